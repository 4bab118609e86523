"""Attaching: every `generate` on a model is served, whoever calls it, and a call that cannot be served runs as if nothing were attached."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

import hf_onlinespec
from hf_onlinespec import (
    ConfigError,
    DraftError,
    OnlineDraft,
    OnlineSpecConfig,
    UnsupportedError,
    attach,
    attached,
    detach,
    online_draft,
    online_memory,
    online_metrics,
)
from hf_onlinespec._compat.generation import GenerationMode
from hf_onlinespec.embedded import EmbeddedPair, load_draft
from tests.test_generation import tiny_rwkv

from .conftest import tiny_llama
from .tiny_models import CACHE

FIXED = OnlineSpecConfig(lookahead=3)
SMALL = OnlineSpecConfig(rank=4, alpha=4.0, lookahead=3)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


def test_every_call_is_served_until_it_is_detached(target, prompt) -> None:
    plain = target.generate(prompt, **GREEDY)
    memory = attach(target, config=FIXED)
    for calls in (1, 2):
        assert torch.equal(plain, target.generate(prompt, **GREEDY))
        assert memory.metrics.requests == calls
    assert memory.metrics.last.acceptance_length > 3 and memory is online_memory(target)
    assert detach(target) is memory and detach(target) is None
    assert torch.equal(plain, target.generate(prompt, **GREEDY)) and memory.metrics.requests == 2


def test_a_draft_learns_from_every_call(target, draft_model, prompt) -> None:
    plain = target.generate(prompt, **GREEDY)
    draft = attach(target, draft_model, SMALL)
    assert draft is online_draft(draft_model) and draft.settings == SMALL
    assert torch.equal(plain, target.generate(prompt, **GREEDY)) and draft.metrics.updates > 0
    ours = OnlineDraft(tiny_llama(3), SMALL)
    assert attach(target, ours) is ours  # replaces the other one
    assert torch.equal(plain, target.generate(prompt, **GREEDY))
    assert (draft.metrics.requests, ours.metrics.requests) == (1, 1)


def test_settings_may_be_a_dict_or_stand_with_the_model(target, draft_model, prompt) -> None:
    assert attach(target, config={"lookahead": 3}).settings == FIXED == attach(tiny_llama(4), lookahead=3).settings
    with attached(tiny_llama(4), draft_model, lookahead=3) as draft:
        assert draft.settings == FIXED
    with pytest.raises(ConfigError, match="learning_rate is called lr here"):
        attach(target, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="'lr_rate'"):
        attach(target, config={"lr_rate": 1.0})
    other = tiny_llama(3)
    other.generation_config.onlinespec = SMALL
    assert attach(other, tiny_llama(5)).settings == SMALL
    assert attach(other, OnlineDraft(draft_model, FIXED)).settings == FIXED


def test_for_a_block(target, draft_model, prompt) -> None:
    memory = attach(target, config=FIXED)
    with attached(target, draft_model, SMALL) as draft:
        target.generate(prompt, **GREEDY)
        with pytest.raises(ZeroDivisionError), attached(target, OnlineDraft(tiny_llama(3), SMALL)) as inner:
            target.generate(prompt, **GREEDY)
            1 / 0  # noqa: B018
        target.generate(prompt, **GREEDY)
    target.generate(prompt, **GREEDY)  # the memory is attached again
    assert [d.metrics.requests for d in (memory, draft, inner)] == [1, 2, 1]
    detach(target)
    with attached(target, draft_model):
        detach(target)
    assert detach(target) is None


def test_what_a_call_says_itself_goes_before(target, draft_model, prompt) -> None:
    plain = target.generate(prompt, **GREEDY)
    draft, other = attach(target, draft_model, SMALL), tiny_llama(3)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        target.generate(prompt, onlinespec=False, **GREEDY)
        target.generate(prompt, generation_config=GenerationConfig(onlinespec=False, pad_token_id=0, **GREEDY))
        target.generate(prompt, assistant_model=other, **GREEDY)  # of transformers, which does not learn
        assert draft.metrics.requests == 0
        target.generate(prompt, assistant_model=other, onlinespec=True, **GREEDY)
        target.generate(prompt, custom_generate=OnlineDraft(other, SMALL).generate_fn(), **GREEDY)
        assert draft.metrics.requests == 0 and online_draft(other).metrics.requests == 1
        assert torch.equal(plain, target.generate(prompt, onlinespec=True, **GREEDY))  # the attached one
        assert draft.metrics.requests == 1
    assert heard == []
    with pytest.raises(UnsupportedError, match="num_beams=2"):
        target.generate(prompt, onlinespec=True, num_beams=2, **GREEDY)
    with pytest.raises(ConfigError, match="lookahead"):
        target.generate(prompt, onlinespec=OnlineSpecConfig(rank=4, alpha=4.0, lookahead=7), **GREEDY)
    assert draft.metrics.requests == 1


@pytest.mark.parametrize("saved", [True, False, OnlineSpecConfig(lookahead=5)], ids=["true", "false", "settings"])
def test_what_is_saved_with_the_model_does_not_go_before(target, draft_model, prompt, saved) -> None:
    """A pipeline passes a copy of the model's configuration with each call: that is no word of the caller's either."""
    plain = target.generate(prompt, **GREEDY)
    target.generation_config.onlinespec = saved
    draft = attach(target, OnlineDraft(draft_model, SMALL))
    copied = copy.deepcopy(target.generation_config)
    copied.update(**GREEDY)
    for call in ({"generation_config": copied}, GREEDY):
        assert torch.equal(plain, target.generate(prompt, **call))
    assert draft.metrics.requests == 2
    with pytest.warns(UserWarning, match="num_beams=2"):
        target.generate(prompt, num_beams=2, **GREEDY)
    other = tiny_llama(3)
    if saved is True:  # a draft of the caller's learns as it did
        target.generate(prompt, assistant_model=other, **GREEDY)
        assert online_draft(other).metrics.requests == 1


def echo(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    return input_ids


class AllTheSame(LogitsProcessor):
    """Lets all rows say what the first one says."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores[:1].expand_as(scores)


BATCH = torch.tensor([[3, 14, 15], [9, 2, 6]])
RUN_PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "num_beams": ({"num_beams": 2}, "num_beams=2"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
    "guidance_scale": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "use_cache": ({"use_cache": False}, "use_cache=False"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    "a batch with a processor of its own": (
        {"inputs": BATCH, "logits_processor": LogitsProcessorList([AllTheSame()])},
        "AllTheSame says of a row alone something else",
    ),
    "sampled batch with a processor of its own": (
        {"inputs": BATCH, "logits_processor": LogitsProcessorList([AllTheSame()]), "do_sample": True},
        "AllTheSame says of a row alone something else",
    ),
    "embeddings": ({"inputs": None, "inputs_embeds": torch.randn(1, 3, 16)}, "inputs_embeds"),
    "another loop": ({"custom_generate": echo}, "custom_generate"),
}


@pytest.mark.parametrize(("call", "said"), RUN_PLAIN.values(), ids=RUN_PLAIN)
def test_a_call_that_cannot_be_served_runs_as_if_nothing_were_attached(prompt, call, said) -> None:
    """Same tokens and random draws; told once, with the reason, at the line that called."""
    target = tiny_llama(1, layers=2, attn_implementation="eager")
    call = {"inputs": prompt} | GREEDY | call

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        out = target.generate(**call)
        return out if isinstance(out, Tensor) else out.sequences, torch.rand(1)

    plain = run()
    with_draft = said == "num_beams=2" or said.startswith("AllTheSame")  # the others are alike
    draft = attach(target, tiny_llama(2) if with_draft else None, SMALL if with_draft else FIXED)
    with pytest.warns(UserWarning, match=f"without the attached draft: .*{said}") as heard:
        ours = run(), run()
    assert len(heard) == 1 and heard[0].filename == __file__
    assert all(torch.equal(a, b) for found in ours for a, b in zip(plain, found, strict=True))
    assert draft.metrics.requests == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the next call is served, and says nothing
        target.generate(prompt, **GREEDY)
    assert draft.metrics.requests == 1


@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("call", [{"num_beams": 2}, {"num_beams": 3, "inputs": BATCH}])
def test_a_call_that_runs_plain_is_not_charged_for_walks_over_the_model(
    target, prompt, call, with_draft, monkeypatch
) -> None:
    """Each takes 0.2 ms on a model of 200 modules."""
    walks, walk = [], type(target).named_modules

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        walks.append(self is target)
        return walk(self, *args, **kwargs)

    call = {"inputs": prompt, "do_sample": False, "max_new_tokens": 1} | call
    attach(target, tiny_llama(2) if with_draft else None, SMALL if with_draft else FIXED)
    with pytest.warns(UserWarning, match="without the attached draft"):
        target.generate(**call)
    monkeypatch.setattr(type(target), "named_modules", counted)
    target.generate(**call)
    attached_walks = walks.count(True)
    detach(target)
    walks.clear()
    target.generate(**call)
    assert attached_walks == walks.count(True)


def test_each_reason_is_told_once_and_again_after_attaching_another_draft(target, prompt) -> None:
    attach(target)
    for n, heard in ((2, 1), (3, 0)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            target.generate(prompt, num_beams=n, **GREEDY)
        assert len(told) == heard
    attach(target)  # the same: nothing is told twice
    target.generate(prompt, num_beams=4, **GREEDY)
    attach(target, tiny_llama(2))
    with pytest.warns(UserWarning, match="num_beams=4"):
        target.generate(prompt, num_beams=4, **GREEDY)


def test_where_warnings_are_errors_the_answer_is_there(target, prompt, caplog) -> None:
    plain = target.generate(prompt, num_beams=2, **GREEDY)
    attach(target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(plain, target.generate(prompt, num_beams=2, **GREEDY))
    assert "num_beams=2" in caplog.text


def test_an_errant_call_raises_what_it_raised_before(target, prompt) -> None:
    attach(target)
    with pytest.raises(ValueError, match="no_such_argument"):
        target.generate(prompt, no_such_argument=1)
    with pytest.raises(ValueError, match="max_length"):
        target.generate(prompt, do_sample=False, max_length=3)
    target.generate(prompt, **GREEDY)
    assert online_memory(target).metrics.requests == 1


class Fixed(DynamicLayer):
    is_croppable = False


def fixed(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [Fixed() for _ in cache.layers]
    return cache


def test_a_cache_from_an_earlier_turn_is_served_and_one_that_cannot_be_is_not(target, prompt) -> None:
    def turns(cache: Any) -> list[Tensor]:
        first = target.generate(prompt, **{CACHE: cache}, **GREEDY)
        more = torch.cat([first, prompt], dim=-1)
        return [first, target.generate(more, **{CACHE: cache}, **GREEDY)]

    plain = turns(DynamicCache(config=target.config))
    memory = attach(target, config=FIXED)
    assert all(map(torch.equal, plain, turns(DynamicCache(config=target.config))))
    assert memory.metrics.requests == 2
    assert all(map(torch.equal, plain, turns(StaticCache(config=target.config, max_cache_len=64))))
    assert memory.metrics.requests == 4
    with pytest.warns(UserWarning, match=f"{CACHE}: .*Fixed"):
        assert all(map(torch.equal, plain, turns(fixed(target.config))))
    assert memory.metrics.requests == 4


def test_one_model_in_several_processes_runs_plain(target, prompt) -> None:
    plain = target.generate(prompt, **GREEDY)
    attach(target, config=FIXED)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.warns(UserWarning, match="synced_gpus=True"):
            assert torch.equal(plain, target.generate(prompt, synced_gpus=True, **GREEDY))
    finally:
        torch.distributed.destroy_process_group()


def test_a_class_that_names_its_modes_is_served_in_these(target, prompt) -> None:
    class Greedy(type(target)):  # type: ignore[misc]
        _supported_generation_modes = (GenerationMode.GREEDY_SEARCH,)

    target.__class__ = Greedy
    plain, memory = target.generate(prompt, **GREEDY), attach(target, config=FIXED)
    assert torch.equal(plain, target.generate(prompt, **GREEDY)) and memory.metrics.requests == 1
    with pytest.raises(ValueError, match="only supports"):
        target.generate(prompt, do_sample=True, max_new_tokens=4)


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_attached_model_drafts_for_another_one_as_it_did(target, draft_model, prompt, do_sample) -> None:
    """Transformers' assisted decoding calls `generate` on its draft in every round."""

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        out = target.generate(prompt, assistant_model=draft_model, do_sample=do_sample, max_new_tokens=20)
        return out, torch.rand(1)

    plain, memory = run(), attach(draft_model, config=FIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(torch.equal, plain, run()))
    assert memory.metrics.requests == 0


def test_a_custom_generate_by_name_is_told_unless_it_comes_back(target, prompt, monkeypatch) -> None:
    """Code from a repository: it decodes by itself, or calls `generate` for that."""
    attach(target, config=FIXED)
    plain = target.generate(prompt, onlinespec=False, **GREEDY)
    comes_back = {
        "back": lambda model, inputs, **kwargs: model.generate(inputs, **GREEDY),
        "echo": lambda model, **_: prompt,
    }
    monkeypatch.setattr(target, "load_custom_generate", lambda name, **kwargs: comes_back[name])
    assert torch.equal(plain, target.generate(prompt, custom_generate="back", trust_remote_code=True))
    assert online_metrics(target).requests == 1
    with pytest.warns(UserWarning, match="custom_generate="):
        assert torch.equal(prompt, target.generate(prompt, custom_generate="echo", trust_remote_code=True))


# Wrappers, copies, threads


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*", "ignore::DeprecationWarning")
def test_wrappers_are_seen_through(prompt) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    inner = tiny_llama(1, layers=2)
    bound = inner.generate  # fetched before
    wrapped = get_peft_model(inner, settings).eval()
    compiled = torch.compile(wrapped, backend="eager")
    plain = wrapped.generate(input_ids=prompt, **GREEDY)
    memory = attach(compiled, config=FIXED)
    for generate in (bound, inner.generate, wrapped.generate, compiled.generate, wrapped.base_model.generate):
        assert torch.equal(plain, generate(input_ids=prompt, **GREEDY))
    assert memory.metrics.requests == 5
    assert detach(inner) is memory
    assert torch.equal(plain, bound(prompt, **GREEDY)) and memory.metrics.requests == 5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")  # PEFT's, which says the old name
def test_prompt_learning_around_an_attached_model_runs_plain(target, prompt) -> None:
    tuned = get_peft_model(target, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    plain = tuned.generate(input_ids=prompt, **GREEDY)
    attach(target, config=FIXED)
    with pytest.warns(UserWarning, match="virtual tokens"):
        assert torch.equal(plain, tuned.generate(input_ids=prompt, **GREEDY))


def test_a_copy_is_not_attached_and_nothing_of_ours_is_saved(target, prompt, tmp_path) -> None:
    target.save_pretrained(tmp_path / "before")
    plain = target.generate(prompt, **GREEDY)
    memory = attach(target, config=FIXED)
    file = io.BytesIO()
    torch.save(target, file)
    file.seek(0)
    target.save_pretrained(tmp_path / "after")
    copies = [copy.deepcopy(target), copy.copy(target), pickle.loads(pickle.dumps(target))]
    copies += [torch.load(file, weights_only=False), AutoModelForCausalLM.from_pretrained(tmp_path / "after")]
    for other in copies:
        assert torch.equal(plain, other.generate(prompt, pad_token_id=0, **GREEDY))
    assert memory.metrics.requests == 0
    names = {path.name for path in (tmp_path / "before").iterdir()}
    assert names == {path.name for path in (tmp_path / "after").iterdir()}
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_models_go_and_what_was_attached_goes_with_them(prompt) -> None:
    """Also where the target is its own draft: the two share weights."""
    target = tiny_llama(1, layers=2)
    draft = attach(target, target, SMALL)
    target.generate(prompt, **GREEDY)
    gone = weakref.ref(target), weakref.ref(draft)
    del target, draft
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


def test_threads_on_attached_and_unattached_models(prompt) -> None:
    """Six at once; every one gets its answer, and only the attached models' drafts hear of it."""
    models = [tiny_llama(seed, layers=2) for seed in (1, 2, 3)]
    prompts = [torch.tensor([[3, 14, 15, 9, 2, 6 + n]]) for n in range(6)]
    plain = [[model.generate(p, **GREEDY) for p in prompts] for model in models]
    drafts = [attach(models[0], tiny_llama(4), SMALL), attach(models[1], config=FIXED)]
    wrong: list[tuple[int, int]] = []

    def work(n: int) -> None:
        for turn in range(3):
            i = (n + turn) % 3
            if not torch.equal(plain[i][n], models[i].generate(prompts[n], **GREEDY)):
                wrong.append((i, n))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and [d.metrics.requests for d in drafts] == [6, 6]


def test_a_model_that_generates_inside_of_a_call_is_served_by_what_is_attached_to_itself(target, prompt) -> None:
    inner, alone = tiny_llama(2), tiny_llama(3)
    expected = [model.generate(prompt, **GREEDY) for model in (target, inner, alone)]
    drafts = [attach(target, config=FIXED), attach(inner, config=FIXED)]
    found: list[Tensor] = []

    def ask(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not found:
            found.extend([inner.generate(prompt, **GREEDY), alone.generate(prompt, **GREEDY)])
        return torch.zeros(1, dtype=torch.bool)

    out = target.generate(prompt, stopping_criteria=[ask], **GREEDY)
    assert all(map(torch.equal, expected, [out, *found]))
    assert [d.metrics.requests for d in drafts] == [1, 1]


def test_disabled(target, prompt) -> None:
    """What is attached rests, and goes on; nothing can be attached meanwhile."""
    memory = attach(target, config=FIXED)
    with attached(target, tiny_llama(2)):
        hf_onlinespec.disable()
        try:
            target.generate(prompt, **GREEDY)
            with pytest.raises(UnsupportedError, match=r"enable\(\)"):
                attach(tiny_llama(3))
        finally:
            hf_onlinespec.enable()
    target.generate(prompt, **GREEDY)
    assert memory.metrics.requests == 1


# What cannot be attached


def test_targets_that_can_never_be_served_are_refused_at_once(draft_model) -> None:
    with pytest.raises(UnsupportedError, match="recurrent state"):
        attach(tiny_rwkv(), draft_model)
    for thing in (torch.nn.Linear(2, 2), "name", None, tiny_llama(1).model):
        with pytest.raises(UnsupportedError, match=f"target is a {type(thing).__name__}"):
            attach(thing)  # type: ignore[arg-type]

    class Speaks(type(draft_model)):  # type: ignore[misc]
        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            return super()._sample(*args, **kwargs)

    draft_model.__class__ = Speaks
    with pytest.raises(UnsupportedError, match="Speaks decodes in a way of its own"):
        attach(draft_model)


@pytest.mark.parametrize("place", ["a class", "a model"])
def test_a_generate_that_is_not_transformers_own_is_named(target, prompt, place) -> None:
    def speak(self: Any, *args: Any, **kwargs: Any) -> Any:
        return "something"

    plain = target.generate(prompt, **GREEDY)
    if place == "a class":
        target.__class__ = type("Speaks", (type(target),), {"generate": speak})
    else:
        target.generate = types.MethodType(speak, target)
    with pytest.warns(UserWarning, match=rf"{type(target).__name__} has a generate of its own \(.*speak\)") as told:
        memory = attach(target, config=FIXED)
    assert len(told) == 1 and told[0].filename == __file__
    assert target.generate(prompt) == "something" and memory.metrics.rounds == 0
    assert torch.equal(plain, GenerationMixin.generate(target, prompt, **GREEDY)) and memory.metrics.rounds > 0


def bans(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Greedy decoding and sampling of its own."""
    return GenerationMixin._sample(self, *args, **kwargs)


def ends_early(self: Any, *args: Any, **kwargs: Any) -> bool:
    """As a class may whose input comes as a stream."""
    self.asked = vars(self).get("asked", 0) + 1
    return self.asked % 9 != 0


def prepares(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As a class may that prepares its cache for the prompt."""
    return GenerationMixin._prefill(self, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "method"), [("_sample", bans), ("_has_unfinished_sequences", ends_early), ("_prefill", prepares)]
)
def test_a_target_that_decodes_in_a_way_of_its_own_is_refused_in_each_call(
    name, method, target, draft_model, prompt
) -> None:
    target.__class__ = type("Bans", (type(target),), {name: method})
    answer = target.generate(prompt, **GREEDY)
    assert answer.shape[1] == prompt.shape[1] + (8 if method is ends_early else 20)
    for how in (
        {"onlinespec": True},
        {"assistant_model": OnlineDraft(draft_model, SMALL)},
        {"assistant_model": draft_model, "onlinespec": True},
        {"custom_generate": OnlineDraft(draft_model, SMALL).generate_fn()},
    ):
        with pytest.raises(UnsupportedError, match="Bans decodes in a way of its own"):
            target.generate(prompt, **GREEDY, **how)


def test_drafts_that_do_not_fit_are_refused_at_once(target, prompt) -> None:
    with pytest.raises(DraftError, match="2000"):
        attach(target, tiny_llama(2, vocab=2000))
    with pytest.raises(DraftError, match="Linear"):
        attach(target, torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(DraftError, match="draft is a int"):
        attach(target, 3)  # type: ignore[arg-type]
    with pytest.raises(DraftError, match=r"draft is a OnlineSpecConfig: .*config="):
        attach(target, FIXED)  # type: ignore[arg-type]
    with pytest.raises(DraftError, match="no such folder"):
        attach(target, "/no/such/folder")
    with pytest.raises(UnsupportedError, match="memory_tokens=0"):
        attach(target, config=OnlineSpecConfig(memory_tokens=0, recycle=False))
    with pytest.raises(ConfigError, match="anew=True"):
        attach(target, config=FIXED), attach(target, config=SMALL)
    draft = tiny_llama(2)
    attach(target, draft, FIXED)
    with pytest.raises(
        ConfigError, match=r"Leave the settings out .*, or pass OnlineDraft\(model, config\) as the draft"
    ):
        attach(target, draft, SMALL)
    detach(target)
    assert torch.equal(target.generate(prompt, **GREEDY), target.generate(prompt, onlinespec=False, **GREEDY))


def test_the_folder_of_a_draft_and_what_attach_returned(target, draft_model, prompt, tmp_path) -> None:
    plain = target.generate(prompt, **GREEDY)
    first = attach(target, draft_model, SMALL)
    target.generate(prompt, **GREEDY)
    first.save_pretrained(tmp_path / "evolved")
    draft_model.save_pretrained(tmp_path / "base")
    # The base has no name that could be found: an evolved draft needs it, see OnlineDraft.from_pretrained.
    assert torch.equal(plain, target.generate(prompt, **GREEDY))
    second = attach(target, tmp_path / "base", SMALL)
    assert torch.equal(plain, target.generate(prompt, **GREEDY))
    assert (first.metrics.requests, second.metrics.requests) == (2, 1)
    memory = attach(target)
    other = tiny_llama(1, layers=2)
    assert attach(other, memory) is memory is online_memory(other)
    assert torch.equal(plain, other.generate(prompt, **GREEDY)) and memory.metrics.requests == 1


# Targets that show only in a call that they cannot be served


def test_a_target_that_loses_its_cache_is_decoded_plainly(target, prompt) -> None:
    def drop(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, dict(kwargs, **{CACHE: None}, use_cache=False)

    target.model.register_forward_pre_hook(drop, with_kwargs=True)
    plain = target.generate(prompt, **GREEDY)
    memory = attach(target, config=FIXED)
    with pytest.warns(UserWarning, match="first forward") as heard:
        assert torch.equal(plain, target.generate(prompt, **GREEDY))
        assert torch.equal(plain, target.generate(prompt, **GREEDY))
    assert len(heard) == 1
    with pytest.raises(UnsupportedError, match="first forward"):
        target.generate(prompt, onlinespec=True, **GREEDY)
    assert memory.metrics.new_tokens <= 2


class Heard(BaseStreamer):
    """What a streamer was given, and how often it was told that the answer ended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.view(-1).tolist()

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("place", ["a hook", "a method", "a class"])
@pytest.mark.parametrize("given", ["a streamer", "a cache"])
def test_a_target_that_loses_its_cache_streams_plainly_from_the_first_call(target, prompt, given, place) -> None:
    """What the caller gave is used once: a prompt is not streamed twice, and a cache is not read into twice."""

    def drop(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, dict(kwargs, use_cache=False) | {CACHE: None}

    if place == "a hook":
        target.model.register_forward_pre_hook(drop, with_kwargs=True)
    elif place == "a method":
        forward = target.forward
        target.forward = lambda *args, **kwargs: forward(*args, **drop(None, args, kwargs)[1])
    else:

        class Loses(type(target)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **drop(None, args, kwargs)[1])

        target.__class__ = Loses

    def answer() -> tuple[list[int], list[int], int]:
        heard = Heard()
        way = {"streamer": heard} if given == "a streamer" else {CACHE: DynamicCache(config=target.config)}
        return target.generate(prompt, **GREEDY, **way)[0].tolist(), heard.tokens, heard.ends

    plain = answer()
    attach(target, config=FIXED)
    with pytest.warns(UserWarning, match="first forward") as told:
        assert answer() == plain
        assert answer() == plain
    assert len(told) == 1


def test_a_target_that_is_altered_after_it_was_served_streams_plainly_until_it_is_as_before(target, prompt) -> None:
    def drop(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, dict(kwargs, use_cache=False) | {CACHE: None}

    def answer() -> tuple[list[int], list[int], int]:
        heard = Heard()
        return target.generate(prompt, **GREEDY, streamer=heard)[0].tolist(), heard.tokens, heard.ends

    hook = target.model.register_forward_pre_hook(drop, with_kwargs=True)
    altered = answer()
    hook.remove()
    memory, before = attach(target, config=FIXED), answer()
    hook = target.model.register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.warns(UserWarning, match="first forward") as told:
        assert answer() == altered
        assert answer() == altered
    assert len(told) == 1 and memory.metrics.requests == 1
    hook.remove()
    assert answer() == before
    assert memory.metrics.requests == 2


class Guarded(dict[str, float]):
    """Settings of somebody else that cannot be listed."""

    def items(self) -> Any:
        raise RuntimeError("not to be listed")


class Sign(int):
    """A number that is equal to others and has no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and int(self) == int(other)


@pytest.mark.parametrize(
    "held, told", [(Guarded(scale=2.0), "could not be told"), (Sign(2), "")], ids=("no list", "no hash")
)
@pytest.mark.parametrize("streams", [False, True])
def test_what_a_hook_refers_to_costs_no_answer(target, prompt, held: Any, told: str, streams: bool) -> None:
    def scale(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * (1.0 + len(str(held)) / 100)

    target.model.norm.register_forward_hook(scale)
    plain = target.generate(prompt, **GREEDY)
    memory = attach(target, config=FIXED)
    for _ in range(2):
        heard = {"streamer": Heard()} if streams else {}
        assert torch.equal(plain, target.generate(prompt, **GREEDY, **heard))
    assert told in memory.metrics.decisions.drafting and memory.metrics.requests == 2


def test_a_target_that_hands_back_no_cache_is_decoded_plainly(target, prompt) -> None:
    def forget(module: Any, args: Any, output: Any) -> Any:
        output[CACHE] = None
        return output

    target.register_forward_hook(forget)
    plain = target.generate(prompt, **GREEDY)
    attach(target, config=FIXED)
    with pytest.warns(UserWarning, match="hands back no cache"):
        assert torch.equal(plain, target.generate(prompt, **GREEDY))
    heard = Heard()
    assert torch.equal(plain, target.generate(prompt, **GREEDY, streamer=heard))
    assert heard.tokens == plain[0].tolist()


# Others that call `generate`


PROMPT = "<|endoftext|>Show the files in a folder"


def test_a_pipeline(pair: EmbeddedPair) -> None:
    texts = [PROMPT, "<|endoftext|>List all orders"]
    pipe = pipeline("text-generation", model=pair.target, tokenizer=pair.tokenizer)
    call: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)
    plain = [pipe(text, **call) for text in texts]
    together = pipe(texts, batch_size=2, **call)
    with attached(pair.target, OnlineDraft(load_draft())) as draft:
        assert [pipe(text, **call) for text in texts] == plain
        assert draft.metrics.requests == 2 and draft.metrics.rounds < draft.metrics.new_tokens
        assert pipe(texts, batch_size=2, **call) == together
        assert draft.metrics.requests == 3


def test_a_streamer_in_a_thread(pair: EmbeddedPair) -> None:
    inputs = pair.tokenizer(PROMPT, return_tensors="pt")

    def stream() -> str:
        streamer = TextIteratorStreamer(pair.tokenizer, skip_prompt=True, timeout=60)
        call: dict[str, Any] = dict(inputs, streamer=streamer, max_new_tokens=16, do_sample=False)
        thread = threading.Thread(target=pair.target.generate, kwargs=call)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    plain = stream()
    with attached(pair.target, OnlineDraft(load_draft())) as draft:
        assert stream() == plain != ""
        assert draft.metrics.requests == 1 and draft.metrics.rounds < draft.metrics.new_tokens


# Asking for the metrics


def test_without_a_draft_model_that_is_told_before_the_first_request(target, prompt) -> None:
    memory = attach(target)
    told = memory.metrics.decisions.drafting, memory.metrics.decisions.learning
    assert all("no draft model" in text for text in told)
    target.generate(prompt, **GREEDY)
    assert memory.metrics.decisions.learning == told[1]


def test_metrics_of_a_target_or_a_draft_are_found_and_nothing_is_made(target, draft_model, prompt) -> None:
    alone = tiny_llama(5)
    for model in (target, draft_model, alone):
        with pytest.raises(UnsupportedError, match="Nothing has drafted for this LlamaForCausalLM"):
            online_metrics(model)
    with pytest.raises(UnsupportedError, match="model is a str"):
        online_metrics("name")  # type: ignore[arg-type]
    target.generate(prompt, assistant_model=draft_model, onlinespec=SMALL, **GREEDY)
    draft = online_draft(draft_model)
    for asked in (target, draft_model, draft, torch.compile(target, backend="eager")):
        assert online_metrics(asked) is draft.metrics
    other = tiny_llama(3)
    target.generate(prompt, assistant_model=other, onlinespec=SMALL, **GREEDY)  # the latest counts
    assert online_metrics(target) is online_metrics(other) is not draft.metrics
    memory = attach(target)
    assert online_metrics(target) is memory.metrics is online_metrics(memory)
    attach(alone)
    assert online_metrics(alone).requests == 0
    with pytest.raises(UnsupportedError, match="Of a copy"):
        online_metrics(copy.deepcopy(target))
    alone.generate(prompt, assistant_model=target, onlinespec=SMALL, **GREEDY)
    with pytest.raises(UnsupportedError, match="is a target and a draft"):
        online_metrics(target)
