"""Every class that reads pictures or sounds, as target of the memory: equal to plain `generate` with and without them, or refused as the table says.

pytest tests/test_multimodal.py -m all_architectures     # those too that are left out of a usual run
python -m tests.test_multimodal > docs/multimodal.md     # the table of the documentation, from a run of all of them
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import logging

from hf_onlinespec import OnlineSpecConfig, OnlineSpecError, UnsupportedError, online_memory
from tests.architectures import PLAIN, SERVED
from tests.multimodal import CLASSES, READERS, TABLE_OF, Reader, types_of
from tests.shown import AUDIO, IMAGE, SHOWN, text
from tests.test_architectures import agree
from tests.tiny_models import CACHE

MEMORY = OnlineSpecConfig(lookahead=4)  # a number, so that no clock decides what is drafted
OF_TABLE = transformers.__version__.startswith(TABLE_OF + ".")
BUILT = [row for row in READERS if not row.reason]
EVERY_RUN = [row for row in BUILT if row.every_run]


@dataclass(frozen=True)
class Found:
    """How it went: "served", a refusal, or in what it differs."""

    alone: str  # with text alone
    shown: str  # with a picture or a sound, in a first turn and in a second one on its cache; "": not tried
    together: (
        str  # two prompts in one call, each with a picture or a sound where it is tried with one, below every window
    )


def answers(row: Reader, model: PreTrainedModel, prompt: dict[str, Tensor], turns: int, **ours: Any) -> list[Tensor]:
    """The tokens after each turn. What reads no text alone is shown the same again in each of them, and begins a cache anew."""
    arguments = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True} | dict(row.call)
    arguments["suppress_tokens"] = [
        IMAGE,
        AUDIO,
    ]  # each of these, if it were written, would ask for another picture or sound
    found = [model.generate(**prompt, **arguments, **ours)]
    for _ in range(1, turns):
        tokens = torch.cat([found[-1].sequences, text(3)], dim=-1)
        shown = {CACHE: found[-1].get(CACHE)} if row.alone else SHOWN[row.shown]()
        found.append(model.generate(input_ids=tokens, **types_of(model, tokens), **shown, **arguments, **ours))
    return [out.sequences for out in found]


def compare(row: Reader, prompt: dict[str, Tensor], turns: int, wide: bool = False) -> str:
    """The memory drafts: what the second request says, it knows from the first one."""
    model = row.build(wide)
    try:
        said = [answers(row, model, prompt, turns, onlinespec=MEMORY)]
    except OnlineSpecError as error:
        return str(error)
    plain = answers(row, model, prompt, turns)
    said.append(answers(row, model, prompt, turns, onlinespec=MEMORY))
    for ours in said:
        for turn, (own, other) in enumerate(zip(plain, ours, strict=True), start=1):
            if not torch.equal(own, other):
                return f"turn {turn} says {other.tolist()} instead of {own.tolist()}"
    draft = online_memory(row.writer(model), MEMORY)
    known = [token for token in (IMAGE, AUDIO) if draft.memory is not None and draft.memory.continuation([token])]
    if known:
        return f"the memory knows {known}, which stand for parts of a picture or a sound"
    metrics = draft.metrics
    together, decided = len(prompt["input_ids"]) > 1, metrics.decisions.drafting
    return SERVED if metrics.drafted_tokens else decided if together else PLAIN


def run(row: Reader) -> Found:
    model = row.build()
    alone = compare(row, {"input_ids": text(10)}, 1) if row.alone else ""
    shown = compare(row, row.prompt(model), 2) if row.shown else ""
    return Found(alone, shown, compare(row, row.prompts(model), 1, wide=True))


def check(row: Reader) -> None:
    if row.model_type not in CONFIG_MAPPING or not OF_TABLE:
        pytest.skip(f"the table is of transformers {TABLE_OF}, installed is {transformers.__version__}")
    found = run(row)
    assert not row.alone or agree(row.target, found.alone), found.alone
    assert not row.shown or agree(row.seen, found.shown), found.shown
    assert agree(row.together, found.together), found.together


@pytest.mark.filterwarnings("default")  # some classes use what torch or transformers itself will drop
@pytest.mark.parametrize("row", EVERY_RUN, ids=lambda row: row.model_type)
def test_equals_plain_generate_with_and_without_what_it_is_shown(row: Reader) -> None:
    check(row)


@pytest.mark.all_architectures
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", [row for row in BUILT if not row.every_run], ids=lambda row: row.model_type)
def test_each_other_class_equals_plain_generate_or_is_refused_for_the_stated_reason(row: Reader) -> None:
    check(row)


def test_a_recurrent_target_that_would_write_the_token_of_a_picture_is_drafted_for() -> None:
    row = next(row for row in READERS if row.model_type == "qwen3_5_moe")
    if row.model_type not in CONFIG_MAPPING or not OF_TABLE:
        pytest.skip(f"the table is of transformers {TABLE_OF}, installed is {transformers.__version__}")
    model = row.build()
    call = row.prompt(model) | {"do_sample": False, "max_new_tokens": 20}
    plain = model.generate(**call)
    assert IMAGE in plain[0, -20:]
    for _ in range(2):
        assert torch.equal(model.generate(**call, onlinespec=MEMORY), plain)
    assert online_memory(model, MEMORY).metrics.drafted_tokens > 0


@pytest.mark.parametrize("model_type", ["internvl", "qwen2_5_vl"])
def test_several_prompts_of_text_alone_equal_plain(model_type: str) -> None:
    """Rows read together have a position each, or one of each kind: of time, height and width."""
    model = reader(model_type).build()
    tokens = torch.cat([text(10), text(11)[:, 1:]])
    mask = torch.ones_like(tokens)
    tokens[1, :3], mask[1, :3] = 0, 0
    arguments: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    plain = model.generate(tokens, **arguments)
    for _ in range(2):
        assert torch.equal(plain, model.generate(tokens, **arguments, onlinespec=MEMORY))
    assert online_memory(model, MEMORY).metrics.drafted_tokens > 0


def reader(model_type: str) -> Reader:
    if not OF_TABLE:
        pytest.skip(f"the table is of transformers {TABLE_OF}, installed is {transformers.__version__}")
    return next(row for row in READERS if row.model_type == model_type)


def test_a_batch_with_pictures_goes_on_in_its_cache() -> None:
    row = reader("qwen2_5_vl")
    model = row.build()
    first = row.prompts(model)

    def turns(**ours: Any) -> list[Tensor]:
        arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
        begun = model.generate(**first, **arguments, **ours)
        tokens = torch.cat([begun.sequences, text(4).expand(2, -1)], dim=-1)
        mask = torch.nn.functional.pad(first["attention_mask"], (0, 12), value=1)
        cache = {CACHE: begun[CACHE]}
        ended = model.generate(tokens, attention_mask=mask, **types_of(model, tokens), **cache, **arguments, **ours)
        return [begun.sequences, ended.sequences]

    plain = turns()
    for _ in range(2):
        assert all(map(torch.equal, plain, turns(onlinespec=MEMORY)))
    assert online_memory(model, MEMORY).metrics.accepted_tokens > 16


def test_a_picture_without_its_placeholder_is_refused_as_by_plain_generate() -> None:
    row = reader("internvl")
    model = row.build()
    prompt = row.prompt(model)
    bad = prompt | {"input_ids": text(9)}
    for ours in ({}, {"onlinespec": MEMORY}):
        with pytest.raises(ValueError, match="tokens: 0, features: 1"):
            model.generate(**bad, do_sample=False, max_new_tokens=4, **ours)
    assert online_memory(model, MEMORY).metrics.new_tokens == 0
    assert compare(row, prompt, 1) == SERVED


def test_a_sound_of_no_length_is_refused_before_any_work() -> None:
    row = reader("glmasr")
    model = row.build()
    prompt = row.prompt(model)
    bad = prompt | {name: value[..., :0] for name, value in prompt.items() if name.startswith("input_features")}
    with pytest.raises(UnsupportedError, match=r"input_features of shape \(1, 8, 0\): a sound of no length"):
        model.generate(**bad, do_sample=False, max_new_tokens=4, onlinespec=MEMORY)
    assert compare(row, prompt, 1) == SERVED


def test_the_table_lists_every_class_of_the_mapping() -> None:
    if not OF_TABLE:
        pytest.skip(f"the table is of transformers {TABLE_OF}, installed is {transformers.__version__}")
    listed = [row.model_type for row in READERS]
    left = {kind for kind in CLASSES if kind not in listed}
    assert len(set(listed)) == len(listed) and set(listed) <= set(CLASSES)
    assert all(CONFIG_MAPPING[kind]().is_encoder_decoder for kind in left), left


def document() -> str:
    """docs/multimodal.md, from what was found for every row."""
    lines, counts = [], Counter[str]()
    for row in READERS:
        if row.reason:
            lines.append(f"| {row.name} | {row.model_type} | no target: {row.reason} | | |")
            counts["no target"] += 1
            continue
        found = run(row)
        stated = ((row.target, found.alone), (row.seen, found.shown), (row.together, found.together))
        alone, with_it, together = (words(*one) for one in stated)
        counts[alone if row.alone else with_it] += 1
        counts["served with what it was shown"] += with_it == SERVED
        counts["served with two prompts in one call"] += together == SERVED
        shown = f"{row.shown}: {with_it}" if row.shown else alone if alone.startswith("refused") else "reads none"
        if row.inner:
            shown += f", its `{row.inner}` writes"
        alone = alone if row.alone else "reads none alone"
        if row.target in (SERVED, PLAIN):
            together = together.replace("refused", "decoded plainly")
        lines.append(f"| {row.name} | {row.model_type} | {alone} | {shown} | {together} |")
        print(lines[-1], file=sys.stderr, flush=True)
    said = "; ".join(f"{n} {word}" for word, n in counts.most_common())
    return "\n".join([HEADING, "", f"- as target: {said}", "", COLUMNS, *lines, ""])


def words(stated: str, seen: str) -> str:
    said = stated if stated in (SERVED, PLAIN) else f"refused: {stated}"
    return said if agree(stated, seen) else f"**{seen}**"


HEADING = f"""# Which models that read pictures or sounds are served

Every class that `AutoModelForMultimodalLM`, `AutoModelForSpeechSeq2Seq` or `AutoModelForSeq2SeqLM` of transformers {TABLE_OF} can build and that is no encoder–decoder, from a tiny configuration in float32, written by `python -m tests.test_multimodal`. The memory drafts. "Served": the same tokens as plain `generate`, in two requests of text alone, and with a picture or a sound, where one is named, in two requests of two turns each, the second one on the cache of the first. "Served without drafting": no round has room, see [Architectures](architectures.md).

The prompt with a picture is read as in plain decoding, and drafting begins behind it. Drafts, the suffix memory and learning see the text alone: the tokens that stand for parts of pictures, videos and sounds are left out. The last column is of two requests of two prompts of different lengths each, both of which have what stands before it, or are text alone; "decoded plainly": in transformers' own loop, with the reason in `decisions`.

- "Its `…` writes": the class has a `generate` of its own, which hands the call to that part. `onlinespec=` and `assistant_model=` go with it; `attach` takes the part (`attach(model.language_model)`). Qwen-Omni is tried with `generation_mode="text"`: when it speaks, it asks for hidden states of each token, which are not handed out (`output_hidden_states=True`).
- What reads no text alone is shown the same picture again in its second turn, on a new cache.
- Mllama keeps its pictures in the cache that a round is rolled back in: with them it is decoded plainly.
- A picture takes places in GIT's cache that no token stands for. Plain decoding itself misreads a second turn on that cache: it is refused.
- "A state of its own": Kyutai's and Voxtral's streaming speech models read sound token by token, with a second cache and the padding of their convolutions, which their forwards change in place.
- "Beside the tokens", of two prompts: inputs that later rounds need too, and that are not told apart by row.
- Layers that attend to a window of tokens: two prompts are tried with a window that they do not come to the end of. Rows of different lengths are verified together with holes in the cache, where one row goes on and another one does not; a window counts places, holes too. So a batch whose longest row may reach the window (prompt, new tokens, and 64 places) is decoded plainly. One prompt at a time is drafted for beyond it."""
COLUMNS = """| class | model type | text alone | with a picture or a sound | two prompts |
|---|---|---|---|---|"""

if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(document(), end="")
