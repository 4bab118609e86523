"""Classes of transformers 5.24 that can generate and stand in no table of an auto mapping, from tiny configurations.

Each is in no auto mapping, or in one whose table leaves it out. `found` says how a class goes as target of the memory: "served", "served without drafting", or words of the refusal; `reason` why it was
not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from tests.architectures import PLAIN, SERVED
from tests.architectures import tiny as tiny_text
from tests.encoder_decoders import BART, START
from tests.multimodal import tiny

CLASS = re.compile(r"^class (\w+)\(([^)]*)\)", re.MULTILINE)

SPOKEN_BART = {name: ... if value is None else value for name, value in BART.items()}  # as `multimodal.tiny` takes it


@cache
def defined() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The classes of all modelling files of the installed transformers: by name the module, and the names of their bases."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    found = {}
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        for name, bases in CLASS.findall(path.read_text(encoding="utf-8")):
            found[name] = module, tuple(base.strip().rpartition(".")[2] for base in bases.split(","))
    return found


def generates(name: str) -> bool:
    """Whether a class of that name has transformers' `generate`."""
    return name == "GenerationMixin" or any(
        generates(base) for base in defined().get(name, ("", ()))[1] if base != name
    )


def text(n: int) -> Tensor:
    return torch.randint(8, 64, (1, n), generator=torch.Generator().manual_seed(5))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# What a class is given, by a word.
GIVEN: dict[str, Callable[[], dict[str, Tensor]]] = {
    "text": lambda: {"input_ids": text(10)},
    "frames": lambda: {"input_features": noise(1, 40, 8), "attention_mask": torch.ones(1, 40, dtype=torch.long)},
    "speech": lambda: {"input_values": noise(1, 2000)},
    "picture": lambda: {"pixel_values": noise(1, 3, 16, 16)},
    "patches": lambda: {"flattened_patches": torch.cat([torch.ones(1, 6, 2), noise(1, 6, 3 * 16 * 16)], dim=-1)},
}


@dataclass(frozen=True)
class Other:
    """A class, what it is given, and how it goes."""

    name: str
    found: str
    given: str
    arguments: dict[str, Any]
    reason: str
    every_run: bool

    def build(self) -> PreTrainedModel:
        """In float32, without a token that ends an answer."""
        kind: Any = getattr(importlib.import_module(defined()[self.name][0]), self.name)
        torch.manual_seed(0)
        parts = PARTS.get(self.name)
        config = kind.config_class(**tiny(kind.config_class, self.arguments)) if parts is None else parts(kind)
        model: PreTrainedModel = kind(config).float().eval()
        settings = model.generation_config
        assert settings is not None
        settings.eos_token_id = settings.forced_eos_token_id = None
        settings.pad_token_id, settings.decoder_start_token_id = 0, START
        return model


def _other(
    name: str, found: str = SERVED, given: str = "text", reason: str = "", every_run: bool = False, **arguments: Any
) -> Other:
    return Other(name, found, given, arguments, reason, every_run)


def _bert(decodes: bool) -> PretrainedConfig:
    more = {"add_cross_attention": True} if decodes else {"is_decoder": None}
    return CONFIG_MAPPING["bert"](**tiny_text("bert", **more))


SPEECH: dict[str, Any] = {
    "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "num_feat_extract_layers": 2,
}  # fmt: skip


def _encoder(model_type: str, **more: Any) -> PretrainedConfig:
    kind: Any = CONFIG_MAPPING[model_type]
    return kind(**tiny(kind, more))  # type: ignore[no-any-return]


PARTS: dict[str, Callable[[Any], PretrainedConfig]] = {
    "EncoderDecoderModel": lambda kind: kind.config_class.from_encoder_decoder_configs(_bert(False), _bert(True)),
    "SpeechEncoderDecoderModel": lambda kind: kind.config_class.from_encoder_decoder_configs(
        _encoder("wav2vec2", **SPEECH), _bert(True)
    ),
    "VisionEncoderDecoderModel": lambda kind: kind.config_class.from_encoder_decoder_configs(
        _encoder("vit"), _bert(True)
    ),
}

CTC = "it says all tokens in one forward (CTC), and its `generate` decodes nothing token by token"
CODES = "it writes the codes of a sound, no text"
PART = "a part of another model, which runs it by itself"
PICTURES = "it writes the codes of a picture, no text"
OWN = "its `generate` drives a text decoder inside of it, with encoder outputs of its own"
SOUND = dict(speech_encoder_layers=1, speech_encoder_attention_heads=4, speech_encoder_intermediate_size=32, t2u_vocab_size=96,
             t2u_encoder_layers=1, t2u_decoder_layers=1, t2u_encoder_ffn_dim=32, t2u_decoder_ffn_dim=32, t2u_encoder_attention_heads=4,
             t2u_decoder_attention_heads=4, feature_projection_input_dim=8, conv_depthwise_kernel_size=3)  # fmt: skip
PARAKEET = {"subsampling_conv_channels": 8}

# fmt: off
OTHERS = [
    _other("BarkCausalModel", reason=PART),
    _other("BarkCoarseModel", reason=CODES),
    _other("BarkModel", reason=CODES),
    _other("BarkSemanticModel", reason=CODES),
    _other("BlenderbotForConditionalGeneration", **SPOKEN_BART),
    _other("BlipForQuestionAnswering", reason=OWN),
    _other("BlipTextLMHeadModel"),
    _other("CanaryForConditionalGeneration", given="frames", encoder_config=PARAKEET),
    _other("ClvpForCausalLM", num_mel_attn_blocks=1, n_inner=64, is_decoder=...),
    _other("ClvpModelForConditionalGeneration", reason=CODES),
    _other("CohereAsrForConditionalGeneration", given="frames", encoder_config=PARAKEET),
    _other("CsmDepthDecoderForCausalLM", reason=PART),
    _other("EncoderDecoderModel", every_run=True),
    _other("Ernie4_5_VL_MoeForConditionalGeneration", reason="another name of Ernie4_5_VLMoeForConditionalGeneration"),
    _other("FlaubertWithLMHeadModel"),
    _other("Florence2ForConditionalGeneration", reason="its vision tower has settings by stage; no tiny one was found"),
    _other("GPT2DoubleHeadsModel"),
    _other("GlmImageForConditionalGeneration", reason=PICTURES),
    _other("GraniteSpeech5ForCTC", reason=CTC),
    _other("ImageGPTForCausalImageModeling"),
    _other("Kosmos2TextForCausalLM"),
    _other("Kosmos2_5TextForCausalLM"),
    _other("LasrForCTC", reason=CTC),
    _other("MarianMTModel", **SPOKEN_BART),
    _other("MoonshineForConditionalGeneration", given="speech", encoder_num_hidden_layers=1, decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4, pad_token_id=0),
    _other("MoonshineStreamingForConditionalGeneration", found=PLAIN, given="speech", num_key_value_heads=4, decoder_start_token_id=START),
    _other("MoshiDepthDecoder", reason=PART),
    _other("MoshiForConditionalGeneration", reason=CODES),
    _other("MusicgenForConditionalGeneration", reason=CODES),
    _other("MusicgenMelodyForConditionalGeneration", reason=CODES),
    _other("OmniASRForCTC", reason=CTC),
    _other("PPFormulaNetForConditionalGeneration", reason="its vision tower has fixed sizes; no tiny one was found"),
    _other("ParakeetForCTC", reason=CTC),
    _other("Pix2StructForConditionalGeneration", given="patches", text_config=dict(d_kv=8, d_ff=64, use_cache=True), vision_config=dict(d_kv=8, d_ff=64, patch_embed_hidden_size=768, seq_len=32, initializer_range=0.3)),
    _other("Pop2PianoForConditionalGeneration", reason="it writes the notes of a piano, no text"),
    _other("Qwen2_5OmniTalkerForConditionalGeneration", reason=CODES),
    _other("Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration", reason=PART),
    _other("Qwen3OmniMoeTalkerForConditionalGeneration", reason=CODES),
    _other("RagTokenForGeneration", reason="its `generate` mixes what several documents say at each token"),
    _other("SeamlessM4TForSpeechToSpeech", reason=CODES),
    _other("SeamlessM4TForSpeechToText", given="frames", **SOUND),
    _other("SeamlessM4TForTextToSpeech", reason=CODES),
    _other("SeamlessM4TForTextToText", **SOUND),
    _other("SeamlessM4TModel", reason=CODES),
    _other("SeamlessM4TTextToUnitForConditionalGeneration", reason=PART),
    _other("SeamlessM4Tv2ForSpeechToSpeech", reason=CODES),
    _other("SeamlessM4Tv2ForSpeechToText", given="frames", **SOUND),
    _other("SeamlessM4Tv2ForTextToSpeech", reason=CODES),
    _other("SeamlessM4Tv2ForTextToText", **SOUND),
    _other("SeamlessM4Tv2Model", reason=CODES),
    _other("SeamlessM4Tv2TextToUnitForConditionalGeneration", reason=PART),
    _other("Speech2TextForConditionalGeneration", given="frames", input_feat_per_channel=8, conv_channels=8, max_source_positions=64, max_target_positions=64),
    _other("SpeechEncoderDecoderModel", given="speech"),
    _other("SpeechT5ForSpeechToText", given="speech", **SPEECH),
    _other("T5Gemma2ForConditionalGeneration", found=PLAIN, vocab_size=96, encoder={"text_config": {"vocab_size": 96}, "vision_config": {"model_type": "siglip_vision_model"}}),
    _other("T5GemmaForConditionalGeneration", vocab_size=96),
    _other("UdopForConditionalGeneration", reason="it reads no text without the picture of a page"),
    _other("VisionEncoderDecoderModel", given="picture"),
]
# fmt: on
