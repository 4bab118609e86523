"""A lookahead that the user has fixed, and what else users say about drafting that the governor decides here.

transformers' names are honoured beside ours. The first of these that is given holds:

1. `num_assistant_tokens` of the call: an argument of `generate`, its `generation_config`, or the target's own;
2. `OnlineSpecConfig.lookahead`, where it is a number;
3. `num_assistant_tokens` of the draft's `generation_config`, from which transformers itself takes it;
4. "auto": the governor decides from measured times.
"""

from __future__ import annotations

from transformers import GenerationConfig

from .._compat.generation import given
from ..config import OnlineSpecConfig
from ..errors import ConfigError

TOKENS, SCHEDULE, CONFIDENCE = "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"


def fixed_lookahead(call: GenerationConfig, settings: OnlineSpecConfig, draft: GenerationConfig | None) -> int | None:
    """Draft tokens per round as the user has fixed them; None: "auto".

    Args:
        draft: the draft's `generation_config`; None: the memory drafts alone.

    Raises:
        ConfigError: `num_assistant_tokens` is no whole number of at least 1.
    """
    asked = given(call, TOKENS, prepared=True)
    if asked is not None:
        return _checked(asked, "in the call or in the target's generation_config")
    if isinstance(settings.lookahead, int):
        return settings.lookahead
    own = None if draft is None else given(draft, TOKENS, prepared=False)
    return None if own is None else _checked(own, "in the draft's generation_config")


def _checked(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{TOKENS}={value!r} {where}: expected a whole number, at least 1, of draft tokens per round. Leave it out, and the "
            "governor decides; leave out the draft to decode without one."
        )
    return value


def replaced(call: GenerationConfig, draft: GenerationConfig | None, lookahead: int | None) -> str | None:
    """What to tell a user whose schedule or confidence threshold is not used; None: there is none, or it changes nothing."""
    asked = {}
    for name in (SCHEDULE, CONFIDENCE):
        value = given(call, name, prepared=True)
        if value is None and draft is not None:
            value = given(draft, name, prepared=False)
        if value is not None:
            asked[name] = value
    if lookahead is not None:  # what keeps the number as it is changes nothing
        asked = {name: value for name, value in asked.items() if value not in ("constant", 0)}
    if not asked:
        return None
    names = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    instead = (
        "the governor decides from measured times and acceptance how far to draft; num_assistant_tokens= fixes it"
        if lookahead is None
        else f"{lookahead} tokens are drafted in every round; without a fixed number the governor decides"
    )
    return f"{names}: not used by a learning draft. Instead, {instead}."
