"""transformers' Gemma-4 assistants and DFlash drafts as draft heads: they say what transformers says, learn, and never change an answer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import candidate_generator

import hf_onlinespec
from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec._compat.hidden_states import hidden_states, hidden_states_inputs
from hf_onlinespec.embedded import EmbeddedPair, prompts
from hf_onlinespec.errors import ArtifactError, DraftError
from hf_onlinespec.heads.assistants import assistant_head
from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.places import digits, places_of, with_places
from hf_onlinespec.heads.unrolling import Unroll
from hf_onlinespec.share.manifest import Manifest
from tests.heads.assistants import Drafted, dflash, gemma
from tests.tiny_models import CACHE, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in version 5.20:FutureWarning")

OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
FIXED: dict[str, Any] = {
    "lookahead": 3,
    "update_every": 1,
    "update_when": "request",
    "memory_tokens": 0,
    "recycle": False,
}
FIXED |= {"replay_tokens": 0, "audit_tokens": 0, "rank": 4}
KINDS: dict[str, Callable[[], Drafted]] = {"gemma4": gemma, "dflash": dflash}
ALL = KINDS | {"gemma4_unified": lambda: gemma("gemma4_unified"), "ordered": lambda: gemma(ordered=True)}


def prompt(seed: int, length: int = 6) -> Tensor:
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(seed))


def features_of(head: Head, target: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What a head reads of all tokens (1, L)."""
    found = hidden_states(target(tokens, **hidden_states_inputs(head.reads)), head.reads, tokens.shape[1])
    assert found is not None
    return with_places(found, 0) if head.reads_places else found


def theirs(pair: Drafted, tokens: Tensor, steps: int) -> Tensor:
    """The logits (steps, vocabulary) with which transformers drafts behind a prompt (1, L), of which the last token was just said."""
    target, draft = pair
    config = GenerationConfig(max_length=100, do_sample=False)
    table, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    generator: Any
    if "target_layer_ids" in vars(draft.config):
        generator = candidate_generator.DFlashTokenCandidateGenerator(draft, table, lm_head, config)
    else:
        before: dict[str, Any] = {"input_ids": tokens, "model_kwargs": {}}  # transformers 5.18 asks for them
        generator = candidate_generator.SinglePositionMultiTokenCandidateGenerator(
            assistant_model=draft, target_model_input_embeddings=table, generation_config=config, **before
        )
    outputs = target(tokens[:, :-1], **generator.model_kwargs_overrides)
    kwargs = {"attention_mask": None, "position_ids": torch.arange(tokens.shape[1])[None]}
    _, logits = generator.get_candidates(tokens, kwargs, outputs, is_first_iteration=False, n_last_matches=0)
    found: Tensor = logits[0, :steps]
    return found


def behind(head: Head, features: Tensor, tokens: Tensor, steps: int, cache: Any = None) -> list[Tensor]:
    """Logits (vocabulary,) of the likeliest chain behind tokens (1, m), which go with features (1, m, width)."""
    out = head(tokens, features=features, past_key_values=cache, use_cache=True, logits_to_keep=1)
    said = [out.logits[0, -1]]
    for _ in range(steps - 1):
        token = said[-1].argmax()[None, None]
        out = head(token, hidden=out.hidden[:, -1:], past_key_values=out.cache, use_cache=True)
        said.append(out.logits[0, -1])
    return said


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 15], ids=["within the window", "beyond it"])
@pytest.mark.parametrize("kind", ALL)
def test_it_says_what_transformers_says(kind: str, length: int) -> None:
    """Behind a prompt, at every step of a chain; where the prompt is read in two parts, too."""
    pair = ALL[kind]()
    head, tokens = assistant_head(pair.draft, pair.target), prompt(0, length)
    features = features_of(head, pair.target, tokens[:, :-1])
    expected = theirs(pair, tokens, 3)
    assert torch.allclose(torch.stack(behind(head, features, tokens[:, 1:], 3)), expected, atol=1e-4)
    first = head(tokens[:, 1:3], features=features[:, :2], use_cache=True)
    rest = behind(head, features[:, 2:], tokens[:, 3:], 3, first.cache)
    assert torch.allclose(torch.stack(rest), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_at_once_say_what_each_says_alone(kind: str) -> None:
    """As learning reads them, padded on the left beside a longer text."""
    pair = KINDS[kind]()
    head, tokens, steps = assistant_head(pair.draft, pair.target), prompt(1, 12), 3
    features = features_of(head, pair.target, tokens)
    pad = 4
    texts = torch.cat([tokens, torch.nn.functional.pad(tokens[:, :-pad], (pad, 0))])
    read = torch.cat([features, torch.nn.functional.pad(features[:, :-pad], (0, 0, pad, 0))])
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :pad] = 0
    n = 5
    unroll = Unroll(head, n, mask, DynamicCache())
    said = unroll.teacher_forced(texts[:, 1:], read[:, :-1], steps)
    for row, end in ((0, 12), (1, 12 - pad)):
        for k, logits in enumerate(said):
            for at in range(n - k):
                length = end - n + at  # rows that are read before the chain of this one begins
                out = head(tokens[:, 1 : length + 1], features=features[:, :length], use_cache=True, logits_to_keep=1)
                for step in range(k):
                    token = tokens[:, length + 1 + step : length + 2 + step]
                    out = head(token, hidden=out.hidden[:, -1:], past_key_values=out.cache, use_cache=True)
                assert torch.allclose(logits[row, at], out.logits[0, -1], atol=1e-4)


def test_places_survive_half_precision() -> None:
    places = torch.tensor([[0, 1, 255, 256, 257, 70_000, 1_000_000]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(places_of(digits(places).to(dtype)), places)
        assert places_of(with_places(torch.zeros(1, 3, 2, dtype=dtype), 254)[..., 2:]).tolist() == [[254, 255, 256]]


@pytest.mark.parametrize("kind", ALL)
def test_exact_while_it_learns(kind: str) -> None:
    """Greedy and sampled, alone, and in a batch of different lengths; the draft and its target are not touched."""
    target, draft = ALL[kind]()
    before = copy.deepcopy(draft.state_dict())
    with torch.random.fork_rng():
        for seed, how in ((0, {}), (1, {}), (2, {"do_sample": True, "temperature": 1e-4})):
            plain = target.generate(prompt(seed), **OPTIONS)
            settings = OnlineSpecConfig(**FIXED)
            found = target.generate(prompt(seed), assistant_model=draft, onlinespec=settings, **(OPTIONS | how))
            assert torch.equal(found, plain)
    metrics = hf_onlinespec.online_metrics(target)
    assert metrics.requests == 3 and metrics.drafted_tokens > 0 and metrics.updates > 0
    assert metrics.failed_drafts == metrics.failed_updates == 0
    batch = torch.cat([prompt(0), torch.nn.functional.pad(prompt(1)[:, :4], (2, 0))])
    inputs = {"input_ids": batch, "attention_mask": (batch != 0).long()}
    drafted = metrics.drafted_tokens
    found = target.generate(**inputs, assistant_model=draft, onlinespec=True, **OPTIONS)
    assert torch.equal(found, target.generate(**inputs, **OPTIONS))
    assert metrics.failed_drafts == 0
    if kind == "dflash":
        assert metrics.drafted_tokens > drafted
    else:  # windows of its target's layers: its rows would have to accept alike
        assert "window" in metrics.decisions.drafting
    assert all(torch.equal(weight, before[name]) for name, weight in draft.state_dict().items())


def test_rows_of_a_batch_that_stay_below_the_window_are_drafted_for() -> None:
    pair = gemma("gemma4_unified", sliding_window=256)
    prompts = torch.randint(8, 64, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    prompts[0, :5], mask[0, :5] = 0, 0
    call: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 16}
    plain = pair.target.generate(prompts, **call)
    config = OnlineSpecConfig(lookahead=3, update_every=2, update_when="round", memory_tokens=0, recycle=False)
    for _ in range(2):
        ours = pair.target.generate(prompts, assistant_model=pair.draft, onlinespec=config, **call)
        assert torch.equal(plain, ours)
    metrics = hf_onlinespec.online_metrics(pair.target)
    assert metrics.drafted_tokens > 0 and metrics.updates > 0 and metrics.failed_updates == 0


def test_with_guesses_in_trees_and_in_a_second_turn() -> None:
    target, draft = dflash()
    tokens, plain = prompt(3), prompt(3)
    for _ in range(3):
        tokens = target.generate(tokens, assistant_model=draft, onlinespec=True, **OPTIONS)
        plain = target.generate(plain, **OPTIONS)
        assert torch.equal(tokens, plain)
    cached = target.generate(prompt(4), return_dict_in_generate=True, **OPTIONS)
    turn = torch.cat([cached.sequences, prompt(5)], dim=1)
    expected = target.generate(turn, **OPTIONS)
    again = {CACHE: cached[CACHE]}
    assert torch.equal(target.generate(turn, assistant_model=draft, onlinespec=True, **again, **OPTIONS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_repeated_text(kind: str) -> None:
    """Acceptance of the last requests against that of the first ones, with an adapter alone."""
    target, draft = KINDS[kind]()
    settings, accepted = OnlineSpecConfig(**(FIXED | {"lr": 1e-2, "rank": 32})), []
    for _ in range(8):
        target.generate(prompt(0), assistant_model=draft, onlinespec=settings, **(OPTIONS | {"max_new_tokens": 12}))
        last = hf_onlinespec.online_metrics(target).last
        accepted.append(last.new_tokens / last.rounds)
    assert accepted[-1] > 1.5 * accepted[0], accepted


def test_a_block_learns_what_a_trained_target_says(pair: EmbeddedPair) -> None:
    """Acceptance on the last 3 of 12 requests, against the same draft without an adapter."""
    drafted, lengths = dflash(target=pair.target), {}
    for learn in (False, True):
        draft = OnlineDraft(assistant_head(drafted.draft, pair.target), **(FIXED | {"replay_tokens": 16_384}))
        tokens = rounds = 0
        for at in range(0 if learn else 9, 12):
            inputs = pair.tokenizer(prompts("orders")[at], return_tensors="pt")
            pair.target.generate(**inputs, do_sample=False, max_new_tokens=24, assistant_model=draft, onlinespec=learn)
            if at >= 9:
                tokens, rounds = tokens + draft.metrics.last.new_tokens, rounds + draft.metrics.last.rounds
        lengths[learn] = tokens / rounds
    assert lengths[True] > 1.1 * lengths[False], lengths


def served(draft: OnlineDraft, target: PreTrainedModel, seeds: range) -> None:
    for seed in seeds:
        target.generate(prompt(seed), assistant_model=draft, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_by_name_it_goes_on_as_if_it_had_never_stopped(kind: str, tmp_path: Path) -> None:
    target, draft = KINDS[kind]()
    draft.save_pretrained(tmp_path / "assistant")
    whole, first = (OnlineDraft.from_pretrained(tmp_path / "assistant", config=FIXED, target=target) for _ in range(2))
    served(whole, target, range(2))
    served(first, target, range(1))
    first.save_pretrained(tmp_path / "draft")
    second = OnlineDraft.from_pretrained(tmp_path / "draft", target=target)
    served(second, target, range(1, 2))
    mine, others = whole.state().part("adapter").tensors, second.state().part("adapter").tensors
    assert whole.steps == second.steps > 0 and all(torch.equal(mine[name], others[name]) for name in mine)
    facts = Manifest.read(tmp_path / "draft").head
    assert facts is not None and facts.kind == {"gemma4": "Gemma-4 assistant", "dflash": "DFlash"}[kind]
    another = KINDS[kind]().draft
    with torch.no_grad():
        for weight in another.parameters():
            weight.mul_(2)
    with pytest.raises(ArtifactError, match="another base"):
        OnlineDraft.from_pretrained(tmp_path / "draft", base_model=assistant_head(another, target), target=target)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "ordered"])
def test_an_export_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    pair = ALL[kind]()
    draft = OnlineDraft(assistant_head(pair.draft, pair.target), **FIXED)
    served(draft, pair.target, range(1))
    draft.merge_and_export(tmp_path / "export")
    auto = AutoModel if kind == "dflash" else AutoModelForCausalLM
    exported = auto.from_pretrained(tmp_path / "export").eval()
    assert type(exported) is type(pair.draft)
    tokens = prompt(5)
    features = features_of(assistant_head(exported, pair.target), pair.target, tokens[:, :-1])
    with draft.trainable.serving() as head:
        own = head(tokens[:, 1:], features=features, logits_to_keep=1).logits[0, -1]
    assert torch.allclose(theirs(Drafted(pair.target, exported), tokens, 1)[0], own, atol=1e-4)
    assert draft.steps > 0 and not torch.equal(theirs(pair, tokens, 1)[0], own)


def test_a_draft_whose_weights_are_written_begins_anew() -> None:
    target, draft = dflash()
    settings = OnlineSpecConfig(**FIXED)
    target.generate(prompt(0), assistant_model=draft, onlinespec=settings, **OPTIONS)
    assert hf_onlinespec.online_draft(draft).steps > 0
    with torch.no_grad():
        for weight in draft.parameters():
            weight.mul_(1.1)
    with pytest.warns(UserWarning, match="learning begins anew"):
        found = target.generate(prompt(1), assistant_model=draft, onlinespec=True, **OPTIONS)
    assert torch.equal(found, target.generate(prompt(1), **OPTIONS))


def test_attached_to_a_target(tmp_path: Path) -> None:
    target, draft = dflash()
    expected = target.generate(prompt(0), **OPTIONS)
    attached = hf_onlinespec.attach(target, draft)
    assert torch.equal(target.generate(prompt(0), **OPTIONS), expected) and attached.metrics.drafted_tokens > 0
    assert hf_onlinespec.online_draft(draft) is attached
    target, draft = dflash()
    draft.save_pretrained(tmp_path)
    attached = hf_onlinespec.attach(target, tmp_path)
    assert torch.equal(target.generate(prompt(0), **OPTIONS), expected) and attached.metrics.drafted_tokens > 0


def test_what_cannot_draft_is_refused_by_name() -> None:
    llama, (target, assistant), (_, block) = tiny_llama(0, vocab=96, hidden=32), gemma(), dflash()
    how = {"onlinespec": True, **OPTIONS}
    with pytest.raises(DraftError, match="LlamaForCausalLM hands out none"):
        llama.generate(prompt(0), assistant_model=assistant, **how)
    with pytest.raises(DraftError, match="no target is given"):
        OnlineDraft(assistant)
    with pytest.raises(DraftError, match="1 layers"):  # it reads the third one
        llama.generate(prompt(0), assistant_model=block, **how)
    block.config.mask_token_id = 1000
    with pytest.raises(DraftError, match="mask_token_id"):
        llama.generate(prompt(0), assistant_model=block, **how)
    other = gemma(num_key_value_heads=4).target
    with pytest.raises(DraftError, match="belongs to another target"):
        other.generate(prompt(0), assistant_model=assistant, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers under an old name
        wrapped = get_peft_model(assistant, LoraConfig(target_modules=["pre_projection"]))
    with pytest.raises(DraftError, match="PeftModel"):
        target.generate(prompt(0), assistant_model=wrapped, **how)
