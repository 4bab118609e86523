"""The draft model's next token in several rows: one forward where they are read together, and one choice for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.vocabulary import widened
from ..runtime.clock import is_host
from .recycling import best_tokens
from .row_model import RowModel
from .sampling import draw


@dataclass(frozen=True)
class NextToken:
    """A token of the draft model's."""

    token: Tensor  # (1, 1)
    known: int | None  # the same, where the host has it
    probs: Tensor | None  # (1, vocab) the distribution it was drawn from; None: greedy
    confidence: float | None  # probability of the likeliest token, where the host has it
    best: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their probabilities, where they were asked for


def next_tokens(
    models: Sequence[RowModel], served: PreTrainedModel, prefixes: Sequence[Tensor], best: int = 0
) -> list[NextToken | None]:
    """The token after each prefix (1, L), which is read, of rows with one draft model; None: what it says there is not finite.

    Args:
        served: the module tree that drafts now, see `DraftModel.serving`.
        best: how many of the likeliest other tokens are asked for, where the host has them.
    """
    # The processors may hold tensors on the target's device: theirs is the place to apply them.
    scores = models[0].said(_read(models, served, prefixes)).to(prefixes[0].device)
    kinds = {(model.samples, model.has_processors) for model in models}
    if len(kinds) == 1:
        return _next_of(models, scores, prefixes, best)
    found: list[NextToken | None] = [None] * len(models)
    for kind in sorted(kinds):  # rows of several calls
        alike = [i for i, model in enumerate(models) if (model.samples, model.has_processors) == kind]
        own = _next_of([models[i] for i in alike], scores[alike], [prefixes[i] for i in alike], best)
        for i, token in zip(alike, own, strict=True):
            found[i] = token
    return found


def _next_of(
    models: Sequence[RowModel], scores: Tensor, prefixes: Sequence[Tensor], best: int
) -> list[NextToken | None]:
    """What is chosen by scores (rows, common ids) of rows that are all greedy or all drawn, with processors or without."""
    first, device = models[0], scores.device
    if first.has_processors:
        own = [
            model.processed(row, prefix) for model, row, prefix in zip(models, scores.split(1), prefixes, strict=True)
        ]
        scores = own[0] if len(own) == 1 else torch.cat(own)
    if not first.samples:
        return list(_chosen(scores, None, scores.argmax(-1, keepdim=True), best))
    probs = scores.softmax(-1)
    if not is_host(device):
        # Asking would wait for the device: the uniform distribution takes the place of none, what is drawn from q stays exact.
        uniform = widened(probs.new_full((1, first.common), 1 / first.common), probs.shape[-1], 0.0)
        probs = torch.where(torch.isfinite(probs).all(-1, keepdim=True), probs, uniform)
        return list(_chosen(scores, probs, draw(probs), best))
    finite = [i for i, total in enumerate(probs.sum(-1).tolist()) if math.isfinite(total)]
    found: list[NextToken | None] = [None] * len(models)
    if finite:
        scores, probs = (scores, probs) if len(finite) == len(models) else (scores[finite], probs[finite])
        for i, token in zip(finite, _chosen(scores, probs, draw(probs), best), strict=True):
            found[i] = token
    return found


def _read(models: Sequence[RowModel], served: PreTrainedModel, prefixes: Sequence[Tensor]) -> Tensor:
    """The draft's logits (rows, ids) behind each prefix, from id 0 on."""
    readable = [model.readable(prefix) for model, prefix in zip(models, prefixes, strict=True)]
    shared = models[0].reader.shared
    if shared is not None:
        return shared.scores(served, {model.number: prefix for model, prefix in zip(models, readable, strict=True)})
    found = [model.reader.scores(served, prefix) for model, prefix in zip(models, readable, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _chosen(scores: Tensor, probs: Tensor | None, tokens: Tensor, best: int) -> list[NextToken | None]:
    """What was chosen: tokens (rows, 1) of scores (rows, vocab), drawn from probs or the best."""
    rows = range(len(tokens))
    each = None if probs is None else probs.split(1)
    if not is_host(tokens.device):
        return [NextToken(tokens[i : i + 1], None, None if each is None else each[i], None) for i in rows]
    shares = scores.softmax(-1) if probs is None else probs
    known, confidences = tokens[:, 0].tolist(), shares.amax(-1).tolist()
    likeliest: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if best:
        places = best_tokens(shares, best + 1)
        found = zip(places.tolist(), shares.gather(-1, places).tolist(), strict=True)
        likeliest = [tuple(zip(own, probabilities, strict=True)) for own, probabilities in found]
    drawn = [None] * len(tokens) if each is None else each
    return [NextToken(tokens[i : i + 1], known[i], drawn[i], confidences[i], likeliest[i]) for i in rows]
