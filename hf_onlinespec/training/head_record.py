"""What is known of a head's training: its record, for machines, and its model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import ModelCardData

CARD = """---
{metadata}
---

# {title}

An EAGLE-3 draft head ([arXiv:2503.01840](https://arxiv.org/abs/2503.01840)) for {target}, trained by `hf-onlinespec head`. The target
verifies every token that it drafts, so it makes generation faster and leaves the text to the target.

| | |
|---|---|
| target | {target} |
| hidden states that it reads | {reads} (indices of `hidden_states`) |
| draft vocabulary | {draft_vocab_size} of {vocab_size} tokens; {known} of the tokens of held-out answers |
| parameters | {parameters} |
| trained on | {answers} answers of the target, {tokens} tokens, {epochs} times |

Acceptance length, tokens per forward of the target with greedy drafts of {chain} tokens from the head alone, on greedy answers that it was not
trained on:

| kind of prompt | answers | acceptance length |
|---|---|---|
{measured}

All settings and the curve over training tokens, for machines: `training.json`.

```python
model.generate(**inputs, assistant_model=OnlineDraft.from_pretrained("{name}", target=model))
```
"""


@dataclass(frozen=True)
class TrainingRecord:
    """How a head came about, and what it measured; answers are those of two tokens and more."""

    target: str | None  # name on the Hub; None: it has none
    target_class: str
    parameters: int
    reads: list[int]
    vocab_size: int
    draft_vocab_size: int
    known_share: float  # of the tokens of held-out answers, those that the head can propose
    answers: int
    answers_by_kind: dict[str, int]
    sampled_answers: int
    prompt_tokens: int
    answer_tokens: int
    learned_tokens: int  # answer tokens, each pass counted
    steps: int
    training_s: float
    from_target: list[str]  # weights that started as the target's
    held_out_answers: dict[str, int]  # by kind
    chain: int  # tokens of a draft
    acceptance_length: dict[str, float]  # by kind, and of all
    curve: list[dict[str, Any]]  # per epoch: tokens, losses by unrolled step, acceptance_length by kind
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def card(self, name: str) -> str:
        """The model card.

        Args:
            name: that the head is loaded by, as `OnlineDraft.from_pretrained` takes it.
        """
        named = self.target or f"a model of class {self.target_class}"
        metadata = ModelCardData(
            base_model=self.target,
            tags=["speculative-decoding", "eagle3", "hf_onlinespec"],
            library_name="hf_onlinespec",
        )
        kinds = [kind for kind in self.acceptance_length if kind != "all"]
        return CARD.format(
            metadata=metadata.to_yaml(),
            title=f"EAGLE-3 head for {named}",
            target=named,
            reads=", ".join(map(str, self.reads)),
            draft_vocab_size=f"{self.draft_vocab_size:,}",
            vocab_size=f"{self.vocab_size:,}",
            known=f"{self.known_share:.1%}",
            parameters=f"{self.parameters:,}",
            answers=f"{self.answers:,}",
            tokens=f"{self.answer_tokens:,}",
            epochs=f"{self.learned_tokens / max(1, self.answer_tokens):.0f}",
            chain=self.chain,
            measured="\n".join(
                f"| {kind or 'all'} | {self.held_out_answers.get(kind, sum(self.held_out_answers.values()))} "
                f"| {self.acceptance_length[kind]:.2f} |"
                for kind in [k for k in kinds if k] + ["all"]
            ),
            name=name,
        )
