"""Acceptance keeps the target's law: held in 10⁵ rows at once against laws that are written down.

Seeds are fixed. A right rule that consumes random numbers in another way would fail a case once in a million times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from hf_onlinespec.verify.accept import accept
from hf_onlinespec.verify.rejection import Drawn, speculative_sample
from tests.chi_square import MILLION, follows

ROWS = 100_000

P = torch.tensor([0.5, 0.3, 0.2, 0.0])
LAWS = {  # of the target and of the draft at one position
    "apart": (P, torch.tensor([0.1, 0.2, 0.3, 0.4])),
    "a point guess": (P, torch.tensor([0.0, 1.0, 0.0, 0.0])),
    "a guess that never holds": (P, torch.tensor([0.0, 0.0, 0.0, 1.0])),
    "nearly the same": (P, torch.tensor([0.49, 0.31, 0.2, 0.0])),
    "the same": (P, P),
    "a larger vocabulary": tuple(torch.softmax(torch.randn(2, 24, generator=torch.Generator().manual_seed(5)), -1)),
}

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def draws(law: Tensor, rows: int = ROWS) -> Tensor:
    return torch.multinomial(law, rows, replacement=True)


def ours(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    return speculative_sample(p, [Drawn(drafted, q)])[0][:, 0]


def counted(p: Tensor, q: Tensor, rule: Rule) -> Tensor:
    """(V, V) how often what was drafted became what."""
    torch.manual_seed(17)
    drafted = draws(q)
    tokens = rule(p.expand(ROWS, -1), q.expand(ROWS, -1), drafted)
    return torch.bincount(drafted * len(p) + tokens, minlength=len(p) ** 2).view(len(p), -1)


def exact(p: Tensor, q: Tensor) -> Tensor:
    """(V, V) how likely it becomes what: it stays with min(1, p/q), else the token comes from (p − q)₊."""
    p, q = p.double(), q.double()
    residual = (p - q).clamp_min(0)
    moved = (q - p).clamp_min(0)[:, None] * (residual / residual.sum().clamp_min(1e-300))
    return torch.minimum(p, q).diag() + moved


@pytest.mark.parametrize("name", LAWS)
def test_tokens_follow_the_target_and_as_many_are_kept_as_can_be(name: str) -> None:
    p, q = LAWS[name]
    law = exact(p, q)
    torch.testing.assert_close(law.sum(0), p.double(), atol=1e-6, rtol=0)  # what is drawn follows p
    torch.testing.assert_close(law.sum(1), q.double(), atol=1e-6, rtol=0)
    assert follows(counted(p, q, ours).flatten(), law.flatten(), MILLION)


def keeps_by_p_alone(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    kept = torch.rand(len(drafted)) < p.gather(-1, drafted[:, None]).squeeze(-1)
    return torch.where(kept, drafted, torch.multinomial((p - q).clamp_min(1e-9), 1).squeeze(1))


def replaces_from_p(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    tokens = ours(p, q, drafted)
    return torch.where(tokens == drafted, tokens, torch.multinomial(p, 1).squeeze(1))


def keeps_too_often(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    """A drafted token in ten whatever its chance, if only the target may say it."""
    lucky = (torch.rand(len(drafted)) < 0.1) & (p.gather(-1, drafted[:, None]).squeeze(-1) > 0)
    return torch.where(lucky, drafted, ours(p, q, drafted))


def draws_again(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    """Follows p and keeps less than could be kept."""
    return torch.multinomial(p, 1).squeeze(1)


def keeps_both_rows_or_none(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    kept = torch.rand(len(drafted)) * q.gather(-1, drafted[:, None]).squeeze(-1) < p.gather(
        -1, drafted[:, None]
    ).squeeze(-1)
    kept = kept.view(-1, 2).all(-1).repeat_interleave(2)
    return torch.where(kept, drafted, torch.multinomial((p - q).clamp_min(1e-9), 1).squeeze(1))


@pytest.mark.parametrize(
    "rule", [keeps_by_p_alone, replaces_from_p, keeps_too_often, draws_again, keeps_both_rows_or_none]
)
def test_a_wrong_rule_is_found(rule: Rule) -> None:
    p, q = LAWS["apart"]
    assert not follows(counted(p, q, rule).flatten(), exact(p, q).flatten(), MILLION)


def test_rounding_that_empties_the_residual_falls_back_to_p(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([[0.25, 0.75]])
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)  # rejects even p = q
    token, _ = speculative_sample(p, [Drawn(torch.tensor([1]), p.clone())])
    assert token.item() in (0, 1)


def proposal_of(tokens: Tensor, lengths: list[int], q: Tensor | None = None) -> Proposal:
    sources = tuple(tuple(TokenSource("model", i, (0,)) for i in range(length)) for length in lengths)
    return Proposal(tokens, q, sources)


def never(tokens: Tensor, scores: object, **kwargs: object) -> Tensor:
    return torch.zeros(len(tokens), dtype=torch.bool)


def test_every_row_of_a_batch_keeps_the_law_of_its_own() -> None:
    """Rows of three kinds, with 0, 1 and 2 candidates and prefixes of two lengths, decided in one call."""
    torch.manual_seed(23)
    kinds = 3
    logits = 1.5 * torch.randn(kinds, 3, 6)
    q = (1.5 * torch.randn(kinds, 2, 6)).softmax(-1)
    for kind, length in enumerate((0, 1, 2)):
        q[kind, length:] = 0.0
    row_kind = torch.arange(ROWS) % kinds
    drafted = torch.stack(
        [torch.multinomial(q[:, i] + 1e-30, ROWS, replacement=True)[row_kind, torch.arange(ROWS)] for i in (0, 1)], 1
    )
    lengths = row_kind.tolist()
    before = Rows(torch.zeros(ROWS, 4, dtype=torch.long), tuple(3 + (i // kinds) % 2 for i in range(ROWS)))
    verdict = accept(
        proposal_of(drafted, lengths, q[row_kind]),
        logits[row_kind],
        before,
        LogitsProcessorList(),
        StoppingCriteriaList([never]),
        True,
        None,
    )
    p = logits.double().softmax(-1)
    starts, accepted = torch.tensor(before.lengths), torch.tensor(verdict.accepted)
    new = torch.stack([verdict.rows.tokens[torch.arange(ROWS), (starts + i).clamp_max(6)] for i in range(3)], 1)
    for kind in range(kinds):
        mine = row_kind == kind
        assert verdict.rows.lengths[kind] == before.lengths[kind] + verdict.new_tokens[kind]
        assert torch.equal(accepted[mine] + 1, torch.tensor(verdict.new_tokens)[mine])
        for i in range(kind + 1):  # position i is reached where all candidates before it were kept
            there = mine & (accepted >= i)
            assert follows(torch.bincount(new[there, i], minlength=6), p[kind, i], MILLION)
            if i < kind:
                kept = float((accepted[there] > i).double().mean())
                assert kept == pytest.approx(float(torch.minimum(p[kind, i], q[kind, i]).sum()), abs=0.02)


class AfterToken(LogitsProcessor):
    """The logits depend on the token before them, so that a law of whole rounds depends on which prefix a row has kept."""

    bias = torch.randn(6, 6, generator=torch.Generator().manual_seed(43))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.bias[input_ids[:, -1]]


WARPERS: dict[str, list[LogitsProcessor]] = {
    "plain": [],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "top_k": [TemperatureLogitsWarper(1.3), TopKLogitsWarper(3)],
    "top_p": [TopPLogitsWarper(0.8)],
    "all": [TemperatureLogitsWarper(0.8), TopKLogitsWarper(4), TopPLogitsWarper(0.9)],
}


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("name", WARPERS)
def test_whole_rounds_follow_the_law_under_every_warper(name: str, lookahead: int) -> None:
    """Each sequence that a round may add is as likely as the target's law and the draft's make it."""
    torch.manual_seed(29)
    vocab, start = 6, 3
    processors = LogitsProcessorList([AfterToken(), *WARPERS[name]])
    logits = torch.randn(lookahead + 1, vocab)
    unused = torch.zeros(1, 1, dtype=torch.long)
    q = torch.stack([LogitsProcessorList(WARPERS[name])(unused, torch.randn(1, vocab))[0] for _ in range(lookahead)])
    q = q.softmax(-1)
    drafted = torch.stack([draws(law) for law in q], 1)
    verdict = accept(
        proposal_of(drafted, [lookahead] * ROWS, q.expand(ROWS, -1, -1)),
        logits.expand(ROWS, -1, -1),
        Rows.of(torch.full((ROWS, 1), start)),
        processors,
        StoppingCriteriaList([never]),
        True,
        None,
    )

    # A sequence has a cell by its tokens, from 1 on: what is padded counts as 0.
    new = verdict.rows.tokens[:, 1:]
    behind = torch.arange(new.shape[1]) >= torch.tensor(verdict.new_tokens)[:, None]
    cells = torch.zeros(ROWS, dtype=torch.long)
    for i in range(lookahead + 1):
        cells = cells * (vocab + 1) + (new + 1).masked_fill(behind, 0)[:, i]
    law = torch.zeros((vocab + 1) ** (lookahead + 1), dtype=torch.float64)

    def add(cell: int, before: int, chance: Tensor, i: int) -> None:
        """Ends here with (p − q)₊ or goes on with min(p, q); the last token is the target's own."""
        p = processors(torch.tensor([[before]]), logits[i : i + 1]).double().softmax(-1)[0]
        guess = q[i].double() if i < lookahead else torch.zeros(vocab, dtype=torch.float64)
        for token in range(vocab):
            here = cell * (vocab + 1) + token + 1
            law[here * (vocab + 1) ** (lookahead - i)] += chance * (p - guess).clamp_min(0)[token]
            if i < lookahead:
                add(here, token, chance * torch.minimum(p, guess)[token], i + 1)

    add(0, start, torch.tensor(1.0, dtype=torch.float64), 0)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-6)
    assert follows(torch.bincount(cells, minlength=len(law)), law, MILLION)


def test_a_wrong_rule_is_found_in_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_or_none(p: Tensor, drawn: Sequence[Drawn], guesses: object) -> tuple[Tensor, list[Tensor]]:
        if not drawn:
            return torch.multinomial(p, 1), []
        rule = keeps_both_rows_or_none if len(p) % 2 == 0 else ours
        return rule(p, drawn[0].q, drawn[0].tokens)[:, None], [torch.zeros(len(p))]

    monkeypatch.setattr("hf_onlinespec.verify.accept.speculative_sample", all_or_none)
    with pytest.raises(AssertionError, match="follows"):
        test_whole_rounds_follow_the_law_under_every_warper("plain", 2)


@pytest.mark.parametrize("sample", [False, True])
def test_a_row_in_a_batch_is_decided_as_alone(sample: bool) -> None:
    """Processors and criteria see its own prefix, once for every kept token; its neighbours change nothing."""
    generator = torch.Generator().manual_seed(31)
    lengths, prefixes = [3, 0, 2, 3, 1], [4, 6, 4, 5, 6]
    tokens = torch.randint(1, 8, (5, 6), generator=generator)
    for row, length in enumerate(prefixes):
        tokens[row, length:] = 0
    logits = 4 * torch.randn(5, 4, 8, generator=generator)
    drafted = logits[:, :3].argmax(-1)  # kept, unless the penalty has changed the best token
    drafted[0, 1] = (drafted[0, 1] + 1) % 8
    q = F.one_hot(drafted, 8).float() * (torch.arange(3) < torch.tensor(lengths)[:, None])[..., None]
    criteria = StoppingCriteriaList([lambda tokens, scores, **kwargs: tokens[:, -1] == int(drafted[3, 0])])

    def decided(rows: list[int], seen: list[list[int]]) -> Verdict:
        class Watching(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                seen.extend(input_ids.tolist())
                return scores

        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), Watching()])
        if sample:  # so sharp that the draw is settled
            processors.append(TemperatureLogitsWarper(1e-4))
        longest = max(prefixes[row] for row in rows)
        before = Rows(tokens[rows, :longest], tuple(prefixes[row] for row in rows))
        proposal = proposal_of(drafted[rows], [lengths[row] for row in rows], q[rows] if sample else None)
        return accept(proposal, logits[rows], before, processors, criteria, sample, ())

    together: list[list[int]] = []
    batch = decided([0, 1, 2, 3, 4], together)
    apart: list[list[int]] = []
    for row in range(5):
        alone = decided([row], apart)
        assert torch.equal(batch.rows.row(row), alone.rows.row(0))
        mine = (batch.paths[row], batch.overlaps[row], batch.chances[row], batch.done[row], batch.new_tokens[row])
        assert mine == (alone.paths[0], alone.overlaps[0], alone.chances[0], alone.done[0], alone.new_tokens[0])
        assert batch.scores is not None and alone.scores is not None
        for ours, theirs in zip(batch.scores[row], alone.scores[0], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert sorted(together) == sorted(apart)
    assert len(set(batch.new_tokens)) > 1 and batch.done[3] and not all(batch.done)
