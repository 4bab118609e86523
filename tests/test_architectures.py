"""Every architecture as target with the memory and as draft of itself with learning: equal to plain `generate`, or refused as the table says.

pytest tests/test_architectures.py -m all_architectures     # those too that are left out of a usual run
python -m tests.test_architectures > docs/architectures.md  # the table of the documentation, from a run of all of them
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, OnlineSpecError, UnsupportedError, attach, online_memory
from tests.architectures import ARCHITECTURES, LIMIT, PLAIN, SERVED, TABLE_OF, VOCAB, WINDOW, Architecture
from tests.conftest import tiny_llama
from tests.tiny_models import CACHE

TIE = 1e-4  # of the two best logits: float32 differs by about 1e-5 from one shape of a forward to another

# Numbers, so that no clock decides what is drafted. A wide step: an adapter that is wrong now and then has its tokens rejected. In
# every third round, and after a request: a step takes as long as ten rounds.
MEMORY = OnlineSpecConfig(lookahead=6)
LEARNING = OnlineSpecConfig(lookahead=4, update_every=3, update_when="round", memory_tokens=0, lr=2e-2, rank=4)

LAYERS: dict[type, str] = {
    DynamicLayer: "full",
    DynamicSlidingWindowLayer: "sliding",  # chunked attention too
    DynamicIndexedLayer: "indexed",
    LinearAttentionLayer: "linear",  # states and convolutions
    LinearAttentionAndFullAttentionLayer: "linear with full",
    LinearAttentionAndSlidingWindowAttentionLayer: "linear with sliding",
}
if "DummyLayer" in vars(cache_utils):  # transformers 5.20 has no such class yet
    LAYERS[cache_utils.DummyLayer] = "shared"

BUILT = [row for row in ARCHITECTURES if not row.reason]
EVERY_RUN = [row for row in BUILT if row.every_run]


@dataclass(frozen=True)
class Plain:
    """What plain `generate` says, and how close it was to saying something else."""

    arguments: dict[str, Any]
    tokens: Tensor  # (L,)
    gaps: Tensor  # (new,) between the two best logits at every new token
    cache: str  # the kinds of its layers


@dataclass(frozen=True)
class Found:
    """How it went: "served", a refusal, or in what it differs."""

    target: str
    draft: str
    cache: str
    ties: int  # answers that part from plain's where rounding may have decided


class StopAt:
    """A stopping criterion that configurations know nothing about."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= self._length])


def prompt() -> Tensor:
    """(1, 10) tokens, more than a window holds; none of them special to any row."""
    return torch.randint(3, 89, (1, WINDOW + 2), generator=torch.Generator().manual_seed(3))


def plain(target: PreTrainedModel, **arguments: Any) -> Plain:
    arguments |= {"do_sample": False}
    out = target.generate(prompt(), return_dict_in_generate=True, output_logits=True, **arguments)
    best = torch.stack(out.logits)[:, 0].topk(2).values
    return Plain(arguments, out.sequences[0], best[:, 0] - best[:, 1], layers_of(out))


def plain_answers(target: PreTrainedModel) -> list[Plain]:
    """A call that may write past the last position but stops in time, and one that goes past it where the class can."""
    answers: list[Plain] = []
    for stop in (LIMIT, LIMIT - 1, LIMIT - 2, LIMIT - 4):  # some classes begin to count at their padding token
        try:
            answers.append(plain(target, max_new_tokens=100, stopping_criteria=[StopAt(stop)]))
            break
        except (IndexError, RuntimeError):
            continue
    try:
        answers.append(plain(target, max_new_tokens=LIMIT))
    except (IndexError, RuntimeError):  # its table ends
        answers.append(answers[0])
    return answers


@cache
def llama() -> tuple[PreTrainedModel, list[Plain]]:
    """The target of drafts that are no targets themselves."""
    target = tiny_llama(1, vocab=VOCAB)
    return target, plain_answers(target)


def parts(answer: Plain, tokens: Tensor) -> str:
    """Where an answer parts from plain's, in words; "" where it does not, "tie" where rounding may have decided."""
    n = min(len(tokens), len(answer.tokens))
    places = (tokens[:n] != answer.tokens[:n]).nonzero()
    if not len(places):
        return "" if len(tokens) == len(answer.tokens) else f"{len(tokens)} tokens instead of {len(answer.tokens)}"
    first = int(places[0])
    gap = float(answer.gaps[first - prompt().shape[1]])
    return "tie" if gap < TIE else f"token {first} of {len(answer.tokens)} differs at a gap of {gap:.2g}"


def serve(target: PreTrainedModel, answers: list[Plain], **ours: Any) -> tuple[str, int]:
    """How ours answers, and how many answers are ties."""
    ties = 0
    for answer in answers:
        try:
            out = target.generate(prompt(), **answer.arguments, **ours)
        except OnlineSpecError as error:
            return str(error), ties
        found = parts(answer, out[0])
        if found not in ("", "tie"):
            return found, ties
        ties += found == "tie"
    return SERVED, ties


def remember(target: PreTrainedModel, answers: list[Plain]) -> tuple[str, int]:
    """As target, the memory drafts: what the second request says, it knows from the first one."""
    found, ties = serve(target, answers, onlinespec=MEMORY)
    if found == SERVED and not online_memory(target, MEMORY).metrics.drafted_tokens:
        found = PLAIN
    return found, ties


def teach(target: PreTrainedModel, answers: list[Plain], model: PreTrainedModel) -> tuple[str, int]:
    """The model as draft, which learns in rounds of the answers."""
    try:
        draft = OnlineDraft(model, LEARNING)
    except OnlineSpecError as error:
        return str(error), 0
    found, ties = serve(target, answers, assistant_model=draft)
    if found == SERVED and not (draft.metrics.drafted_tokens and draft.metrics.updates):
        found = f"{draft.metrics.drafted_tokens} drafted tokens, {draft.metrics.updates} updates"
    return found, ties


def run(model: PreTrainedModel, answers: list[Plain]) -> Found:
    cache = answers[0].cache
    as_target, ties = remember(model, answers)
    target, answers = (model, answers) if as_target == SERVED else llama()
    as_draft, more = teach(target, answers, copy.deepcopy(model))
    return Found(as_target, as_draft, cache, ties + more)


def layers_of(out: Any) -> str:
    """The kinds of layers in the cache that a call returned."""
    cache = out.get(CACHE)
    if not isinstance(cache, Cache):
        return "no transformers cache"
    kinds = {type(layer) for layer in cache.layers}
    return ", ".join(sorted(LAYERS.get(kind, kind.__name__) for kind in kinds))


def agree(stated: str, seen: str) -> bool:
    """Whether it went as the table says: served, or refused with these words."""
    return seen == stated if stated in (SERVED, PLAIN) else stated in seen


# Other releases than the table's have other kinds of layers, and refuse for other reasons.
OF_TABLE = transformers.__version__.startswith(TABLE_OF + ".")


def built(row: Architecture) -> tuple[PreTrainedModel, list[Plain]]:
    """A model of that class, and what plain `generate` answers."""
    if row.model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {row.model_type}; the table is of {TABLE_OF}")
    model = row.build()
    try:
        return model, plain_answers(model)
    except Exception as error:
        if OF_TABLE:
            raise
        pytest.skip(f"plain generate fails in transformers {transformers.__version__}: {type(error).__name__}: {error}")


def is_as_stated(stated: str, seen: str) -> bool:
    refused = stated not in (SERVED, PLAIN) and seen.startswith(("The target ", "The draft "))
    return agree(stated, seen) or (refused and not OF_TABLE)


def check(row: Architecture) -> None:
    found = run(*built(row))
    assert not OF_TABLE or found.cache == row.cache
    for stated, seen in ((row.target, found.target), (row.draft, found.draft)):
        assert is_as_stated(stated, seen), seen


@pytest.mark.filterwarnings("default")  # some classes use what torch or transformers itself will drop
@pytest.mark.parametrize("row", EVERY_RUN, ids=lambda row: row.name)
def test_equals_plain_generate_or_is_refused_for_the_stated_reason(row: Architecture) -> None:
    check(row)


@pytest.mark.all_architectures
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", [row for row in BUILT if not row.every_run], ids=lambda row: row.name)
def test_each_other_class_equals_plain_generate_or_is_refused_for_the_stated_reason(row: Architecture) -> None:
    check(row)


def test_the_table_lists_every_class_of_the_mapping() -> None:
    if not OF_TABLE:
        pytest.skip(f"the table is of transformers {TABLE_OF}, installed is {transformers.__version__}")
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= {row.model_type for row in ARCHITECTURES}


def test_every_run_covers_each_kind_of_cache_layer_and_of_positions() -> None:
    assert len(EVERY_RUN) >= 60
    assert {row.positions for row in EVERY_RUN} == {row.positions for row in BUILT}
    kinds = {(row.cache, row.target == SERVED, row.draft == SERVED) for row in EVERY_RUN}
    assert kinds == {(row.cache, row.target == SERVED, row.draft == SERVED) for row in BUILT}


# Attached


def attached_answers(row: Architecture) -> tuple[str, list[str]]:
    """How an attached model of that class answers, in words, and what the user is told where it was decoded plainly."""
    model, answers = built(row)
    try:
        attach(model, config=MEMORY)
    except UnsupportedError as error:
        return str(error), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found, _ = serve(model, answers)
            if found != SERVED:
                break
    return found, [str(one.message) for one in caught if "ran without the attached draft" in str(one.message)]


def check_attached(row: Architecture) -> None:
    """Refused when attached, or answers as it did, and tells of it where it was decoded plainly: never an error in a call."""
    found, told = attached_answers(row)
    assert found == SERVED or (row.target != PLAIN and is_as_stated(row.target, found))
    assert not told or row.target not in (SERVED, PLAIN), told


# Reformer's hashes are drawn at random: two plain calls differ.
COMPARED = [row for row in ARCHITECTURES if not row.reason and row.name != "reformer"]
ONE_OF_EACH = ("llama", "minimax", "qwen3_next", "deepseek_v32")  # served, no Cache, recurrent, served without drafting


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", [row for row in COMPARED if row.name in ONE_OF_EACH], ids=lambda row: row.name)
def test_no_class_answers_otherwise_when_attached(row: Architecture) -> None:
    check_attached(row)


@pytest.mark.all_architectures
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", [row for row in COMPARED if row.name not in ONE_OF_EACH], ids=lambda row: row.name)
def test_no_class_at_all_answers_otherwise_when_attached(row: Architecture) -> None:
    check_attached(row)


# The documentation


def document(find: Callable[[Architecture], Found] = lambda row: run(*built(row))) -> str:
    """docs/architectures.md, from what was found for every row."""
    lines, as_target, as_draft = [], Counter[str](), Counter[str]()
    for row in ARCHITECTURES:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(row.model_type, row.model_type)
        if row.reason:
            lines.append(f"| {name} | {row.name} | {row.positions} | | not tried: {row.reason} | not tried |")
            as_target["not tried"] += 1
            as_draft["not tried"] += 1
            continue
        found = find(row)
        cells = []
        for stated, seen, counter in ((row.target, found.target, as_target), (row.draft, found.draft, as_draft)):
            word = stated if stated in (SERVED, PLAIN) else f"refused: {stated}"
            word = word if agree(stated, seen) else f"**{seen}**"
            counter[word] += 1
            cells.append(word)
        lines.append(f"| {name} | {row.name} | {row.positions} | {row.cache} | {cells[0]} | {cells[1]} |")
        print(lines[-1], file=sys.stderr, flush=True)
    counts = [
        f"- as {kind}: " + "; ".join(f"{n} {word}" for word, n in counter.most_common())
        for kind, counter in (("target", as_target), ("draft", as_draft))
    ]
    return "\n".join([HEADING, "", *counts, "", COLUMNS, *lines, ""])


HEADING = f"""# Which architectures are served

Every class that `AutoModelForCausalLM` of transformers {TABLE_OF} can build, from a tiny configuration in float32, written by `python -m tests.test_architectures`.

As target: the memory drafts in two requests that run past sliding windows, chunks and the end of the positions. As draft: of itself (of a Llama where the class is no target), learning in the middle of requests. "Served": the same tokens as plain `generate`, but where the two best logits are closer than {TIE}. "Served without drafting": from the first token on, here past the window or the number of selected keys, a forward over several tokens is not what transformers computes token by token, so that rounds have no room; or the class leaves its recurrent state out of a forward over several tokens. Refusals come before any work and say what to do; the words are those of the message."""
COLUMNS = """| class | model type, variant | positions | cache layers | as target | as draft |
|---|---|---|---|---|---|"""

if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(document(), end="")
