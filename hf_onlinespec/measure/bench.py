"""Measuring ways of generating against each other: every request goes through all arms, in a rotating order, before the next.

An arm is what it adds to the arguments of `generate`. The demo, the command `try` and `benchmarks/` share this code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .._compat.generation import generative
from ..commit.base import Draft
from ..commit.memory_draft import online_memory
from ..draft import OnlineDraft
from ..embedded import load_draft
from ..metrics import Counts
from ..runtime.progress import Bar, NoBar
from .inputs import begins
from .records import PLAIN, Prompt, Record

ASSISTANT_TOKENS = (1, 2, 3, 5, 8)  # the numbers that transformers' arm may choose from
WARM_UPS = 2  # unmeasured prompts through every arm
TIE_GAP = 1e-4  # two logits closer than this may swap places between kernels

Arm = Mapping[str, Any]
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What one arm gave to one request, and what that took; the fields are those of `Record`."""

    output: Tensor  # (1, L) prompt and new tokens
    new_tokens: int
    target_forwards: int
    wall_time_s: float
    update_time_s: float
    loop_time_s: float
    target_forward_s: float
    draft_forward_s: float

    def record(self, request: int, segment: int, domain: str, arm: str, output: str | None, seed: int) -> Record:
        return Record(
            request=request,
            segment=segment,
            domain=domain,
            arm=arm,
            new_tokens=self.new_tokens,
            target_forwards=self.target_forwards,
            wall_time_s=self.wall_time_s,
            update_time_s=self.update_time_s,
            output=output,
            seed=seed,
            loop_time_s=self.loop_time_s,
            target_forward_s=self.target_forward_s,
            draft_forward_s=self.draft_forward_s,
        )


@dataclass(frozen=True)
class Calibration:
    """How transformers' arm got its number of assistant tokens."""

    prompts: int
    tokens_per_s: dict[int, float]  # by number of assistant tokens
    chosen: int
    source: str = "outside the stream"

    def __str__(self) -> str:
        speeds = ", ".join(f"{k}: {speed:.{int(speed < 10)}f}" for k, speed in self.tokens_per_s.items())
        return (
            f"Calibration of transformers' assisted generation on {self.prompts} prompt{'s' * (self.prompts > 1)} {self.source}, "
            f"tokens/s by number of assistant tokens: {speeds}. Chosen: {self.chosen}."
        )


class ForwardClock:
    """Counts the forwards of a module and the time inside them."""

    def __init__(self) -> None:
        self.calls, self.time_s, self._started = 0, 0.0, 0.0

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def reset(self) -> None:
        self.calls, self.time_s = 0, 0.0

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.time_s += time.perf_counter() - self._started
        self.calls += 1


class Runner:
    """A target and its tokenizer, ready to be sent requests.

    Args:
        temperature: 0: greedy.
        seed: goes into the records, and with the number of the request into the sampling.
        encode: text to the inputs of the target; None: the tokenizer as it is.
        clock: seconds.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
        seed: int,
        encode: Callable[[str], BatchEncoding] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target, self._tokenizer, self._seed = target, tokenizer, seed
        self._text_to_inputs, self._clock = encode, clock
        self._sample = temperature > 0
        self._options: dict[str, Any] = {"do_sample": self._sample, "num_beams": 1}  # whatever was saved with the model
        if self._sample:
            self._options |= {"temperature": temperature, "top_k": 0}
        self._target_clock, self._draft_clock = ForwardClock(), ForwardClock()
        self._target_clock.watch(target)

    def watch_draft(self, arm: Arm) -> None:
        """Takes the time of the draft's bare forwards too, of an arm that does not learn."""
        draft = arm["assistant_model"]
        if isinstance(draft, OnlineDraft):
            with draft.trainable.serving() as model:
                self._draft_clock.watch(model)
        else:
            self._draft_clock.watch(draft)

    def warm_up(self, prompts: Sequence[Prompt], arms: Mapping[str, Arm], bar: Bar | None = None) -> None:
        """Sends a few requests through arms that are thrown away; `bar` is told of each."""
        bar = NoBar() if bar is None else bar
        for prompt in prompts[:WARM_UPS]:
            for arm in arms.values():
                self._generate(self.encode(prompt), prompt.new_tokens, arm, 0)
                bar.update()

    def speeds(self, prompts: Sequence[Prompt], arms: Mapping[K, Arm], bar: Bar | None = None) -> dict[K, float]:
        """Net tokens/s of each arm; `bar` is told of each call."""
        bar = NoBar() if bar is None else bar
        sums = {name: Counts() for name in arms}
        for at, prompt in enumerate(prompts):
            inputs = self.encode(prompt)
            for name in rotated(tuple(arms), at):
                output, wall_time_s = self._generate(inputs, prompt.new_tokens, arms[name], at)
                sums[name].add(Counts(new_tokens=self._new_tokens(inputs, output), wall_time_s=wall_time_s))
                bar.update()
        return {name: counts.tokens_per_s for name, counts in sums.items()}

    def measure(self, number: int, segment: int, prompt: Prompt, arms: Mapping[str, Arm]) -> list[Record]:
        """Sends one request through all arms; the records in the order of the arms."""
        answers = dict(self.answers(number, prompt, arms))
        compared = PLAIN in arms and not self._sample
        records = []
        for name in arms:
            same = self.compare(answers[PLAIN].output, answers[name].output) if compared and name != PLAIN else None
            records.append(answers[name].record(number, segment, prompt.domain, name, same, self._seed))
        return records

    def answers(self, number: int, prompt: Prompt, arms: Mapping[str, Arm]) -> Iterator[tuple[str, Answer]]:
        """Sends one request through all arms, in an order rotated by its number: each arm's answer as it comes."""
        inputs = self.encode(prompt)
        for name in rotated(tuple(arms), number):
            self._target_clock.reset()
            self._draft_clock.reset()
            output, wall_time_s = self._generate(inputs, prompt.new_tokens, arms[name], number)
            draft = self._ours(arms[name])
            last = draft.metrics.last if draft is not None else Counts()
            yield (
                name,
                Answer(
                    output=output,
                    new_tokens=self._new_tokens(inputs, output),
                    target_forwards=self._target_clock.calls,
                    wall_time_s=wall_time_s,
                    update_time_s=last.update_time_s,
                    loop_time_s=last.wall_time_s,
                    target_forward_s=self._target_clock.time_s,
                    draft_forward_s=self._draft_clock.time_s,
                ),
            )

    def _ours(self, arm: Arm) -> Draft | None:
        """What drafts in our loop, if the arm goes through it."""
        draft = arm.get("assistant_model")
        if draft is None and arm.get("onlinespec"):
            return online_memory(self._target)
        return draft if isinstance(draft, OnlineDraft) else None

    def compare(self, plain: Tensor, other: Tensor) -> str:
        """Compares (1, L) outputs; "tie": where they part, the target's own logits cannot tell the two tokens apart."""
        if torch.equal(plain, other):
            return "identical"
        shared = min(plain.shape[1], other.shape[1])
        parted = (plain[0, :shared] != other[0, :shared]).nonzero()
        if len(parted) == 0:
            return "different"
        at = int(parted[0])
        with torch.no_grad():
            logits = self._target(plain[:, :at]).logits[0, -1]
        gap = logits.max() - torch.minimum(logits[plain[0, at]], logits[other[0, at]])
        return "tie" if gap < TIE_GAP else "different"

    def encode(self, prompt: Prompt) -> BatchEncoding:
        """The inputs of the target, a batch of one."""
        encode = self._text_to_inputs
        inputs = self._tokenizer(prompt.text, return_tensors="pt") if encode is None else encode(prompt.text)
        return inputs.to(self._target.device)

    def _generate(self, inputs: BatchEncoding, new_tokens: int, arm: Arm, number: int) -> tuple[Tensor, float]:
        torch.manual_seed(1000 * self._seed + number)
        started = self._now()
        output = generative(self._target).generate(**inputs, **self._options, max_new_tokens=new_tokens, **arm)
        return output, self._now() - started

    def _new_tokens(self, inputs: BatchEncoding, output: Tensor) -> int:
        return output.shape[1] - begins(self._target, inputs)

    def _now(self) -> float:
        """Seconds, once all work that was sent to an accelerator is done."""
        if self._target.device.type != "cpu":
            torch.accelerator.synchronize(self._target.device)
        return self._clock()


def stock_draft(assistant_tokens: int, draft: PreTrainedModel | None = None) -> PreTrainedModel:
    """A draft that transformers asks for a fixed number of tokens per round: a copy of the embedded one, or `draft` itself."""
    if draft is None:
        draft = load_draft()
    draft.generation_config.num_assistant_tokens = assistant_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    return draft


def calibrate(
    runner: Runner,
    prompts: Sequence[Prompt],
    draft: Callable[[int], PreTrainedModel],
    choices: Sequence[int],
    source: str = "outside the stream",
    bar: Bar | None = None,
) -> Calibration:
    """Finds the number of assistant tokens with the most tokens per second; the numbers take turns."""
    speeds = runner.speeds(prompts, {k: {"assistant_model": draft(k)} for k in choices}, bar)
    return Calibration(len(prompts), speeds, best(speeds), source)


def best(speeds: Mapping[K, float]) -> K:
    return max(speeds, key=lambda name: speeds[name])


def rotated(items: tuple[T, ...], by: int) -> tuple[T, ...]:
    by %= len(items)
    return items[by:] + items[:by]


# What the records say


# The user's own prompts
