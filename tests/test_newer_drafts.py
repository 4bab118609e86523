"""transformers' own newer drafts: each learns and leaves greedy decoding as it is, or is refused as the table of the documentation says.

python -m tests.test_newer_drafts > docs/newer_drafts.md    # the page, from a run of all rows
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_onlinespec
from hf_onlinespec import OnlineSpecConfig
from hf_onlinespec.commit.head import AT_ONCE
from hf_onlinespec.commit.row_features import MOST_HELD as KEPT
from hf_onlinespec.errors import OnlineSpecError
from tests.architectures import ARCHITECTURES, Architecture
from tests.heads.assistants import assistant_of, dflash_of
from tests.heads.mtp_targets import mtp_target
from tests.multimodal import READERS

PAGE = Path(__file__).parents[1] / "docs" / "newer_drafts.md"
TABLE_OF = "5.24"  # the release of transformers whose drafts are listed
LEARNS = "learns"
OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
FIXED = OnlineSpecConfig(
    lookahead=2, update_every=1, update_when="round", memory_tokens=0, recycle=False, replay_tokens=0
)

EXIT, LAYERS, ASSISTANT, DFLASH = "assistant_early_exit=N", "use_mtp=True", "Gemma-4 assistant", "DFlash"


@dataclass(frozen=True)
class Row:
    """One draft of transformers."""

    kind: str
    model_type: str  # of the target
    found: str  # LEARNS, or words of the refusal
    more: dict[str, Any] = field(default_factory=dict)  # arguments of the configuration

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model_type}"


READS = {one.model_type: one for one in READERS if one.model_type == "muse_glimmer"}  # a target of that table alone
MTP_SLIDING = {"num_mtp_layers": 1, "num_hidden_layers": 2}
ROWS = [
    *(
        Row(EXIT, name, LEARNS)
        for name in (
            *("llama", "gpt2", "gpt_neox", "bloom", "qwen3", "gemma2", "gemma3_text", "gpt_oss"),
            *("deepseek_v3", "llama4_text"),
        )
    ),
    Row(EXIT, "jamba", "recurrent state"),
    Row(EXIT, "lfm2", "more than keys and values"),
    Row(EXIT, "gemma4_text", "inputs of its own"),
    Row(EXIT, "longcat_flash", "4 lists of 2 layers"),
    *(Row(LAYERS, name, LEARNS) for name in ("glm4_moe", "deepseek_v3", "sarvam_mla", "sarvam_moe", "bailing_hybrid")),
    Row(LAYERS, "mellum", "sliding_attention", MTP_SLIDING),
    Row(LAYERS, "inkling_text", "no rotary embedding", {"num_mtp_layers": 1}),
    Row(LAYERS, "nemotron_h", "num_mtp_layers"),
    Row(LAYERS, "llama", "num_mtp_layers"),
    Row(ASSISTANT, "gemma4_text", LEARNS),
    Row(ASSISTANT, "gemma4_unified_text", LEARNS),
    Row(ASSISTANT, "gemma4", LEARNS),
    Row(ASSISTANT, "gemma3n_text", "hands out none"),
    Row(DFLASH, "llama", LEARNS),
    Row(DFLASH, "qwen3", LEARNS),
    Row(DFLASH, "muse_glimmer", LEARNS),
    Row(DFLASH, "qwen3_next", LEARNS),
]


def architecture(row: Row) -> Architecture:
    """The target's: as the table of architectures has it."""
    known = next(one for one in ARCHITECTURES if one.name == row.model_type and not one.reason)
    return Architecture(known.name, known.positions, known.cache, "", "", known.arguments | row.more)


def asked(row: Row, folder: Path, patch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A target, and how the draft is asked for."""
    if row.kind == EXIT:
        return architecture(row).build(), {"assistant_early_exit": 1}
    if row.kind == LAYERS and row.found == LEARNS:
        return mtp_target(row.model_type, folder, patch), {"use_mtp": True}
    if row.kind == LAYERS:
        return architecture(row).build(), {"use_mtp": True}
    target = READS[row.model_type].build() if row.model_type in READS else architecture(row).build()
    draft = assistant_of(target) if row.kind == ASSISTANT else dflash_of(target)
    return target, {"assistant_model": draft}


def run(row: Row, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """LEARNS, or the refusal."""
    target, how = asked(row, folder, patch)
    tokens = torch.randint(3, 96, (1, 5), generator=torch.Generator().manual_seed(0))
    try:
        found = target.generate(tokens, onlinespec=FIXED, **how, **OPTIONS)
    except OnlineSpecError as error:
        return str(error)
    assert torch.equal(found, target.generate(tokens, **OPTIONS))
    metrics = hf_onlinespec.online_metrics(target)
    assert metrics.drafted_tokens > 0 and metrics.updates > 0
    return LEARNS


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_learns_or_is_refused_for_the_stated_reason(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not transformers.__version__.startswith(TABLE_OF):
        pytest.skip(f"the table is of transformers {TABLE_OF}, installed is {transformers.__version__}")
    assert row.found in run(row, tmp_path, monkeypatch)


def test_the_page_has_these_rows() -> None:
    stated = document(lambda row: row.found)
    assert PAGE.read_text(encoding="utf-8") == stated, "run python -m tests.test_newer_drafts > docs/newer_drafts.md"


# The documentation


def document(find: Callable[[Row], str]) -> str:
    """docs/newer_drafts.md, from what was found for every row."""
    lines = []
    for row in ROWS:
        found = find(row)
        word = row.found if row.found in found else f"**{found}**"
        lines.append(f"| {row.kind} | {row.model_type} | {word if word == LEARNS else f'refused: {word}'} |")
    return "\n".join([HEADING, "", COLUMNS, *lines, ""])


HEADING = f"""# transformers' own newer drafts

Beside a small model and an EAGLE head, transformers {TABLE_OF} drafts with parts of the target itself, and with models that read its inside. With `onlinespec=True` they draft in our loop and learn:

- `target.generate(..., assistant_early_exit=4, onlinespec=True)`: the target's first 4 layers, its final norm and its head, over the target's weights. Any class that serves as a draft and has its layers in one list: of the first 104 [architectures](architectures.md) in the alphabet that are served as targets of text, 94 learned so (2026-11-27), and the others are refused by name. A target that was not trained to exit early says little behind its first layers: on SmolLM2 it did not pay (`benchmarks/LOG.md`, 2026-11-27). The KV cache of these layers is the draft's own, as the adapter changes its keys and values.
- `target.generate(..., use_mtp=True, onlinespec=True)`: the MTP layer of the target's checkpoint, read from the folder or repository that the target was loaded from, as a [draft head](heads.md). Its name stands wherever a head's does: `hf_onlinespec:mtp_layers`. Of several MTP layers the first one drafts, again and again. Needs transformers 5.24; an older one is refused by name.

- `target.generate(..., assistant_model=assistant, onlinespec=True)` with a Gemma-4 assistant (`google/gemma-4-E2B-it-assistant`): it reads keys and values of a Gemma 4 target, which the verifying forward hands out, and the target's last hidden state. A drafted token is read at the place of the last one that was verified, as the assistant was trained. Of the last {KEPT:,} tokens at most, keys and values are held beside the target's own, for drafting and for learning.
- `target.generate(..., assistant_model=dflash, onlinespec=True)` with a DFlash draft (`meta-models/Muse-Glimmer-30B-assistant`): it reads hidden states of a few layers and says a block of tokens in one forward. It learns from the first {AT_ONCE} tokens of a block, or from `head_steps` of them where that is more. `speculation_type="dflash"` may be left out.

Both are [draft heads](heads.md) from there on: each token is drawn from the draft's own distribution and verified against it, so sampling is exact too (transformers {TABLE_OF} hands Gemma-4 assistants' likeliest token on with logits that it was not drawn from). Where `generate` verifies chains of one row only, as with the layers of Gemma 4 that share keys, and where a row may reach the end of a sliding window, several rows decode plainly and `metrics.decisions` says so. Memory, recycling, governor and metrics are those of every draft.

What is learned is an adapter of the draft alone: the model that was passed is not touched. It is saved by `save_pretrained`, and loaded with `OnlineDraft.from_pretrained(FOLDER, target=target)`; an assistant that has learned nothing yet is loaded by its name in the same way. `merge_and_export` writes an assistant as transformers reads it.

Greedy decoding of tiny random models, each compared with plain `generate` while the draft learns in every round. The words of a refusal are those of its message. Written by `python -m tests.test_newer_drafts`."""
COLUMNS = """| draft | model type | here |
|---|---|---|"""


@contextmanager
def _place() -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        yield Path(folder), patch


def _find(row: Row) -> str:
    with _place() as (folder, patch):
        return run(row, folder, patch)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(document(_find), end="")
