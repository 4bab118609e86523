"""What is saved of the draft head that an evolved draft goes on from: for its card, and for whoever inspects it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from transformers import PretrainedConfig

from ..errors import ArtifactError, brief
from ..heads.config import (
    DFlashConfig,
    Eagle1Config,
    Eagle3Config,
    GemmaAssistantConfig,
    HeadConfig,
    HydraConfig,
    MtpConfig,
)

ASSISTANT = "Gemma-4 assistant"
KINDS = {
    "EAGLE-3": Eagle3Config,
    "EAGLE-1": Eagle1Config,
    "Hydra": HydraConfig,
    "MTP": MtpConfig,
    ASSISTANT: GemmaAssistantConfig,
    "DFlash": DFlashConfig,
}
MOST_READS = 1_000  # hidden states; chosen


@dataclass(frozen=True)
class HeadFacts:
    """A draft head, in numbers."""

    kind: str  # one of KINDS
    reads: tuple[int, ...]  # indices of the target's `hidden_states`; -1: the last one
    draft_vocabulary: int  # tokens that it can propose
    vocabulary: int  # tokens of the target
    target_layers: int | None  # decoder layers of the target; None: not known

    @classmethod
    def of(cls, config: PretrainedConfig) -> HeadFacts | None:
        """By the configuration of a draft; None: it is no head."""
        if not isinstance(config, HeadConfig):
            return None
        kind = next(kind for kind, known in KINDS.items() if isinstance(config, known))
        if isinstance(config, Eagle3Config):
            size = config.draft_vocab_size or config.vocab_size
            return cls(kind, tuple(config.reads), size, config.vocab_size, config.target_layers)
        reads = tuple(config.reads) if isinstance(config, DFlashConfig) else (-1,)
        return cls(kind, reads, config.vocab_size, config.vocab_size, config.target_layers)

    def to_dict(self) -> dict[str, object]:
        """For a file."""
        return asdict(self) | {"reads": list(self.reads)}

    @classmethod
    def from_dict(cls, values: object) -> HeadFacts:
        """The inverse of `to_dict`. Raises ArtifactError."""
        names = {"kind", "reads", "draft_vocabulary", "vocabulary", "target_layers"}
        if not isinstance(values, dict) or set(values) != names or values["kind"] not in list(KINDS):
            raise ArtifactError(f"What is said of the draft head is {brief(values)}: expected {sorted(names)}.")
        numbers = {name: values[name] for name in ("draft_vocabulary", "vocabulary")}
        if values["target_layers"] is not None:
            numbers["target_layers"] = values["target_layers"]
        for name, value in numbers.items():
            if not _is_whole(value) or value < 1:
                raise ArtifactError(
                    f"What is said of the draft head has {name}={brief(value)}: expected a whole number."
                )
        reads = values["reads"]
        if not isinstance(reads, list) or not 1 <= len(reads) <= MOST_READS or not all(map(_is_whole, reads)):
            raise ArtifactError(f"What is said of the draft head has reads={brief(reads)}: expected whole numbers.")
        return cls(**values | {"reads": tuple(reads)})

    @property
    def reads_text(self) -> str:
        """What it reads, in words."""
        if self.reads == (-1,):
            shared = ", and keys and values of its cache" if self.kind == ASSISTANT else ""
            return f"the last hidden state of the target{shared}"
        of = "" if self.target_layers is None else f" of a target of {self.target_layers} layers"
        return f"hidden_states[{', '.join(map(str, self.reads))}]{of}"

    @property
    def vocabulary_text(self) -> str:
        """What it can propose, in words."""
        if self.draft_vocabulary == self.vocabulary:
            return f"all {self.vocabulary:,} tokens of the target"
        return f"{self.draft_vocabulary:,} of the target's {self.vocabulary:,} tokens"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
