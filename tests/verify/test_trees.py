"""Trees of candidates: verified in one forward, and the cache afterwards holds the path that was kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_onlinespec._compat.caches import move
from hf_onlinespec.measure.bench import ForwardClock
from hf_onlinespec.rounds import Proposal
from hf_onlinespec.verify.probe import guesses
from hf_onlinespec.verify.probe_trees import why_chains
from hf_onlinespec.verify.trees import in_place, tree_mask, tree_positions
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_llama
from tests.fakes import PlainDraft, ScriptedProposer
from tests.tiny_models import CACHE, random_model

VOCAB = 96
# Per candidate its parent and how far its token is from the right one.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "right branch last": ((-1, 1), (-1, 2), (0, 0), (-1, 0), (3, 3), (3, 0), (5, 1), (5, 2), (5, 0), (8, 0)),
    "right branch first": ((-1, 0), (0, 0), (1, 0), (2, 0), (-1, 1), (4, 0), (0, 5), (1, 7)),
    "right branch in the middle": ((-1, 4), (-1, 0), (-1, 9), (1, 3), (1, 0), (2, 0), (4, 1), (4, 0), (4, 2), (7, 1)),
    "by depth": ((-1, 1), (-1, 0), (0, 0), (1, 5), (1, 0), (2, 0), (3, 0), (4, 7), (4, 0)),
    "nothing right": ((-1, 1), (-1, 2), (0, 0), (1, 0), (-1, 3)),
    "a chain": ((-1, 0), (0, 0), (1, 0)),
    "some of a branch": ((-1, 3), (-1, 0), (1, 2), (1, 0), (3, 1), (4, 0)),
}
SERVED = "llama qwen2 qwen3 gpt2 gpt_neox phi opt olmo2 granite granitemoe codegen gptj smollm3 cohere stablelm".split()
# How each of the others says why.
REFUSED = {
    "bloom": "ALiBi", "mpt": "ALiBi", "falcon alibi": "ALiBi", "gemma2": "window", "gemma3_text mixed": "window",
    "mistral": "window", "mixtral": "window", "gpt_oss": "window", "llama4_text chunked": "window", "gpt_neo": "window",
    "llama dynamic": "length", "phi3 longrope": "window", "bart": "position",
}  # fmt: skip
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
CALL: dict[str, Any] = dict(do_sample=False, max_new_tokens=24, return_dict_in_generate=True)


def built(name: str, **arguments: Any) -> PreTrainedModel:
    """Of tests/architectures.py, with room for positions."""
    row = next(row for row in ARCHITECTURES if row.name == name)
    config = row.config()
    for field in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if field in vars(config):
            setattr(config, field, 256)
    for field, value in arguments.items():
        setattr(config, field, value)
    return random_model(config, 0)


def prompt(n: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(8, VOCAB, (1, n), generator=torch.Generator().manual_seed(seed))


def read(cache: DynamicCache, i: int) -> tuple[Tensor, Tensor]:
    return cache.layers[i].keys, cache.layers[i].values


def same_cache(ours: DynamicCache, plain: DynamicCache, behind: int = 0) -> bool:
    """Whether both hold the same keys and values, to rounding; `behind`: so many tokens of padding."""
    pairs = [pair for i in range(len(plain.layers)) for pair in zip(read(ours, i), read(plain, i), strict=True)]
    return all(
        one.shape == other.shape and torch.allclose(one[..., behind:, :], other[..., behind:, :], atol=1e-4, rtol=1e-3)
        for one, other in pairs
    )


class TreeDraft(PlainDraft):
    def __init__(self, scripted: ScriptedProposer) -> None:
        super().__init__(scripted)
        self.scripted = scripted


def drafted(target: PreTrainedModel, script: Tensor, shape: str, inputs: Tensor, **given: Any) -> tuple[Any, TreeDraft]:
    """What a call says whose draft proposes trees of that shape."""
    draft = TreeDraft(ScriptedProposer(script, SHAPES[shape], VOCAB))
    return target.generate(inputs, assistant_model=draft, **given), draft


def trees_of(draft: TreeDraft) -> int:
    """How many trees were proposed."""
    return draft.scripted.trees


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SERVED)
def test_trees_say_what_plain_decoding_says_and_leave_its_cache(name: str, shape: str) -> None:
    target = built(name)
    plain = target.generate(prompt(), **CALL)
    ours, draft = drafted(target, plain.sequences, shape, prompt(), **CALL)
    assert torch.equal(ours.sequences, plain.sequences)
    assert same_cache(ours[CACHE], plain[CACHE])
    metrics = draft.metrics
    assert "chains only" not in metrics.decisions.drafting
    assert trees_of(draft) > 0
    assert shape == "nothing right" or metrics.last.acceptance_length > 1.5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "biogpt"])
def test_a_prompt_that_is_padded_on_the_left(name: str, dtype: torch.dtype, attention: str) -> None:
    target = built(name).to(dtype)
    target.set_attn_implementation(attention)
    tokens = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt()], dim=-1)
    mask = (torch.arange(17) >= 5).long()[None]
    plain = target.generate(tokens, attention_mask=mask, **CALL)
    for shape in ("right branch last", "by depth"):
        ours, draft = drafted(target, plain.sequences, shape, tokens, attention_mask=mask, **CALL)
        assert torch.equal(ours.sequences, plain.sequences)
        assert draft.metrics.last.acceptance_length > 1.5 and trees_of(draft) > 0
        assert same_cache(ours[CACHE], plain[CACHE], behind=5)


@pytest.mark.parametrize("new_tokens_only", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_cache_of_an_earlier_turn_goes_on(name: str, new_tokens_only: bool) -> None:
    """Twice, each with trees: what the first turn leaves in the cache, the second one goes on from."""
    target, more = built(name), prompt(5, seed=8)
    first = target.generate(prompt(), **CALL)
    turns = torch.cat([first.sequences, more], dim=-1)
    given = {"attention_mask": torch.ones_like(turns)}
    # Of the last token of a turn the cache knows nothing yet.
    new = torch.cat([first.sequences[:, -1:], more], dim=-1) if new_tokens_only else turns
    plain = target.generate(new, **given, **{CACHE: first[CACHE]}, **CALL)
    whole = torch.cat([turns[:, : turns.shape[1] - new.shape[1]], plain.sequences], dim=-1)
    script = plain.sequences if new_tokens_only else whole
    for shape in ("right branch last", "right branch in the middle"):
        ours, _ = drafted(target, first.sequences, shape, prompt(), **CALL)
        again, draft = drafted(target, script, shape, new, **given, **{CACHE: ours[CACHE]}, **CALL)
        assert torch.equal(again.sequences, plain.sequences) and trees_of(draft) > 0
        assert draft.metrics.last.acceptance_length > 1.5
        assert same_cache(again[CACHE], plain[CACHE])


@pytest.mark.parametrize("stop", range(13, 20))
def test_a_row_that_ends_within_a_path(stop: int) -> None:
    """The last kept token is not in the cache, be it a candidate or the target's own."""
    target = built("llama")
    script = target.generate(prompt(), **CALL).sequences
    given = CALL | dict(eos_token_id=int(script[0, stop]))
    plain = target.generate(prompt(), **given)
    for shape in ("right branch last", "by depth", "some of a branch"):
        ours, _ = drafted(target, script, shape, prompt(), **given)
        assert torch.equal(ours.sequences, plain.sequences) and same_cache(ours[CACHE], plain[CACHE])


def test_logits_and_scores_are_those_of_the_kept_path() -> None:
    target = built("llama")
    given = CALL | dict(output_logits=True, output_scores=True, repetition_penalty=1.3)
    plain = target.generate(prompt(), **given)
    ours, draft = drafted(target, plain.sequences, "right branch in the middle", prompt(), **given)
    assert trees_of(draft) > 0 and len(ours.logits) == len(plain.logits) == 24
    for one, other in ((ours.logits, plain.logits), (ours.scores, plain.scores)):
        assert torch.allclose(torch.cat(one), torch.cat(other), atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_count_places_are_given_chains_and_decisions_say_why(name: str) -> None:
    target = built(name)
    plain = target.generate(prompt(), **CALL)
    ours, draft = drafted(target, plain.sequences, "right branch last", prompt(), **CALL)
    assert torch.equal(ours.sequences, plain.sequences)
    if plain[CACHE].get_seq_length() < plain.sequences.shape[1] - 1:
        pytest.skip(
            f"plain decoding of transformers {transformers.__version__} loses its prompt, and ours drafts no more"
        )
    assert trees_of(draft) == 0 and draft.metrics.last.accepted_tokens > 0
    said = draft.metrics.decisions.drafting
    assert "chains only: the target" in said and REFUSED[name] in said


def test_decisions_forget_why_there_were_chains_when_there_are_trees() -> None:
    target = built("llama")
    plain = target.generate(prompt(), **CALL)
    draft = TreeDraft(ScriptedProposer(plain.sequences, SHAPES["by depth"], VOCAB))
    for limited in (True, True, False):
        target.config.attn_temperature_tuning = limited  # which no Llama reads
        ours = target.generate(prompt(), assistant_model=draft, **CALL)
        assert torch.equal(ours.sequences, plain.sequences)
        assert draft.metrics.decisions.drafting.count("chains only") == limited


def test_layers_of_a_window_that_are_not_in_use_are_no_obstacle() -> None:
    target = random_model(MistralConfig(**SMALL, sliding_window=None), 0)
    plain = target.generate(prompt(), **CALL)
    _, draft = drafted(target, plain.sequences, "by depth", prompt(), **CALL)
    assert trees_of(draft) > 0
    target = random_model(
        MistralConfig(**SMALL, sliding_window=64), 0
    )  # longer than the answer, and refused nevertheless
    _, draft = drafted(target, plain.sequences, "by depth", prompt(), **CALL)
    assert trees_of(draft) == 0 and "window" in draft.metrics.decisions.drafting


def test_sinks_scaled_attention_and_other_implementations_are_given_chains() -> None:
    dense = dict(layer_types=["full_attention"] * 2)
    inputs = {CACHE: DynamicCache()}
    assert "sinks" in why_chains(built("gpt_oss", **dense), prompt(), inputs)
    assert "scales" in why_chains(built("llama4_text", **dense), prompt(), inputs)
    for kind in ("flash_attention_2", "flex_attention"):
        target = built("llama")
        assert why_chains(target, prompt(), {CACHE: DynamicCache()}) == ""
        target.config._attn_implementation = kind
        assert repr(kind) in why_chains(target, prompt(), {CACHE: DynamicCache()})


def test_inputs_that_have_no_tree_are_given_chains() -> None:
    target, text = built("llama"), {CACHE: DynamicCache()}
    padded = torch.tensor([[0] + [1] * 11])
    windows = DynamicCache(config=MistralConfig(**SMALL, sliding_window=8))
    for inputs, reason in (
        (text | dict(pixel_values=torch.zeros(1)), "more than text"),
        (text | dict(attention_mask=padded), "without positions"),
        (text | dict(position_ids=torch.zeros(12)), "position for each token"),
        ({CACHE: windows}, "cannot be moved"),
        ({CACHE: DynamicCache(offloading=True)}, "cannot be moved"),
    ):
        assert reason in why_chains(target, prompt(), inputs)


def test_a_prompt_that_no_target_can_read_says_nothing_of_this_one() -> None:
    target, inputs = built("llama"), {CACHE: DynamicCache()}
    assert "failed: IndexError" in why_chains(target, prompt() + 1_000_000, inputs)
    assert why_chains(target, prompt(), inputs) == ""


class RefusesMasks(LlamaForCausalLM):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **inputs: Any
    ) -> ModelOutput:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("a mask of two dimensions is expected")
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **inputs)


class IgnoresMasks(LlamaForCausalLM):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **inputs: Any
    ) -> ModelOutput:
        return super().forward(input_ids, attention_mask=None, position_ids=position_ids, **inputs)


class CountsPositions(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> ModelOutput:
        return super().forward(input_ids, position_ids=None, **inputs)


def in_training(cls: type[LlamaForCausalLM], dropout: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    target = cls(LlamaConfig(**SMALL, attention_dropout=dropout)).train()
    target.generation_config.pad_token_id, target.generation_config.eos_token_id = 0, None
    return target


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_trees_are_verified_in_training_mode_and_trying_them_leaves_no_trace(dropout: float) -> None:
    """As reinforcement learning leaves the policy that it samples from. Part of the model may be in evaluation mode."""
    target, inputs = in_training(LlamaForCausalLM, dropout), {CACHE: DynamicCache()}
    target.model.layers[1].eval()
    modes, numbers = [module.training for module in target.modules()], torch.get_rng_state()
    assert why_chains(target, prompt(), inputs) == ""
    assert [module.training for module in target.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    for cls in (IgnoresMasks, CountsPositions):
        assert "something else" in why_chains(in_training(cls, dropout), prompt(), inputs)


@torch.no_grad()
def test_a_class_of_others_whose_weights_are_trained_goes_on_with_trees_as_it_was_found() -> None:
    """Its weights are among what may alter what it computes, and those of a policy change in each step."""
    for cls, reason in ((LlamaForCausalLM, ""), (IgnoresMasks, "something else")):
        own = type("OfOthers", (cls,), {"__module__": "of_others"})
        target = in_training(own, 0.0)
        target.scale = torch.nn.Parameter(torch.ones(1))
        for _ in range(12):
            found = why_chains(target, prompt(), {CACHE: DynamicCache()})
            assert reason in found and bool(found) == bool(reason)
            for parameter in target.parameters():
                parameter.mul_(0.99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "reason"),
    [(RefusesMasks, "ValueError"), (IgnoresMasks, "something else"), (CountsPositions, "something else")],
)
def test_a_model_that_refuses_or_ignores_what_a_tree_needs_is_found_out(
    cls: type[LlamaForCausalLM], reason: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    target = cls(LlamaConfig(**SMALL)).to(dtype).eval()
    target.generation_config.pad_token_id, target.generation_config.eos_token_id = 0, None
    plain = target.generate(prompt(), **CALL)
    for _ in range(2):  # it is told again, though it is tried once
        ours, draft = drafted(target, plain.sequences, "right branch last", prompt(), **CALL)
        assert torch.equal(ours.sequences, plain.sequences) or dtype is torch.bfloat16
        assert trees_of(draft) == 0 and draft.metrics.last.failed_drafts == 0
        said = draft.metrics.decisions.drafting
        assert f"chains only: the target {cls.__name__}" in said and reason in said


def test_a_target_is_tried_once_and_again_when_it_changes() -> None:
    target, read = built("llama"), ForwardClock()
    read.watch(target)
    for _ in range(3):
        assert why_chains(target, prompt(), {CACHE: DynamicCache()}) == ""
        assert read.calls == 5
    target.set_attn_implementation("eager")
    why_chains(target, prompt(), {CACHE: DynamicCache()})
    assert read.calls == 10
    why_chains(target.double(), prompt(), {CACHE: DynamicCache()})
    assert read.calls == 15


def test_trying_leaves_the_request_and_its_random_numbers_alone() -> None:
    target, cache = built("llama"), DynamicCache()
    torch.manual_seed(5)
    with torch.no_grad():
        target(prompt(), **{CACHE: cache})
        before = [states.clone() for i in range(len(cache.layers)) for states in read(cache, i)]
        state = torch.get_rng_state()
        assert why_chains(target, prompt(), {CACHE: cache}) == ""
    assert torch.equal(torch.get_rng_state(), state)
    after = [states for i in range(len(cache.layers)) for states in read(cache, i)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


class ShortOfMemory(LlamaForCausalLM):
    short = True  # whether there is none left for a mask

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **inputs: Any
    ) -> ModelOutput:
        if self.short and attention_mask is not None and attention_mask.ndim == 4:
            raise torch.OutOfMemoryError("simulated")
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **inputs)


def test_a_shortage_of_memory_while_it_is_tried_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    target = ShortOfMemory(LlamaConfig(**SMALL)).eval()
    assert "OutOfMemoryError" in why_chains(target, prompt(), {CACHE: DynamicCache()})
    monkeypatch.setattr(ShortOfMemory, "short", False)
    assert why_chains(target, prompt(), {CACHE: DynamicCache()}) == ""


def test_a_small_vocabulary_is_enough_to_be_tried() -> None:
    assert why_chains(tiny_llama(1, vocab=3), torch.tensor([[1, 2, 0]]), {CACHE: DynamicCache()}) == ""


def test_near_the_end_of_a_table_of_positions_there_are_chains() -> None:
    target = built("gpt2")
    given = CALL | dict(max_new_tokens=256 - 150)
    plain = target.generate(prompt(150), **given)
    ours, draft = drafted(target, plain.sequences, "right branch first", prompt(150), **given)
    assert torch.equal(ours.sequences, plain.sequences) and same_cache(ours[CACHE], plain[CACHE])
    rounds = draft.metrics.last.rounds
    assert 0 < trees_of(draft) < rounds - 5


# Mask and positions


def test_a_mask_shows_each_candidate_what_it_follows() -> None:
    """Two rows, the second one with padding in its cache and fewer candidates."""
    tree = Proposal.joined([guesses(torch.tensor([[7, 8, 9]]), (-1, -1, 0)), guesses(torch.tensor([[5]]))])
    shown = torch.tensor([[1, 1], [0, 1]])
    mask = tree_mask(tree, 2, shown, torch.bfloat16, torch.device("cpu"))
    assert mask.shape == (2, 1, 4, 6) and mask.dtype is torch.bfloat16 and bool(mask.isfinite().all())
    assert (mask[0, 0] == 0).long().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 0, 1],
    ]
    assert (mask[1, 0] == 0).long()[:2].tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    assert bool(
        ((mask[1, 0] == 0).sum(-1) > 0).all()
    )  # what stands for no candidate attends to something: no NaN arises
    assert tree_positions(tree, torch.tensor([[10], [3]]))[0].tolist() == [10, 11, 11, 12]
    assert tree_positions(tree, torch.tensor([[10], [3]]))[1, :2].tolist() == [3, 4]


def test_a_mask_of_a_chain_is_causal() -> None:
    mask = tree_mask(guesses(torch.tensor([[1, 2, 3]])), 0, None, torch.float32, torch.device("cpu"))
    assert torch.equal(mask[0, 0] == 0, torch.ones(4, 4).tril().bool())


def test_what_lies_in_place_is_not_moved() -> None:
    assert [in_place(paths) for paths in (((),), ((0, 1),), ((0, 2),), ((1,),))] == [0, 2, 1, 0]
    cache = DynamicCache()
    keys = torch.arange(6.0).view(1, 1, 6, 1).repeat(1, 2, 1, 3)
    cache.update(keys.clone(), -keys, 0)
    move(cache, torch.tensor([[3, 5]]), 1)
    assert read(cache, 0)[0][0, 0, :, 0].tolist() == [0, 3, 5, 3, 4, 5] and read(cache, 0)[1][0, 1, 1, 2] == -3
