"""The entry point: what it lets in, what it refuses and how, and that it shuts without a trace."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    StoppingCriteriaList,
    pipeline,
)

import hf_onlinespec
from hf_onlinespec import (
    ConfigError,
    DraftError,
    OnlineDraft,
    OnlineSpecConfig,
    OnlineSpecError,
    UnsupportedError,
    VersionError,
    disable,
    enable,
    online_draft,
    online_memory,
)
from hf_onlinespec._compat import generation as compat
from hf_onlinespec._compat.versions import SUPPORTED
from hf_onlinespec.embedded import load_draft
from tests.verify.test_loop import Heard, letters  # noqa: F401

from .conftest import answered, tiny_gpt2, tiny_llama
from .drafts import flat_params

SMALL = OnlineSpecConfig(rank=4, alpha=4.0, lookahead=3)
GREEDY = {"do_sample": False, "max_new_tokens": 20}


def test_true_learns_from_call_to_call(target, draft_model, prompt) -> None:
    plain = target.generate(prompt, **GREEDY)
    for calls in (1, 2):
        assert torch.equal(plain, target.generate(prompt, assistant_model=draft_model, onlinespec=True, **GREEDY))
        metrics = online_draft(draft_model).metrics
        assert metrics.requests == calls and metrics.updates > 0 and metrics.last.new_tokens == 20
    assert metrics.new_tokens == 40


def test_a_config_sets_the_draft_up_once(target, draft_model, prompt) -> None:
    target.generate(prompt, assistant_model=draft_model, onlinespec=SMALL, **GREEDY)
    assert online_draft(draft_model).settings == SMALL
    target.generate(prompt, assistant_model=draft_model, onlinespec=True, **GREEDY)  # goes on with it
    steps = online_draft(draft_model).metrics.updates
    with pytest.raises(ConfigError, match="lookahead"):
        target.generate(
            prompt, assistant_model=draft_model, onlinespec=OnlineSpecConfig(rank=4, alpha=4.0, lookahead=7), **GREEDY
        )
    assert online_draft(draft_model).metrics.updates == steps


def test_online_draft_needs_no_argument_and_false_only_drafts(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, SMALL)
    plain = target.generate(prompt, **GREEDY)
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))
    updates = draft.metrics.updates
    params = flat_params(draft)
    assert updates > 0
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, onlinespec=False, **GREEDY))
    assert draft.metrics.updates == updates and torch.equal(flat_params(draft), params)
    assert draft.metrics.last.drafted_tokens > 0 and draft.metrics.last.update_time_s == 0


def test_inside_a_generation_config(target, draft_model, prompt) -> None:
    config = GenerationConfig(onlinespec=SMALL, pad_token_id=0, **GREEDY)
    assert config.to_dict()["onlinespec"]["rank"] == 4 and "onlinespec" in repr(config)
    target.generate(prompt, generation_config=config, assistant_model=draft_model)
    assert online_draft(draft_model).settings == SMALL


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_peft_model_as_draft_and_as_target(target, draft_model, prompt) -> None:
    peft_draft = get_peft_model(
        draft_model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    peft_target = get_peft_model(
        target, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    plain = peft_target.generate(input_ids=prompt, **GREEDY)
    ours = peft_target.generate(input_ids=prompt, assistant_model=peft_draft, onlinespec=True, **GREEDY)
    assert torch.equal(plain, ours) and online_draft(peft_draft).metrics.updates > 0


def test_two_pairs_in_one_process(prompt) -> None:
    """Each draft learns from its own target alone."""
    targets, models = [tiny_llama(1, layers=2), tiny_llama(3, layers=2)], [tiny_llama(2), tiny_llama(2)]
    for _ in range(2):
        for t, m in zip(targets, models, strict=True):
            plain = t.generate(prompt, **GREEDY)
            assert torch.equal(plain, t.generate(prompt, assistant_model=m, onlinespec=SMALL, **GREEDY))
    alone = tiny_llama(2)
    for _ in range(2):
        targets[1].generate(prompt, assistant_model=alone, onlinespec=SMALL, **GREEDY)
    assert torch.equal(flat_params(online_draft(models[1])), flat_params(online_draft(alone)))
    assert not torch.equal(flat_params(online_draft(models[0])), flat_params(online_draft(alone)))


def test_the_draft_goes_when_its_model_goes(target, prompt) -> None:
    model = tiny_llama(2)
    target.generate(prompt, assistant_model=model, onlinespec=SMALL, **GREEDY)
    gone = weakref.ref(online_draft(model))
    del model
    gc.collect()
    assert gone() is None


def test_the_users_draft_is_never_touched(target, draft_model, prompt) -> None:
    state = copy.deepcopy(draft_model.state_dict())
    before = draft_model(prompt).logits
    for _ in range(3):
        target.generate(prompt, assistant_model=draft_model, onlinespec=SMALL, **GREEDY)
    assert (online_draft(draft_model)(prompt).logits - before).abs().max() > 1e-4  # it did learn
    assert torch.equal(draft_model(prompt).logits, before)
    assert draft_model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in draft_model.state_dict().items())


def test_custom_generate_without_any_hook(target, draft_model, prompt, letters) -> None:  # noqa: F811
    plain = target.generate(prompt, **GREEDY)
    stop = "".join(letters.convert_ids_to_tokens(plain[0, 12:14].tolist()))
    stopped = target.generate(prompt, stop_strings=stop, tokenizer=letters, **GREEDY)
    hf_onlinespec.disable()
    try:
        draft, heard = OnlineDraft(draft_model, SMALL), Heard()
        assert torch.equal(plain, target.generate(prompt, custom_generate=draft.generate_fn(streamer=heard), **GREEDY))
        assert heard.tokens == plain[0].tolist() and heard.ended == 1
        assert draft.metrics.updates > 0
        fn = draft.generate_fn(tokenizer=letters)
        assert torch.equal(stopped, target.generate(prompt, custom_generate=fn, stop_strings=stop, **GREEDY))
        fn = draft.generate_fn()
        with pytest.raises(UnsupportedError, match="tokenizer"):
            target.generate(prompt, custom_generate=fn, stop_strings=stop, **GREEDY)
        with pytest.raises(ConfigError, match="'no'"):
            target.generate(prompt, custom_generate=fn, onlinespec="no", **GREEDY)
        with pytest.raises(ConfigError, match="lookahead"):
            target.generate(prompt, custom_generate=fn, onlinespec=OnlineSpecConfig(lookahead=9), **GREEDY)
        sampled = target.generate(prompt, custom_generate=fn, do_sample=True, max_new_tokens=5)
        assert sampled.shape == (1, 11)
        with pytest.raises(UnsupportedError, match="num_beams=2"):
            target.generate(prompt, custom_generate=fn, num_beams=2, max_new_tokens=5)
    finally:
        hf_onlinespec.enable()


def test_disable_restores_transformers_exactly(target, draft_model, prompt) -> None:
    wrapped = [
        GenerationConfig.get_generation_mode,
        GenerationMixin._validate_generation_mode,
        GenerationMixin._assisted_decoding,
        GenerationMixin._prepare_generation_config,
    ]
    copy.deepcopy(GenerationConfig())  # the copy module leaves its __slotnames__ on the class
    names = {**vars(GenerationConfig)}, {**vars(GenerationMixin)}
    hf_onlinespec.disable()
    try:
        originals = [
            GenerationConfig.get_generation_mode,
            GenerationMixin._validate_generation_mode,
            GenerationMixin._assisted_decoding,
            GenerationMixin._prepare_generation_config,
        ]
        assert all("__wrapped__" not in vars(f) and f.__module__.startswith("transformers.") for f in originals)
        assert [f.__wrapped__ for f in wrapped] == originals
        assert "onlinespec" not in vars(GenerationConfig)
        with pytest.raises(ValueError, match="onlinespec"):
            target.generate(prompt, assistant_model=draft_model, onlinespec=True, **GREEDY)
    finally:
        hf_onlinespec.enable()
    hf_onlinespec.enable()  # a second time changes nothing
    assert {**vars(GenerationConfig)}.keys() == names[0].keys() and {**vars(GenerationMixin)}.keys() == names[1].keys()
    target.generate(prompt, assistant_model=draft_model, onlinespec=True, **GREEDY)


def test_a_moved_method_is_named_with_the_versions_that_have_it(monkeypatch) -> None:
    hf_onlinespec.disable()
    try:
        monkeypatch.setattr(compat, "WRAPPED", (*compat.WRAPPED, (GenerationMixin, "_gone_tomorrow")))
        with pytest.raises(VersionError, match=rf"GenerationMixin\._gone_tomorrow.*{SUPPORTED}"):
            hf_onlinespec.enable()
        assert "onlinespec" not in vars(GenerationConfig)  # nothing half done
    finally:
        monkeypatch.undo()
        hf_onlinespec.enable()


def test_other_calls_are_untouched_bit_for_bit(target, draft_model, prompt) -> None:
    """Plain, beam and stock assisted calls, greedy and sampled: same tokens, same scores, same random draws."""
    calls = [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"assistant_model": draft_model},
        {"assistant_model": draft_model, "do_sample": True},
        {"assistant_model": draft_model, "onlinespec": False},
    ]

    def run() -> list:
        results = []
        for call in calls:
            if "onlinespec" not in vars(GenerationConfig):  # disabled
                call = {k: v for k, v in call.items() if k != "onlinespec"}
            torch.manual_seed(5)
            out = target.generate(prompt, max_new_tokens=15, return_dict_in_generate=True, output_scores=True, **call)
            results.append((out.sequences, torch.stack(out.scores), torch.rand(1)))
        return results

    with_hook = run()
    hf_onlinespec.disable()
    try:
        without = run()
    finally:
        hf_onlinespec.enable()
    for ours, theirs in zip(with_hook, without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


BAD_CALLS = {
    "num_beams": ({"num_beams": 2}, "num_beams=2"),
    "guidance_scale": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight=0.5"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "speculation_type": ({"speculation_type": "dflash"}, "speculation_type=dflash"),
    "synced_gpus": ({"synced_gpus": True}, "synced_gpus=True"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "CONTRASTIVE"),
    "decoding by layers": ({"dola_layers": "low"}, "DOLA"),
    "constraints": ({"force_words_ids": [[3]]}, "CONSTRAINED"),
    "use_cache": ({"use_cache": False}, "use_cache"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    "not a setting": ({"onlinespec": "yes"}, "'yes'"),
}


@pytest.mark.parametrize(("call", "said"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(target, draft_model, prompt, call, said) -> None:
    """Refused with the value and the way out, before any forward of either model; what was learned stays."""
    draft = OnlineDraft(draft_model, SMALL)
    target.generate(prompt, assistant_model=draft, **GREEDY)
    state = flat_params(draft), draft.metrics.requests
    forwards = []
    hook = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(OnlineSpecError, match=said) as caught:
        target.generate(prompt, assistant_model=draft, max_new_tokens=5, **call)
    hook.remove()
    assert isinstance(caught.value, ValueError) and str(caught.value).count(".") >= 1
    assert forwards == [] and torch.equal(flat_params(draft), state[0]) and draft.metrics.requests == state[1]
    plain = target.generate(prompt, **GREEDY)
    assert torch.equal(plain, target.generate(prompt, assistant_model=draft, **GREEDY))  # and it goes on


NO_BATCHES = {
    "prompts of two lengths": ([[3, 4], [5]], 'padding_side="left"'),
    "a list": ([3, 4], "given as a list"),
    "a row without its batch": (torch.tensor([3, 4]), r"shape \(2,\).*prompt\[None\]"),
    "no tokens": (torch.zeros(1, 0, dtype=torch.long), "have no tokens"),
    "no rows": (torch.zeros(0, 3, dtype=torch.long), "batch is empty"),
}


@pytest.mark.parametrize(("given", "said"), NO_BATCHES.values(), ids=NO_BATCHES)
@pytest.mark.parametrize("name", ["", "inputs", "input_ids"])
def test_prompts_that_are_no_batch_of_tokens(target, draft_model, given, said, name) -> None:
    draft = OnlineDraft(draft_model, SMALL)
    args, kwargs = ((), {name: given}) if name else ((given,), {})
    for asked in ({"onlinespec": True}, {"assistant_model": draft}):
        with pytest.raises(OnlineSpecError, match=said):
            target.generate(*args, **kwargs, **asked, **GREEDY)
    assert draft.metrics.requests == 0


def test_a_refused_call_sets_nothing_up(target, draft_model, prompt) -> None:
    with pytest.raises(UnsupportedError, match="num_beams=2"):
        target.generate(prompt, assistant_model=draft_model, onlinespec=True, num_beams=2, max_new_tokens=5)
    target.generate(prompt, assistant_model=draft_model, onlinespec=SMALL, **GREEDY)
    assert online_draft(draft_model).settings == SMALL


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_prompt_learning_targets_are_refused(target, draft_model, prompt) -> None:
    tuned = get_peft_model(target, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="virtual tokens"):
        tuned.generate(input_ids=prompt, assistant_model=draft_model, onlinespec=True, **GREEDY)


@pytest.mark.parametrize("settings", [True, OnlineSpecConfig(lookahead=4)], ids=["auto", "fixed"])
def test_without_a_draft_the_memory_drafts(target, prompt, settings) -> None:
    """The second time, the memory knows the answer; what the target says stays the same."""
    plain = target.generate(prompt, **GREEDY)
    for _ in range(2):
        assert torch.equal(plain, target.generate(prompt, onlinespec=settings, **GREEDY))
    metrics = online_memory(target).metrics
    assert metrics.requests == 2 and metrics.updates == 0 and metrics.memory_bytes > 0
    if settings is not True:
        # The index asks for two known tokens: the first round of the second call finds the whole answer, four by four.
        assert metrics.last.acceptance_length == 5.0 and metrics.last.acceptance_rate == 1.0
    with pytest.raises(ConfigError, match="lookahead"):
        target.generate(prompt, onlinespec=OnlineSpecConfig(lookahead=2), **GREEDY)


def test_embeddings_instead_of_tokens(target, draft_model) -> None:
    with pytest.raises(UnsupportedError, match="input_ids"):
        target.generate(inputs_embeds=torch.randn(1, 3, 16), assistant_model=OnlineDraft(draft_model), max_new_tokens=5)
    with pytest.raises(UnsupportedError, match="inputs_embeds of 4 places with 3 tokens"):
        ids = torch.ones(1, 3, dtype=torch.long)
        target.generate(
            ids, inputs_embeds=torch.randn(1, 4, 16), assistant_model=OnlineDraft(draft_model), max_new_tokens=5
        )


@pytest.mark.parametrize("rows", [1, 2])
def test_embeddings_beside_tokens_are_read_in_their_place(target, draft_model, rows) -> None:
    """As models that read pictures hand them to the model that writes (BLIP-2). The draft and the processors see the tokens."""
    prompts = torch.arange(2, 2 + 5 * rows).reshape(rows, 5)
    vectors = torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(0))
    call = {"inputs_embeds": vectors, "attention_mask": torch.ones_like(prompts), "repetition_penalty": 1.2} | GREEDY
    draft = OnlineDraft(draft_model, SMALL)
    plain = target.generate(prompts, **call)
    assert not torch.equal(plain, target.generate(prompts, **call | {"inputs_embeds": None}))
    for drafting in (draft, draft, None, None):
        assert torch.equal(plain, target.generate(prompts, assistant_model=drafting, onlinespec=True, **call))
    assert draft.metrics.drafted_tokens > 0 and online_memory(target).metrics.new_tokens == 2 * rows * 20


def tiny_bart() -> PreTrainedModel:
    size = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=32, encoder_ffn_dim=16, decoder_ffn_dim=16, **size)
    ).eval()


def tiny_mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()


def tiny_rwkv() -> PreTrainedModel:
    return RwkvForCausalLM(RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)).eval()


@pytest.mark.parametrize(
    ("make", "said"), [(tiny_bart, "encoder"), (tiny_mamba, "recurrent state")], ids=["bart", "mamba"]
)
def test_drafts_that_are_not_handled_yet(target, prompt, make, said) -> None:
    with pytest.raises(OnlineSpecError, match=said):
        target.generate(prompt, assistant_model=make(), onlinespec=True, max_new_tokens=5)


def test_a_target_whose_state_is_out_of_reach(draft_model, prompt) -> None:
    target = tiny_rwkv()
    with pytest.raises(OnlineSpecError, match="recurrent state outside of a transformers Cache"):
        target.generate(prompt, assistant_model=OnlineDraft(draft_model), max_new_tokens=5)


def test_a_draft_that_is_no_model(target, prompt) -> None:
    with pytest.raises(DraftError, match="Linear"):
        OnlineDraft(torch.nn.Linear(2, 2))
    with pytest.raises(DraftError, match="Linear"):
        target.generate(prompt, assistant_model=torch.nn.Linear(2, 2), onlinespec=True, **GREEDY)


def test_after_disable_a_draft_says_what_to_do(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model)
    for model in (target, tiny_gpt2(1)):  # transformers touches other attributes first where logits cannot be limited
        disable()
        try:
            with answered(), pytest.raises(OnlineSpecError, match=r"enable\(\).*generate_fn\(\)"):
                model.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=4)
        finally:
            enable()
    target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=4)
    assert draft.metrics.requests == 1


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_draft_is_saved_not_copied(draft_model, how) -> None:
    with pytest.raises(TypeError, match=r"save_pretrained.*from_pretrained") as caught:
        how(OnlineDraft(draft_model))
    assert isinstance(caught.value, OnlineSpecError)


def test_a_callable_of_somebody_else_ignores_onlinespec_with_a_warning(target, draft_model, prompt) -> None:
    def echo(model, input_ids, **kwargs):
        return input_ids

    configured = GenerationConfig(onlinespec=True, max_new_tokens=4)
    for arguments in ({"onlinespec": True, "max_new_tokens": 4}, {"generation_config": configured}):
        with pytest.warns(UserWarning, match="onlinespec=True is ignored") as caught:
            assert torch.equal(target.generate(prompt, custom_generate=echo, **arguments), prompt)
        assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(
        target.generate(prompt, custom_generate=echo, max_new_tokens=4), prompt
    )  # warnings are errors in tests
    ours = OnlineDraft(draft_model).generate_fn()
    target.generate(prompt, custom_generate=ours, onlinespec=True, max_new_tokens=4, do_sample=False)
    target.generate(prompt, custom_generate=ours, generation_config=configured, do_sample=False)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*", "ignore::DeprecationWarning")
def test_wrappers_are_seen_through(target, draft_model, prompt) -> None:
    """A memory and a draft belong to the model inside: it is where `generate` ends."""
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    compiled = torch.compile(target, backend="eager")
    wrapped = get_peft_model(tiny_llama(1), settings).eval()
    for outer, inner in ((compiled, target), (wrapped, wrapped.get_base_model())):
        outer.generate(input_ids=prompt, onlinespec=True, do_sample=False, max_new_tokens=4)
        assert online_memory(outer) is online_memory(inner)
        assert online_memory(outer).metrics.requests == 1
    compiled_draft = torch.compile(draft_model, backend="eager")
    target.generate(prompt, assistant_model=compiled_draft, onlinespec=True, do_sample=False, max_new_tokens=4)
    assert online_draft(compiled_draft) is online_draft(draft_model)
    assert online_draft(draft_model).metrics.requests == 1


def test_a_memory_with_other_settings_says_how_to_begin_anew(target, prompt) -> None:
    target.generate(prompt, onlinespec=True, do_sample=False, max_new_tokens=4)
    other = OnlineSpecConfig(memory_tokens=500)
    with pytest.raises(ConfigError, match=r"memory that is kept with this target.*anew=True") as caught:
        target.generate(prompt, onlinespec=other, do_sample=False, max_new_tokens=4)
    assert "draft" not in str(caught.value)
    assert online_memory(target, other, anew=True).metrics.requests == 0
    target.generate(prompt, onlinespec=other, do_sample=False, max_new_tokens=4)
    assert online_memory(target).metrics.requests == 1 and online_memory(target).settings == other


def test_the_other_entry_refuses_one_model_in_several_processes_too(target, draft_model, prompt, monkeypatch) -> None:
    """generate() keeps its synced_gpus from custom_generate: what it would have been is found out, and a direct call says it."""
    fn = OnlineDraft(draft_model, SMALL).generate_fn()
    plain = target.generate(prompt, **GREEDY)
    assert torch.equal(plain, target.generate(prompt, custom_generate=fn, **GREEDY))
    with pytest.raises(UnsupportedError, match="synced_gpus=True"):
        fn(target, prompt, LogitsProcessorList(), StoppingCriteriaList(), target.generation_config, synced_gpus=True)
    monkeypatch.setattr("hf_onlinespec.verify.custom_generate.needs_synced_gpus", lambda model: model is target)
    with pytest.raises(UnsupportedError, match="synced_gpus=True"):
        target.generate(prompt, custom_generate=fn, **GREEDY)


def test_settings_may_be_named_one_by_one_or_in_a_dict(target, draft_model, prompt) -> None:
    small = {"rank": 4, "alpha": 4.0, "lookahead": 3}
    drafts = [OnlineDraft(draft_model, **small), OnlineDraft(draft_model, small)]
    drafts += [OnlineDraft(draft_model, OnlineSpecConfig(rank=4, lookahead=8), alpha=4.0, lookahead=3)]
    drafts += [online_draft(tiny_llama(3), small)]
    assert [draft.settings for draft in drafts] == [SMALL] * 4
    target.generate(prompt, assistant_model=drafts[0], onlinespec=small, **GREEDY)
    assert online_memory(target, {"lookahead": 3}).settings == OnlineSpecConfig(lookahead=3)
    fn = drafts[0].generate_fn()
    target.generate(prompt, custom_generate=fn, onlinespec=small, **GREEDY)
    with pytest.raises(ConfigError, match="lookahead"):
        target.generate(prompt, custom_generate=fn, onlinespec=small | {"lookahead": 5}, **GREEDY)
    for wrong in ({"learning_rate": 1e-3}, {"config": {"learning_rate": 1e-3}}):
        with pytest.raises(ConfigError, match="learning_rate is called lr here"):
            OnlineDraft(draft_model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config=3"):
        OnlineDraft(draft_model, 3)  # type: ignore[arg-type]


def test_the_name_of_a_draft_says_how_to_load_it(target, prompt) -> None:
    name = "org/draft"
    calls = (
        lambda: OnlineDraft(name),  # type: ignore[arg-type]
        lambda: online_draft(name),  # type: ignore[arg-type]
        lambda: target.generate(prompt, assistant_model=name, onlinespec=True, **GREEDY),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"'org/draft' is a name: .* OnlineDraft.from_pretrained\('org/draft'\)"):
            call()
    with pytest.raises(ValueError, match="target is a str"):
        online_memory(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("saved", [True, False, SMALL], ids=["true", "false", "settings"])
def test_a_generation_config_keeps_it_through_save_and_load(target, prompt, tmp_path, saved) -> None:
    """Also one that was derived from the model's configuration, as of every model without a generation_config.json."""
    plain = target.generate(prompt, **GREEDY)
    target.generation_config.onlinespec = saved
    target.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    configs = [loaded.generation_config, GenerationConfig.from_pretrained(tmp_path)]
    configs += [GenerationConfig.from_dict(target.generation_config.to_dict())]
    assert [config.onlinespec for config in configs] == [saved] * 3
    assert torch.equal(plain, loaded.generate(prompt, **GREEDY))
    assert online_memory(loaded).metrics.requests == (saved is not False)
    disable()  # the same folder, read and used by transformers alone
    try:
        alone = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(plain, alone.generate(prompt, **GREEDY))
    finally:
        enable()


@pytest.mark.parametrize("kind", ["plain", "evolved"])
def test_a_pipeline_takes_the_folder_of_a_draft(pair, tmp_path, kind) -> None:
    if kind == "plain":
        load_draft().save_pretrained(tmp_path)
        pair.tokenizer.save_pretrained(tmp_path)
    else:
        draft = OnlineDraft(load_draft(), SMALL)
        tokens = pair.tokenizer("<|endoftext|>List all orders", return_tensors="pt")
        pair.target.generate(**tokens, assistant_model=draft, **GREEDY)
        draft.save_pretrained(tmp_path)
    parts = {"model": pair.target, "tokenizer": pair.tokenizer}
    text, call = "<|endoftext|>Show the files in a folder", {"max_new_tokens": 12, "do_sample": False}
    plain = pipeline("text-generation", **parts)(text, **call)
    pipe = pipeline("text-generation", assistant_model=str(tmp_path), **parts)
    assert pipe(text, onlinespec=True, **call) == plain
    served = online_draft(pipe.assistant_model).metrics
    assert (served.requests, served.drafted_tokens > 0) == (1 if kind == "plain" else 2, True)
    with pytest.raises(OSError):  # transformers' own, as before
        pipeline("text-generation", assistant_model="no-such-folder", **parts)


# How each setting of `generate` is met, beside those that transformers turns into processors and criteria.
PROCESSORS_AND_CRITERIA = """max_length max_new_tokens min_length min_new_tokens max_time stop_strings temperature top_k top_p min_p
top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size bad_words_ids
renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
begin_suppress_tokens sequence_bias watermarking_config encoder_no_repeat_ngram_size pad_token_id bos_token_id eos_token_id
decoder_start_token_id""".split()
BEFORE_THE_LOOP = ["token_healing", "is_assistant", "num_return_sequences"]  # generate() has seen to it
IN_THE_LOOP = """do_sample use_cache cache_implementation cache_config output_scores output_logits return_dict_in_generate
prefill_chunk_size num_assistant_tokens assistant_early_exit use_mtp""".split()
REFUSED = """num_beams guidance_scale output_attentions output_hidden_states prompt_lookup_num_tokens
assistant_ensemble_weight speculation_type penalty_alpha dola_layers num_beam_groups constraints
force_words_ids""".split()
WITHOUT_MEANING_HERE = """early_stopping length_penalty diversity_penalty low_memory max_cache_len compile_config disable_compile
continuous_batching_config max_matching_ngram_size assistant_lookbehind target_lookbehind num_assistant_tokens_schedule
assistant_confidence_threshold transformers_version""".split()  # of beams, static caches, compiled or other drafting


def test_no_setting_of_generate_is_dropped_unseen() -> None:
    """A setting that a later transformers adds has to be put in its place."""
    known = {*PROCESSORS_AND_CRITERIA, *BEFORE_THE_LOOP, *IN_THE_LOOP, *REFUSED, *WITHOUT_MEANING_HERE}
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - known == set()
