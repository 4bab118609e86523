"""Trees inside of a draft model: who attends to whom, and whether a model reads them at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .._compat.attention import has_sinks, takes_positions, tree_obstacle
from .._compat.caches import CACHE
from .draft_model import Branch

# Largest difference of two logits over the largest one between a tree of two branches and its two chains; chosen: where a mask is left
# out they are 0.1 and more apart, and a draft that is off by less only guesses a little worse.
MOST_OFF = 0.05


def seen_by(branches: Sequence[Branch], read: Mapping[int, tuple[int, int]], row: int, cached: int) -> Tensor:
    """Which places in the cache each branch attends to: (branches, cached + branches), on the host.

    Args:
        read: per candidate that was read, its place in the cache and the candidate that it follows (-1: the row).
        row: places of the row itself, all of which are seen.
        cached: places in the cache.
    """
    seen = torch.zeros(len(branches), cached + len(branches), dtype=torch.bool)
    seen[:, :row] = True
    for i, branch in enumerate(branches):
        above = branch.parent
        while above >= 0:
            place, above_it = read[above]
            seen[i, place] = True
            above = above_it
        seen[i, cached + i] = True
    return seen


def added_mask(seen: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the attention's logits, (1, 1, n, places)."""
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None].to(device)


@torch.no_grad()
def reads_trees(model: PreTrainedModel) -> bool:
    """Whether a model reads a tree as it reads its chains: by its configuration, then tried on two branches of two tokens."""
    if tree_obstacle(model.config) or has_sinks(model) or not takes_positions(model) or model.training:
        return False
    size = model.config.get_text_config(decoder=True).vocab_size
    tokens = [token % size for token in (3, 5, 7, 11, 13)]  # two of the row; a branch of two, and one of one
    device = model.device

    def said(feed: Sequence[int], past: DynamicCache, **inputs: Tensor) -> Tensor:
        ids = torch.tensor([feed], device=device)
        logits: Tensor = model(input_ids=ids, **{CACHE: past}, use_cache=True, **inputs).logits[0]
        return logits

    try:
        alone = [said(tokens[:2] + own, DynamicCache(config=model.config))[-1] for own in (tokens[2:4], tokens[4:])]
        past = DynamicCache(config=model.config)
        said(tokens[:2], past)
        first = [Branch(0, -1, 0, tokens[2]), Branch(1, -1, 0, tokens[4])]
        read = {0: (2, -1), 1: (3, -1)}
        together = []
        for branches, cached in ((first, 2), ([Branch(2, 0, 1, tokens[3])], 4)):
            mask = added_mask(seen_by(branches, read, 2, cached), model.dtype, device)
            positions = torch.tensor([[2 + branch.depth for branch in branches]], device=device)
            feed = [branch.token for branch in branches]
            together.append(said(feed, past, attention_mask=mask, position_ids=positions))
        found = [together[1][0], together[0][1]]
    except Exception:  # a model from elsewhere may raise anything: it drafts chains
        return False
    apart = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in zip(found, alone, strict=True))
    return apart <= MOST_OFF
