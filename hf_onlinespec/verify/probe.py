"""Whether a target computes in one forward over several tokens what it computes token by token, tried once for each model.

Drafting rests on that. Transformers' common models are known to; a class from elsewhere, or a model with a module or a hook from
elsewhere, is tried before its first round: logits of one forward over three tokens against three forwards, to rounding, and once more
after two of the three were rolled back.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .._compat.adapters import activates_lora
from .._compat.alterations import Alterations, alterations
from .._compat.caches import CACHE, fresh_cache, own_way
from .._compat.devices import autocast_inside, matmul_dtypes
from .._compat.modules import modules_of
from .._compat.recurrent import is_recurrent
from .._compat.rollback import rollback_obstacle
from ..errors import UnsupportedError
from ..govern.acceptance import TokenSource
from ..models.placeholders import placeholder_tokens
from ..rounds import Proposal
from ..runtime.failures import kind_and_place
from .inputs import InputNames, given
from .probe_quantized import why_one_by_one
from .target import Verifier

# Families whose classes are compared with plain decoding in tests/test_architectures.py, test_encoder_decoders.py and verify/test_target.py.
KNOWN = """llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 gemma3n phi phi3 phimoe gpt2 gpt_neo gpt_neox
gptj gpt_bigcode gpt_oss opt bloom falcon mpt starcoder2 stablelm olmo olmo2 olmo3 olmoe cohere cohere2 granite granitemoe glm
glm4 smollm3 deepseek_v2 deepseek_v3 llama4 lfm2 codegen biogpt xglm persimmon nemotron exaone4 ernie4_5 seed_oss
llava paligemma qwen2_vl idefics mllama clip siglip
t5 mt5 umt5 bart mbart marian m2m_100 pegasus plbart mvp blenderbot blenderbot_small whisper
led longt5 bigbird_pegasus pegasus_x nllb_moe switch_transformers""".split()
LIBRARIES = ("torch", "peft", "accelerate", "bitsandbytes")
PROMPT_TOKENS = 128  # of the request's last tokens are read; chosen: as long as a usual question
# Largest difference of two logits over the largest logit, by the coarsest numbers that are multiplied. Measured on 60 tiny models:
# 2e-6 in float32, where a fault gives 1e-2 or more; on 40 of them, with operands rounded to the 10 bits of TF32: 7e-4.
TOLERANCE: dict[torch.dtype | str, float] = {torch.float64: 1e-6, torch.float32: 1e-3, "tf32": 1e-2}
MOST_LOGIT = 1e4  # beyond it an id is blocked; chosen: logits of the models measured are below 1e3
TOLERANCE_HALF = 0.1  # bfloat16 has 8 bits, and an expert's router may flip at a tie

# Classes of the modules of a model, and the kinds of its alterations.
Parts = tuple[tuple[weakref.ref[type[nn.Module]], ...], tuple[Any, ...]]
# A recurrent target reads so many tokens more, one by one, before it is tried: behind a prompt of two tokens a state that is left out of
# a longer forward hardly shows. Chosen.
RECURRENT_TOKENS = 12
# Of a recurrent target in full precision. Measured on 19 tiny models: at most 2e-6 where a state enters all tokens of a forward; 2e-4 to
# 3e-3 (Zamba-2, Nemotron-H) where a longer forward goes another way than plain decoding's, 4e-2 or more where the state is left out.
TOLERANCE_RECURRENT = 1e-4
# In any other precision: so many times what one forward over the whole text is apart, and two steps of the numbers. Measured on the same in
# bfloat16: 1.0 times, and 8 to 50 where the state is left out.
TIMES_NOISE = 4
MOST_TRIALS = 8  # of a model whose hooks refer to something else in each request, such as a counter; chosen

# For each model why it is decoded plainly, by what it was made of when it was tried, and by what its alterations referred to. It
# refers to classes weakly: their methods may hold the model.
_tried: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], dict[tuple[Any, ...], str]]] = (
    weakref.WeakKeyDictionary()
)


def why_plain(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> str:
    """Why this request of a target is decoded without drafting; "": it is not.

    Args:
        input_ids: (1, L) the prompt, or its new part.
    """
    known = _as_known(target, model_kwargs)
    if isinstance(known, str) and known:
        return known
    mixes = why_one_by_one(target, input_ids.device)
    if mixes or isinstance(known, str):
        return mixes
    tried, values = known
    try:
        # With dropout two forwards never agree: nothing can be compared, and no two answers need to be the same.
        random = target.training and is_random(target, input_ids, model_kwargs)
        tried[values] = "" if random else _fault(target, input_ids, model_kwargs)
    except Exception as error:  # a class from elsewhere may raise anything, and may yet decode token by token
        reason = f"the target {type(target).__name__} was tried with several tokens at once, and failed: {kind_and_place(error)}"
        if not tells_of_target(error, target, input_ids, model_kwargs):
            return reason
        tried[values] = reason
    return tried[values]


def tells_of_target(error: Exception, target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> bool:
    """Whether what a trial raised is to be remembered of a target; else the next request tries again.

    A lack of memory passes, and a prompt that cannot be read at all (a picture without its placeholder) fails in plain decoding too.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        prompt, kept = own_inputs(target, input_ids, model_kwargs)
        with own_random_numbers(target, input_ids):
            _one_by_one(target, prompt, kept).verify(prompt, guesses(prompt[:, :0]))
    except Exception:  # whatever a class from elsewhere raises
        return False
    return True


def needs_trial(target: PreTrainedModel, model_kwargs: dict[str, Any]) -> bool:
    """Whether `why_plain` would run forwards of its own."""
    return not isinstance(_as_known(target, model_kwargs), str)


def _as_known(
    target: PreTrainedModel, model_kwargs: dict[str, Any]
) -> str | tuple[dict[tuple[Any, ...], str], tuple[Any, ...]]:
    """The answer of `why_plain`, where it is known; else where that of a trial belongs: results by the values that they are for."""
    extras = given(model_kwargs) - InputNames.of(target).text
    if extras and vars(target.config.get_text_config(decoder=True)).get("cross_attention_layers"):
        return f"the target {type(target).__name__} keeps its pictures in the cache that a round is rolled back in"
    try:
        if activates_lora(target):
            return f"the target {type(target).__name__} has an activated LoRA, which adapts the last tokens of each forward"
        own = own_way(model_kwargs[CACHE], target.config.get_text_config(decoder=True))
        if own:
            return f"{CACHE}: {own}"
        modules, unknown, altered = _looked_at(target)
    except Exception as error:  # what hooks and caches of others refer to may be anything
        return f"whether the target {type(target).__name__} was altered could not be told: {kind_and_place(error)}"
    if not unknown and not altered.kinds:
        return ""
    made_of = (*_parts(modules, altered), target.training, frozenset(extras))
    tried = _tried.setdefault(target, {}).setdefault(made_of, {})
    if altered.values in tried:
        return tried[altered.values]
    if len(tried) >= MOST_TRIALS:
        return next(filter(None, tried.values()), "")
    return tried, altered.values


def parts_of(target: PreTrainedModel) -> Parts:
    """What a target is made of: the classes of its modules, and what was done to them since. It holds no module.

    Where its hooks cannot be looked into, all of them count as the same: `why_plain` decodes such a target without drafting.
    """
    try:
        modules, _, altered = _looked_at(target)
    except Exception:  # what hooks refer to may be anything
        return _classes(modules_of(target)), ("hooks that cannot be looked into",)
    return _parts(modules, altered)


def made_of(target: PreTrainedModel) -> tuple[bool, tuple[Any, ...], tuple[Any, ...]]:
    """Whether a target is transformers' own as it is, of a family that is known; what tells it from what it may become; and what its
    alterations refer to.

    It holds no module. Raises whatever hooks of others raise when they are looked into.
    """
    modules, unknown, altered = _looked_at(target)
    return not unknown and not altered.kinds, (*_parts(modules, altered), target.dtype), altered.values


def _parts(modules: list[nn.Module], altered: Alterations) -> Parts:
    return _classes(modules), altered.kinds


def _classes(modules: list[nn.Module]) -> tuple[weakref.ref[type[nn.Module]], ...]:
    return tuple(weakref.ref(type(module)) for module in modules)


def check_rounds(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Reads the prompt and one token more on a cache of its own, if the target is not known to keep its cache between forwards.

    Raises:
        UnsupportedError: its first forwards show that it cannot be served.
    """
    try:
        _, unknown, altered = _looked_at(target)
        if not unknown and not altered.kinds:
            return
        with torch.inference_mode(False), torch.no_grad():
            prompt, kept = own_inputs(target, input_ids, model_kwargs)
            read_on(_one_by_one(target, prompt, kept), prompt, 2)
    except UnsupportedError:
        raise
    except Exception:  # nothing is known then: the request itself will tell
        return


def _looked_at(target: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module], Alterations]:
    """Its modules, those of them whose classes are not known, and what was altered in it."""
    modules = modules_of(target)
    unknown = [module for module in modules if not _known_module(type(module).__module__)]
    return modules, unknown, alterations(target, modules, unknown)


@functools.cache
def _known_module(name: str) -> bool:
    path = name.split(".")
    if path[:2] == ["transformers", "models"]:
        return path[2] in KNOWN
    return path[0] in ("transformers", *LIBRARIES)


def tolerance(target: PreTrainedModel, device: str) -> float:
    """How far two logits may be apart by rounding alone, in the precision that the target is computed with now.

    Args:
        device: the kind that it computes on; weights that are offloaded lie nowhere between two forwards.
    """
    dtypes: set[torch.dtype | str] = {
        p.dtype for p in target.parameters()
    }  # of quantised weights too, which are multiplied in half precision
    if torch.float32 in dtypes:
        dtypes -= {torch.float32}
        dtypes |= matmul_dtypes(device) | autocast_inside(target)
    return max(TOLERANCE.get(dtype, TOLERANCE_HALF) for dtype in dtypes)


def own_inputs(
    target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The prompt (1, L) of a request and the inputs beside it, for a cache that holds nothing yet."""
    own = {name: value for name, value in model_kwargs.items() if value is not None and name != CACHE}
    names = InputNames.of(target)
    if not set(own) <= names.text:
        return input_ids, own
    # Text: the last of it, without padding, and without a token that opens it: any tokens show a fault.
    mask = own.pop(names.mask, None)
    prompt = input_ids[:, -PROMPT_TOKENS:]
    shown = slice(None) if mask is None else mask[0, -prompt.shape[1] :].bool()
    if isinstance(shown, Tensor) and not bool(shown.any()):  # of padding alone
        shown = slice(None)
    for name in set(own) & set(names.columns):
        column = own.pop(name)
        if column.shape[-1] == input_ids.shape[1]:
            own[name] = column[..., -prompt.shape[1] :][..., shown]
    return prompt[:, shown], own


def guesses(tokens: Tensor, parents: tuple[int, ...] | None = None) -> Proposal:
    """Tokens (1, n) as a proposal: a chain, or a tree of these parents."""
    source = TokenSource("model", 0, (0,))
    return Proposal(tokens, None, ((source,) * tokens.shape[1],), parents=None if parents is None else (parents,))


def off(found: Tensor, expected: Tensor) -> Tensor:
    """How far logits (n, vocab) are apart, over the largest of the expected ones: (n,)."""
    # Ids that a target blocks by a huge or infinite logit are compared as blocked: they would hide all other differences.
    blocked, too = ~(expected.abs() < MOST_LOGIT), ~(found.abs() < MOST_LOGIT)
    differ = (found - expected).abs().masked_fill(blocked | too, 0.0).masked_fill(blocked != too, torch.inf)
    return differ.amax(-1) / expected.abs().masked_fill(blocked, 0.0).amax().clamp_min(torch.finfo(expected.dtype).tiny)


def read_on(
    verifier: Verifier, prompt: Tensor, forwards: int, never: Set[int] = frozenset()
) -> tuple[Tensor, list[Tensor]]:
    """The prompt with as many tokens more, each of a forward of its own; and the logits (1, vocab) of each.

    Args:
        never: ids that are none of these tokens.
    """
    tokens, found = prompt, list[Tensor]()
    for _ in range(forwards):
        logits = verifier.verify(tokens, guesses(prompt[:, :0]))[:, 0]
        found.append(logits)
        said = logits.clone()
        said[:, [token for token in never if token < said.shape[1]]] = -torch.inf
        tokens = torch.cat([tokens, said.argmax(-1, keepdim=True)], dim=-1)
        verifier.keep(tokens)
    return tokens, found


@contextmanager
def own_random_numbers(target: PreTrainedModel, input_ids: Tensor) -> Iterator[None]:
    """Within it a target may draw random numbers: the request's own stay as they are."""
    kind = input_ids.device.type if input_ids.device.type in ("cuda", "xpu") else "cpu"
    devices = {parameter.device for parameter in target.parameters()} | {input_ids.device}
    places = sorted({device.index for device in devices if device.type == kind and device.index is not None})
    with torch.random.fork_rng(places, device_type=kind):
        yield


@contextmanager
def in_evaluation(target: PreTrainedModel) -> Iterator[None]:
    """Within it the target is not in training mode."""
    training = [module for module in target.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_random(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> bool:
    """Whether two forwards over the same tokens differ."""
    prompt, kept = own_inputs(target, input_ids, model_kwargs)
    with own_random_numbers(target, input_ids):
        reads = [_one_by_one(target, prompt, kept).verify(prompt, guesses(prompt[:, :0])) for _ in range(2)]
    return not torch.equal(*reads)


def trial_forwards(target: PreTrainedModel) -> int:
    """Of one trial of a target that is not in training mode."""
    return 8 + RECURRENT_TOKENS if is_recurrent(target) else 7


def _most_of_recurrent(target: PreTrainedModel, most: float, noise: float) -> float:
    """How far logits of a recurrent target may be apart.

    Args:
        most: of any target, see `tolerance`.
        noise: how far those of one forward over the whole text are.
    """
    if most <= TOLERANCE[torch.float32]:
        return min(most, TOLERANCE_RECURRENT)
    return min(most, max(TIMES_NOISE * noise, 2 * torch.finfo(torch.bfloat16).eps))


def _new_cache(target: PreTrainedModel) -> dict[str, Any]:
    return {CACHE: fresh_cache(target.config)}


def _one_by_one(target: PreTrainedModel, prompt: Tensor, kept: dict[str, Any]) -> Verifier:
    """Reads as plain decoding does, on a cache of its own."""
    return Verifier(target, prompt, GenerationConfig(), kept | _new_cache(target), plain_because="to compare with")


def _fault(target: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> str:
    """What a forward over several tokens gets wrong, on the request's own prompt and a cache of its own; "": nothing."""
    prompt, kept = own_inputs(target, input_ids, model_kwargs)
    one, most = _one_by_one(target, prompt, kept), tolerance(target, input_ids.device.type)
    more = RECURRENT_TOKENS if is_recurrent(target) else 0
    # Behind the prompt no token stands for a part of a picture: there is none to read in its place.
    tokens, singles = read_on(one, prompt, more + 4, placeholder_tokens(target.config))
    obstacle = rollback_obstacle(one.cache)
    if obstacle:
        return f"the target {type(target).__name__} {obstacle}"
    n, singles = prompt.shape[1] + more, singles[more:]
    if more:
        whole = _one_by_one(target, prompt, kept).verify(tokens[:, : n + 1], guesses(tokens[:, n + 1 : n + 3]))[0]
        most = _most_of_recurrent(target, most, float(off(whole, torch.cat(singles[1:])).max()))
    several = Verifier(target, prompt, GenerationConfig(), kept | _new_cache(target))
    several.verify(tokens[:, :n], guesses(prompt[:, :0]))
    several.keep(tokens[:, : n + 1])
    together = several.verify(tokens[:, : n + 1], guesses(tokens[:, n + 1 : n + 3]))[0]  # (3, vocab)
    several.keep(tokens[:, : n + 2])
    again = several.verify(tokens[:, : n + 2], guesses(tokens[:, n + 2 : n + 3]))[0]  # (2, vocab)
    expected = torch.cat(singles[1:])  # (3, vocab)
    for found, place, what in ((together, 0, "one forward over 3 tokens"), (again, 1, "a forward after a rollback")):
        apart = off(found, expected[place:])
        if int((apart > most).sum()) > 1 or not bool(apart.isfinite().all()):
            return (
                f"the target {type(target).__name__} computes something else in {what} than token by token "
                f"(logits off by {float(apart.max()):.2g} of the largest)"
            )
    return ""
