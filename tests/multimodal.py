"""Every class of transformers 5.24 that reads pictures, videos or sounds and writes text, from a tiny configuration.

One row for each model type of the mappings of `AutoModelForMultimodalLM`, `AutoModelForSpeechSeq2Seq` and `AutoModelForSeq2SeqLM` that is no
encoder–decoder: those have a table of their own. `shown` says what
the model is shown beside text: one of those in
`shown.py`. `target` says how it goes, as in `tests/architectures.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import modeling_auto

from tests.architectures import PLAIN, SERVED, TINY, VOCAB
from tests.shown import AUDIO, IMAGE, SHOWN, SIDE_BY_SIDE, START, VIDEO, text

# Some that read sounds stand among those of speech, or of sequences, alone.
CLASSES = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
)
TABLE_OF = "5.24"  # the release of transformers whose classes are listed
# Values for the fields of those names, beside `architectures.TINY`.
SMALL: dict[str, Any] = dict(
    image_size=16, patch_size=8, depth=1, embed_dim=32, num_channels=3, temporal_patch_size=2, projection_dim=32,
    num_mel_bins=8, output_dim=32, out_hidden_size=32, spatial_merge_size=2, image_token_id=IMAGE, image_token_index=IMAGE,
    video_token_id=VIDEO, video_token_index=VIDEO, audio_token_id=AUDIO, audio_token_index=AUDIO,
    vision_start_token_id=START, vision_end_token_id=3,
)  # fmt: skip
WIDE = {"sliding_window": 256, "attention_chunk_size": 256}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}


@dataclass(frozen=True)
class Reader:
    """How to build a tiny model, what it is shown, and how it is served."""

    model_type: str
    shown: str  # a key of SHOWN; "": text alone
    target: str  # "served", "served without drafting", or words of the refusal
    arguments: dict[str, Any]  # for the configuration, beside TINY and SMALL; ... for one that must stay away
    reason: str = ""  # why nothing can be asked of it
    every_run: bool = False  # among those that run without the marker
    together: str = ""  # how two prompts in one call go, as `target`; "": as one
    alone: bool = True  # whether it reads text alone
    inner: str = ""  # the part that writes, to which its own `generate` hands the call; "": itself
    call: Mapping[str, Any] = field(default_factory=dict)  # for `generate`, beside the prompt
    seen: str = ""  # how it goes with what it is shown, as `target`; "": as text alone
    places: int | None = None  # tokens that stand for what it is shown; None: as many as it makes vectors of it

    @property
    def name(self) -> str:
        """Of its class."""
        return CLASSES[self.model_type]

    def build(self, wide: bool = False) -> PreTrainedModel:
        """The model; `wide`: with windows that no request comes to the end of."""
        config = CONFIG_MAPPING[self.model_type]
        torch.manual_seed(0)
        arguments = tiny(config, self.arguments, TINY | SMALL | (WIDE if wide else {}))
        model: PreTrainedModel = getattr(transformers, self.name)(config(**arguments))
        model = model.float().eval()
        if self.inner == "thinker":
            model.speaker_map = {"Chelsie": {}}  # voices are loaded with the weights
        for speaker in {model, self.writer(model)}:
            assert speaker.generation_config is not None
            speaker.generation_config.eos_token_id, speaker.generation_config.pad_token_id = None, 0
        return model

    def writer(self, model: PreTrainedModel) -> PreTrainedModel:
        """The part of the model that writes."""
        return getattr(model, self.inner) if self.inner else model

    def prompts(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Two prompts, of which the first one is padded, each with what it is shown."""
        one = self.prompt(model) if self.shown else {"input_ids": text(7)}
        tokens = one["input_ids"]
        longer = torch.cat([tokens[:, :-3], text(6)[:, 2:], tokens[:, -3:]], dim=-1)
        padding = tokens.new_zeros(1, longer.shape[1] - tokens.shape[1])
        both = torch.cat([torch.cat([padding, tokens], dim=-1), longer])
        mask = torch.ones_like(both)
        mask[0, : padding.shape[1]] = 0
        shown = {
            name: torch.cat(
                [value, value / 2 if value.is_floating_point() else value],
                dim=-1 if self.shown == SIDE_BY_SIDE and name == "pixel_values" else 0,
            )
            for name, value in one.items()
            if name in SHOWN[self.shown]()
        }
        return {"input_ids": both, "attention_mask": mask} | shown | types_of(model, both)

    def prompt(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Two tokens, what it is shown, five tokens."""
        shown = SHOWN[self.shown]()
        heard = any(name.startswith("input_") for name in shown)
        places = self._counted(model, shown, heard) if self.places is None else self.places
        token = AUDIO if heard else IMAGE
        tokens = torch.cat([text(2), torch.full((1, places), token), text(5)], dim=-1)
        return {"input_ids": tokens} | shown | types_of(model, tokens)

    def _counted(self, model: PreTrainedModel, shown: dict[str, Tensor], heard: bool) -> int:
        """The vectors that the model makes of what it is shown."""
        reads = "get_audio_features" if heard else "get_image_features"
        part = next(part for part in (model, model.base_model, self.writer(model)) if reads in dir(type(part)))
        with torch.no_grad():
            return _places(getattr(part, reads)(**shown))


def types_of(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Which tokens stand for a picture, where a model is told: it counts positions of time, height and width by it."""
    asked, picture = inspect.signature(model.forward).parameters, tokens == IMAGE
    said = {"mm_token_type_ids": picture.int()} if "mm_token_type_ids" in asked else {}
    if "image_embeds_position_mask" in asked and bool(picture.any()):
        said["image_embeds_position_mask"] = picture.int()
    if model.config.model_type == "mllama" and bool(picture.any()):
        said["cross_attention_mask"] = torch.ones(*tokens.shape, 1, 2)
    if model.config.model_type == "idefics":  # which of the pictures each token sees
        said["image_attention_mask"] = torch.ones(*tokens.shape, 1)
    return said


def _places(features: Any) -> int:
    """Tokens that stand for what was shown: one for each vector."""
    if isinstance(features, list | tuple):
        return sum(map(_places, features))
    if not isinstance(features, Tensor):
        if "deepstack_features" in features and "pooler_output" not in features:
            return _places(features["deepstack_features"][0][1])
        found = features.get("pooler_output")
        return _places(features.last_hidden_state if found is None else found)
    return features.numel() // features.shape[-1]


def tiny(
    kind: type[PretrainedConfig], given: Mapping[str, Any], small: Mapping[str, Any] | None = None, inner: bool = False
) -> dict[str, Any]:
    """Arguments of a small configuration of that class, and of those inside of it.

    Args:
        small: values for the fields of those names; None: TINY and SMALL.
        given: beside them; those of an inner configuration are a dict, with its `model_type` where any may stand there.
    """
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    small = TINY | SMALL if small is None else small
    found = {name: value for name, value in small.items() if name in known}
    if inner:
        found.pop("is_decoder", None)
    for name, part in kind.sub_configs.items():
        own = given.get(name, {})
        if own is None or own is ...:
            continue
        own = dict(own)
        if part is transformers.AutoConfig:
            default = vars(kind()).get(name)
            model_type = own.pop("model_type", None if default is None else default.model_type)
            if model_type is None:
                continue
            found[name] = {"model_type": model_type} | tiny(CONFIG_MAPPING[model_type], own, small, inner=True)
        else:
            found[name] = tiny(part, own, small, inner=True)
    found |= {name: value for name, value in given.items() if name not in kind.sub_configs or value is None}
    return {name: value for name, value in found.items() if value is not ...}


class Tower(PreTrainedModel):
    """Reads pictures in place of those of the package timm: one convolution."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.patches = torch.nn.Conv2d(3, config.hidden_size, 8, stride=8)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


for _kind in (transformers.TimmWrapperConfig, transformers.Gemma3nVisionConfig):
    Tower.config_class = _kind  # what it is registered for has to be its own
    transformers.AutoModel.register(_kind, Tower, exist_ok=True)


def _row(model_type: str, shown: str = "", target: str = SERVED, reason: str = "", every_run: bool = False, together: str = "", alone: bool = True, inner: str = "", call: Mapping[str, Any] = {}, seen: str = "", places: int | None = None, **arguments: Any) -> Reader:  # fmt: skip
    return Reader(
        model_type,
        shown,
        target,
        arguments,
        reason,
        every_run,
        together or target,
        alone,
        inner,
        call,
        seen or target,
        places,
    )


TEXT = {"generation_mode": "text", "thinker_max_new_tokens": 12}  # an omni model speaks else
EIGHT = {"max_source_positions": 8}
TOKENIZER = {"hidden_size": 32, "num_filters": 4, "downsampling_ratios": [2], "depths": [1, 1]}
ONE_CELL = {"vision_feature_layer": -1, "image_grid_pinpoints": [[16, 16]]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
WINDOW, ITS_WAY, NO_POSITIONS = "a window of tokens", "in a way of its own", "takes no position for each token"
BESIDE = "beside the tokens"
PATCHES, FRAMES, PICTURE = "patches", "patches of two frames", "a picture"
THREE = {"text_config": MROPE}
INKLING: dict[str, Any] = {
    "unpadded_vocab_size": VOCAB,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "n_layers_per_attn_res_block": 1,
    "layer_types": ["hybrid_sliding", "hybrid"],
}

# fmt: off
READERS = [
    _row("apertus1p5", "a picture and its size", text_config={"vocab_size": 96}, image_token_offset=32, audio_token_offset=48, vision_config={"codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}, audio_config={"codebook_size": 16, "codebook_dim": 32}),
    _row("aria", PICTURE, every_run=True, projector_patch_to_query_dict={4: 2}),
    _row("audioflamingo3", "a sound", audio_config=EIGHT),
    _row("aya_vision", PICTURE, every_run=True),
    _row("blip", PICTURE, together=BESIDE, places=0, alone=False, inner="text_decoder", text_config={"encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}),
    _row("blip-2", PICTURE, every_run=True, places=3, alone=False, inner="language_model", num_query_tokens=3, image_token_index=IMAGE, text_config={"word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    _row("chameleon", PICTURE, vocabulary_map={"<image>": IMAGE} | {f"IMGIMG{letter}Z": 40 + i for i, letter in enumerate("ABCDEFGH")}, vq_config={"num_embeddings": 8, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": 16}),
    _row("cohere2_vision", PICTURE),
    _row("cohere_compass", FRAMES, text_config={"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {kind: ROPE for kind in ("sliding_attention", "full_attention")}}),
    _row("cosmos3_edge", PATCHES, **THREE),
    _row("cosmos3_omni", FRAMES),
    _row("deepseek_ocr2", PICTURE, text_config={"mlp_layer_types": ["dense", "sparse"], "pad_token_id": 0}, vision_config={"sam_config": {"output_channels": 8, "downsample_channels": [16, 32], "window_size": 2, "global_attn_indexes": [1], "image_size": 64}, "encoder_config": {}}),
    _row("deepseek_vl", PICTURE),
    _row("deepseek_vl_hybrid", "a picture, coarse and fine", high_res_vision_config={"image_size": 64, "output_channels": 8, "window_size": 2, "global_attn_indexes": [1]}),
    _row("diffusion_gemma", reason="it writes blocks by diffusion, not token by token; `attach` refuses it, and `onlinespec=` changes nothing in its own `generate`"),
    _row("dots3_note", PATCHES, target=PLAIN, together=WINDOW, vision_config={"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32}, audio_config={"adapter_input_size": 32, "adapter_out_dim": 32, "feature_size": 8, "downsample_hidden_size": 8}, text_config={"num_key_value_heads": 4}),
    _row("emu3", "a picture and its size", vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 30} | {f"<|visual token {i:06d}|>": 40 + i for i in range(16)}, vq_config={"embed_dim": 4, "codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": []}),
    _row("ernie4_5_vl_moe", PATCHES, text_config=MROPE | {"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2}),
    _row("evolla", target="use_cache=False"),
    _row("exaone4_5", FRAMES, together="rows of different lengths"),
    _row("fast_vlm", PICTURE, vision_config={"hidden_size": 32}),
    _row("fun_asr_nano", "stacked frames of sound", adaptor_config={"intermediate_size": 8}),
    _row("fuyu", "patches in rows"),
    _row("gemma3", PICTURE, every_run=True, mm_tokens_per_image=4),
    _row("gemma3n", PICTURE, vision_soft_tokens_per_image=4, text_config={"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [64, 64]}),
    _row("gemma4", "patches and their places", text_config={"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0}, vision_config={"pooling_kernel_size": 2}),
    _row("gemma4_unified", "patches and their places", vision_config={"pooling_kernel_size": 1, "mm_embed_dim": 32, "output_proj_dims": 32}),
    _row("git", PICTURE, every_run=True, places=0, seen="a picture among them, which no token stands for", together="rows of different lengths"),
    _row("glm46v", FRAMES, **THREE),
    _row("glm4v", FRAMES, **THREE),
    _row("glm4v_moe", FRAMES, text_config={"rope_parameters": ROPE | {"mrope_section": [1, 0, 1]}}),
    _row("glm5_next", FRAMES, target=PLAIN, together="recurrent state", text_config={"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_kpool": 4, "linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "indexed_attention"]}),
    _row("glm_ocr", FRAMES, **THREE),
    _row("glmasr", "a sound", every_run=True),
    _row("glmga", FRAMES, **THREE),
    _row("got_ocr2", PICTURE),
    _row("granite4_vision", "a picture in two parts", deepstack_layer_map=[[-1, 0]], spatial_target_layers=[0, 1, 0, 1], downsample_rate="1/2", vision_config={"hidden_size": 64}, **ONE_CELL),
    _row("granite_docling", "tiles of a picture", vision_config={"scale_factor": 2}),
    _row("granite_speech", "a spectrogram alone", encoder_config={"input_dim": 8, "hidden_dim": 32, "context_size": 8, "num_layers": 1}, window_size=4, downsample_rate=2, projector_config={"encoder_hidden_size": 32}),
    _row("granite_speech_plus", "a spectrogram alone", encoder_config={"input_dim": 8, "hidden_dim": 32, "context_size": 8, "num_layers": 1}, window_size=4, downsample_rate=2, projector_config={"encoder_hidden_size": 32}),
    _row("hunyuan_vl", PATCHES, text_config={"rope_parameters": ROPE | {"xdrope_section": [1, 1, 1, 1], "alpha": 1.0}}),
    _row("hy_v4_vl", PATCHES, together="in one forward over 3 tokens", target=PLAIN, **THREE),
    _row("hyperclovax_vision_v2", FRAMES, together="rows of different lengths"),
    _row("idefics", "a picture that each token sees", together=BESIDE, every_run=True, places=0, alone=False, alpha_initializer="ones", use_resampler=False),
    _row("idefics2", "one of several pictures", every_run=True),
    _row("idefics3", "one of several pictures"),
    _row("inkling2", "squares of patches", together=WINDOW, text_config=INKLING, vision_config={"text_hidden_size": 32, "projection_hidden_dim": 32, "posemb_grid_size": 4}),
    _row("inkling2_loop", "squares of patches", together=WINDOW, text_config=INKLING | {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2}, vision_config={"text_hidden_size": 32, "projection_hidden_dim": 32, "posemb_grid_size": 4}),
    _row("inkling_mm_model", "cubes of pictures", together=WINDOW, vision_config={"text_hidden_size": 32}),
    _row("instructblip", "a picture and a question of it", places=3, alone=False, inner="language_model", num_query_tokens=3, image_token_index=IMAGE, text_config={"word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    _row("instructblipvideo", "frames and a question of them", places=3, alone=False, inner="language_model", num_query_tokens=3, video_token_index=IMAGE, text_config={"word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    _row("internvl", PICTURE, every_run=True),
    _row("janus", PICTURE, vq_config=None),
    _row("kimi_k25", "square patches", text_config={"num_key_value_heads": 4}, projection_hidden_size=32),
    _row("kosmos-2", "a picture and its places", together=BESIDE, every_run=True, inner="text_model", latent_query_num=3, text_config={"scale_embedding": False, "layers": 2, "embed_dim": 32, "attention_heads": 4}),
    _row("kosmos-2.5", "patches and their rows", together=BESIDE, places=3, latent_query_num=3, vision_config={"patch_embed_hidden_size": 192}),
    _row("kyutai_speech_to_text", "a wave", target="a state of its own", every_run=True, places=0, alone=False, pad_token_id=0, audio_pad_token_id=69, audio_bos_token_id=32, codebook_vocab_size=33, num_codebooks=2, codec_config={"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [2, 2], "codebook_size": 32, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 2, "num_semantic_quantizers": 1, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "upsample_groups": 16}),
    _row("lfm2_vl", "patches and their mask", every_run=True),
    _row("lfm3_vl", FRAMES, together=WINDOW, text_config={"layer_types": ["conv", "full_attention"]}),
    _row("lighton_ocr", "a picture and its size"),
    _row("llama4", reason="plain generate fails in transformers 5.24 (its text model hands back no image_outputs)"),
    _row("llava", PICTURE, vision_feature_layer=-1),
    _row("llava_next", "a picture in two parts", every_run=True, **ONE_CELL),
    _row("llava_next_video", "a picture in two parts", **ONE_CELL),
    _row("llava_onevision", "a picture in two parts", **ONE_CELL),
    _row("minicpm_ocr", SIDE_BY_SIDE, together="recurrent state", insert_layer_id=0, text_config=HYBRID, vision_config={"insert_layer_id": 0}),
    _row("minicpmv4_6", SIDE_BY_SIDE, together="recurrent state", insert_layer_id=0, text_config=HYBRID, vision_config={"insert_layer_id": 0}),
    _row("minicpmv4_7", SIDE_BY_SIDE, together="recurrent state", insert_layer_id=0, text_config=HYBRID, vision_config={"insert_layer_id": 0}),
    _row("minimax_m3_vl", FRAMES),
    _row("mistral3", "a picture and its size", vision_feature_layer=-1, spatial_merge_size=1),
    _row("mistral4", num_key_value_heads=4),
    _row("mistral_large4", "a picture and its size", together=WINDOW, target=PLAIN, vision_feature_layer=-1, spatial_merge_size=1, text_config={"num_key_value_heads": 4}),
    _row("mllama", "a picture in tiles", together=BESIDE, seen=PLAIN, places=1, text_config={"cross_attention_layers": [1]}, vision_config={"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "num_global_layers": 1, "attention_heads": 4, "intermediate_layers_indices": [0], "vision_output_dim": 64}),
    _row("molmo2", "patches and how they are pooled", every_run=True, vision_config={"image_size": [16, 16]}, adapter_config={"vision_feature_layer": [1, 0], "text_hidden_size": 32}, text_config={"additional_vocab_size": 8}, image_patch_id=IMAGE),
    _row("moss_transcribe_diarize", "a sound and how long it is", together=NO_POSITIONS, audio_config=EIGHT, audio_chunk_size=16),
    _row("muse_glimmer", FRAMES, out_hidden_size=128, projector_hidden_size=32),
    _row("muse_spark", FRAMES, text_config={"moe_hidden_size": 16}, out_hidden_size=128, projector_hidden_size=32, audio_config={"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [8], "depths": [1], "out_hidden_size": 32}),
    _row("musicflamingo", "a sound", places=4, audio_config=EIGHT),
    _row("nemo_speechlm", "a spectrogram", target=PLAIN, together="recurrent state", audio_config={"asr_config": {"max_position_embeddings": 64}, "diarization_config": {"head_config": {"audio_hidden_size": 32}}}, word_timestamp_config={"blank_token_id": 0}),
    _row("nemotron_h_omni", "patches of a grid", target=PLAIN, together="recurrent state", projector_hidden_size=32, vision_hidden_size=32, vision_config={"video_temporal_patch_size": 2}),
    _row("omniasr", "a wave"),
    _row("ovis2", PICTURE),
    _row("paddleocr_vl", "square patches", **THREE),
    _row("paligemma", PICTURE, together=ITS_WAY, every_run=True, vision_config={"model_type": "siglip_vision_model", "projection_dim": 32}),
    _row("perception_lm", "one of several pictures", vision_use_cls_token=False, vision_config={"model_type": "siglip_vision_model", "model_args": {"embed_dim": 32}}),
    _row("phi4_multimodal", "a picture, whole and cropped", together=BESIDE, every_run=True, places=5, vision_config={"crop_size": 16}),
    _row("pi0", reason="it has no `generate`: what it writes is movements of a robot, no tokens"),
    _row("pp_chart2table", PICTURE),
    _row("qianfan_ocr", PICTURE),
    _row("qwen2_5_omni", FRAMES, inner="thinker", call=TEXT, thinker_config=dict(audio_start_token_id=3, vision_start_token_id=START, **THREE), talker_config=MROPE, token2wav_config={"dit_config": {}, "bigvgan_config": {}}),
    _row("qwen2_5_omni_thinker", FRAMES, every_run=True, audio_start_token_id=3, vision_start_token_id=START, **THREE),
    _row("qwen2_5_vl", FRAMES, every_run=True, **THREE),
    _row("qwen2_audio", "a sound and its mask", places=4, audio_config=EIGHT),
    _row("qwen2_vl", FRAMES, **THREE),
    _row("qwen3_5", FRAMES, together="recurrent state", every_run=True, text_config=HYBRID),
    _row("qwen3_5_moe", FRAMES, together="recurrent state", text_config=HYBRID),
    _row("qwen3_asr", "1 s of sound", eos_token_id=2, text_config={"eos_token_id": 2}),
    _row("qwen3_omni_moe", FRAMES, inner="thinker", call=TEXT | {"thinker_eos_token_id": None}, enable_audio_output=False, thinker_config=dict(audio_start_token_id=3, vision_start_token_id=START, text_config={"sliding_window": ...})),
    _row("qwen3_omni_moe_thinker", FRAMES, audio_start_token_id=3, vision_start_token_id=START, text_config={"sliding_window": ...}),
    _row("qwen3_vl", FRAMES, every_run=True),
    _row("qwen3_vl_moe", FRAMES),
    _row("qwen4_exp", FRAMES, together="recurrent state", text_config=MROPE | {"layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4}),
    _row("shieldgemma2", PICTURE, mm_tokens_per_image=4),
    _row("smolvlm", "one of several pictures", every_run=True),
    _row("step3p7", PICTURE),
    _row("unlimited_ocr", target="decodes in a way of its own (_prefill)"),
    _row("vibevoice", target="decodes in a way of its own (_sample)", call={"noise_scheduler": SimpleNamespace(timesteps=(), set_timesteps=None, step=None)}, pad_token_id=0, eos_token_id=2, audio_bos_token_id=3, audio_eos_token_id=4, audio_config=TOKENIZER, semantic_model_config=TOKENIZER, diffusion_head_config={"latent_size": 32}),
    _row("vibevoice_asr", "a short wave", together=BESIDE, call={"sample": False}, acoustic_tokenizer_encoder_config=TOKENIZER, semantic_tokenizer_encoder_config=TOKENIZER),
    _row("video_llama_3", "patches, merged"),
    _row("video_llava", PICTURE, vision_feature_layer=-1),
    _row("vipllava", PICTURE, vision_feature_layers=[-1]),
    _row("voxtral", "30 s of sound", every_run=True),
    _row("voxtral_realtime", "a sound for each token", target="carries a state of its own", places=0, alone=False),
]
# fmt: on
