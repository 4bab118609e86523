"""What of a request is refused before it waits for its turn."""

from __future__ import annotations

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .._compat.models import max_positions
from ..commit.base import Draft
from ..errors import ConfigError
from ..generation.setting import wanted, wanted_adapter
from ..verify.checks import check_adapters

NEW_TOKENS = 1024  # of an answer whose length nobody states; as transformers' handlers have it


class RequestError(Exception):
    """A request that is answered with an error; its text goes to the client alone, never into a log."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def check_adapter(draft: Draft, gen_config: GenerationConfig) -> None:
    """Refuses an adapter that the draft neither has nor makes. Raises RequestError."""
    name = wanted_adapter(gen_config)
    if isinstance(name, list):
        raise RequestError(400, "adapter: a request has one prompt, and takes one name.")
    try:
        check_adapters(draft, (name,), wanted(gen_config) is not False)
    except ConfigError as error:
        raise RequestError(400, str(error)) from error


def check(inputs: dict[str, Tensor], gen_config: GenerationConfig, target: PreTrainedModel, streams: bool) -> None:
    """Refuses what could not be generated, before it waits for its turn; shortens an answer that would not fit.

    Raises:
        RequestError: the prompt is empty or too long, or a setting is none that `generate` takes.
    """
    prompt_tokens, longest = inputs["input_ids"].shape[-1], max_positions(target.config)
    if prompt_tokens == 0:
        raise RequestError(400, "The prompt has no tokens.")
    if prompt_tokens >= longest:
        raise RequestError(
            400, f"The prompt has {prompt_tokens} tokens: the model takes {longest} together with the answer."
        )
    if gen_config.max_new_tokens is None and gen_config.max_length is None:  # a configuration of the request's own
        gen_config.max_new_tokens = NEW_TOKENS
    most = gen_config.max_new_tokens
    if most is not None:
        if most < 1:
            raise RequestError(400, f"The answer may have {most} tokens (max_tokens): expected at least 1.")
        gen_config.max_new_tokens = min(most, longest - prompt_tokens)
    if streams and gen_config.num_beams not in (None, 1):
        raise RequestError(400, f"num_beams={gen_config.num_beams}: a stream takes 1. Send it without stream.")
    if wanted(gen_config) not in (None, True, False):
        raise RequestError(400, "onlinespec: expected true or false; how this server drafts is not a request's to say.")
    if not gen_config.sequence_bias:  # an empty logit_bias is none
        gen_config.sequence_bias = None
    penalty = gen_config.repetition_penalty
    if penalty is not None and not penalty > 0:
        raise RequestError(
            400, f"repetition_penalty={penalty}: expected more than 0 (frequency_penalty: more than -1)."
        )
    gen_config.return_dict_in_generate = False  # the handlers take tokens
    stop = gen_config.stop_strings
    if stop is not None and not (isinstance(stop, str) or (stop and all(isinstance(one, str) for one in stop))):
        raise RequestError(400, "stop: expected a text or a list of texts.")
    try:
        gen_config.validate()
    except ValueError as error:
        raise RequestError(400, str(error)) from error
