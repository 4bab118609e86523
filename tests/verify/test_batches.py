"""A batch: each row says what it says alone, and what plain batched decoding says, whatever is drafted and however far."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, UnsupportedError, online_memory
from hf_onlinespec.commit.batch_reader import BatchReader
from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.govern.batch_pace import BatchPace
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from tests.chi_square import THOUSAND, follows
from tests.fakes import PlainDraft, ScriptedProposer
from tests.heads.tiny import KINDS, tiny_head
from tests.tiny_models import CACHE, tiny_gpt2, tiny_llama, tiny_windowed
from tests.verify.test_sampling_law import Tastes, Whims

VOCAB = 32
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
FIXED = OnlineSpecConfig(lookahead=4, update_every=1, rank=2, alpha=2.0)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_llama(1, layers=2)


def prompts(lengths: tuple[int, ...], seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab) for _ in range(n)] for n in lengths]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Prompts padded on the left, and their mask."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": tokens, "attention_mask": mask}


class Scripted(ScriptedProposer):
    """Proposes for each row what a plain call would say there, right or wrong, so many tokens as a random number says, or trees."""

    def __init__(self, answers: Tensor, right: list[bool], seed: int, trees: bool = True) -> None:
        super().__init__(answers)
        self._answers, self._right, self._rng, self._trees = answers, right, random.Random(seed), trees
        self.seen: list[tuple[int, ...]] = []  # rows of each round
        self.lengths: list[tuple[int, ...]] = []  # candidates of each row, per round
        self.kept: list[tuple[int, ...]] = []

    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        self.seen.append(rows.of_call)
        found = []
        for at, row in enumerate(rows.of_call):
            n = min(room, self._rng.randrange(6))
            known = self._answers[row, rows.lengths[at] : rows.lengths[at] + n].tolist()
            known += [0] * (n - len(known))
            tokens = [token if self._right[row] or self._rng.random() < 0.2 else (token + 1) % VOCAB for token in known]
            found.append(self._proposal(tokens, trees and self._trees and self._rng.random() < 0.5))
        joined = Proposal.joined(found)
        self.lengths.append(joined.lengths)
        return joined

    def _proposal(self, tokens: list[int], tree: bool) -> Proposal:
        """A chain; or the same with a wrong sibling in front of each token."""
        parents = tuple(range(-1, len(tokens) - 1))
        if tree and tokens:
            nodes, parents, last = list[int](), tuple[int, ...](), -1
            for token in tokens:
                nodes += [(token + 2) % VOCAB, token]
                parents += (last, last)
                last = len(nodes) - 1
            tokens = nodes
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        sources = tuple(TokenSource("memory", depth) for depth in depths)
        return Proposal(
            torch.tensor([tokens], dtype=torch.long), None, (sources,), parents=(parents,) if tree else None
        )

    def observe(self, verdict: Verdict) -> None:
        self.kept.append(verdict.accepted)


def scripted(
    target: PreTrainedModel, inputs: dict[str, Tensor], right: list[bool], seed: int = 0, **call: Any
) -> tuple[Tensor, Scripted]:
    """What a scripted draft makes of a call, and the draft."""
    with torch.no_grad():
        answers = target.generate(**inputs, do_sample=False, max_new_tokens=30, pad_token_id=0)
    proposer = Scripted(answers, right, seed)
    return target.generate(**inputs, assistant_model=PlainDraft(proposer), **call), proposer


def cases(n: int = 100, seed: int = 7) -> list[tuple[int, dict[str, Any]]]:
    rng = random.Random(seed)
    found = []
    for case in range(n):
        stop = rng.choice([None, 5, [5, 9], [3, 7, 11]])
        call: dict[str, Any] = {"do_sample": False, "max_new_tokens": rng.choice([1, 2, 7, 16, 24])}
        if stop is not None:
            call["eos_token_id"] = stop
            call["pad_token_id"] = rng.choice([0, 5, 31])
        if rng.random() < 0.3:
            call["repetition_penalty"] = 1.3
        if rng.random() < 0.2 and call["max_new_tokens"] > 3:
            call["min_new_tokens"] = 3
        found.append((case, call))
    return found


def test_greedy_rows_are_those_of_a_plain_batch_and_of_each_row_alone(target) -> None:
    """100 cases: 1 to 8 rows, prompts of 3 to 40 tokens, useless and perfect drafts mixed, stops, pads."""
    rng, ragged, left = random.Random(3), 0, 0
    for case, call in cases():
        rows = prompts(tuple(rng.randrange(3, 41) for _ in range(rng.randrange(1, 9))), seed=case)
        inputs = padded(rows)
        right = [rng.random() < 0.6 for _ in rows]
        plain = target.generate(**inputs, **call)
        ours, proposer = scripted(target, inputs, right, case, **call)
        assert torch.equal(plain, ours), case
        ragged += any(len(set(kept)) > 1 for kept in proposer.kept)
        left += len(set(proposer.seen)) > 1
        row = rng.randrange(len(rows))
        alone = target.generate(**padded([rows[row]]), **call)[0, len(rows[row]) :]
        assert torch.equal(alone, ours[row, inputs["input_ids"].shape[1] :][: len(alone)]), case
    assert ragged > 40 and left > 25


def altered(target: PreTrainedModel, share: float) -> PreTrainedModel:
    """The target's copy with so much noise in its weights: 0 is right about everything, 1 about nothing."""
    model, generator = tiny_llama(1, layers=2), torch.Generator().manual_seed(4)
    for own, of_target in zip(model.parameters(), target.parameters(), strict=True):
        own.data = of_target.data + share * of_target.std() * torch.randn(own.shape, generator=generator)
    return model


def run_with_draft_models(target: PreTrainedModel, n: int, seed: int = 11) -> Counter[str]:
    """Random batches with draft models that are right about everything, something or nothing; those that differ from plain batches."""
    rng, seen = random.Random(seed), Counter[str]()
    scores = BatchReader.scores

    def counted(self: BatchReader, served: PreTrainedModel, prefixes: Mapping[int, Tensor]) -> Tensor:
        seen["forwards"] += 1
        seen["rows"] += len(prefixes)
        return scores(self, served, prefixes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchReader, "scores", counted)
        patch.setattr("hf_onlinespec.govern.governor.AdapterRouter", Tastes)
        patch.setattr(Whims, "whim", random.Random(seed))
        patch.setattr(BatchPace, "asks", lambda self: Whims.whim.random() < 0.8)  # no clock decides
        settings = {"rank": 2, "alpha": 2.0, "update_every": 1, "replay_passes": 0}
        fixed, whims = list[OnlineDraft](), list[OnlineDraft]()
        for share in (0.0, 0.15, 1.0):
            for when in ("round", "request"):
                fixed.append(OnlineDraft(altered(target, share), **settings, update_when=when, lookahead=4))
        patch.setattr("hf_onlinespec.commit.base.Governor", Whims)
        whims += [OnlineDraft(altered(target, share), rank=2, alpha=2.0) for share in (0.0, 0.15, 1.0)]
        for case, call in cases(n, seed):
            draft = rng.choice(fixed if case % 2 else whims)
            inputs = padded(prompts(tuple(rng.randrange(3, 41) for _ in range(rng.randrange(1, 9))), seed=case))
            ours = target.generate(**inputs, assistant_model=draft, **call)
            seen["differ"] += not torch.equal(target.generate(**inputs, **call), ours)
            seen["partly accepted"] += 0 < draft.metrics.last.acceptance_rate < 1
        seen["updates"] = sum(draft.metrics.updates for draft in fixed + whims)
        seen["failed"] = sum(draft.metrics.failed_drafts + draft.metrics.failed_updates for draft in fixed + whims)
    return seen


def test_rows_that_a_draft_model_reads_together_are_those_of_a_plain_batch(target) -> None:
    """Base and learned draft in one batch, learning at every round or at the end, whoever drafts and how far."""
    seen = run_with_draft_models(target, 60)
    assert not seen["differ"] and not seen["failed"], seen
    assert seen["rows"] > 2.5 * seen["forwards"] > 800, seen
    assert seen["partly accepted"] > 15 and seen["updates"] > 50, seen


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_a_perfect_row_is_not_held_up_by_useless_ones_and_leaves(target, rows) -> None:
    right = [i == 1 for i in range(rows)]
    inputs = padded(prompts(tuple(range(3, 3 + rows))))
    ours, proposer = scripted(target, inputs, right, **GREEDY)
    assert torch.equal(ours, target.generate(**inputs, **GREEDY))
    rounds = [sum(row in seen for seen in proposer.seen) for row in range(rows)]
    assert rounds[1] < min(rounds[:1] + rounds[2:])
    assert len(proposer.seen[-1]) < rows  # the ended ones cost nothing
    assert all(len(a) >= len(b) for a, b in itertools.pairwise(proposer.seen))


def test_a_table_of_positions_is_used_to_its_end() -> None:
    """GPT-2's ends at 64; holes in the cache count as little as padding does."""
    target = tiny_gpt2(4)
    inputs = padded(prompts((3, 9, 6)))
    call = {"do_sample": False, "max_length": 64}
    plain = target.generate(**inputs, **call)
    ours, proposer = scripted(target, inputs, [True, False, True], **call)
    assert torch.equal(plain, ours) and plain.shape[1] == 64
    assert any(len(set(kept)) > 1 for kept in proposer.kept)


LAW_NEW, LAW_VOCAB, LAW_CALLS = 2, 6, 160


@torch.no_grad()
def exact_law(target: PreTrainedModel, prompt: list[int]) -> Tensor:
    sequences = torch.tensor(list(itertools.product(range(LAW_VOCAB), repeat=LAW_NEW)))
    tokens = torch.cat([torch.tensor([prompt]).expand(len(sequences), -1), sequences], dim=-1)
    p = target(tokens).logits.double().softmax(-1)[:, len(prompt) - 1 : -1]
    return p.gather(-1, sequences[..., None]).squeeze(-1).prod(-1)


@pytest.mark.parametrize("how", ["learns", "drafts", "whims"])
def test_every_row_follows_the_target_s_law(how, monkeypatch) -> None:
    """Two rows of different prompts, one draft, whose adapter moves meanwhile; or whatever drafts in trees, and how far."""
    learns = how != "drafts"
    if how == "whims":
        monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Whims)
        monkeypatch.setattr(Whims, "whim", random.Random(5))
        monkeypatch.setattr(BatchPace, "asks", lambda self: Whims.whim.random() < 0.8)  # no clock decides
    flat = {"vocab": LAW_VOCAB, "initializer_range": 0.2}
    target, model = tiny_llama(1, layers=2, **flat), tiny_llama(2, **flat)
    config = OnlineSpecConfig(
        lookahead=3, update_when="request", update_every=1, memory_tokens=0, rank=2, alpha=2.0, lr=3e-3, replay_passes=0
    )
    if how == "whims":
        config = replace(config, lookahead="auto", memory_tokens=200)
    draft, together = OnlineDraft(model, config), list[int]()
    scores = BatchReader.scores

    def noted(self: BatchReader, served: PreTrainedModel, prefixes: Mapping[int, Tensor]) -> Tensor:
        together.append(len(prefixes))
        return scores(self, served, prefixes)

    monkeypatch.setattr(BatchReader, "scores", noted)
    rows = [[1, 4], [2, 3, 5, 1]]
    inputs, counts = padded(rows), torch.zeros(2, LAW_VOCAB**LAW_NEW, dtype=torch.long)
    place = torch.tensor([LAW_VOCAB**i for i in reversed(range(LAW_NEW))])
    torch.manual_seed(21)
    many = {name: value.repeat(4, 1) for name, value in inputs.items()}
    for _ in range(LAW_CALLS):
        out = target.generate(
            **many, assistant_model=draft, onlinespec=learns, do_sample=True, top_k=0, max_new_tokens=LAW_NEW
        )
        for i, row in enumerate(out[:, -LAW_NEW:]):
            counts[i % 2, (row * place).sum()] += 1
    for row, prompt in enumerate(rows):
        assert follows(counts[row], exact_law(target, prompt), THOUSAND)
    assert (draft.metrics.updates >= LAW_CALLS) is learns
    assert draft.metrics.accepted_tokens > 100
    assert sum(together) > 2 * len(together) > LAW_CALLS  # rows of both prompts are drafted in one forward


@pytest.mark.parametrize("settings", [FIXED, OnlineSpecConfig(rank=2, alpha=2.0)], ids=["fixed", "auto"])
@pytest.mark.parametrize("who", ["model", "useless model", "memory"])
def test_a_draft_model_and_the_memory_draft_in_batches_and_learn_of_all_rows(target, who, settings) -> None:
    inputs = padded(prompts((3, 17, 9, 30, 4)))
    call = GREEDY | {"max_new_tokens": 32}
    plain = target.generate(**inputs, **call)
    if who == "memory":
        draft: Any = online_memory(target, settings, anew=True)
        how = {"onlinespec": True}
    else:
        draft = OnlineDraft(tiny_llama(1, layers=2) if who == "model" else tiny_llama(3), settings)
        how = {"assistant_model": draft}
    for _ in range(3):
        assert torch.equal(plain, target.generate(**inputs, **call, **how))
    last = draft.metrics.last
    assert last.new_tokens == 5 * 32 and draft.metrics.requests == 3
    assert last.rounds == last.plain_rounds + last.memory_rounds + last.model_rounds + last.mixed_rounds
    assert 0 <= last.accepted_tokens + last.rounds - last.new_tokens <= 5  # a row may end with a candidate
    if who == "model" and settings is FIXED:
        assert last.acceptance_length > 2
    if who != "memory" and settings is FIXED:
        assert 3 <= draft.metrics.updates <= 3 * (1 + FIXED.replay_passes) and len(draft.learning.replayed()) == 15
        assert draft.metrics.learned_tokens >= 3 * 5 * 32  # each new one at once, in one step for all rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookahead", [3, "auto"])
def test_a_head_drafts_in_a_batch_as_in_each_row_alone_and_learns(target, kind, lookahead, monkeypatch) -> None:
    if lookahead == "auto":  # trees, and rounds in which nobody drafts
        monkeypatch.setattr("hf_onlinespec.commit.base.Governor", Whims)
        monkeypatch.setattr(Whims, "whim", random.Random(4))
    settings: dict[str, Any] = dict(lookahead=lookahead, update_every=1, rank=2, alpha=2.0, replay_passes=0)
    if lookahead != "auto":
        settings |= dict(memory_tokens=0)
    rows = prompts((3, 17, 9, 30))
    inputs = padded(rows)
    plain = target.generate(**inputs, **GREEDY)
    draft = OnlineDraft(tiny_head(kind, target), **settings)
    for _ in range(2):
        assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, **GREEDY))
    metrics = draft.metrics
    assert metrics.updates >= 2 and metrics.sources["model"] + metrics.sources["memory+model"] > 3
    assert not metrics.failed_drafts and not metrics.failed_updates
    if lookahead == "auto":
        return
    # Of every row the head drafts what it drafts of the row alone.
    frozen = [OnlineDraft(tiny_head(kind, target), **settings) for _ in range(2)]
    target.generate(**inputs, assistant_model=frozen[0], onlinespec=False, **GREEDY)
    for row in rows:
        target.generate(torch.tensor([row]), assistant_model=frozen[1], onlinespec=False, **GREEDY)
    together, alone = (draft.metrics for draft in frozen)
    assert together.rounds == alone.rounds and together.accepted_tokens == alone.accepted_tokens


def test_several_sequences_of_one_prompt(target) -> None:
    draft = OnlineDraft(tiny_llama(1, layers=2), FIXED)
    prompt = torch.tensor([prompts((6,))[0]])
    out = target.generate(
        prompt, assistant_model=draft, do_sample=True, num_return_sequences=4, max_new_tokens=12, top_k=0
    )
    assert out.shape == (4, 18) and len({tuple(row.tolist()) for row in out}) > 1
    assert draft.metrics.last.new_tokens == 48 and draft.metrics.last.accepted_tokens > 0


def test_scores_and_logits_are_those_of_a_plain_batch(target) -> None:
    inputs = padded(prompts((3, 8, 5)))
    call = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    call |= {"eos_token_id": [5, 9], "pad_token_id": 0, "repetition_penalty": 1.2}
    plain = target.generate(**inputs, **call)
    ours, _ = scripted(target, inputs, [True, False, True], **call)
    assert torch.equal(plain.sequences, ours.sequences)
    new = plain.sequences[:, 8:]
    ended = (torch.isin(new, torch.tensor([5, 9])).cumsum(1) - torch.isin(new, torch.tensor([5, 9])).long()) > 0
    for name in ("scores", "logits"):
        theirs, own = torch.stack(plain[name], dim=1), torch.stack(ours[name], dim=1)
        assert theirs.shape == own.shape
        assert torch.allclose(theirs[~ended], own[~ended], atol=1e-4)
        assert not own[ended].any()  # nothing was computed for a row that had ended


class EveryThird(LogitsProcessor):
    """Keeps something from call to call: every third token of a row is another one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            scores = scores.clone()
            scores[:, 7] += 100.0
        return scores


class AfterTwo(StoppingCriteria):
    """Ends a row behind the second token below 9."""

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, self._prompt :] < 9).sum(-1) >= 2


def test_processors_and_criteria_see_of_each_row_what_they_would_see_alone(target) -> None:
    inputs = padded(prompts((3, 8, 5, 20)))
    call = GREEDY | {"eos_token_id": 31, "pad_token_id": 0}

    def own() -> dict[str, Any]:
        return {
            "logits_processor": LogitsProcessorList([EveryThird()]),
            "stopping_criteria": StoppingCriteriaList([AfterTwo(20)]),
        }

    plain = target.generate(**inputs, **call, **own())
    ours, proposer = scripted(target, inputs, [True, False, True, True], **call, **own())
    assert torch.equal(plain, ours)
    assert len(set(proposer.seen)) > 1


def test_allowed_tokens_are_asked_for_with_the_number_of_the_row(target) -> None:
    inputs = padded(prompts((3, 8, 5)))

    def allowed(row: int, tokens: Tensor) -> list[int]:
        return list(range(3 + row, VOCAB, 3))

    plain = target.generate(**inputs, **GREEDY, prefix_allowed_tokens_fn=allowed)
    ours, _ = scripted(target, inputs, [True, False, True], prefix_allowed_tokens_fn=allowed, **GREEDY)
    assert torch.equal(plain, ours)


class OfTheBatch(LogitsProcessor):
    """Does with a row what its place in the batch says."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.arange(len(scores))[:, None] * torch.arange(scores.shape[1])


class Uncopied(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")


class AllAtOnce(StoppingCriteria):
    """Ends the batch where each row has had a token below a number; it remembers which rows had. lm_eval's stop sequences are so."""

    def __init__(self, below: int, rows: int, prompt: int) -> None:
        self._below, self._prompt = below, prompt
        self.had, self.lengths = [False] * rows, list[int]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        for i, row in enumerate(input_ids[:, self._prompt :]):
            self.had[i] = self.had[i] or bool((row[-1:] < self._below).any())
        self.lengths.append(input_ids.shape[1])
        return all(self.had)


def test_a_criterion_that_judges_the_whole_batch_is_shown_what_plain_decoding_shows_it(target) -> None:
    """Every length once, in order, with all rows; then all of them end there, however far some are ahead."""
    ended = 0
    for seed in range(12):
        inputs = padded(prompts((3, 8, 5), seed))
        call = GREEDY | {"eos_token_id": 31, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        judges = [AllAtOnce(2 + seed % 5, 3, 8) for _ in range(2)]
        plain = target.generate(**inputs, **call, stopping_criteria=StoppingCriteriaList([judges[0]]))
        right = [True, False, seed % 2 == 0]
        ours, proposer = scripted(
            target, inputs, right, seed, stopping_criteria=StoppingCriteriaList([judges[1]]), **call
        )
        assert torch.equal(plain.sequences, ours.sequences)
        assert len(plain.logits) == len(ours.logits)
        assert judges[0].lengths == judges[1].lengths and judges[0].had == judges[1].had
        assert max(map(max, proposer.kept)) > 0
        ended += all(judges[0].had)
    assert 2 <= ended < 12


def test_rows_that_are_ended_together_are_learned_and_remembered(target) -> None:
    inputs, call = padded(prompts((3, 8, 5), 4)), GREEDY | {"eos_token_id": 31, "pad_token_id": 0}

    def judged(**more: Any) -> Tensor:
        return target.generate(**inputs, **call, stopping_criteria=StoppingCriteriaList([AllAtOnce(6, 3, 8)]), **more)

    plain, draft = judged(), OnlineDraft(tiny_llama(2), FIXED)
    assert plain.shape[1] < 28
    for _ in range(2):
        assert torch.equal(plain, judged(assistant_model=draft))
    assert draft.metrics.updates > 0 and draft.metrics.requests == 2
    assert draft.metrics.last.acceptance_length > 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"logits_processor": LogitsProcessorList([OfTheBatch()])}, "OfTheBatch says of a row alone something else"),
        ({"logits_processor": LogitsProcessorList([Uncopied()])}, "Uncopied cannot be copied"),
        (
            {
                "stopping_criteria": StoppingCriteriaList([AllAtOnce(3, 2, 8)]),
                "eos_token_id": 31,
                "return_dict_in_generate": True,
                "output_scores": True,
            },
            "AllAtOnce says one thing",
        ),
        ({"num_beams": 2}, "num_beams=2"),
    ],
)
def test_what_cannot_be_asked_row_by_row_is_refused_by_name_before_any_work(target, call, said) -> None:
    forwards: list[int] = []
    hook = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(UnsupportedError, match=said):
        target.generate(**padded(prompts((3, 8))), onlinespec=True, **(GREEDY | {"pad_token_id": 0} | call))
    hook.remove()
    assert forwards == []


class Raises(LogitsProcessor):
    """Raises behind a token of one row."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 14 and (input_ids[:, 0] == 0).any():
            raise RuntimeError("of a test")
        return scores


def test_what_one_row_s_processor_raises_reaches_the_caller_and_the_next_call_is_served(target) -> None:
    inputs = padded(prompts((3, 8)))
    draft = OnlineDraft(tiny_llama(1, layers=2), FIXED)
    with pytest.raises(RuntimeError, match="of a test"):
        target.generate(**inputs, assistant_model=draft, logits_processor=LogitsProcessorList([Raises()]), **GREEDY)
    plain = target.generate(**inputs, **GREEDY)
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, **GREEDY))


def test_a_streamer_is_refused_by_name(target) -> None:
    inputs = padded(prompts((4, 4)))

    class Streamer(TextStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value: Tensor) -> None:
            pass

    with pytest.raises(UnsupportedError, match="streamer with a batch of 2"):
        target.generate(**inputs, streamer=Streamer(), onlinespec=True, **GREEDY)


@pytest.fixture(scope="module")
def windowed() -> PreTrainedModel:
    return tiny_windowed(3)


def test_a_target_whose_rows_cannot_differ_in_length_decodes_plainly_and_says_why(windowed) -> None:
    inputs = padded(prompts((3, 8, 12)))
    plain = windowed.generate(**inputs, **GREEDY)
    draft = online_memory(windowed, anew=True)
    assert torch.equal(plain, windowed.generate(**inputs, onlinespec=True, **GREEDY))
    said = draft.metrics.decisions.drafting
    assert "a batch of 3 decoded plainly: the target Gemma2ForCausalLM has layers" in said


def test_rows_that_do_not_come_to_the_end_of_a_window_are_served_and_go_on_in_its_cache() -> None:
    """Prompts of up to 12 tokens, 20 more and 64 places for holes: 96 in all. The cache that is handed back has its window again."""
    inputs = padded(prompts((3, 8, 12)))
    for window, fits in ((96, True), (95, False)):
        target = tiny_windowed(3, window=window)
        call = GREEDY | {"return_dict_in_generate": True}
        plain, caches = target.generate(**inputs, **call), []
        for _ in range(2):
            ours = target.generate(**inputs, onlinespec=FIXED, **call)
            assert torch.equal(plain.sequences, ours.sequences)
            caches = [plain[CACHE], ours[CACHE]]
        drafted = online_memory(target).metrics.drafted_tokens
        assert (drafted > 20) is fits
        first, second = ([type(layer) for layer in cache.layers] for cache in caches)
        assert first == second == [DynamicSlidingWindowLayer, DynamicLayer]
        more = torch.cat([plain.sequences, torch.tensor([[5], [7], [9]])], dim=-1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 21), value=1)
        said = [target.generate(more, attention_mask=mask, **{CACHE: cache}, **GREEDY) for cache in caches]
        assert torch.equal(*said)
        # The window of a call that goes on is reached by what it goes on from, too.
        ours = target.generate(**inputs, onlinespec=FIXED, **call)
        again = target.generate(more, attention_mask=mask, **{CACHE: ours[CACHE]}, onlinespec=FIXED, **GREEDY)
        assert torch.equal(again, said[0]) and "decoded plainly" in online_memory(target).metrics.decisions.drafting


def test_what_is_decoded_plainly_is_counted_and_remembered(windowed) -> None:
    rows = prompts((3, 8, 12))
    inputs = padded(rows)
    plain = windowed.generate(**inputs, **GREEDY)
    stop = int(plain[1, 16])
    draft = online_memory(windowed, anew=True)
    out = windowed.generate(**inputs, onlinespec=True, eos_token_id=stop, **GREEDY)
    written = sum(row.index(stop) + 1 if stop in row else len(row) for row in out[:, 12:].tolist())
    metrics = draft.metrics
    assert metrics.requests == 1 and metrics.new_tokens == metrics.plain_rounds == written < out[:, 12:].numel()
    assert metrics.memory_bytes > 0 and metrics.wall_time_s > 0
    windowed.generate(torch.tensor([rows[2]]), onlinespec=True, **GREEDY)
    assert metrics.last.acceptance_length > 1.5  # of a row alone the memory drafts what the batch has written


def test_stop_strings_end_each_row_by_itself(target) -> None:
    """Without a token that ends a text `generate` lets ended rows write on: then it decodes itself."""
    inputs = padded(prompts((3, 8, 5)))
    plain = target.generate(**inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([AfterTwo(8)]))
    ours, proposer = scripted(
        target, inputs, [True] * 3, **GREEDY, stopping_criteria=StoppingCriteriaList([AfterTwo(8)])
    )
    assert torch.equal(plain, ours) and proposer.seen == []


def test_settings_of_the_call_are_read_as_for_one_row(target) -> None:
    inputs = padded(prompts((3, 8, 5)))
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, num_assistant_tokens=2)
    draft = OnlineDraft(tiny_llama(1, layers=2), rank=2, alpha=2.0)
    out = target.generate(**inputs, generation_config=config, assistant_model=draft)
    assert torch.equal(out, target.generate(**inputs, generation_config=config))
    assert draft.metrics.last.acceptance_length == pytest.approx(3.0)


def test_rows_of_padding_alone_are_drafted_for(target) -> None:
    inputs = padded(prompts((3, 8)))
    inputs["attention_mask"].zero_()
    plain, draft = target.generate(**inputs, **GREEDY), OnlineDraft(tiny_llama(1, layers=2), FIXED)
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, **GREEDY))
    assert not draft.metrics.failed_drafts and draft.metrics.accepted_tokens > 0


def test_columns_beyond_the_tokens_are_left_to_plain_decoding(target) -> None:
    inputs = padded(prompts((3, 8)))
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    plain, draft = target.generate(**inputs, **GREEDY), OnlineDraft(tiny_llama(1, layers=2), FIXED)
    assert torch.equal(plain, target.generate(**inputs, assistant_model=draft, **GREEDY))
    assert "attention_mask has 10 columns for 8 tokens" in draft.metrics.decisions.drafting
