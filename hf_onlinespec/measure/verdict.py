"""What the numbers of a trial say: whether ours pays, how sure that is, and what to write into one's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .budget import LEAST_PROMPTS
from .records import PLAIN, Ratio, Record, by_arm, speed_ratio, totals
from .trial import DRAFT, OURS, static_arguments

CAUSAL = "AutoModelForCausalLM"
LEVEL = 0.9  # of the intervals: paired bootstrap over prompts
MIN_ACCEPTANCE_TO_START = 2000  # prompts: where more would be needed, two ways are called equally fast


@dataclass(frozen=True)
class Verdict:
    """Ours against plain, and against the best other arm of the whole run, chosen in hindsight."""

    prompts: int
    best: str  # of all arms but ours: the one with the most tokens/s
    over_plain: Ratio
    over_best: Ratio

    @property
    def is_decided(self) -> bool:
        """Whether the interval of ours over the best other arm lies on one side of 1."""
        return self.prompts >= LEAST_PROMPTS and self.over_best.is_decided

    @property
    def pays(self) -> bool:
        return self.is_decided and self.over_best.value > 1

    @property
    def more_prompts(self) -> int | None:
        """How many more prompts are likely to decide; None: too many to be worth it."""
        more = self.over_best.more_requests(self.prompts, MIN_ACCEPTANCE_TO_START)
        return None if more is None else max(more, LEAST_PROMPTS - self.prompts)

    def text(self, prompt_s: float = 0.0) -> str:
        """The verdict in words.

        Args:
            prompt_s: mean time that one prompt took; 0: not known.
        """
        best = "plain generation" if self.best == PLAIN else f"the best other way in hindsight, {self.best}"
        n = "1 prompt" if self.prompts == 1 else f"{self.prompts} prompts"
        ratio = f"{self.over_best} times as fast as {best}"
        if self.best != PLAIN:
            ratio += f", and {self.over_plain} times as fast as plain generation"
        ratio += f", learning included (90 % intervals over {n})"
        if self.pays:
            return f"It pays: ours is {ratio}."
        if self.is_decided:
            return f"It does not pay here: ours is {ratio}."
        words = f"Not decided: ours is {ratio}."
        if self.prompts < LEAST_PROMPTS:
            return f"{words} Fewer than {LEAST_PROMPTS} prompts decide nothing: give more."
        more = self.more_prompts
        if more is None:
            return f"{words} The interval contains 1, and more prompts would hardly change that: take the two for equally fast."
        words += f" The interval contains 1: it takes about {more} more prompt{'s' * (more > 1)} to tell"
        return f"{words} (about {max(1, round(more * prompt_s / 60))} min more)." if prompt_s else f"{words}."


def judge(records: Sequence[Record]) -> Verdict:
    """The verdict on the finished prompts of a trial, one at least."""
    arms = by_arm(records)
    speeds = {arm: totals(own).tokens_per_s for arm, own in arms.items() if arm != OURS}
    best = max(speeds, key=lambda arm: speeds[arm])
    over_plain, over_best = (speed_ratio(arms[OURS], arms[other], level=LEVEL) for other in (PLAIN, best))
    return Verdict(len(arms[OURS]), best, over_plain, over_best)


@dataclass(frozen=True)
class Models:
    """What was tried, by the names that load it."""

    target: str
    draft: str | None  # a model or a draft head; None: the suffix memory drafted
    dtype: str  # as Python writes it, such as "torch.bfloat16"
    device: str
    is_chat: bool  # whether the tokenizer has a chat template
    saved: str | None = None  # where the draft is kept with what it learned; None: nowhere
    loads: str = CAUSAL  # the class of transformers' that loads the target
    draft_loads: str = CAUSAL
    is_head: bool = False  # whether the draft is a draft head, which is loaded for its target


def code_for(verdict: Verdict, models: Models) -> str:
    """Python that does what the verdict recommends: ours, unless another way is faster."""
    ours = verdict.pays or not verdict.is_decided
    place = "" if models.device == "cpu" else f".to({models.device!r})"
    load = f"{{}}.from_pretrained({{!r}}, dtype={models.dtype}){place}"
    classes = {models.loads, "AutoTokenizer"}
    lines = [
        f"tokenizer = AutoTokenizer.from_pretrained({models.target!r})",
        f"model = {load.format(models.loads, models.target)}",
    ]
    arguments = dict(static_arguments(verdict.best)) if not ours else {}
    attached = "model" if models.draft is None else "model, draft"
    if models.is_head:
        attached = f"model, {(models.saved or models.draft)!r}"
    elif ours and models.saved is not None:
        lines.append(f"draft = hf_onlinespec.OnlineDraft.from_pretrained({models.saved!r})")
    elif models.draft is not None and (ours or verdict.best.startswith(DRAFT)):
        lines.append(f"draft = {load.format(models.draft_loads, models.draft)}")
        classes.add(models.draft_loads)
        if not ours:
            lines += [f"draft.generation_config.{name} = {value!r}" for name, value in arguments.items()]
            arguments = {"assistant_model": "draft"}
    if ours:
        lines.append(
            f"hf_onlinespec.attach({attached})  # from here on every model.generate(...) speculates and learns"
        )
    message = 'tokenizer("Hello", return_tensors="pt")'
    if models.is_chat:
        message = (
            'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
            'return_dict=True, return_tensors="pt"\n)'
        )
    given = "".join(f", {name}={value}" for name, value in arguments.items())
    begin = ', inputs["input_ids"].shape[1] :'
    if models.loads != CAUSAL:  # many encoder–decoders are saved with a search of several beams, which runs plain
        begin, given = "", f", num_beams=1{given}"
    lines += [
        "",
        f"inputs = {message}.to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens=200{given})",
        f"print(tokenizer.decode(output[0{begin}], skip_special_tokens=True))",
    ]
    imports = [
        "import torch",
        *(["import hf_onlinespec"] if ours else []),
        f"from transformers import {', '.join(sorted(classes))}",
    ]
    return "\n".join([*imports, "", *lines]) + "\n"
