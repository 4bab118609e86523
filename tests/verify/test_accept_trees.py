"""Acceptance of trees: the walk, the law of what is sampled, and the chances that are told.

Laws are held in many rows at once, one round each; tokens behind the round are drawn from the target's law by the test, so that three
tokens of every row must follow it, whatever the tree was.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from hf_onlinespec._compat.generation import processed_scores
from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from hf_onlinespec.verify.accept import accept
from hf_onlinespec.verify.rejection import Drawn, speculative_sample
from tests.chi_square import MILLION, follows

ROWS, VOCAB, START = 40_000, 5, 3
GENERATOR = torch.Generator().manual_seed(61)
# Raw logits behind the row, behind one token and behind two.
LOGITS = [2 * torch.randn(*[VOCAB] * depth, VOCAB, generator=GENERATOR) for depth in range(3)]
Q = [(1.5 * torch.randn(*[VOCAB] * depth, VOCAB, generator=GENERATOR)).softmax(-1) for depth in range(2)]
Q[0][2] = 0.0  # which the target may say
Q[0] /= Q[0].sum()


def never(tokens: Tensor, scores: object, **kwargs: object) -> Tensor:
    return torch.zeros(len(tokens), dtype=torch.bool)


def sources(n: int) -> tuple[TokenSource, ...]:
    return tuple(TokenSource("model", i, (0,)) for i in range(n))


class Trees:
    """One tree per row, all of one shape, while they grow."""

    def __init__(self, wide: int = VOCAB) -> None:
        self.tokens: list[Tensor] = []  # (rows,) each
        self.parents: list[int] = []
        self.drawn: list[int] = []
        self.q: list[Tensor] = []  # (rows, wide) each
        self._wide = wide

    def guess(self, token: Tensor | int, parent: int = -1) -> int:
        self.tokens.append(torch.as_tensor(token).expand(ROWS))
        self.parents.append(parent)
        return len(self.tokens) - 1

    def draw(self, q: Tensor, parent: int = -1) -> int:
        """One more, without those that were drawn behind this parent before."""
        q = torch.nn.functional.pad(q, (0, self._wide - q.shape[-1])).expand(ROWS, -1).clone()
        for earlier in self.drawn:
            if self.parents[earlier] == parent:
                q.scatter_(1, self.tokens[earlier][:, None], 0.0)
        q /= q.sum(-1, keepdim=True)
        self.drawn.append(self.guess(torch.multinomial(q, 1).squeeze(1), parent))
        self.q.append(q)
        return self.drawn[-1]

    def draw_behind(self, parent: int) -> int:
        return self.draw(Q[1][self.tokens[parent].clamp_max(VOCAB - 1)], parent)

    def proposal(self) -> Proposal:
        return Proposal(
            torch.stack(self.tokens, 1),
            torch.stack(self.q, 1) if self.q else None,
            (sources(len(self.tokens)),) * ROWS,
            parents=(tuple(self.parents),) * ROWS,
            drawn=(tuple(self.drawn),) * ROWS,
        )

    def logits(self) -> Tensor:
        """(rows, n + 1, vocab) of the target."""
        found = [LOGITS[0].expand(ROWS, -1)]
        seen = [token.clamp_max(VOCAB - 1) for token in self.tokens]
        for token, parent in zip(seen, self.parents, strict=True):
            found.append(LOGITS[1][token] if parent < 0 else LOGITS[2][seen[parent], token])
        return torch.stack(found, 1)


def point_guesses() -> Trees:
    trees = Trees()
    first, second = trees.guess(1), trees.guess(4)
    for token in (0, 2, 4):
        trees.guess(token, first)
    trees.guess(1, second)
    return trees


def guesses_that_are_alike() -> Trees:
    trees = Trees()
    for token in (1, 1, 0):
        trees.guess(2, trees.guess(token))
    return trees


def guesses_of_each_row_its_own() -> Trees:
    trees = Trees()
    token = torch.arange(ROWS) % VOCAB
    for step in (1, 3):
        own = trees.guess((token + step) % VOCAB)
        trees.guess((trees.tokens[own] + step) % VOCAB, own)
        trees.guess((trees.tokens[own] + 2 * step) % VOCAB, own)
    return trees


def one_drawn_with_guesses() -> Trees:
    trees = Trees()
    drawn = trees.draw(Q[0])
    guess = trees.guess((trees.tokens[drawn] + 1) % VOCAB)
    trees.guess((trees.tokens[drawn] + 2) % VOCAB)
    trees.draw_behind(guess)
    behind = trees.draw_behind(drawn)
    trees.guess((trees.tokens[behind] + 1) % VOCAB, drawn)
    return trees


def guesses_before_a_drawn_one() -> Trees:
    trees = Trees()
    trees.guess(0, trees.guess(0))
    trees.draw_behind(trees.draw(Q[0]))
    return trees


def two_drawn() -> Trees:
    trees = Trees()
    for parent in (trees.draw(Q[0]), trees.draw(Q[0])):
        trees.draw_behind(parent)
        trees.draw_behind(parent)
    return trees


def three_drawn_with_a_guess() -> Trees:
    trees = Trees()
    drawn = [trees.draw(Q[0]) for _ in range(3)]
    trees.guess(2)
    trees.draw_behind(drawn[1])
    trees.guess(1, drawn[2])
    return trees


def drawn_from_the_target() -> Trees:
    """p = q up to rounding, where no processor comes between."""
    trees = Trees()
    p = [logits.softmax(-1) for logits in LOGITS]
    drawn, other = trees.draw(p[0]), trees.draw(p[0])
    trees.draw(p[1][trees.tokens[drawn]], drawn)
    trees.guess(3, other)
    return trees


def candidates_beyond_the_vocabulary() -> Trees:
    trees = Trees(VOCAB + 2)
    wide = torch.cat([0.6 * Q[0], torch.tensor([0.3, 0.1])])
    drawn, other = trees.draw(wide), trees.draw(wide)
    trees.guess(VOCAB + 1)
    trees.draw_behind(drawn)
    trees.guess(1, other)
    return trees


TREES: list[Callable[[], Trees]] = [
    point_guesses,
    guesses_that_are_alike,
    guesses_of_each_row_its_own,
    one_drawn_with_guesses,
    guesses_before_a_drawn_one,
    two_drawn,
    three_drawn_with_a_guess,
    drawn_from_the_target,
    candidates_beyond_the_vocabulary,
]


class Remembering(LogitsProcessor):
    """Its state per row depends on every prefix it has seen, which must come once and in order."""

    bias = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(67))

    def __init__(self, rows: int) -> None:
        self.seen = torch.ones(rows, dtype=torch.long)  # length of the prefix that comes next
        self.state = torch.zeros(rows, dtype=torch.long)

    def take(self, rows: Tensor, prefix: Tensor, scores: Tensor) -> Tensor:
        assert bool((self.seen[rows] == prefix.shape[1]).all()), "a prefix came twice, or was left out"
        self.seen[rows] += 1
        self.state[rows] = (3 * self.state[rows] + prefix[:, -1] + 1) % 7
        return scores + self.bias[self.state[rows]]


class Processors(LogitsProcessor):
    """All of them; the first token is the number of the row, which only a test can tell."""

    def __init__(self, rows: int, plain: bool) -> None:
        self._plain, self._remembering = plain, Remembering(rows)
        self._pure = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4), TopPLogitsWarper(0.9)])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if self._plain:
            return scores
        scores = self._remembering.take(input_ids[:, 0], input_ids[:, 1:], scores)
        return processed_scores(self._pure, input_ids[:, 1:], scores)


def law_of_three(plain: bool) -> Tensor:
    """(V, V, V) how likely the target says three tokens behind START."""
    n = VOCAB**3
    tokens = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    processors, chance = Processors(n, plain), torch.ones(n, dtype=torch.float64)
    prefix = torch.stack([torch.arange(n), torch.full((n,), START)], 1)
    for i in range(3):
        logits = LOGITS[i][tuple(tokens[:, :i].T)] if i else LOGITS[0].expand(n, -1)
        p = processors(prefix, logits).double().softmax(-1)
        chance *= p.gather(-1, tokens[:, i : i + 1]).squeeze(1)
        prefix = torch.cat([prefix, tokens[:, i : i + 1]], 1)
    return chance


def sampled(trees: Trees, plain: bool) -> tuple[Verdict, Tensor]:
    """A round of all rows, and three tokens (rows, 3) behind each."""
    processors = Processors(ROWS, plain)
    before = torch.stack([torch.arange(ROWS), torch.full((ROWS,), START)], 1)
    verdict = accept(
        trees.proposal(),
        trees.logits(),
        Rows.of(before),
        LogitsProcessorList([processors]),
        StoppingCriteriaList([never]),
        True,
        None,
    )
    got = torch.tensor(verdict.new_tokens)
    tokens = torch.cat([verdict.rows.tokens, before.new_zeros(ROWS, 3)], 1)[:, :5]
    for i in (1, 2):
        rows = torch.nonzero(got <= i).squeeze(1)
        prefix = tokens[rows, : 2 + i]
        p = processors(prefix, LOGITS[i][tuple(prefix[:, 2:].T)]).softmax(-1)
        tokens[rows, 2 + i] = torch.multinomial(p, 1).squeeze(1)
    return verdict, tokens[:, 2:]


def cells(tokens: Tensor) -> Tensor:
    return torch.bincount((tokens[:, 0] * VOCAB + tokens[:, 1]) * VOCAB + tokens[:, 2], minlength=VOCAB**3)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "processors"])
@pytest.mark.parametrize("grow", TREES)
def test_three_tokens_follow_the_target_whatever_the_tree(grow: Callable[[], Trees], plain: bool) -> None:
    torch.manual_seed(71)
    trees = grow()
    verdict, tokens = sampled(trees, plain)
    assert follows(cells(tokens), law_of_three(plain), MILLION)
    assert max(verdict.accepted) == 2  # trees of two levels

    # A candidate is kept as often as its chances say: both are means over all rows, 0 where its place was not reached.
    n = len(trees.tokens)
    kept, chance = torch.zeros(ROWS, n, dtype=torch.float64), torch.zeros(ROWS, n, dtype=torch.float64)
    for row, (path, told) in enumerate(zip(verdict.paths, verdict.chances, strict=True)):
        kept[row, list(path)] = 1.0
        for candidate, value in told:
            chance[row, candidate] = value
    error = (kept - chance).std(0) / ROWS**0.5
    assert bool(((kept - chance).mean(0).abs() <= MILLION * error + 1e-6).all())
    for told, overlaps in list(zip(verdict.chances, verdict.overlaps, strict=True))[:1000]:
        assert sum(overlaps) == pytest.approx(sum(value for _, value in told))


def test_a_draw_that_looks_at_what_was_rejected_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_p(p: Tensor, drawn: list[Drawn], guesses: object) -> tuple[Tensor, list[Tensor]]:
        tokens, chances = speculative_sample(p, drawn, guesses)  # type: ignore[arg-type]
        kept = torch.stack([one.tokens for one in drawn]) == tokens.T if drawn else torch.zeros(1, len(p)).bool()
        return torch.where(kept.any(0)[:, None], tokens, torch.multinomial(p, 1)), chances

    monkeypatch.setattr("hf_onlinespec.verify.accept.speculative_sample", from_p)
    with pytest.raises(AssertionError, match="follows"):
        test_three_tokens_follow_the_target_whatever_the_tree(two_drawn, True)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("same", [False, True], ids=["apart", "p = q"])
def test_chances_are_those_of_an_enumeration_of_all_draws(k: int, same: bool) -> None:
    """Chances depend on the candidates alone: over all k tokens without replacement, weighted by their law, they are the exact ones."""
    p = LOGITS[0].softmax(-1)
    q = p if same else Q[0]
    support = [token for token in range(VOCAB) if q[token] > 0]
    ways = torch.tensor(list(permutations(support, k)))
    guesses = [(row, (int(way[0]) + step) % VOCAB) for row, way in enumerate(ways) for step in (1, 2)]
    drawn, weight, own = [], torch.ones(len(ways), dtype=torch.float64), q.expand(len(ways), -1).double()
    left, exact, reached = p.expand(len(ways), -1).double(), [], torch.ones(len(ways), dtype=torch.float64)
    for i in range(k):
        x = ways[:, i : i + 1]
        drawn.append(Drawn(ways[:, i], own.float()))
        at_p, at_q = left.gather(1, x).squeeze(1), own.gather(1, x).squeeze(1)
        keep = (at_p / at_q).clamp_max(1.0)
        weight = weight * at_q
        exact.append(reached * keep)
        reached = reached * (1 - keep)
        residual = (left - own).clamp_min(0)
        left = torch.where(residual.sum(1, keepdim=True) > 1e-12, residual, left)
        left = left / left.sum(1, keepdim=True)
        own = own.scatter(1, x, 0.0)
        own = own / own.sum(1, keepdim=True)
    torch.manual_seed(73)
    tokens, chances = speculative_sample(p.expand(len(ways), -1), drawn, guesses)
    assert tokens.shape == (len(ways), 1) and [len(one) for one in chances] == [len(ways)] * k + [len(guesses)]
    for ours, theirs in zip(chances[:k], exact, strict=True):
        assert float((weight * ours).sum()) == pytest.approx(float((weight * theirs).sum()), abs=1e-6)
    rows, ids = map(list, zip(*guesses, strict=True))
    torch.testing.assert_close(chances[k].double(), reached[rows] * left[rows, ids], atol=1e-6, rtol=0)
    total = torch.stack(exact).sum(0) + reached
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(chances[0][0], torch.minimum(p, q).sum())


def test_point_guesses_alone_have_the_chance_of_the_target() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.2, 0.7]])
    _, chances = speculative_sample(p, [], [(0, 0), (0, 2), (1, 0), (1, 3)])
    torch.testing.assert_close(chances, [torch.tensor([0.5, 0.2, 0.0, 0.7])])


# Greedy decoding: a target whose next token is the sum of the last two, modulo 10.


def next_of(prefix: list[int]) -> int:
    return sum(prefix[-2:]) % 10


def spelled(proposal: Proposal, row: int, prefix: list[int]) -> list[list[int]]:
    """The prefix behind the row and behind each of its candidates."""
    found = [prefix]
    for token, parent in zip(proposal.tokens[row].tolist(), proposal.parents_of(row), strict=False):
        found.append([*found[parent + 1], token])
    return found


def logits_of(proposal: Proposal, prefixes: list[list[int]]) -> Tensor:
    """(batch, n + 1, 10): 1 at the next token, noise below."""
    logits = 0.1 * torch.rand(len(prefixes), proposal.tokens.shape[1] + 1, 10)
    for row, prefix in enumerate(prefixes):
        for i, behind in enumerate(spelled(proposal, row, prefix)):
            logits[row, i, next_of(behind)] = 1.0
    return logits


def tree(tokens: list[int], parents: list[int]) -> Proposal:
    return Proposal(torch.tensor([tokens]), None, (sources(len(tokens)),), parents=(tuple(parents),))


def decided(
    proposal: Proposal,
    prefixes: list[list[int]],
    processors: list[LogitsProcessor] | None = None,
    criterion: Callable[..., Tensor] = never,
    logits: Tensor | None = None,
    sample: bool = False,
) -> Verdict:
    longest = max(map(len, prefixes))
    tokens = torch.tensor([prefix + [0] * (longest - len(prefix)) for prefix in prefixes])
    return accept(
        proposal,
        logits_of(proposal, prefixes) if logits is None else logits,
        Rows(tokens, tuple(map(len, prefixes))),
        LogitsProcessorList(processors or []),
        StoppingCriteriaList([criterion]),
        sample,
        (),
    )


# Behind 1, 2 come 3, 5, 8, 3: kept are candidates 1, 4 and 5; 0, 2 and 3 lead elsewhere.
TREE = tree([7, 3, 9, 4, 5, 8, 0], [-1, -1, 0, 1, 1, 4, 3])


class OnlyKept(LogitsProcessor):
    """Takes kept prefixes once and in order, and raises on any other."""

    def __init__(self, length: int) -> None:
        self.prefixes: list[list[int]] = []
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        (prefix,) = input_ids.tolist()
        if len(prefix) != self._length + len(self.prefixes) or any(
            next_of(prefix[:i]) != prefix[i] for i in range(self._length, len(prefix))
        ):
            raise RuntimeError(f"{prefix} was not kept")
        self.prefixes.append(prefix)
        return scores


@pytest.mark.parametrize("sample", [False, True])
def test_the_walk_goes_to_the_child_that_is_the_token_and_no_processor_sees_another(sample: bool) -> None:
    processor = OnlyKept(2)
    logits = 1000 * logits_of(TREE, [[1, 2]])  # so that a draw is settled
    verdict = decided(TREE, [[1, 2]], [processor], logits=logits, sample=sample)
    assert verdict.rows.row(0).tolist() == [[1, 2, 3, 5, 8, 3]]
    assert verdict.paths == ((1, 4, 5),) and verdict.accepted == (3,) and verdict.new_tokens == (4,)
    assert verdict.overlaps == ((1.0, 1.0, 1.0),)
    assert verdict.chances == (((0, 0.0), (1, 1.0), (3, 0.0), (4, 1.0), (5, 1.0)),)
    assert processor.prefixes == [[1, 2], [1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 5, 8]]


def test_scores_and_logits_are_those_behind_the_kept_path() -> None:
    logits = logits_of(TREE, [[1, 2]])
    raw = logits.clone()
    verdict = decided(TREE, [[1, 2]], [RepetitionPenaltyLogitsProcessor(1.01)], logits=logits)
    here = raw[0, [0, 2, 5, 6]]
    torch.testing.assert_close(verdict.of_new_tokens(raw), here[None])
    assert verdict.scores is not None and len(verdict.scores[0]) == 4
    for i, scores in enumerate(verdict.scores[0]):
        prefix = verdict.rows.tokens[:, : 2 + i]
        torch.testing.assert_close(scores, RepetitionPenaltyLogitsProcessor(1.01)(prefix, here[i : i + 1])[0])


def test_a_place_without_the_token_ends_the_walk() -> None:
    proposal = tree([3, 6, 6, 7], [-1, -1, 0, 0])
    verdict = decided(proposal, [[1, 2]])
    assert verdict.rows.row(0).tolist() == [[1, 2, 3, 5]] and verdict.paths == ((0,),)
    assert verdict.overlaps == ((1.0, 0.0),) and verdict.chances == (((0, 1.0), (1, 0.0), (2, 0.0), (3, 0.0)),)
    nothing = decided(tree([4, 5], [-1, -1]), [[1, 2]])
    assert nothing.rows.row(0).tolist() == [[1, 2, 3]] and nothing.paths == ((),) and nothing.overlaps == ((0.0,),)


def test_a_criterion_ends_a_row_inside_of_a_branch() -> None:
    seen: list[list[int]] = []

    def at_five(tokens: Tensor, scores: tuple[Tensor, ...], **kwargs: object) -> Tensor:
        seen.extend(tokens.tolist())
        assert len(scores) == tokens.shape[1] - 2
        return tokens[:, -1] == 5

    verdict = decided(TREE, [[1, 2]], criterion=at_five)
    assert verdict.rows.row(0).tolist() == [[1, 2, 3, 5]] and verdict.done == (True,)
    assert verdict.paths == ((1, 4),) and verdict.new_tokens == (2,) and verdict.overlaps == ((1.0, 1.0),)
    assert seen == [[1, 2, 3], [1, 2, 3, 5]]


@pytest.mark.parametrize("sample", [False, True])
def test_rows_with_trees_of_their_own_are_decided_as_alone(sample: bool) -> None:
    prefixes = [[1, 2], [2, 3], [4, 4, 0], [5, 5], [1, 1]]
    single = [
        TREE,
        tree([5, 8, 8, 1], [-1, -1, 0, 2]),
        tree([4, 4], [-1, 0]),
        Proposal.nothing(Rows.of(torch.tensor([[5, 5]]))),
        tree([9, 2, 3, 5, 8], [-1, -1, 1, 2, 3]),
    ]
    together = Proposal.joined(single)
    batch = decided(together, prefixes, logits=1000 * logits_of(together, prefixes), sample=sample)
    for row, (proposal, prefix) in enumerate(zip(single, prefixes, strict=True)):
        alone = decided(proposal, [prefix], logits=1000 * logits_of(proposal, [prefix]), sample=sample)
        assert torch.equal(batch.rows.row(row), alone.rows.row(0))
        mine = (batch.paths[row], batch.overlaps[row], batch.chances[row], batch.done[row], batch.new_tokens[row])
        assert mine == (alone.paths[0], alone.overlaps[0], alone.chances[0], alone.done[0], alone.new_tokens[0])
    assert len(set(batch.new_tokens)) > 2
