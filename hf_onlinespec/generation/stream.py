"""`generate_stream`: prompts in, answers out, for as many of them as there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat.caches import CACHE
from .._compat.models import inner_model
from ..errors import ConfigError, UnsupportedError, require_whole
from ..runtime.progress import Bar, NoBar
from ..runtime.progress import progress as progress_bar
from .answers import Answer
from .batches import Batches
from .drafting import drafting_of
from .prompt_calls import PromptCalls
from .prompts import PromptReader

# Arguments of `generate` that belong to one call, or ask for more than tokens.
OF_ONE_CALL = (
    *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "streamer", "custom_generate", CACHE),
    *("past_key_values", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "prefix_allowed_tokens_fn", "synced_gpus", "decoder_input_ids", "decoder_attention_mask"),
    *("encoder_outputs", "decoder_position_ids"),
)


def generate_stream(
    target: PreTrainedModel | PeftModel,
    prompts: Iterable[Any],
    batch_size: int = 8,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ordered: bool = True,
    progress: bool = False,
    **generate_kwargs: Any,
) -> Iterator[Answer]:
    """Answers prompts as they come from an iterator, `batch_size` at a time, with a bounded number of them in memory.

    What drafts is said as in `generate`: `assistant_model=`, `onlinespec=`, or what is attached to the target; learning goes on from
    prompt to prompt. A prompt that fails is an answer with an `error`, and costs no other one. Rows that end make room for the next
    prompts; at most 16 batches of prompts are read ahead, and two at first.

    What an interruption (Ctrl-C) or an error of `prompts` itself finds finished is handed out before it is raised.

    Args:
        target: a model, also inside of a `PeftModel`.
        prompts: each a text, messages of a chat, or the token ids of one sequence; or a dict with one of them as `prompt`, `messages`
            or `input_ids` (with its `attention_mask`), and whatever else shall come back with the answer.
        batch_size: prompts that are answered at a time.
        tokenizer: reads texts and writes those of answers; None: prompts are token ids.
        ordered: whether answers come in the order of the prompts; False: as they are finished.
        progress: whether a progress bar is shown.
        generate_kwargs: further arguments of `generate`, the same for all prompts.

    Raises:
        ConfigError: an argument cannot work. Whatever `generate` raises at any prompt is raised, too.

    Example:
        >>> for answer in hf_onlinespec.generate_stream(                       # doctest: +SKIP
        ...     target, open("prompts.txt"), tokenizer=tokenizer, assistant_model=draft, onlinespec=True, max_new_tokens=64
        ... ):
        ...     print(answer.index, answer.text if answer.error is None else answer.error)
    """
    require_whole("batch_size", batch_size)
    refused = sorted(name for name in OF_ONE_CALL if generate_kwargs.get(name) is not None)
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: belongs to one call of generate, and a stream makes many. Leave it out."
        )
    if (generate_kwargs.get("num_return_sequences") or 1) > 1:
        raise ConfigError("num_return_sequences: a prompt has one answer. Repeat the prompt instead.")
    if isinstance(generate_kwargs.get("adapter"), list | tuple):
        raise ConfigError("adapter: a stream has one for all prompts. Name it, or make a stream for each.")
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts is a {type(prompts).__name__}: expected a list or an iterator of prompts.")
    inner = inner_model(target) if isinstance(target, nn.Module) else target
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedError(f"target is a {type(target).__name__}: expected a loaded transformers model.")
    if inner.config.is_encoder_decoder and inner.main_input_name != "input_ids":
        raise UnsupportedError(
            f"The target {type(inner).__name__} reads {inner.main_input_name}: a stream has prompts of text. Call generate, or the "
            "pipeline of its task with attach(target)."
        )
    reader = PromptReader(inner, tokenizer)
    calls = PromptCalls(target, tokenizer, generate_kwargs)
    batches = Batches(calls, lambda: drafting_of(inner, generate_kwargs | {"tokenizer": tokenizer}), batch_size)
    return _counted(_Stream(prompts, reader, batches, ordered), prompts, progress)


def _counted(stream: _Stream, prompts: Iterable[Any], shows: bool) -> Iterator[Answer]:
    """The answers, with a bar over them."""
    if not shows:
        yield from stream.answers(NoBar())
        return
    total = len(prompts) if isinstance(prompts, Sized) else None
    with progress_bar(total, "Answers", "prompt") as bar:
        yield from stream.answers(bar)


class _Stream:
    """From prompts to answers."""

    def __init__(self, prompts: Iterable[Any], reader: PromptReader, batches: Batches, ordered: bool) -> None:
        self._prompts, self._reader, self._batches, self._ordered = enumerate(prompts), reader, batches, ordered
        self._finished: dict[int, Answer] = {}  # by index, not handed out yet
        self._next = 0  # the index that is handed out next, where they are ordered
        self._exhausted = False
        self._broken: BaseException | None = None  # what ended the prompts early

    def answers(self, bar: Bar) -> Iterator[Answer]:
        try:
            while not (self._exhausted and self._batches.idle):
                try:
                    self._fill()
                    if not self._batches.idle:
                        self._take(self._batches.step())
                except KeyboardInterrupt as interrupt:
                    self._broken = interrupt
                    break
                for answer in self._due():
                    bar.update()
                    yield answer
        finally:
            self._batches.close()
        for index in sorted(self._finished):  # where it was interrupted, some before them are missing
            bar.update()
            yield self._finished.pop(index)
        if self._broken is not None:
            raise self._broken

    def _fill(self) -> None:
        while not self._exhausted and self._batches.room > len(self._finished):
            try:
                index, prompt = next(self._prompts)
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:  # the caller's own: it is raised when what was read before is answered
                self._exhausted, self._broken = True, error
                return
            try:
                self._batches.add(self._reader.read(index, prompt))
            except Exception as error:  # a tokenizer and a chat template may raise anything
                self._take([Answer(index, prompt, error=error)])

    def _take(self, answers: list[Answer]) -> None:
        self._finished |= {answer.index: answer for answer in answers}

    def _due(self) -> Iterator[Answer]:
        """What is finished, as far as the order allows."""
        if not self._ordered:
            for index in sorted(self._finished):
                yield self._finished.pop(index)
        while self._next in self._finished:
            yield self._finished.pop(self._next)
            self._next += 1
