"""Where a token stands in its text, as numbers beside its features: for a head that reads keys which the target has turned by it.

Features go through memories and batches that know nothing of the text before them. Three digits to the base of 256 are exact in every
type of numbers that models have, bfloat16 included.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE, DIGITS = 256, 3


def digits(places: Tensor) -> Tensor:
    """Of places (B, n), the first token's being 0: (B, n, DIGITS), the highest digit first."""
    places = places.clamp(0, BASE**DIGITS - 1)
    return torch.stack([places // BASE**power % BASE for power in reversed(range(DIGITS))], dim=-1)


def places_of(numbers: Tensor) -> Tensor:
    """The inverse of `digits`: (B, n) whole numbers."""
    powers = torch.tensor([BASE**power for power in reversed(range(DIGITS))], device=numbers.device)
    return (numbers.long() * powers).sum(-1)


def with_places(features: Tensor, first: int) -> Tensor:
    """Features (B, n, width) of tokens that follow each other from place `first` on, with their digits: (B, n, width + DIGITS)."""
    places = torch.arange(first, first + features.shape[1], device=features.device)
    numbers = digits(places[None]).to(features.dtype).expand(len(features), -1, -1)
    return torch.cat([features, numbers], dim=-1)
