"""An evolved draft exported as a plain language model, which neither this package nor PEFT is needed to load.

transformers takes it as `assistant_model`, vLLM and SGLang as a draft model, llama.cpp's converter as a model like any other.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._compat.adapters import base_of
from .._compat.models import commit_hash, model_name, weight_of
from ..adapt.service import LearningService
from ..errors import ArtifactError, DraftError, brief
from ..heads.base import Head
from ..heads.writing import write_head
from ..models.identity import TOKENIZER, tokenizer_file
from ..models.vocabulary import rows
from .audited import AdaptedModel
from .folder import header_of, read_json
from .json_files import MOST_INTEGER
from .targets import Targets

# What may lie beside the first file of a tokenizer.
BESIDE = ("tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
HEADS = ("lm_head.weight", "embed_out.weight")  # how files call a head of its own
# Whose head the servers tie, whatever config.json says.
GEMMA = "vLLM refuses a Gemma whose head is not tied, SGLang leaves the head out"
ALWAYS_TIED = {
    "gpt2": "SGLang leaves the head of a GPT-2 out (vLLM reads it)",
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


class Mergeable(Protocol):
    """A draft, as far as it is exported."""

    learning: LearningService

    targets: Targets

    @property
    def model(self) -> PeftModel: ...
    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def trainable(self) -> AdaptedModel: ...


def merge_and_export(
    draft: Mergeable,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    form: str | None = None,
) -> None:
    """Writes the draft as it serves now, merged into its base: config, generation config, safetensors, tokenizer.

    Of a draft head it is an ordinary head folder, which vLLM and SGLang serve.

    Of an ensemble it is what serves, the mixture or the best single row. The sums are made in float32. In a base of half
    precision small changes are then rounded away; `dtype=torch.float32` keeps them, at twice the size. A head that was tied to
    the embedding gets weights of its own where the two have been changed differently.

    Args:
        folder: a new one, or an empty one; it appears when it is complete.
        dtype: of the written weights; None: as the base has them.
        tokenizer: to lie beside the model; None: the files that lie beside the base, if there are any.
        form: of a draft head, see `heads.writing.write_head`; None: as it was read.

    Raises:
        DraftError: the base is quantised, or `form` is not one of this draft's.
        ArtifactError: the folder holds something, or cannot be written.
    """
    folder = Path(folder).absolute()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArtifactError(f"{folder}: not empty. An export is never written over something: name a new folder.")
        head = base_of(draft.model)
        if form is not None and not isinstance(head, Head):
            raise DraftError(
                f"form={brief(form)}: only draft heads have forms. Leave it out: this draft is a whole model."
            )
        aside = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)  # what a process that was killed has left
        aside.mkdir(parents=True)
        try:
            if isinstance(head, Head):
                target = draft.targets.at_hand
                config = None if target is None else target.config
                write_head(head, aside, form, target_config=config, weights=_merged_weights(draft, dtype))
            else:
                _save_model(draft, dtype, tokenizer, aside)
            if folder.exists():
                folder.rmdir()
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: the draft could not be exported ({error}). Name another folder.") from error


@torch.no_grad()
def _merged_weights(draft: Mergeable, dtype: torch.dtype | None) -> dict[str, Tensor]:
    with draft.learning.steps_lock, draft.learning.lock:  # between two gradient steps
        return draft.trainable.adapter.merged_weights(dtype)


def _save_model(
    draft: Mergeable, dtype: torch.dtype | None, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    _merged_model(draft, dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        _copy_tokenizer(draft.config, folder)


@torch.no_grad()
def _merged_model(draft: Mergeable, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of the base's class with the merged weights, to be saved: buffers that no file holds are empty."""
    base, weights = base_of(draft.model), _merged_weights(draft, dtype)
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = _tied(base, weights)
    if (
        base.config.is_encoder_decoder and not config.tie_word_embeddings
    ):  # it ties the embeddings of encoder and decoder, too
        weights = {name: weight.clone() for name, weight in weights.items()}
    in_head, in_embedding = rows(base.get_output_embeddings()), rows(base.get_input_embeddings())
    if in_head is not None and in_head == in_embedding:  # a head that was widened without the configuration
        config.get_text_config().vocab_size = in_head
    with torch.device("meta"):
        model: PreTrainedModel = type(base)(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise DraftError(
            f"{type(base).__name__} has other weights than its configuration describes ({in_head} rows in its head, {in_embedding} in its "
            f"embedding): {error}. Resize it with resize_token_embeddings, and learn anew."
        ) from error
    if config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


def _tied(base: PreTrainedModel, weights: dict[str, Tensor]) -> bool:
    """Whether head and embedding were one weight, and still are equal."""
    names = {id(module): name for name, module in base.named_modules()}
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or weight_of(head).data_ptr() != weight_of(embedding).data_ptr():
        return False
    return torch.equal(*(weights[f"{names[id(module)]}.weight"] for module in (embedding, head)))


def _copy_tokenizer(config: PretrainedConfig, folder: Path) -> None:
    """Copies the tokenizer that lies beside a base."""
    found = tokenizer_file(model_name(config), commit_hash(config))
    if found is None:
        return
    for name in (*TOKENIZER, *BESIDE):
        if (found.parent / name).is_file():
            shutil.copyfile(found.parent / name, folder / name)


def check_export(folder: str | Path, target: PretrainedConfig) -> list[str]:
    """What transformers, vLLM or SGLang would refuse in a draft for this target, or silently do otherwise; []: nothing.

    Only what files tell: whether the two tokenizers agree token by token, and whether a server knows the architecture, is
    theirs to say.

    Raises:
        ArtifactError: there is no config.json, or a weight file is damaged.
    """
    folder, target = Path(folder), target.get_text_config()
    config = read_json(folder / "config.json")
    found = []
    if not config.get("architectures") or not config.get("model_type"):
        found.append(
            f"config.json has architectures={config.get('architectures')}, model_type={config.get('model_type')}."
        )
    if "auto_map" in config:
        found.append(
            "config.json has auto_map: the model brings its own code, which has to be trusted where it is loaded."
        )
    if config.get("dtype") not in ("float32", "float16", "bfloat16"):
        found.append(f"config.json has dtype={config.get('dtype')}: expected a floating-point type.")
    if config.get("vocab_size") != target.vocab_size:
        found.append(f"{config.get('vocab_size')} tokens in the vocabulary, the target has {target.vocab_size}.")
    reads, wanted = (c.get("max_position_embeddings") for c in (config, target.to_dict()))
    if isinstance(reads, int) and isinstance(wanted, int) and reads < wanted:
        found.append(
            f"It reads {reads} tokens, the target {wanted}: give the server at most {reads} as its context length."
        )
    if not any((folder / name).is_file() for name in TOKENIZER):
        found.append("No tokenizer lies beside it: SGLang and llama.cpp look for one. Export with tokenizer=.")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_WEIGHTS)
    if others:
        found.append(f"Weights that are not safetensors: {others}.")
    names = _tensor_names(folder)
    has_head = any(name.endswith(HEADS) for name in names)
    if not names:
        found.append("No safetensors file.")
    elif config.get("tie_word_embeddings") and has_head:
        found.append("tie_word_embeddings is true, but there is a head in the files: servers leave it out.")
    elif not config.get("tie_word_embeddings") and not has_head:
        found.append("tie_word_embeddings is false, but there is no head in the files.")
    elif has_head and (why := ALWAYS_TIED.get(str(config.get("model_type")))) is not None:
        found.append(
            f"It has a head of its own, and {why}. Let the draft learn with target_modules= that "
            "leave out embedding and head: they stay tied."
        )
    return found


def _tensor_names(folder: Path) -> list[str]:
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        names += header_of(folder, path.name, MOST_INTEGER)
    return names
