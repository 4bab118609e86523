"""Targets with a recurrent state: what is rejected leaves no trace in it, and the caches that come back are plain decoding's."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, UnsupportedError, online_memory
from hf_onlinespec._compat.hidden_states import Reads
from hf_onlinespec.verify.probe import guesses
from hf_onlinespec.verify.target import MOST_READ_AGAIN, Verifier
from tests.architectures import ARCHITECTURES, VOCAB
from tests.conftest import answered, tiny_llama
from tests.fakes import PlainDraft, ScriptedProposer
from tests.tiny_models import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 2, 6]])
CALL: dict[str, Any] = dict(do_sample=False, max_new_tokens=60, return_dict_in_generate=True, eos_token_id=None)
# Gated delta rule beside attention; both in one layer; a state alone; a state that is a part of the last token (Zaya).
NAMES = ["qwen3_next", "falcon_h1", "mamba2", "zaya"]


def recurrent(name: str) -> PreTrainedModel:
    target = next(row for row in ARCHITECTURES if row.name == name).build()
    if CACHE not in inspect.signature(target.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} hands {name}'s state on under another name")
    target.config.max_position_embeddings = 256
    return target


class Mistaken(ScriptedProposer):
    """Says what is right, but for a share of its tokens."""

    def __init__(self, script: Tensor, share: float) -> None:
        wrong = torch.rand(script.shape, generator=torch.Generator().manual_seed(0)) < share
        super().__init__(torch.where(wrong, (script + 1) % VOCAB, script), vocab=VOCAB)


class Read:
    """How many tokens each forward of a model has read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens: list[int] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: object, args: object, inputs: dict[str, Any]) -> None:
        self.tokens.append(inputs["input_ids"].shape[1])


def states(cache: Any) -> list[Tensor]:
    """What the layers of a cache hold."""
    found: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            found += [
                state for state in (*layer.conv_states.values(), *layer.recurrent_states.values()) if state is not None
            ]
        if "keys" in vars(layer) and layer.keys is not None:
            found += [layer.keys, layer.values]
    return found


@pytest.mark.parametrize(
    ("name", "share"), [(name, 0.3) for name in NAMES] + [("qwen3_next", 0.0), ("qwen3_next", 0.8), ("zaya", 0.0)]
)
def test_the_answer_and_the_cache_are_plain_decodings_however_much_is_rejected(name: str, share: float) -> None:
    target = recurrent(name)
    plain = target.generate(PROMPT, **CALL)
    draft = PlainDraft(Mistaken(plain.sequences, share))
    read = Read(target)
    target.generate(PROMPT, **CALL | {"max_new_tokens": 2}, assistant_model=draft)  # it is tried before its first round
    read.tokens.clear()
    with answered():
        ours = target.generate(PROMPT, **CALL, assistant_model=draft)
    assert torch.equal(ours.sequences, plain.sequences)
    for one, other in zip(states(plain[CACHE]), states(ours[CACHE]), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-4)
    counts = draft.metrics
    assert counts.accepted_tokens > 0 and (counts.accepted_tokens == counts.drafted_tokens) == (share == 0)
    # The prompt once, and no more of the answer than the limit, what the last round kept, and four candidates.
    assert read.tokens[0] == PROMPT.shape[1] and max(read.tokens[1:]) <= MOST_READ_AGAIN + 4 + 1 + 4
    if share == 0:
        assert len(read.tokens) == 1 + 60 // 5


def test_what_is_read_again_is_limited() -> None:
    """Where no round is kept as a whole, a round without candidates comes before too much is read again."""
    target = recurrent("qwen3_next")
    plain = target.generate(PROMPT, **CALL)
    wrong = plain.sequences.clone()
    wrong[:, ::3] = (wrong[:, ::3] + 1) % VOCAB
    draft = PlainDraft(ScriptedProposer(wrong, vocab=VOCAB))
    read = Read(target)
    assert torch.equal(target.generate(PROMPT, **CALL, assistant_model=draft).sequences, plain.sequences)
    assert max(read.tokens) > MOST_READ_AGAIN and draft.metrics.plain_rounds >= 60 // (MOST_READ_AGAIN + 5)
    assert sum(tokens > MOST_READ_AGAIN + 1 for tokens in read.tokens) <= len(read.tokens) / 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_a_conversation_goes_on_in_the_same_cache(name: str, mode: Any) -> None:
    target = recurrent(name)
    arguments = CALL | {"max_new_tokens": 20, "return_dict_in_generate": False}

    def turns(ours: bool) -> list[Tensor]:
        with mode():
            cache, rows = DynamicCache(config=target.config), [PROMPT]
            for turn in range(3):
                draft = PlainDraft(Mistaken(spoken[turn], 0.3)) if ours else None
                arm = {"assistant_model": draft} if ours else {}
                rows.append(target.generate(torch.cat([rows[-1], PROMPT], -1), **{CACHE: cache}, **arguments, **arm))
            return rows[1:]

    spoken: list[Tensor] = turns(False)
    with answered():
        assert all(map(torch.equal, spoken, turns(True)))


def test_an_interrupted_request_leaves_no_candidate_in_the_state() -> None:
    target = recurrent("qwen3_next")
    script = target.generate(PROMPT, **CALL).sequences
    for seen in (8, 23):

        def stops(tokens: Tensor, scores: object, seen: int = seen, **kwargs: Any) -> Tensor:
            if tokens.shape[1] == seen:
                raise KeyboardInterrupt
            return torch.zeros(1, dtype=torch.bool)

        turn, cache = torch.cat([script[:, :seen], PROMPT], dim=-1), DynamicCache(config=target.config)
        right = target.generate(turn, **CALL).sequences
        draft = PlainDraft(Mistaken(script, 0.3))
        with pytest.raises(KeyboardInterrupt):
            target.generate(PROMPT, **CALL, **{CACHE: cache}, assistant_model=draft, stopping_criteria=[stops])
        assert torch.equal(target.generate(turn, **CALL, **{CACHE: cache}).sequences, right)


def test_a_learning_draft_serves_it() -> None:
    target, draft = (
        recurrent("qwen3_5_text"),
        OnlineDraft(tiny_llama(2, vocab_size=VOCAB), OnlineSpecConfig(lookahead=3)),
    )
    plain = target.generate(PROMPT, **CALL)
    with answered():
        assert torch.equal(target.generate(PROMPT, **CALL, assistant_model=draft).sequences, plain.sequences)
    assert draft.metrics.drafted_tokens > 0 and draft.metrics.updates > 0


def test_the_hidden_states_of_a_token_are_handed_out_once() -> None:
    target = recurrent("qwen3_next")
    reads: Reads = (1,)
    plain = target(PROMPT, output_hidden_states=True).hidden_states[1]
    verifier = Verifier(target, PROMPT[:, :2], GenerationConfig(), {CACHE: DynamicCache(config=target.config)})
    verifier.hand_out(reads)
    verifier.verify(PROMPT[:, :2], guesses(PROMPT[:, :0]))
    verifier.keep(PROMPT[:, :3])
    verifier.verify(PROMPT[:, :3], guesses(torch.tensor([[14, 1, 1]])))
    verifier.keep(PROMPT[:, :4], ((),))
    verifier.verify(PROMPT[:, :4], guesses(PROMPT[:, 4:]))
    assert verifier.features is not None and torch.allclose(verifier.features, plain[:, 3:], atol=1e-5)


@pytest.mark.parametrize("name", ["jamba", "falcon_mamba"])
def test_a_class_that_forgets_its_state_in_a_longer_forward_is_decoded_plainly(name: str) -> None:
    target = recurrent(name)
    plain = target.generate(PROMPT, **CALL)
    draft = PlainDraft(ScriptedProposer(plain.sequences, vocab=VOCAB))
    assert torch.equal(target.generate(PROMPT, **CALL, assistant_model=draft).sequences, plain.sequences)
    assert draft.metrics.drafted_tokens == 0 and type(target).__name__ in draft.metrics.decisions.drafting


def test_several_rows_and_a_compiled_target_are_decoded_plainly() -> None:
    target = recurrent("qwen3_next")
    rows = torch.cat([PROMPT, PROMPT.flip(-1)])
    plain = target.generate(rows, **CALL)
    assert torch.equal(target.generate(rows, **CALL, onlinespec=True).sequences, plain.sequences)
    assert "recurrent state" in online_memory(target).metrics.decisions.drafting
    target.model.layers[1].mlp.compile(backend="eager")
    plain, draft = target.generate(PROMPT, **CALL), PlainDraft(ScriptedProposer(PROMPT))
    assert torch.equal(target.generate(PROMPT, **CALL, assistant_model=draft).sequences, plain.sequences)
    assert "is compiled, and keeps a recurrent state" in draft.metrics.decisions.drafting


def test_a_cache_that_cannot_be_taken_back_or_counted_is_refused() -> None:
    for name, held, said in (
        ("qwen3_next", 5, "its recurrent state has taken them in"),
        ("mamba2", 5, "how many tokens"),
    ):
        target = recurrent(name)
        cache = DynamicCache(config=target.config)
        target.generate(PROMPT, **{CACHE: cache}, do_sample=False, max_new_tokens=held)
        with pytest.raises(UnsupportedError, match=said):
            target.generate(PROMPT, **{CACHE: cache}, onlinespec=True, max_new_tokens=5)
