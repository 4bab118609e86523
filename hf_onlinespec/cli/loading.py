"""Models, tokenizers and drafts, loaded as an option names them, on the best device and in the best dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from transformers import (
    AutoConfig,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._compat.models import auto_class, placed
from ..draft import OnlineDraft
from ..errors import ConfigError, DraftError
from ..heads.reading import check_head
from ..models.identity import OF_TARGETS
from ..models.tokenizer_pair import retokenizer_of
from ..runtime.failures import is_out_of_memory
from ..share.base_models import why_not_loaded
from ..share.folder import is_artifact
from ..share.heads import head_folder, names_assistant, names_head
from ..share.loading import NamedBase, base_of, draftable, is_early_exit, locate
from .common import AUTO


def best_device(wanted: str | None = None) -> torch.device:
    """The device of `--device`; without it an accelerator where there is one, else the CPU. Raises ConfigError."""
    if wanted is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # one that holds no numbers, "meta", has none to give
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second from a build of torch without it
        raise ConfigError(f"--device {wanted}: torch cannot use it here. Use cpu, for one.") from error
    return device


def best_dtype(wanted: str, config: PretrainedConfig, device: torch.device) -> torch.dtype | str:
    """The dtype of `--dtype`; for "auto" the checkpoint's own, with two exceptions.

    float16 becomes float32 on a CPU, most of which have no arithmetic for it. A checkpoint that states none is read in
    bfloat16 on an accelerator and in float32 on a CPU; a quantized one decides itself ("auto").
    """
    if wanted != AUTO:
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if "quantization_config" in vars(config):
        return AUTO
    stated = config.get_text_config().dtype or config.dtype
    on_cpu = device.type == "cpu"
    if stated is None:
        return torch.float32 if on_cpu else torch.bfloat16
    stated = getattr(torch, stated) if isinstance(stated, str) else stated
    return torch.float32 if on_cpu and stated == torch.float16 else stated


def load_config(option: str, name: str, encoder_decoders: bool = False) -> PretrainedConfig:
    """The configuration of a whole model. Raises ConfigError in one line, named after the option.

    Args:
        encoder_decoders: whether the command runs these too.
    """
    if names_head(name):  # its configuration is that of a model with one layer, which transformers would build
        way = "Name a whole model." if option == "--draft" else "A head is given as --draft, beside its target."
        raise ConfigError(f"{option} {name}: a draft head, and no whole model. {way}")
    config: PretrainedConfig = _loaded(AutoConfig, option, name)
    if config.is_encoder_decoder and not encoder_decoders:
        way = "this command runs causal language models. hf-onlinespec try and run serve it; from Python, generate(..., onlinespec=True) and attach(model)."
        if option == "--draft":
            way = "TARGET is none: it drafts for encoder–decoders alone. Name a causal language model."
        raise ConfigError(f"{option} {name}: an encoder–decoder ({config.model_type}), and {way}")
    if encoder_decoders and auto_class(config) is AutoModelForSpeechSeq2Seq:
        raise ConfigError(
            f"{option} {name}: it hears speech ({config.model_type}), and the prompts of this command are texts. From Python, attach(model) "
            "serves its generate and its pipeline."
        )
    return config


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ConfigError in one line, named after the option."""
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, option, name, "tokenizer")
    return tokenizer


def check_template(option: str, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where a model's chat template, if it has one, cannot write a message."""
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "."}], add_generation_prompt=True)
    except Exception as error:  # a template is a program
        raise ConfigError(
            f"{option} {name}: its chat template fails at a plain message ({type(error).__name__}: {error}). Correct it, in "
            "chat_template.jinja or tokenizer_config.json."
        ) from error


def load_model(
    option: str,
    name: str,
    dtype: str = AUTO,
    device: torch.device | None = None,
    encoder_decoders: bool = False,
) -> PreTrainedModel:
    """A language model in evaluation mode, on the device and in the dtype that are best or were asked for.

    Args:
        option: as it stands in errors, such as "--draft".
        dtype: of `--dtype`.
        device: None: the best one.
        encoder_decoders: see `load_config`.

    Raises:
        ConfigError: it cannot be loaded; one line that says why, and for want of memory how much was needed.
    """
    device = best_device() if device is None else device
    config = load_config(option, name, encoder_decoders)
    chosen = best_dtype(dtype, config, device)
    if device.type == "cpu":
        needed, free = _needed_bytes(config, chosen), psutil.virtual_memory().available
        if needed > free:  # Linux may end the process without a word
            print(f"hf-onlinespec: warning: {_memory(option, name, needed, free, chosen)}", file=sys.stderr, flush=True)
    try:
        model, found = _loaded(auto_class(config), option, name, dtype=chosen, output_loading_info=True)
        missing = sorted(found["missing_keys"])
        if missing:
            print(
                f"hf-onlinespec: warning: {option} {name}: {len(missing)} of its weights are not in the checkpoint, "
                f"{missing[0]} for one, and have random values.",
                file=sys.stderr,
                flush=True,
            )
        placed: PreTrainedModel = model.to(device).eval()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        needed = _needed_bytes(config, chosen)
        raise ConfigError(_memory(option, name, needed, free_bytes(device), chosen)) from error
    return placed


def load_pair(
    target: str,
    draft: str | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    device: torch.device,
    base: str | None = None,
) -> tuple[PreTrainedModel, OnlineDraft | None]:
    """The models of TARGET and --draft: a saved draft goes on, an adapter, a model or a head begins a new one.

    Args:
        draft: None: there is none.
        config: of the target, an encoder–decoder's where the command runs these: a draft for another one is refused before weights of the
            target are read.
        tokenizer: of the target; None: there is none.
        base: the model or head that a saved draft has to be made for; None: the one that it names.

    Raises:
        ConfigError, DraftError, ArtifactError, HubError: in one line.
    """
    encodes = bool(config.is_encoder_decoder)
    if draft is None:
        return load_model("TARGET", target, dtype, device, encodes), None
    if is_early_exit(draft) or is_head_for(draft, config, base):
        model = load_model("TARGET", target, dtype, device, encodes)
        return model, OnlineDraft.from_pretrained(draft, base_model=base, target=model)
    found, is_adapter = load_draft_model("--draft", draft, config, tokenizer, dtype, device, base)
    online = OnlineDraft.from_pretrained(draft, base_model=found) if is_adapter else OnlineDraft(found)
    return load_model("TARGET", target, dtype, device, encodes), online


def is_head_for(draft: str, target: PretrainedConfig, base: str | None = None) -> bool:
    """Whether --draft names a head, or what one has learned, and not a model. Arguments are those of `load_pair`.

    Raises:
        DraftError: it is a head of another target, or one that is not served.
        ArtifactError, HubError: it is damaged, or not there.
    """
    name, revision = base_of(draft, base)
    folder = head_folder(name, revision)
    if folder is None:
        return name in OF_TARGETS or names_assistant(name, revision)  # its target makes it, or makes a head of it
    try:
        check_head(folder, target)
    except DraftError as error:
        raise DraftError(f"--draft {draft}: {error}") from error
    return True


def load_draft_model(
    option: str,
    name: str,
    target: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    device: torch.device,
    base: str | None = None,
) -> tuple[PreTrainedModel, bool]:
    """The model of a draft without what it learned, and whether the option names more than that: an adapter for it.

    Args:
        target: its configuration: a draft that has no token in common with it is refused before its weights are read.
        tokenizer, base: see `load_pair`.

    Raises:
        ConfigError, DraftError, ArtifactError, HubError: in one line.
    """
    origin = locate(name)
    is_adapter = origin.folder is not None
    if not is_adapter or base is not None:
        name = base if is_adapter and base is not None else name
        encodes = bool(target.is_encoder_decoder)
        config = load_config(option, name, encodes)
        try:
            own = load_tokenizer(option, name)
        except ConfigError:  # it may lie with the target alone
            own = None
        retokenizer_of(target, config, tokenizer, own)
        return load_model(option, name, dtype, device, encodes), is_adapter
    named = NamedBase.of(origin)
    before = named.config()
    if before is not None:
        retokenizer_of(target, before, tokenizer)
    try:
        model = draftable(named.load())
    except DraftError as error:
        why = str(error).partition(" Expected an evolved draft")[0]
        raise DraftError(
            f"{option} {name}: the base of this adapter cannot be loaded: {why} In Python, OnlineDraft.from_pretrained({name!r}, "
            "base_model=...) takes it from another place."
        ) from error
    retokenizer_of(target, model.config, tokenizer)
    return placed(model, device), True


def _loaded(kind: Any, option: str, name: str, what: str = "model", **kwargs: Any) -> Any:
    # Transformers asks the user whether code that a model brings may run; an answer from a pipe would be a message or nothing.
    trusted = None if sys.stdin is not None and sys.stdin.isatty() else False
    try:
        return kind.from_pretrained(name, trust_remote_code=trusted, **kwargs)
    except Exception as error:  # files from elsewhere may make any of the libraries raise anything
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{option} {name}: this model brings code of its own, which is not run unasked. If you trust it, load the model "
                "in Python with trust_remote_code=True and use hf_onlinespec.attach."
            ) from error
        if is_artifact(Path(name)):
            place = "" if option == "--draft" else " It is given as --draft."
            raise ConfigError(f"{option} {name}: a saved draft lies there, and no whole model.{place}") from error
        raise ConfigError(f"{option} {name}: {why_not_loaded(error, name, what)}") from error


def _needed_bytes(config: PretrainedConfig, dtype: torch.dtype | str) -> int:
    """Of the weights; 0 where that is not known before they are read: quantized ones, or those of no language model."""
    if not isinstance(dtype, torch.dtype):
        return 0
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except Exception:  # a configuration from elsewhere: loading says what is wrong with it
        return 0
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def _memory(option: str, name: str, needed: int, free: int | None, dtype: torch.dtype | str) -> str:
    has = "" if free is None else f", and {_size(free)} are free"
    words = f"{option} {name}: its weights need {_size(needed)} in {str(dtype).removeprefix('torch.')}{has}."
    if isinstance(dtype, torch.dtype) and dtype.itemsize > 2:
        half = needed // dtype.itemsize * 2
        fits = "" if free is None else ", which would do" if half < free else ", still too much"
        return f"{words} With --dtype bfloat16 they need {_size(half)}{fits}."
    return f"{words} No smaller dtype would do: take a smaller or a quantized model, or another --device."


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
