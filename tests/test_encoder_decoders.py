"""Classes of encoder–decoders as targets with the memory, one row and several: equal to plain `generate`, or decoded plainly as the table says.

pytest tests/test_encoder_decoders.py -m all_architectures        # those too that are left out of a usual run
python -m tests.test_encoder_decoders > docs/encoder_decoders.md  # the table of the documentation, from a run of all of them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.utils import logging

from hf_onlinespec import OnlineSpecConfig, attach, online_memory
from tests.architectures import PLAIN, SERVED
from tests.encoder_decoders import BART, T5, WHISPER, encoder_decoder, source

MEMORY = OnlineSpecConfig(lookahead=5)
GROWS = OnlineSpecConfig(
    grow_head=True, lookahead=3, update_every=4, update_when="round", rank=2, memory_tokens=0, recycle=False
)
TABLE_OF = "5.24"  # the release of transformers that the table is of
OF_TABLE = transformers.__version__.startswith(TABLE_OF + ".")
SEVERAL = 3  # rows

LED = dict(attention_window=8, max_encoder_position_embeddings=32, max_decoder_position_embeddings=32)


@dataclass(frozen=True)
class Row:
    """A class, and how it is served."""

    model_type: str
    positions: str  # how the decoder knows the places of its tokens
    arguments: dict[str, Any]
    served: str = SERVED
    every_run: bool = False


ROWS = [
    Row("bart", "counted", BART),
    Row("bigbird_pegasus", "counted", BART | dict(attention_type="original_full")),
    Row("blenderbot-small", "counted", BART),
    Row(
        "fsmt",
        "counted",
        BART | dict(langs=["en", "de"], src_vocab_size=96, tgt_vocab_size=96, is_encoder_decoder=True),
        served=PLAIN,
        every_run=True,
    ),
    Row("led", "counted", BART | LED, every_run=True),
    Row("longt5", "distances", T5 | dict(local_radius=4, global_block_size=4)),
    Row("m2m_100", "counted", BART),
    Row("mbart", "counted", BART, every_run=True),
    Row("mt5", "distances", T5),
    Row("mvp", "counted", BART),
    Row("nllb-moe", "counted", BART),
    Row("pegasus", "counted", BART),
    Row("pegasus_x", "counted", BART | dict(block_size=8)),
    Row("plbart", "counted", BART),
    Row("prophetnet", "counted", BART, served=PLAIN, every_run=True),
    Row("switch_transformers", "distances", T5 | dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)),
    Row("t5", "distances", T5),
    Row("umt5", "distances", T5, every_run=True),
    Row("whisper", "given", WHISPER),
]


def answered(row: Row, rows: int) -> str:
    """How a class answers, in words, in two requests: the memory knows the second from the first."""
    target = encoder_decoder(row.model_type, 0, **row.arguments)
    arguments = source(target, rows) | {"do_sample": False, "max_new_tokens": 20, "num_beams": 1}
    plain = target.generate(**arguments)
    for _ in range(2):
        if not torch.equal(target.generate(**arguments, onlinespec=MEMORY), plain):
            return "differs"
    metrics = online_memory(target).metrics
    # Without a number or a place in the code, which are not the table's.
    reason = metrics.decisions.drafting.partition(" (logits")[0].partition(": AssertionError")[0]
    return SERVED if metrics.accepted_tokens else f"{PLAIN}: {reason}"


def with_head(row: Row, rows: int) -> str:
    """The same in two requests in which a head that grows on the decoder drafts and learns."""
    target = encoder_decoder(row.model_type, 0, **row.arguments)
    arguments = source(target, rows) | {"do_sample": False, "max_new_tokens": 12, "num_beams": 1}
    plain = target.generate(**arguments)
    draft = attach(target, config=GROWS)
    for _ in range(2):
        if not torch.equal(target.generate(**arguments), plain):
            return "differs"
    metrics = draft.metrics
    if metrics.failed_drafts or metrics.failed_updates:
        return "failed"
    return SERVED if metrics.sources["model"] and metrics.updates else PLAIN


def check(row: Row, rows: int) -> None:
    if row.model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {row.model_type}")
    found = answered(row, rows)
    assert found.startswith(row.served) if OF_TABLE else found != "differs"
    assert (found == SERVED) == (row.served == SERVED) or not OF_TABLE


def check_head(row: Row, rows: int) -> None:
    if row.model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {row.model_type}")
    assert with_head(row, rows) in ((row.served,) if OF_TABLE else (SERVED, PLAIN))


@pytest.mark.filterwarnings("default")
def test_a_head_grows_on_the_decoder() -> None:
    check_head(next(row for row in ROWS if row.model_type == "led"), SEVERAL)


@pytest.mark.all_architectures
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rows", [1, SEVERAL])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_a_head_grows_on_each_decoder(row: Row, rows: int) -> None:
    check_head(row, rows)


@pytest.mark.filterwarnings("default")  # some classes use what torch or transformers itself will drop
@pytest.mark.parametrize("rows", [1, SEVERAL])
@pytest.mark.parametrize("row", [row for row in ROWS if row.every_run], ids=lambda row: row.model_type)
def test_equals_plain_generate(row: Row, rows: int) -> None:
    check(row, rows)


@pytest.mark.all_architectures
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rows", [1, SEVERAL])
@pytest.mark.parametrize("row", [row for row in ROWS if not row.every_run], ids=lambda row: row.model_type)
def test_each_other_class_equals_plain_generate(row: Row, rows: int) -> None:
    check(row, rows)


HEAD = """# Which encoder–decoders are served

Classes of `AutoModelForSeq2SeqLM` and `AutoModelForSpeechSeq2Seq` of transformers {version}, from a tiny configuration in float32, written by `python -m tests.test_encoder_decoders`. The memory drafts in two requests. "Served": the same tokens as plain `generate`; a class that is decoded plainly has the reason behind it.

Positions that are given to a decoder allow trees; the others verify chains. Where a decoder counts positions itself, the rows of a batch are verified at positions of their own through a second module tree over the same weights; where it knows its tokens by their distance, rows are moved to end at the same place.

The last column says whether a head that grows on the decoder (`grow_head=True`) drafts and learns, in one row and in {several}.

| class | model type | positions | one row | {several} rows | a grown head |
|---|---|---|---|---|---|"""

if __name__ == "__main__":
    logging.set_verbosity_error()
    print(HEAD.format(version=TABLE_OF, several=SEVERAL))
    for row in ROWS:
        name = type(encoder_decoder(row.model_type, 0, **row.arguments)).__name__
        answers, heads = ([tell(row, rows) for rows in (1, SEVERAL)] for tell in (answered, with_head))
        head = heads[0] if heads[0] == heads[1] else ", ".join(heads)
        print(f"| {name} | {row.model_type} | {row.positions} | {' | '.join(answers)} | {head} |", flush=True)
