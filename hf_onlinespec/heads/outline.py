"""What the folder of a draft head says about it where its target is not at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .described import stated_reads
from .names import D2T, EAGLE1, EAGLE3, HYDRA, SPECULATORS, T2D, is_left_out, our_name
from .recognising import served_form
from .stored import CONFIG, Stored, stored_config, stored_tensors

KINDS = {
    EAGLE3: "EAGLE-3",
    SPECULATORS: "EAGLE-3",
    EAGLE1: "EAGLE-1",
    HYDRA: "Hydra",
}  # by form


@dataclass(frozen=True)
class HeadOutline:
    """A head before it is read."""

    form: str
    reads: tuple[int, ...] | None  # indices of the target's hidden states, -1 the last; None: the defaults of its kind
    vocabulary: int | None  # of the target; None: it is not said
    draft_vocabulary: int | None  # tokens that it can propose; None: all of the target's
    parameters: int
    nbytes: int  # of the files with weights

    @property
    def kind(self) -> str:
        return KINDS[self.form]

    @classmethod
    def read(cls, folder: str | Path) -> HeadOutline:
        """Raises DraftError: the folder holds no head that is served, or is damaged."""
        folder = Path(folder)
        values, stored = stored_config(folder), stored_tensors(folder)
        form = served_form(values, stored, folder)
        prefix = form == HYDRA and values.get("hydra_head_arch") == "prefix-mlp"
        own: dict[str, Stored] = {}
        for name, one in stored.items():
            if not is_left_out(name) and name not in (D2T, T2D):
                own.setdefault(our_name(name, form, prefix), one)
        reads: tuple[int, ...] | None = (-1,)
        if form in (EAGLE3, SPECULATORS):
            reads = stated_reads(values, folder / CONFIG) or None
        layer = values["transformer_layer_config"] if form == SPECULATORS else values
        said = own.get("lm_head.weight", own.get("lm_heads.0.weight"))
        return cls(
            form,
            reads,
            _whole(layer.get("vocab_size")),
            None if said is None else said.shape[0],
            sum(math.prod(one.shape) for one in own.values()),
            sum(file.stat().st_size for file in {one.file for one in own.values()}),
        )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
