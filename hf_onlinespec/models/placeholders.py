"""Tokens that stand for a part of a picture, a video or a sound in a prompt: no text, and nothing that a draft could learn from."""

from __future__ import annotations

from transformers import PretrainedConfig

# What configurations of transformers 5.23 call them; marks of a beginning or an end are ordinary tokens.
NAMES = tuple(f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index"))


def placeholder_tokens(config: PretrainedConfig) -> frozenset[int]:
    """Ids that a model replaces by what it reads of a picture, a video or a sound; none: it reads text alone."""
    found = (vars(config).get(name) for name in NAMES)
    return frozenset(token for token in found if isinstance(token, int))
