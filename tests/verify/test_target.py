"""The target's inputs are carried from round to round as plain decoding carries them, and its cache is judged by what it can do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GitConfig,
    IdeficsConfig,
    LlamaConfig,
    LlavaConfig,
    MiniMaxConfig,
    MistralConfig,
    MllamaConfig,
    MoshiForConditionalGeneration,
    MptConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen3OmniMoeTalkerForConditionalGeneration,
    ReformerConfig,
    VoxtralRealtimeForConditionalGeneration,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, UnsupportedError, online_memory
from tests.conftest import answered, tiny_gpt2, tiny_llama
from tests.tiny_models import CACHE

FIXED = OnlineSpecConfig(lookahead=4, update_every=1)  # whatever the memory holds is drafted, four tokens at a time
IMAGE = 5  # the token that stands for a part of a picture

TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
HEADS = dict(head_dim=8)
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
)
SIGLIP = dict(VISION, model_type="siglip_vision_model")
ROPE = dict(rope_type="default", rope_theta=1e4)


def text(n: int) -> Tensor:
    return torch.randint(8, 64, (1, n), generator=torch.Generator().manual_seed(n))


def picture(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def shown(n: int = 4) -> Tensor:
    """Two tokens, a picture, five tokens."""
    return torch.cat([text(2), torch.full((1, n), IMAGE), text(5)], dim=-1)


def made(config: PretrainedConfig, auto: Any = AutoModelForImageTextToText) -> PreTrainedModel:
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    for name, gate in model.named_parameters():
        if "gate" in name and gate.numel() == 1:  # of what reads pictures; shut in a new model
            torch.nn.init.ones_(gate)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def llava() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32), text_config=LlamaConfig(**TEXT, **HEADS),
        image_token_index=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    return made(config), dict(input_ids=shown(), pixel_values=picture(1, 3, 16, 16))


def paligemma() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = PaliGemmaConfig(
        vision_config=dict(SIGLIP, projection_dim=32), text_config=GemmaConfig(**TEXT, **HEADS).to_dict(),
        image_token_index=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    pictures = dict(pixel_values=picture(1, 3, 16, 16), token_type_ids=torch.zeros(1, 11, dtype=torch.long))
    return made(config), dict(input_ids=shown(), **pictures)


def gemma3() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = Gemma3Config(
        vision_config=SIGLIP, text_config=Gemma3TextConfig(**TEXT, **HEADS, sliding_window=8).to_dict(),
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    tokens = shown()
    return made(config), dict(
        input_ids=tokens, pixel_values=picture(1, 3, 16, 16), token_type_ids=(tokens == IMAGE).long()
    )


def qwen2_vl() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=8, temporal_patch_size=2)
    config = Qwen2VLConfig(
        vision_config=vision, text_config=TEXT | dict(rope_parameters=ROPE | dict(mrope_section=[1, 1, 2])),
        image_token_id=IMAGE, video_token_id=4, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    tokens = shown()
    pictures = dict(pixel_values=picture(16, 3 * 2 * 8 * 8), image_grid_thw=torch.tensor([[1, 4, 4]]))
    return made(config), dict(input_ids=tokens, mm_token_type_ids=(tokens == IMAGE).int(), **pictures)


def idefics() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    vision = dict(embed_dim=32, image_size=16, intermediate_size=32, patch_size=8, num_hidden_layers=1)
    config = IdeficsConfig(
        **{name: value for name, value in TEXT.items() if name != "num_key_value_heads"}, additional_vocab_size=0,
        cross_layer_interval=1, use_resampler=False, alpha_initializer="ones", alphas_initializer_range=0.3,
        vision_config=vision | dict(num_attention_heads=4),
    )  # fmt: skip
    mask = torch.ones(1, 8, 1, dtype=torch.long)
    return made(config), dict(input_ids=text(8), pixel_values=picture(1, 1, 3, 16, 16), image_attention_mask=mask)


def mllama() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    vision = dict(VISION, num_global_layers=1, attention_heads=4, vision_output_dim=64, intermediate_layers_indices=[0])
    vision |= dict(max_num_tiles=1, supported_aspect_ratios=[[1, 1]], initializer_range=0.3)
    layers = dict(num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=ROPE)
    config = MllamaConfig(vision_config=vision, text_config=TEXT | layers, image_token_index=IMAGE)
    one = torch.ones(1, 1, dtype=torch.long)
    ratios = dict(aspect_ratio_ids=one, aspect_ratio_mask=one[None], cross_attention_mask=one.expand(8, 1, 1)[None])
    return made(config), dict(input_ids=shown(1), pixel_values=picture(1, 1, 1, 3, 16, 16), **ratios)


def git() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Its picture takes places in the cache that no token stands for."""
    config = GitConfig(
        **{name: value for name, value in TEXT.items() if name != "num_key_value_heads"}, vision_config=dict(VISION),
        max_position_embeddings=64,
    )  # fmt: skip
    return made(config, AutoModelForCausalLM), dict(input_ids=text(5), pixel_values=picture(1, 3, 16, 16))


READERS = [llava, paligemma, gemma3, qwen2_vl, idefics, mllama, git]


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # Mllama's own, of transformers 5.18
@pytest.mark.parametrize("make", READERS, ids=[make.__name__ for make in READERS])
def test_prompts_with_a_picture_equal_plain(make: Callable[[], tuple[PreTrainedModel, dict[str, Tensor]]]) -> None:
    target, inputs = make()
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=16)
    for _ in range(2):
        with answered():
            ours = target.generate(**inputs, do_sample=False, max_new_tokens=16, onlinespec=FIXED)
        assert torch.equal(plain, ours)
    metrics = online_memory(target).metrics
    # The picture is read as in plain decoding, and then it is drafted; Mllama's cache holds the picture too.
    assert (metrics.last.rounds < 8) == (make is not mllama)
    assert ("pictures" in metrics.decisions.drafting) == (make is mllama)


@pytest.mark.parametrize("make", [paligemma, gemma3, qwen2_vl, mllama], ids=lambda make: make.__name__)
def test_text_alone_equals_plain_in_models_that_read_pictures(make) -> None:
    target = make()[0]
    plain = target.generate(text(8), do_sample=False, max_new_tokens=16)
    for _ in range(2):
        assert torch.equal(plain, target.generate(text(8), do_sample=False, max_new_tokens=16, onlinespec=FIXED))
    assert online_memory(target).metrics.last.accepted_tokens > 0


@pytest.mark.parametrize("turns", [1, 2])
def test_token_types_are_continued_as_plain_decoding_continues_them(turns: int) -> None:
    """GPT-2 adds the embedding of the type; the last one goes on."""
    target = tiny_gpt2(1)
    prompt = torch.tensor([[3, 14, 15, 9, 2, 6]])
    types = torch.tensor([[0, 1, 1, 7, 7, 4]])
    texts = []
    for arm in ({}, {"onlinespec": FIXED}, {"onlinespec": FIXED}):
        call: dict[str, Any] = dict(do_sample=False, max_new_tokens=16, return_dict_in_generate=True)
        with answered():
            out = target.generate(prompt, token_type_ids=types, **call, **arm)
            if turns == 2:
                turn = torch.cat([out.sequences, prompt[:, :3]], dim=-1)
                both = torch.cat([types, types[:, -1:].expand(1, 16), types[:, :3]], dim=-1)
                out = target.generate(turn, token_type_ids=both, **{CACHE: out.past_key_values}, **call, **arm)
        texts.append(out.sequences)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], target.generate(texts[0][:, :-16], do_sample=False, max_new_tokens=16))


def test_a_mask_with_more_columns_than_tokens_is_continued_behind_them() -> None:
    """As plain decoding does: positions that are learned one by one begin further on."""
    target, prompt = tiny_gpt2(1), torch.tensor([[3, 14, 15, 9, 2, 6]])
    arguments = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    plain = target.generate(prompt, **arguments)
    assert not torch.equal(plain, target.generate(prompt, do_sample=False, max_new_tokens=24))
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompt, **arguments, onlinespec=FIXED))


# Caches


def test_a_layer_that_does_not_roll_back_is_refused_whatever_its_cache_is_called(target, prompt) -> None:
    class Fixed(DynamicLayer):
        is_croppable = False

    cache = DynamicCache(config=target.config)
    cache.layers = [Fixed() for _ in cache.layers]
    assert isinstance(cache.layers[0], CacheLayerMixin)
    with pytest.raises(UnsupportedError, match="Fixed"):
        target.generate(prompt, **{CACHE: cache}, max_new_tokens=5, onlinespec=True)


def rounded_together(keys: torch.Tensor) -> torch.Tensor:
    step = keys.abs().amax((-1, -2), keepdim=True) / 7
    return (keys / step).round() * step


class RoundsTogether(DynamicLayer):
    """All tokens of a forward, to multiples of one number."""

    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded_together(key_states), *args, **kwargs)


class DropsTheMiddle(DynamicLayer):
    """Keeps the first tokens and the last ones, long after the first round."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(*args, **kwargs)
        if keys.shape[-2] > 16:
            self.keys = torch.cat([keys[..., :2, :], keys[..., -10:, :]], dim=-2)
            self.values = torch.cat([values[..., :2, :], values[..., -10:, :]], dim=-2)
        return keys, values


class RoundsAllLayers(DynamicCache):
    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded_together(key_states), *args, **kwargs)


class NeverCrops(DynamicCache):
    def crop(self, *args: Any, **kwargs: Any) -> None: ...


class OnlyNamed(DynamicCache):
    """As transformers' own."""

    name = "mine"


def of_layers(layer: Callable[[], Any]) -> Callable[[Any], DynamicCache]:
    def make(config: Any) -> DynamicCache:
        cache = DynamicCache(config=config)
        cache.layers = [layer() for _ in cache.layers]
        return cache

    return make


@pytest.mark.parametrize(
    ("make", "drafts"),
    [
        (of_layers(RoundsTogether), False),
        (of_layers(DropsTheMiddle), False),
        (of_layers(lambda: DynamicSlidingWindowLayer(sliding_window=10)), False),
        (lambda config: Cache(layer_class_to_replicate=DropsTheMiddle), False),
        (lambda config: RoundsAllLayers(config=config), False),
        (lambda config: NeverCrops(config=config), False),
        (lambda config: OnlyNamed(config=config), True),
    ],
    ids=["rounds", "drops", "a window", "drops, made later", "all layers round", "no crop", "a name"],
)
def test_a_cache_that_keeps_in_a_way_of_its_own_is_not_drafted_for(target, prompt, make, drafts) -> None:
    arguments = {"do_sample": False, "max_new_tokens": 24}
    plain = target.generate(prompt, **{CACHE: make(target.config)}, **arguments)
    for _ in range(2):
        ours = target.generate(prompt, **{CACHE: make(target.config)}, **arguments, onlinespec=FIXED)
        assert torch.equal(plain, ours)
    assert (online_memory(target).metrics.drafted_tokens > 0) == drafts


def test_the_default_cache_is_served_by_its_name(target, prompt) -> None:
    plain = target.generate(prompt, do_sample=False, max_new_tokens=20)
    for arm in ({"onlinespec": FIXED}, {"assistant_model": OnlineDraft(tiny_llama(2))}):
        with answered():
            ours = target.generate(prompt, do_sample=False, max_new_tokens=20, cache_implementation="dynamic", **arm)
        assert torch.equal(plain, ours)


class NoStream:
    """In the place of an accelerator's stream: there is nothing to wait for."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...


@pytest.mark.parametrize("given", ["its name", "an object"])
def test_an_offloaded_cache_is_judged_by_its_layers(target, prompt, monkeypatch, given) -> None:
    """They are those of the default cache, and rolled back like these."""
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: NoStream())
    draft = OnlineDraft(tiny_llama(2), FIXED)
    call: dict[str, Any] = dict(do_sample=False, max_new_tokens=20)
    plain = target.generate(prompt, **call)
    for arm in ({}, {"onlinespec": FIXED}, {"assistant_model": draft}):
        cache: dict[str, Any] = {"cache_implementation": "offloaded"}
        if given == "an object":
            cache = {CACHE: DynamicCache(config=target.config, offloading=True)}
        with answered():
            ours = target.generate(prompt, **call, **cache, **arm)
        assert torch.equal(plain, ours)
    assert draft.metrics.accepted_tokens < draft.metrics.drafted_tokens


def test_a_window_that_dropped_its_past_is_not_rolled_back_into() -> None:
    """A cache that holds the whole prompt: its last token is read again, and that takes one token back."""
    sizes = dict(TEXT, vocab_size=32, sliding_window=8)
    target = made(MistralConfig(**sizes), AutoModelForCausalLM)
    tokens = text(12) % 32
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(tokens, **{CACHE: cache})
    with answered(), pytest.raises(UnsupportedError, match="window"):
        target.generate(tokens, **{CACHE: cache}, max_new_tokens=5, do_sample=False, onlinespec=True)


def test_the_message_says_where_use_cache_came_from(target, prompt) -> None:
    with pytest.raises(UnsupportedError, match="this call"):
        target.generate(prompt, use_cache=False, max_new_tokens=5, onlinespec=True)
    target.generation_config.use_cache = False
    with pytest.raises(UnsupportedError, match="model's generation_config, as it was saved"):
        target.generate(prompt, max_new_tokens=5, onlinespec=True)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=5)
    assert torch.equal(
        plain, target.generate(prompt, do_sample=False, max_new_tokens=5, use_cache=True, onlinespec=True)
    )


def test_the_use_cache_of_a_configuration_is_named_too() -> None:
    target = made(MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64), AutoModelForCausalLM)
    with pytest.raises(UnsupportedError, match="as it was saved"):
        target.generate(text(5), max_new_tokens=5, onlinespec=True)


@pytest.mark.parametrize("kind", ["minimax", "reformer"])
def test_a_model_without_a_transformers_cache_is_refused_as_such(kind) -> None:
    if kind == "minimax":
        config: PretrainedConfig = MiniMaxConfig(**TEXT, **HEADS, num_local_experts=2, num_experts_per_tok=1)
    else:
        axes = dict(axial_pos_shape=[4, 4], axial_pos_embds_dim=[16, 16], attention_head_size=8, hidden_size=32)
        config = ReformerConfig(vocab_size=64, attn_layers=["local"], feed_forward_size=32, is_decoder=True, **axes)
    with pytest.raises(UnsupportedError, match="a state of its own"):
        made(config, AutoModelForCausalLM).generate(text(5), max_new_tokens=5, onlinespec=True)


# Gradient checkpointing


def test_training_mode_with_gradient_checkpointing_is_recognised_before_any_work(target, prompt) -> None:
    try:
        target.activation_checkpointing_enable()
    except AttributeError:  # what transformers 5.18 calls it
        target.gradient_checkpointing_enable()
    target.train()
    forwards: list[int] = []
    target.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        target.generate(prompt, max_new_tokens=5, do_sample=False, onlinespec=True)
    assert forwards == []
    target.eval()
    plain = target.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, target.generate(prompt, max_new_tokens=5, do_sample=False, onlinespec=True))


def test_a_target_that_loses_its_cache_is_noticed_after_the_first_forward(target, prompt) -> None:
    target.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, dict(kwargs, **{CACHE: None}, use_cache=False)), with_kwargs=True
    )
    with pytest.raises(UnsupportedError, match="first forward"):
        target.generate(prompt, max_new_tokens=5, do_sample=False, onlinespec=True)


# Inputs that a class carries on itself


class Counts(type(tiny_llama(0))):  # type: ignore[misc]
    """Carries a number from token to token, which its logits depend on."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, heard: int = 0, **kwargs: Any
    ) -> dict[str, Any]:
        self.heard = heard
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        outputs = super().forward(*args, **kwargs)
        outputs.logits[..., self.heard % 32] += 4.0
        return outputs

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, inputs: dict[str, Any], **kwargs: Any) -> Any:
        inputs = super()._update_model_kwargs_for_generation(outputs, inputs, **kwargs)
        return dict(inputs, heard=inputs.get("heard", 0) + 1)


def test_what_a_class_carries_from_token_to_token_is_carried_here_too(target, prompt) -> None:
    """Which token this is changes its logits, so that a forward over several cannot serve: it is decoded plain, and says so."""
    counting = copy.deepcopy(target)
    counting.__class__ = Counts
    plain = counting.generate(prompt, do_sample=False, max_new_tokens=20)
    for _ in range(2):
        assert torch.equal(plain, counting.generate(prompt, do_sample=False, max_new_tokens=20, onlinespec=FIXED))
    assert "Counts" in online_memory(counting).metrics.decisions.drafting


TALKERS = [
    MoshiForConditionalGeneration,
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen3OmniMoeTalkerForConditionalGeneration,
    VoxtralRealtimeForConditionalGeneration,
]


@pytest.mark.parametrize("kind", TALKERS, ids=lambda kind: kind.__name__)
def test_what_talkers_carry_from_token_to_token_is_refused_by_name(target, prompt, kind) -> None:
    class Talker(type(target)):  # type: ignore[misc]
        _update_model_kwargs_for_generation = kind._update_model_kwargs_for_generation

    target.__class__ = Talker
    with pytest.raises(UnsupportedError, match="Talker carries a state of its own"):
        target.generate(prompt, max_new_tokens=5, onlinespec=True)


# Prompts in pieces


@pytest.mark.parametrize("size", [1, 3, 6, 100])
def test_a_prompt_is_read_in_pieces_where_it_is_asked_for(target, prompt, size) -> None:
    read: list[int] = []
    target.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    call: dict[str, Any] = dict(do_sample=False, max_new_tokens=12, prefill_chunk_size=size)
    plain = target.generate(prompt, **call)
    for _ in range(3):  # what `read` holds when the target is tried is part of its hook
        read.clear()
        assert torch.equal(plain, target.generate(prompt, **call, onlinespec=FIXED))
    assert sum(read[: -(-6 // size)]) >= 6 and max(read) <= max(size + 4, 5)


def test_a_picture_is_not_read_in_pieces() -> None:
    target, inputs = llava()
    with pytest.raises(UnsupportedError, match="cannot be read in pieces"):
        target.generate(**inputs, max_new_tokens=4, prefill_chunk_size=3, onlinespec=True)
