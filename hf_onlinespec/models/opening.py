"""The token that opens every text of some models (BOS, a decoder's start): what is read on its own is given it where the whole text has it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig


def opening_tokens(config: PretrainedConfig, tokens: Sequence[int]) -> list[int]:
    """The token that a text (L,) opens with, if it is the one that opens every text of this model, or none.

    A part of a text that is read on its own is given it: models that were trained with it (Gemma, Llama 3) compute something else
    without. Of the models that name one some (Qwen 2) never see it: so the text decides.
    """
    stated = vars(config.get_text_config(decoder=True))
    openings = {stated.get("bos_token_id"), stated.get("decoder_start_token_id")} - {None}
    return [int(tokens[0])] if len(tokens) and int(tokens[0]) in openings else []
