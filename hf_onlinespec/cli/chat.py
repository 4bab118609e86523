"""`hf-onlinespec chat`: a conversation with a model that speculates and learns.

`Chat` is the conversation and knows no terminal. It keeps the target's KV cache from turn to turn: of a new prompt only what
differs from the tokens in the cache is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .._compat.caches import CACHE, crop, forgets, held_tokens, rollback_obstacle, rolls_back
from .._compat.generation import generative
from .._compat.models import max_positions
from .._compat.tokenizers import chat_inputs
from ..commit.base import Draft
from ..draft import OnlineDraft
from ..errors import ConfigError
from ..metrics import Counts
from ..verify.streaming import OriginStreamer

PLAIN_TOKENS = 16  # of a measurement of plain generation; chosen: a second or less, and steady to a few percent
PLAIN_SHARE = 0.03  # of the time of all answers, that measuring may take after the first one; chosen
UNFINISHED = "\ufffd"  # what a tokenizer writes for a character whose bytes are not all there

Show = Callable[[str, bool], None]  # a piece of text, and whether it was drafted


@dataclass(frozen=True)
class Answer:
    """What was said in one turn, and how fast."""

    text: str
    new_tokens: int
    reused_tokens: int  # of the conversation, found in the KV cache
    wall_time_s: float  # of the whole call
    tokens_per_s: float  # once the prompt was read, learning included
    counts: Counts | None  # of the decoding loop; None: decoded plainly
    interrupted: bool


@dataclass
class PlainSpeed:
    """Plain generation's speed, as last measured, and what measuring has cost."""

    tokens_per_s: float | None = None
    measurements: int = 0
    time_s: float = 0.0


class Detokenizer:
    """Text as it grows token by token: every token gives the text that it completes, "" inside of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start, self._said = 0, 0  # text is decoded from _start on; up to _said it was given away

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decode(self._tokens[self._start :])
        if text.endswith(UNFINISHED):
            return ""
        return self._give(text)

    def end(self) -> str:
        """What is left of an unfinished character."""
        return self._give(self._decode(self._tokens[self._start :]))

    def _give(self, text: str) -> str:
        before = self._decode(self._tokens[self._start : self._said])
        self._start, self._said = self._said, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class _Teller(OriginStreamer):
    """Shows text as it comes, and notes when the first of it came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show) -> None:
        self._text, self._show = Detokenizer(tokenizer), show
        self._is_prompt = True
        self.first_at, self.first_tokens = 0.0, 0

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.put_round(value.view(-1), 0)

    def put_round(self, tokens: Tensor, accepted: int) -> None:
        if not self.first_at:
            self.first_at, self.first_tokens = time.perf_counter(), len(tokens)
        for at, token in enumerate(tokens.tolist()):
            self._tell(self._text.add(token), at < accepted)

    def end(self) -> None:
        self._tell(self._text.end(), False)

    def _tell(self, text: str, drafted: bool) -> None:
        if text:
            self._show(text, drafted)


class _Stop(StoppingCriteria):
    """Ends an answer between two tokens, so that everything that was kept stays in order."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped
        self.happened = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.happened = self.happened or self._stopped()
        return torch.full((input_ids.shape[0],), self.happened, device=input_ids.device)


class Chat:
    """A conversation with a target.

    Args:
        target: with `drafts` attached to it.
        system: the system message; a model without a chat template begins with it.
        max_new_tokens: of an answer.
        options: of `generate` besides, such as temperature.

    Raises:
        ConfigError: the chat template takes no system message.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafts: Draft,
        system: str | None = None,
        max_new_tokens: int = 512,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.target, self.tokenizer, self.drafts, self.system = target, tokenizer, drafts, system
        self.plain = False  # whether nothing drafts
        self.plain_speed = PlainSpeed()
        self.answers, self.answering_s = 0, 0.0
        self.total = Counts()  # of the answers that were not plain
        self._max_new_tokens = max_new_tokens
        self._options = {"pad_token_id": self._pad(), **(options or {})}
        self.reset()
        try:
            self._render([{"role": "user", "content": "."}])
        except ConfigError as error:
            if system is None:
                raise
            raise ConfigError(f"--system: {error} Perhaps it takes no system message: leave it out.") from error

    def _pad(self) -> int | None:
        config, tokenizer = self.target.generation_config, self.tokenizer
        ids = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        return next((i for i in ids if i is not None), None)

    def reset(self) -> None:
        """Forgets the conversation; what was learned stays."""
        self._messages: list[dict[str, str]] = []  # stays empty without a chat template
        self._sequence = torch.empty(1, 0, dtype=torch.long)  # all tokens of the latest turn, prompt and answer
        self._cache: Cache | None = None
        self._cached = torch.empty(0, dtype=torch.long)  # the tokens whose keys and values are in it
        if self.system is not None and self.tokenizer.chat_template is not None:
            self._messages.append({"role": "system", "content": self.system})

    def answer(self, text: str, show: Show, stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Answers a message, and keeps both.

        Args:
            show: is told the text as it comes.
            stopped: asked between two tokens; where it says so, the answer ends, and what was said stays.

        Raises:
            ConfigError: the conversation has become too long. Nothing of the message is kept then, or after any other error.
        """
        message = {"role": "user", "content": text}
        prompt = self._render([message])  # (1, L)
        room = max_positions(self.target.config) - prompt.shape[1]
        if room < 1:
            raise ConfigError(
                f"The conversation has {prompt.shape[1]} tokens with this message, and the model reads {prompt.shape[1] + room}: "
                "begin anew with /reset."
            )
        cache, reused = self._reusable(prompt[0])
        self._cache = None  # whatever interrupts the call leaves it in no known state
        teller, stop = _Teller(self.tokenizer, show), _Stop(stopped)
        served = self.drafts.metrics.requests
        started = time.perf_counter()
        output = generative(self.target).generate(
            prompt.to(self.target.device),
            attention_mask=torch.ones_like(prompt, device=self.target.device),
            max_new_tokens=min(self._max_new_tokens, room),
            streamer=teller,
            stopping_criteria=StoppingCriteriaList([stop]),
            return_dict_in_generate=True,
            **self._options,
            **({} if cache is None else {CACHE: cache}),
            **({"onlinespec": False} if self.plain else {}),
        )
        ended = time.perf_counter()
        tokens = output.sequences.cpu()
        said = self._decode(tokens[0, prompt.shape[1] :])
        self._keep([message, {"role": "assistant", "content": said}], tokens, output.past_key_values)
        n = tokens.shape[1] - prompt.shape[1]
        later, later_s = n - teller.first_tokens, ended - teller.first_at
        metrics = self.drafts.metrics
        answer = Answer(
            text=said,
            new_tokens=n,
            reused_tokens=reused,
            wall_time_s=ended - started,
            tokens_per_s=later / later_s if later else n / (ended - started),
            counts=metrics.last if metrics.requests > served else None,
            interrupted=stop.happened,
        )
        self._count(answer)
        return answer

    def _count(self, answer: Answer) -> None:
        self.answers += 1
        self.answering_s += answer.wall_time_s
        if answer.counts is not None:
            self.total.add(answer.counts)
        elif answer.new_tokens > PLAIN_TOKENS:
            self.plain_speed.tokens_per_s = answer.tokens_per_s

    def _render(self, more: list[dict[str, str]]) -> Tensor:
        """The tokens (1, L) of the conversation with more messages, as the target is to read them."""
        if self.tokenizer.chat_template is None:
            begins = self._sequence.shape[1] == 0
            text = "".join(message["content"] for message in more)
            if begins and self.system is not None:
                text = self.system + text
            new = self.tokenizer(text, add_special_tokens=begins, return_tensors="pt").input_ids
            return torch.cat([self._sequence, new.view(1, -1).long()], dim=1)
        try:
            rendered = chat_inputs(self.tokenizer, [*self._messages, *more])
        except TemplateError as error:
            raise ConfigError(f"The chat template of this model does not take this conversation ({error}).") from error
        prompt: Tensor = rendered["input_ids"]
        return prompt

    def _decode(self, tokens: Tensor) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _keep(self, messages: list[dict[str, str]], tokens: Tensor, cache: Cache | None) -> None:
        """Notes a turn, with all tokens (1, L) of the conversation."""
        if self.tokenizer.chat_template is not None:
            self._messages += messages
        self._sequence = tokens
        asked_for = self.target.generation_config.cache_implementation  # generate makes that one itself, each time
        self._cache = None if asked_for is not None or rollback_obstacle(cache) else cache
        self._cached = tokens[0, : 0 if self._cache is None else held_tokens(self._cache)]

    def _reusable(self, prompt: Tensor) -> tuple[Cache | None, int]:
        """The cache, rolled back to what it shares with a prompt (L,), and how many tokens these are.

        A template may write earlier turns in another way than they were generated.
        """
        if self._cache is None:
            return None, 0
        longest = min(len(self._cached), len(prompt) - 1)  # one token has to be read
        differs = (self._cached[:longest] != prompt[:longest]).nonzero()
        shared = int(differs[0]) if len(differs) else longest
        return (self._cache, shared) if shared and self._roll_back(len(self._cached) - shared) else (None, 0)

    def _roll_back(self, n: int) -> bool:
        """Takes the last n tokens out of the cache; False: it cannot be done."""
        assert self._cache is not None
        if n and (not rolls_back(self.target.config) or forgets(self._cache, n)):
            return False
        if n:
            crop(self._cache, n)
        return True

    def measure_plain(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Measures plain generation where the conversation stands, unless that would take too large a part of the time.

        It goes on for `PLAIN_TOKENS` tokens, which are thrown away; where `stopped` says so, it ends sooner and tells nothing.
        """
        speed, cache = self.plain_speed, self._cache
        affordable = not speed.measurements or speed.time_s < PLAIN_SHARE * self.answering_s
        if self.plain or cache is None or not affordable or not rolls_back(self.target.config):
            return
        sequence = self._sequence.to(self.target.device)
        if sequence.shape[1] + PLAIN_TOKENS > max_positions(self.target.config):
            return
        self._cache, stop = None, _Stop(stopped)
        started = time.perf_counter()
        output = generative(self.target).generate(
            sequence,
            stopping_criteria=StoppingCriteriaList([stop]),
            attention_mask=torch.ones_like(sequence),
            **{CACHE: cache},
            return_dict_in_generate=True,
            onlinespec=False,
            **self._options | {"do_sample": False, "max_new_tokens": PLAIN_TOKENS, "min_new_tokens": PLAIN_TOKENS},
        )
        elapsed_s = time.perf_counter() - started
        speed.time_s += elapsed_s
        if not stop.happened:
            speed.tokens_per_s = PLAIN_TOKENS / elapsed_s
            speed.measurements += 1
        self._cache = output.past_key_values
        if not self._roll_back(held_tokens(output.past_key_values) - len(self._cached)):
            self._cache = None

    def save(self, folder: Path) -> str:
        """Saves the evolved draft; what was done, in words. Raises ArtifactError."""
        if not isinstance(self.drafts, OnlineDraft):
            return "Nothing to save: without --draft the suffix memory drafts, which holds your text and is never written down."
        self.drafts.save_pretrained(folder)
        return f"Saved: {folder}. Go on with --draft {folder}."

    def status(self, answer: Answer) -> str:
        """An answer's numbers in one line."""
        parts = [f"{answer.new_tokens} tokens", f"{answer.tokens_per_s:.1f} tokens/s"]
        if answer.counts is None:
            parts[1] += " (plain generation)"
        else:
            if self.plain_speed.tokens_per_s is not None:
                parts[1] += f" (plain {self.plain_speed.tokens_per_s:.1f})"
            parts.append(f"{answer.counts.acceptance_length:.2f} tokens per target forward")
            parts.append(f"learning {answer.counts.update_share:.0%} of the time")
        return " · ".join(parts) + (" · stopped" if answer.interrupted else "")

    def stats(self) -> list[str]:
        """Everything since the start, line by line."""
        total, speed = self.total, self.plain_speed
        lines = [f"answers: {self.answers}, in {self.answering_s:.1f} s"]
        if total.requests:
            lines += [
                f"with drafting: {total.new_tokens} tokens, {total.tokens_per_s:.1f} tokens/s with reading the prompts, "
                f"{total.decode_tokens_per_s:.1f} without learning",
                f"tokens per target forward: {total.acceptance_length:.2f}; drafted tokens accepted: "
                f"{total.accepted_tokens} of {total.drafted_tokens}",
                f"learning: {total.updates} steps, {total.update_share:.1%} of the time",
            ]
        if speed.tokens_per_s is not None:
            lines.append(
                f"plain generation: {speed.tokens_per_s:.1f} tokens/s; measuring that took {speed.time_s:.1f} s beside the answers"
            )
        decisions = self.drafts.metrics.decisions
        return [*lines, f"drafting: {decisions.drafting}", f"learning: {decisions.learning}"]
