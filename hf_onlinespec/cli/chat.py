"""`hf-onlinespec chat`: a conversation with a model that speculates and learns. `Chat` knows no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from .._compat.caches import CACHE, rolls_back
from .._compat.generation import generative
from .._compat.models import max_positions
from ..commit.base import Draft
from ..draft import OnlineDraft
from ..errors import ConfigError
from ..metrics import Counts
from .conversation import Conversation, KeptCache
from .streaming import Show, StopWhen, Teller

PLAIN_TOKENS = 16  # of a measurement of plain generation; chosen: a second or less, and steady to a few percent
PLAIN_SHARE = 0.03  # of the time of all answers, that measuring may take after the first one; chosen


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
        self.target, self.tokenizer, self.drafts = target, tokenizer, drafts
        self.conversation, self.kept = Conversation(tokenizer, system), KeptCache(target)
        self.plain = False  # whether nothing drafts
        self.plain_speed = PlainSpeed()
        self.answers, self.answering_s = 0, 0.0
        self.total = Counts()  # of the answers that were not plain
        self._max_new_tokens = max_new_tokens
        self._options = {"pad_token_id": self._pad(), **(options or {})}
        try:
            self.conversation.render([{"role": "user", "content": "."}])
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
        self.conversation.reset()
        self.kept.drop()

    def answer(self, text: str, show: Show, stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Answers a message, and keeps both.

        Args:
            show: is told the text as it comes.
            stopped: asked between two tokens; where it says so, the answer ends, and what was said stays.

        Raises:
            ConfigError: the conversation has become too long. Nothing of the message is kept then, or after any other error.
        """
        message = {"role": "user", "content": text}
        prompt = self.conversation.render([message])  # (1, L)
        room = max_positions(self.target.config) - prompt.shape[1]
        if room < 1:
            raise ConfigError(
                f"The conversation has {prompt.shape[1]} tokens with this message, and the model reads {prompt.shape[1] + room}: "
                "begin anew with /reset."
            )
        cache, reused = self.kept.take(prompt[0])
        teller, stop = Teller(self.tokenizer, show), StopWhen(stopped)
        served = self.drafts.metrics.requests
        started = time.perf_counter()
        options = {"max_new_tokens": min(self._max_new_tokens, room), "streamer": teller, **self._options}
        output = self._generate(prompt, cache, stop, options | ({"onlinespec": False} if self.plain else {}))
        ended = time.perf_counter()
        tokens = output.sequences.cpu()
        said = self._decode(tokens[0, prompt.shape[1] :])
        self.conversation.keep([message, {"role": "assistant", "content": said}], tokens)
        self.kept.keep(tokens, output.past_key_values)
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

    def _generate(self, prompt: Tensor, cache: Cache | None, stop: StopWhen, options: Mapping[str, Any]) -> Any:
        """`generate` of the target: its output with sequences and cache."""
        return generative(self.target).generate(
            prompt.to(self.target.device),
            attention_mask=torch.ones_like(prompt, device=self.target.device),
            stopping_criteria=StoppingCriteriaList([stop]),
            return_dict_in_generate=True,
            **options,
            **({} if cache is None else {CACHE: cache}),
        )

    def _count(self, answer: Answer) -> None:
        self.answers += 1
        self.answering_s += answer.wall_time_s
        if answer.counts is not None:
            self.total.add(answer.counts)
        elif answer.new_tokens > PLAIN_TOKENS:
            self.plain_speed.tokens_per_s = answer.tokens_per_s

    def _decode(self, tokens: Tensor) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def measure_plain(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Measures plain generation where the conversation stands, unless that would take too large a part of the time.

        It goes on for `PLAIN_TOKENS` tokens, which are thrown away; where `stopped` says so, it ends sooner and tells nothing.
        """
        speed, cache, cached = self.plain_speed, self.kept.cache, self.kept.tokens
        affordable = not speed.measurements or speed.time_s < PLAIN_SHARE * self.answering_s
        if self.plain or cache is None or not affordable or not rolls_back(self.target.config):
            return
        sequence = self.conversation.sequence
        if sequence.shape[1] + PLAIN_TOKENS > max_positions(self.target.config):
            return
        stop = StopWhen(stopped)
        self.kept.drop()
        lengths = {"max_new_tokens": PLAIN_TOKENS, "min_new_tokens": PLAIN_TOKENS}
        started = time.perf_counter()
        options = self._options | {"onlinespec": False, "do_sample": False, **lengths}
        output = self._generate(sequence, cache, stop, options)
        elapsed_s = time.perf_counter() - started
        speed.time_s += elapsed_s
        if not stop.happened:
            speed.tokens_per_s = PLAIN_TOKENS / elapsed_s
            speed.measurements += 1
        self.kept.give_back(output.past_key_values, cached)

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
