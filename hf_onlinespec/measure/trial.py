"""A trial: the same prompts through plain generation, transformers' best static ways and ours, in turns, in one process.

    plain              generate(...)
    prompt lookup N    generate(..., prompt_lookup_num_tokens=N), transformers' own, which needs no draft
    draft K            generate(..., assistant_model=draft), transformers' own, K drafted tokens a round: the best K of a calibration
    ours               generate(..., onlinespec=True), with the draft where there is one; it begins with nothing learned,
                       unless the draft is a saved one

Each prompt goes through all of them before the next one starts, in an order that rotates. What ours spends on learning is in
its time. Drafts and memories of the warm-up are thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..commit.base import Draft
from ..commit.memory_draft import online_memory
from ..draft import OnlineDraft
from ..errors import UnsupportedError
from ..models.borrow import borrow
from ..runtime.failures import is_out_of_memory
from .bench import Arm, Calibration, Runner, calibrate, stock_draft
from .budget import LEAST_PROMPTS, Budget
from .exactness import IDENTICAL, Difference, Examiner
from .records import PLAIN, Prompt, Record, by_arm, totals
from .shipped import encoder

OURS, LOOKUP, DRAFT = "ours", "prompt lookup", "draft"  # names of arms; the latter two are followed by their number
LOOKUP_TOKENS = (3, 10)  # of prompt lookup: a cautious setting, and the one that transformers' documentation shows
DRAFT_TOKENS = (1, 2, 3, 5, 8)  # that the draft's fixed number is chosen from
WARM_UP_TOKENS = 24  # new tokens of prompts that are not measured
SPARE = 4  # prompts set aside: one warms up, one tells the pace, all but the first choose the draft's number


@dataclass(frozen=True)
class Examined:
    """Where the output of one arm left plain's, for one request."""

    request: int
    kind_of_prompt: str
    arm: str
    difference: Difference


@dataclass(frozen=True)
class Learned:
    """What ours learned during the trial, and what that cost."""

    steps: int  # gradient steps on the adapter; 0: there is no draft model, or it did not learn
    learning_time_s: float
    learning_share: float  # of the time of ours
    memory_bytes: int  # of the suffix memory
    learning_bytes: int  # of adapter, optimizer and replay; 0: no draft model
    drafting: str  # what is drafted by the end, and why, in words
    learning: str  # the same of learning


@dataclass
class Outcome:
    """What is known of a trial, also while it runs."""

    new_tokens: int = 0  # at most, per prompt
    records: list[Record] = field(default_factory=list)  # of finished prompts, in the order of the arms
    examined: list[Examined] = field(default_factory=list)  # outputs that differ from plain's
    calibration: Calibration | None = None  # of the draft's fixed number
    notes: list[str] = field(default_factory=list)  # what the reader has to know about how it was measured
    prompt_s: float = 0.0  # mean time of a prompt in all arms, examination included

    @property
    def prompts(self) -> int:
        """Finished ones."""
        return len({record.request for record in self.records})


class Trial:
    """Runs a trial; `outcome` grows prompt by prompt.

    Args:
        draft: a smaller model with the same tokenizer; None: what `make` makes drafts, or else the suffix memory.
        make: makes what drafts in ours, each time from the same beginning: of `draft`, or of a draft head, which transformers
            cannot run, where that is None; None: a new `OnlineDraft` of `draft`.
        prompts: to be measured, in their order; `new_tokens` of each is chosen by the budget unless `new_tokens` is given.
        spare: `SPARE` prompts for warm-up and calibration.
        examiner: classifies outputs that differ from plain's.
        new_tokens: per prompt; None: as many as let enough prompts fit.
        temperature: 0: greedy. Sampled outputs are not compared.
        clock: seconds.
        show: called whenever something was begun or finished, with a word for it ("": one answer) and what is known.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        draft: PreTrainedModel | None,
        prompts: Sequence[Prompt],
        spare: Sequence[Prompt],
        budget: Budget,
        examiner: Examiner,
        make: Callable[[], OnlineDraft] | None = None,
        new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        show: Callable[[str, Outcome], None] = lambda phase, outcome: None,
    ) -> None:
        self._target, self._draft, self._make = target, draft, make
        self._prompts, self._spare = list(prompts), list(spare)
        self._budget, self._examiner, self._show = budget, examiner, show
        self._new_tokens, self._seed, self._is_greedy = new_tokens, seed, temperature == 0
        self._runner = Runner(target, tokenizer, temperature, seed, encoder(tokenizer), clock)
        self._arms: dict[str, Arm] = {}
        self._failing: set[str] = set()  # arms of transformers' that raise with these models
        self.outcome = Outcome()

    def prepare(self) -> None:
        """Warms up, chooses the draft's fixed number and the length of the answers, and begins with nothing learned."""
        spare = [prompt._replace(new_tokens=WARM_UP_TOKENS) for prompt in self._spare]
        self._show("warming up", self.outcome)
        self._warm_up(spare[:1])
        chosen = DRAFT_TOKENS[0]
        if self._has_static_draft:
            self._show("calibrating the draft", self.outcome)
            assert self._draft is not None
            draft = self._draft
            self.outcome.calibration = calibrate(
                self._runner, spare[1:], lambda k: stock_draft(k, borrow(draft)), DRAFT_TOKENS, "that are not measured"
            )
            chosen = self.outcome.calibration.chosen
        elif self._draft is not None and not any(name.startswith(DRAFT) for name in self._failing):
            self.outcome.notes.append(
                "The draft's vocabulary has another size than the target's: transformers' assisted generation does not take "
                "it, and was not measured."
            )
        speeds = self._runner.speeds(spare[1:2], self._new_arms(chosen))
        token_s = sum(1 / speed for speed in speeds.values() if speed)
        if self._new_tokens is None:
            self._new_tokens = self._budget.new_tokens(token_s)
        self.outcome.new_tokens = self._new_tokens
        self._arms = self._new_arms(chosen)

    def _warm_up(self, prompts: Sequence[Prompt]) -> None:
        """Sends prompts through every arm; one of transformers' that fails with these models is left out of the trial."""
        for name, arm in self._new_arms(DRAFT_TOKENS[0]).items():
            try:
                self._runner.warm_up(prompts, {name: arm})
            except Exception as error:
                if name == OURS or is_out_of_memory(error):
                    raise
                why = f"{type(error).__name__}: {error}".partition("\n")[0]
                if name == PLAIN:
                    raise UnsupportedError(f"Plain generate fails with this target ({why}).") from error
                self._failing.add(name)
                self.outcome.notes.append(f"Transformers' {name} fails with these models and was not measured ({why}).")

    def run(self) -> None:
        """Measures as many prompts as fit into the budget."""
        self._budget.begin()
        for number, prompt in enumerate(self._prompts):
            if not self._budget.has_room():
                break
            self._measure(number, prompt._replace(new_tokens=self.outcome.new_tokens))
            self._budget.finish_prompt()
            self.outcome.prompt_s = self._budget.prompt_s
            self._show(f"prompt {number + 1}", self.outcome)
        if self._budget.is_exceeded and self.outcome.prompts <= LEAST_PROMPTS:
            self.outcome.notes.append(
                f"{self.outcome.prompts} prompts, the fewest that are measured, took {self._budget.elapsed_s / 60:.1f} minutes with "
                f"loading: longer than the {self._budget.total_s / 60:g} asked for."
            )

    def _measure(self, number: int, prompt: Prompt) -> None:
        answers = {}
        for name, answer in self._runner.answers(number, prompt, self._arms):
            answers[name] = answer
            self._show("", self.outcome)
        outputs = {name: answer.output for name, answer in answers.items()}
        differences = self._differences(prompt, outputs) if self._is_greedy else None
        records, examined = [], []
        for name in self._arms:
            kind = None
            if differences is not None and name != PLAIN:
                difference = differences[name]
                kind = IDENTICAL if difference is None else difference.kind
                if difference is not None:
                    examined.append(Examined(number, prompt.domain, name, difference))
            records.append(answers[name].record(number, 1, prompt.domain, name, kind, self._seed))
        self.outcome.records += records
        self.outcome.examined += examined

    def _differences(self, prompt: Prompt, outputs: Mapping[str, Tensor]) -> dict[str, Difference | None]:
        others = {name: output for name, output in outputs.items() if name != PLAIN}
        return self._examiner.differences(self._runner.encode(prompt), outputs[PLAIN], others)

    @property
    def _has_static_draft(self) -> bool:
        if self._draft is None or f"{DRAFT} {DRAFT_TOKENS[0]}" in self._failing:
            return False
        own, other = (m.config.get_text_config().vocab_size for m in (self._target, self._draft))
        return bool(own == other)

    def _new_arms(self, draft_tokens: int) -> dict[str, Arm]:
        """The arms, with nothing learned."""
        arms: dict[str, Arm] = {PLAIN: {}}
        lookups = {f"{LOOKUP} {n}": {"prompt_lookup_num_tokens": n} for n in LOOKUP_TOKENS}
        arms |= {name: arm for name, arm in lookups.items() if name not in self._failing}
        if self._has_static_draft:
            assert self._draft is not None
            static = stock_draft(draft_tokens, borrow(self._draft))
            arms[f"{DRAFT} {draft_tokens}"] = {"assistant_model": static}
        if self._make is not None:
            return arms | {OURS: {"assistant_model": self._make()}}
        if self._draft is not None:
            return arms | {OURS: {"assistant_model": OnlineDraft(self._draft)}}
        online_memory(self._target, anew=True)
        return arms | {OURS: {"onlinespec": True}}

    @property
    def ours(self) -> Draft:
        """What drafts in ours: an `OnlineDraft`, or the memory that is kept with the target."""
        draft: Draft | None = self._arms.get(OURS, {}).get("assistant_model")
        return online_memory(self._target) if draft is None else draft

    @property
    def learned(self) -> Learned:
        """What ours learned so far."""
        ours, total = self.ours, totals(by_arm(self.outcome.records).get(OURS, []))
        metrics = ours.metrics
        return Learned(
            steps=metrics.updates,
            learning_time_s=total.update_time_s,
            learning_share=total.update_share,
            memory_bytes=metrics.memory_bytes,
            learning_bytes=ours.learning_bytes if isinstance(ours, OnlineDraft) else 0,
            drafting=metrics.decisions.drafting,
            learning=metrics.decisions.learning,
        )


def static_arguments(arm: str) -> dict[str, Any]:
    """What a static arm sets, by its name: arguments of `generate`, or for the draft its generation_config's."""
    kind, _, number = arm.rpartition(" ")
    if kind == LOOKUP:
        return {"prompt_lookup_num_tokens": int(number)}
    if kind != DRAFT:
        return {}
    return {
        "num_assistant_tokens": int(number),
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0,
    }
