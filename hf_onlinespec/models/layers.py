"""Which layers of a draft carry an adapter: those that are what their class and their name say."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._compat.adapters import expert_names
from ..errors import DraftError
from .borrow import is_plain
from .encoders import encoder_of, inputs_without_source, writing_embedding

FORWARD = "its forward is not W x"
COMPUTED = "its weight is computed at every forward"
# What a draft head names its main input: hidden states of its target go with the tokens, so that PEFT's wrapper of causal language
# models does not call it, and a trial on tokens alone is none.
HEAD_INPUT = "tokens"
# What T5 and its kin add to attention by distance, a number per head: all that their decoders know of positions. A draft whose bias
# stays as it was hardly learns more than what follows the last token: LOG 2026-11-27 "The encoder–decoder pair's draft learns positions".
POSITION_BIAS = ".relative_attention_bias"
EXPERT = "PEFT takes its name for an expert's weights"
ROWS = "its rows are not those of the batch, which an ensemble's gate has to follow"


def adaptable_layers(model: PreTrainedModel) -> list[str]:
    """Names of all layers that get an adapter by default: linear layers, the token embedding, the head and T5's position bias.

    Of an encoder none: what it has read is then read once in a request, whatever is learned meanwhile, and a target's encoder can
    be shared.
    """
    return choose_layers(model, None)[0]


def choose_layers(model: PreTrainedModel, wanted: Collection[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of the layers that carry an adapter; and the layers that are left out, with the reason of each.

    Args:
        wanted: layer names (full, or their last part); None: see `adaptable_layers`.
    """
    encoder = encoder_of(model)
    embedding = writing_embedding(model)
    encodes = set() if encoder is None else set(encoder.modules())
    chosen: list[str] = []
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        if wanted is None:
            learns = isinstance(module, nn.Linear | Conv1D) or (
                isinstance(module, nn.Embedding) and (module is embedding or name.endswith(POSITION_BIAS))
            )
            asked = module not in encodes and learns
        else:
            asked = name in wanted or name.endswith(tuple(f".{part}" for part in wanted))
        if asked:
            reason = _unfit(module)
            if reason is None:
                chosen.append(name)
            else:
                left_out[name] = reason
    experts = expert_names(model, {name.rpartition(".")[2] for name in chosen})
    left_out |= {name: EXPERT for name in chosen if name.rpartition(".")[2] in experts}
    return [name for name in chosen if name not in left_out], left_out


def adapted_layers(
    model: PreTrainedModel, wanted: Collection[str] | None, blocks: int
) -> tuple[list[str], dict[str, str]]:
    """The same for an adapter of several blocks, whose gate follows the rows of the batch.

    Args:
        model: is tried on a few tokens where there are several blocks.
        blocks: how many adapters stand side by side.
    """
    names, left_out = choose_layers(model, wanted)
    # Draft heads are ours, and their rows those of the batch in every layer. A trial of one step would leave out what Hydra drafts
    # its second token with.
    if blocks > 1 and model.main_input_name != HEAD_INPUT:
        follow = follows_batch(model, names)
        left_out |= {name: ROWS for name in names if name not in follow}
    return [name for name in names if name not in left_out], left_out


def _unfit(module: nn.Module) -> str | None:
    """Why a layer can carry no adapter; None: it can, or PEFT has to say."""
    if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        return None
    if "weight" not in module._parameters:  # parametrizations, weight_norm
        return COMPUTED
    own = type(module).forward
    if own in (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward) or not is_plain(module.weight):
        return None  # quantised layers have forwards of their own, and PEFT has adapters for them
    return None if _is_linear(module) else FORWARD


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a layer with a forward of its own still computes what its weights say, tried on two rows."""
    weight = module.get_parameter("weight")
    bias = vars(module)["_parameters"].get("bias")
    if isinstance(module, nn.Embedding):
        rows = torch.arange(2, device=weight.device).clamp_max(len(weight) - 1)[None]
        scale = dict(module.named_buffers(recurse=False)).get("embed_scale", vars(module).get("embed_scale", 1.0))
        expected = F.embedding(rows, weight) * scale
    else:
        matrix = weight.T if isinstance(module, Conv1D) else weight
        rows = torch.linspace(-1, 1, 2 * matrix.shape[1], device=weight.device).view(1, 2, -1).to(weight.dtype)
        expected = F.linear(rows, matrix, bias)
    try:
        found = module(rows)
    except Exception:  # it takes other arguments than a linear layer does: anything may come of that
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def follows_batch(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """The layers whose rows are those of the batch, one sequence after the other: (batch, …) or (batch · length, …).

    Tried on two sequences together and alone. Experts that see a selection of the tokens are not among them, nor is what
    was not called.

    Raises:
        DraftError: the model's forward does.
    """
    vocab = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.arange(1, 7, device=model.device).remainder(vocab).view(2, 3)
    modules = dict(model.named_modules())
    seen: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for batch in (tokens[:1], tokens[1:], tokens):
        handles = []
        for name in names:
            seen[name].append([])
            handles.append(modules[name].register_forward_pre_hook(_collector(seen[name][-1])))
        try:
            model(**inputs_without_source(model, batch), use_cache=False)
        except Exception as error:  # as in plain.check_cache: whatever it raises here, it would raise at every step
            raise DraftError(
                f"The draft {type(model).__name__} cannot read two sequences, which the experts of an ensemble need: "
                f"{type(error).__name__}: {error}. Use another draft or another learner."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    return {name for name, runs in seen.items() if runs[0] and _stacks(*runs)}


def _collector(into: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        into.append(args[0] if args else torch.zeros(0))

    return collect


def _stacks(first: list[Tensor], second: list[Tensor], both: list[Tensor]) -> bool:
    """Whether what a layer was given for both sequences is what it was given for each of them, in this order."""
    if not len(first) == len(second) == len(both):
        return False
    for a, b, ab in zip(first, second, both, strict=True):
        shared = ab.shape == a.shape and len(ab) == 1 and torch.equal(a, b)  # positions: the same for every row
        if not shared:
            if len(ab) != 2 * len(a) or a.shape != b.shape:
                return False
            if not torch.allclose(ab.float(), torch.cat([a, b]).float(), rtol=1e-2, atol=1e-3):
                return False
    return True


def describe(left_out: dict[str, str]) -> str:
    """The layers that are left out, a reason at a time; each by the last part of its name."""
    reasons: dict[str, dict[str, int]] = {}
    for name, reason in left_out.items():
        names = reasons.setdefault(reason, {})
        last = name.rpartition(".")[2]
        names[last] = names.get(last, 0) + 1
    return "; ".join(
        f"{', '.join(f'{name} ×{n}' if n > 1 else name for name, n in names.items())} ({reason})"
        for reason, names in reasons.items()
    )
