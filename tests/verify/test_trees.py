"""Trees of candidates: verified in one forward, and the cache afterwards holds the path that was kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.architectures import ARCHITECTURES
from tests.fakes import PlainDraft, ScriptedProposer
from tests.tiny_models import CACHE, random_model

VOCAB = 96
# Per candidate its parent and how far its token is from the right one.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "right branch last": ((-1, 1), (-1, 2), (0, 0), (-1, 0), (3, 3), (3, 0), (5, 1), (5, 2), (5, 0), (8, 0)),
    "right branch first": ((-1, 0), (0, 0), (1, 0), (2, 0), (-1, 1), (4, 0), (0, 5), (1, 7)),
    "right branch in the middle": ((-1, 4), (-1, 0), (-1, 9), (1, 3), (1, 0), (2, 0), (4, 1), (4, 0), (4, 2), (7, 1)),
    "by depth": ((-1, 1), (-1, 0), (0, 0), (1, 5), (1, 0), (2, 0), (3, 0), (4, 7), (4, 0)),
    "nothing right": ((-1, 1), (-1, 2), (0, 0), (1, 0), (-1, 3)),
    "a chain": ((-1, 0), (0, 0), (1, 0)),
    "some of a branch": ((-1, 3), (-1, 0), (1, 2), (1, 0), (3, 1), (4, 0)),
}
SERVED = "llama qwen2 qwen3 gpt2 gpt_neox phi opt olmo2 granite granitemoe codegen gptj smollm3 cohere stablelm".split()
# How each of the others says why.
REFUSED = {
    "bloom": "ALiBi", "mpt": "ALiBi", "falcon alibi": "ALiBi", "gemma2": "window", "gemma3_text mixed": "window",
    "mistral": "window", "mixtral": "window", "gpt_oss": "window", "llama4_text chunked": "window", "gpt_neo": "window",
    "llama dynamic": "length", "phi3 longrope": "window", "bart": "position",
}  # fmt: skip
CALL: dict[str, Any] = dict(do_sample=False, max_new_tokens=24, return_dict_in_generate=True)


def built(name: str, **arguments: Any) -> PreTrainedModel:
    """Of tests/architectures.py, with room for positions."""
    row = next(row for row in ARCHITECTURES if row.name == name)
    config = row.config()
    for field in ("max_position_embeddings", "n_positions", "n_ctx"):
        if field in vars(config):
            setattr(config, field, 256)
    for field, value in arguments.items():
        setattr(config, field, value)
    return random_model(config, 0)


def prompt(n: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(8, VOCAB, (1, n), generator=torch.Generator().manual_seed(seed))


def read(cache: DynamicCache, i: int) -> tuple[Tensor, Tensor]:
    return cache.layers[i].keys, cache.layers[i].values


def same_cache(ours: DynamicCache, plain: DynamicCache) -> bool:
    """Whether both hold the same keys and values, to rounding."""
    pairs = [
        (one, other) for i in range(len(plain.layers)) for one, other in zip(read(ours, i), read(plain, i), strict=True)
    ]
    return all(one.shape == other.shape and torch.allclose(one, other, atol=1e-4, rtol=1e-3) for one, other in pairs)


def drafted(
    target: PreTrainedModel, script: Tensor, shape: str, inputs: Tensor, **given: Any
) -> tuple[Any, PlainDraft]:
    """What a call says whose draft proposes trees of that shape."""
    draft = PlainDraft(ScriptedProposer(script, SHAPES[shape], VOCAB))
    return target.generate(inputs, assistant_model=draft, **given), draft


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SERVED)
def test_trees_say_what_plain_decoding_says_and_leave_its_cache(name: str, shape: str) -> None:
    target = built(name)
    plain = target.generate(prompt(), **CALL)
    ours, draft = drafted(target, plain.sequences, shape, prompt(), **CALL)
    assert torch.equal(ours.sequences, plain.sequences)
    assert same_cache(ours[CACHE], plain[CACHE])
    metrics = draft.metrics
    assert "chains only" not in metrics.decisions.drafting
    assert draft.proposer(None).trees > 0  # type: ignore[arg-type]
    assert shape == "nothing right" or metrics.last.acceptance_length > 1.5
