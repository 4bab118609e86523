"""Which candidates are kept: greedy ones that are the target's own, sampled ones so that the target's law is kept (arXiv:2211.17192)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from .._compat.generation import processed_scores
from ..commit.sampling import draw
from ..models.vocabulary import widened
from ..rounds import Proposal, Rows, Verdict


def accept(
    proposal: Proposal,
    logits: Tensor,
    rows: Rows,
    processors: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    sample: bool,
    scores: tuple[Tensor, ...] | None,
) -> Verdict:
    """Keeps the candidates of every row up to its first rejection or stop, then one token of the target's own.

    Position by position, so that a stateful processor or criterion sees every kept prefix once and in order, and nothing behind
    a rejection. Rows of one length go together; processors and criteria are called with those that go on.

    Args:
        logits: (batch, n + 1, vocab) raw target logits.
        rows: before this round.
        scores: processed scores (batch, vocab) of every token so far, which criteria are shown; None: nobody asked for them.
    """
    groups = defaultdict(list)
    for row, length in enumerate(rows.lengths):
        groups[length].append(row)
    if len(groups) == 1:
        return _Group(proposal, logits, rows, scores).accept(processors, stopping_criteria, sample)
    verdicts = {}
    for members in groups.values():
        index = torch.tensor(members, device=logits.device)
        own = Rows(rows.tokens[index], tuple(rows.lengths[row] for row in members))
        earlier = None if scores is None else tuple(s[index] for s in scores)
        group = _Group(proposal.of(members), logits[index], own, earlier)
        verdicts[tuple(members)] = group.accept(processors, stopping_criteria, sample)
    return _joined(proposal, verdicts)


@dataclass
class _Place:
    """Where one row stands: behind a kept prefix."""

    candidates: list[int]  # that follow it, the drawn ones in the order of their draws
    drawn: list[int]  # of these, the drawn ones


class _Group:
    """Rows of one length in one round."""

    def __init__(self, proposal: Proposal, logits: Tensor, rows: Rows, scores: tuple[Tensor, ...] | None) -> None:
        self._proposal, self._logits = proposal, logits
        batch, length = len(rows.lengths), rows.lengths[0]
        self._tokens = rows.tokens[:, :length]  # of the rows that go on
        self._active = list(range(batch))
        self._earlier = scores
        self._steps: list[tuple[list[int], Tensor, Tensor]] = []  # rows that went on, their tokens and processed scores
        self._candidates = [_followers(proposal.parents_of(row)) for row in range(batch)]
        self._q_rows = [{candidate: i for i, candidate in enumerate(proposal.drawn_of(row))} for row in range(batch)]
        self._known: list[list[int]] | None = None  # the candidates' tokens, once somebody asks for them
        self.paths: list[list[int]] = [[] for _ in range(batch)]
        self.overlaps: list[list[float]] = [[] for _ in range(batch)]
        self.chances: list[list[tuple[int, float]]] = [[] for _ in range(batch)]
        self.done = [False] * batch

    def accept(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, sample: bool) -> Verdict:
        before = self._tokens
        while True:
            places = [self._place(row) for row in self._active]
            processed = processed_scores(processors, self._tokens, self._logits_here())  # (active, vocab)
            token, kept = self._sampled(processed, places) if sample else self._greedy(processed, places)
            self._tokens = torch.cat([self._tokens, token[:, None]], dim=-1)
            self._steps.append((self._active, token, processed))
            # generate() passes the scores to the criteria only where the caller asked for them.
            stops = criteria(self._tokens, self._scores_so_far())
            ends = [bool(stops.all())] if len(self._active) == 1 else stops.tolist()
            goes_on = []
            for i, (row, candidate) in enumerate(zip(self._active, kept, strict=True)):
                self.done[row] = ends[i]
                if candidate is not None:
                    self.paths[row].append(candidate)
                    if not self.done[row]:
                        goes_on.append(i)
            if not goes_on:
                return self._verdict(before)
            if len(goes_on) < len(self._active):
                self._active = [self._active[i] for i in goes_on]
                self._tokens = self._tokens[torch.tensor(goes_on, device=token.device)]

    def _place(self, row: int) -> _Place:
        at = self.paths[row][-1] if self.paths[row] else -1
        candidates = self._candidates[row].get(at, [])
        return _Place(candidates, [candidate for candidate in candidates if candidate in self._q_rows[row]])

    def _logits_here(self) -> Tensor:
        """(active, vocab) behind what was kept of every row that goes on."""
        at = [self.paths[row][-1] + 1 if self.paths[row] else 0 for row in self._active]
        if len(self._active) == self._logits.shape[0] and len(set(at)) == 1:
            return self._logits[:, at[0]]
        if len(self._active) == 1:
            return self._logits[self._active[0], at[0]][None]
        device = self._logits.device
        return self._logits[torch.tensor(self._active, device=device), torch.tensor(at, device=device)]

    def _token(self, row: int, candidate: int) -> int:
        if self._known is None:
            self._known = self._proposal.tokens.tolist()
        return self._known[row][candidate]

    def _kept(self, tokens: Tensor, places: list[_Place], tried: Sequence[int | None]) -> list[int | None]:
        """Of every row the candidate that is its token; `tried`: what is known of that already."""
        if not any(place.candidates for place in places):
            return list(tried)
        found = list(tried)
        for i, (row, place, token) in enumerate(zip(self._active, places, tokens.tolist(), strict=True)):
            if found[i] is None:
                # A drawn candidate that was rejected is not kept, whatever is drawn in its place.
                guesses = (c for c in place.candidates if c not in place.drawn and self._token(row, c) == token)
                found[i] = next(guesses, None)
        return found

    def _greedy(self, processed: Tensor, places: list[_Place]) -> tuple[Tensor, list[int | None]]:
        token = processed.argmax(-1)
        # Whatever a candidate was drawn from, it is kept where it is the target's own.
        kept = self._kept(token, [_Place(place.candidates, []) for place in places], [None] * len(places))
        for row, place, candidate in zip(self._active, places, kept, strict=True):
            if place.candidates:
                self.overlaps[row].append(float(candidate is not None))
                self.chances[row] += [(one, float(one == candidate)) for one in place.candidates]
        return token, kept

    def _sampled(self, processed: Tensor, places: list[_Place]) -> tuple[Tensor, list[int | None]]:
        left = processed.softmax(-1)  # (active, vocab) the law of the token, given what was rejected
        reached = [1.0] * len(places)  # per row, the chance that everything so far was rejected
        kept: list[int | None] = [None] * len(places)
        token: Tensor | None = None  # of the rows that have one
        chances: list[list[tuple[int, float]]] = [[] for _ in places]
        for i in range(max((len(place.drawn) for place in places), default=0)):
            left, token = self._try_drawn(i, left, places, kept, token, reached, chances)
        for row, place, rest, found, after in zip(self._active, places, left, chances, reached, strict=True):
            guesses = [c for c in place.candidates if c not in place.drawn]
            if guesses:
                inside = [c for c in guesses if self._token(row, c) < rest.shape[0]]
                values = rest[torch.tensor([self._token(row, c) for c in inside], device=rest.device)].tolist()
                known = dict(zip(inside, values, strict=True))
                found += [(c, after * known.get(c, 0.0)) for c in guesses]
        for row, place, found in zip(self._active, places, chances, strict=True):
            if place.candidates:
                self.overlaps[row].append(min(1.0, sum(chance for _, chance in found)))
                self.chances[row] += found
        if token is None or None in kept:
            drawn = draw(left).squeeze(1)
            has = torch.tensor([candidate is not None for candidate in kept], device=left.device)
            token = drawn if token is None else torch.where(has, token, drawn)
            kept = self._kept(token, places, kept)
        return token, kept

    def _try_drawn(
        self,
        i: int,
        left: Tensor,
        places: list[_Place],
        kept: list[int | None],
        token: Tensor | None,
        reached: list[float],
        chances: list[list[tuple[int, float]]],
    ) -> tuple[Tensor, Tensor]:
        """Keeps or rejects the drawn candidate number `i` of every row that has one and kept none before it (recursive rejection,
        arXiv:2305.09781); what is left of the law, and the rows' tokens so far."""
        assert self._proposal.q is not None
        has = [len(place.drawn) > i and candidate is None for place, candidate in zip(places, kept, strict=True)]
        wide = self._proposal.q.shape[-1]
        left = widened(left, wide, 0.0)
        q, ids = left.new_zeros(len(places), wide), [0] * len(places)
        for at, (row, place) in enumerate(zip(self._active, places, strict=True)):
            if has[at]:
                q[at] = self._proposal.q[row, self._q_rows[row][place.drawn[i]]]
                ids[at] = place.drawn[i]
        # A distribution is 0 at ids that the other one has alone.
        q = widened(q, left.shape[-1], 0.0)
        rows = torch.tensor(self._active, device=left.device)
        drafted = self._proposal.tokens[rows, torch.tensor(ids, device=left.device)]
        some = torch.tensor(has, device=left.device)
        overlap = torch.minimum(left, q).sum(-1).tolist()
        keeps, residual = keep_drawn(left, q, drafted, some)
        token = drafted if token is None else torch.where(some, drafted, token)
        for at, one in enumerate(keeps.tolist()):
            if not has[at]:
                continue
            chances[at].append((ids[at], reached[at] * min(1.0, overlap[at])))
            reached[at] *= max(0.0, 1 - overlap[at])
            if one:
                kept[at] = ids[at]
        return torch.where(some[:, None], residual, left), token

    def _scores_so_far(self) -> tuple[Tensor, ...] | None:
        """What generate() would show the criteria of the rows that go on: the processed scores (active, vocab) of every token."""
        if self._earlier is None:
            return None
        found = [
            scores if len(self._active) == scores.shape[0] else scores[torch.tensor(self._active, device=scores.device)]
            for scores in self._earlier
        ]
        for rows, _, processed in self._steps:
            same = rows == self._active
            found.append(processed if same else processed[[rows.index(row) for row in self._active]])
        return tuple(found)

    def _verdict(self, before: Tensor) -> Verdict:
        batch = len(self.paths)
        scores: list[list[Tensor]] = [[] for _ in range(batch)]
        if batch == 1:
            tokens, counts = self._tokens, [len(self._steps)]
        else:
            tokens = torch.cat([before, before.new_zeros(batch, len(self._steps))], dim=-1)
            counts = [0] * batch
            for i, (rows, token, _) in enumerate(self._steps):
                tokens[torch.tensor(rows, device=tokens.device), before.shape[1] + i] = token
                for row in rows:
                    counts[row] += 1
        if self._earlier is not None:
            for rows, _, processed in self._steps:
                for row, own in zip(rows, processed, strict=True):
                    scores[row].append(own)
        return Verdict(
            self._proposal,
            Rows(tokens, tuple(before.shape[1] + n for n in counts)),
            tuple(counts),
            tuple(map(tuple, self.paths)),
            tuple(map(tuple, self.overlaps)),
            tuple(map(tuple, self.chances)),
            tuple(self.done),
            None if self._earlier is None else tuple(map(tuple, scores)),
        )


def _followers(parents: tuple[int, ...]) -> dict[int, list[int]]:
    """For every candidate, and the row itself (-1), those that follow it."""
    found: dict[int, list[int]] = {}
    for candidate, parent in enumerate(parents):
        found.setdefault(parent, []).append(candidate)
    return found


def _joined(proposal: Proposal, groups: dict[tuple[int, ...], Verdict]) -> Verdict:
    """Verdicts on some of the rows each, as one on all of them."""
    place = {row: (verdict, i) for rows, verdict in groups.items() for i, row in enumerate(rows)}
    order = [place[row] for row in range(len(place))]
    lengths = tuple(verdict.rows.lengths[i] for verdict, i in order)
    tokens = order[0][0].rows.tokens.new_zeros(len(order), max(lengths))
    for row, (verdict, i) in enumerate(order):
        tokens[row, : lengths[row]] = verdict.rows.row(i)[0]
    scores = None
    if all(verdict.scores is not None for verdict in groups.values()):
        scores = tuple((verdict.scores or ())[i] for verdict, i in order)
    return Verdict(
        proposal,
        Rows(tokens, lengths),
        tuple(verdict.new_tokens[i] for verdict, i in order),
        tuple(verdict.paths[i] for verdict, i in order),
        tuple(verdict.overlaps[i] for verdict, i in order),
        tuple(verdict.chances[i] for verdict, i in order),
        tuple(verdict.done[i] for verdict, i in order),
        scores,
    )


def keep_drawn(p: Tensor, q: Tensor, drafted: Tensor, has: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keeps x ~ q with probability min(1, p(x)/q(x)), row by row (arXiv:2211.17192).

    Args:
        p, q: (rows, vocab) the target's law, and what each x was drawn from.
        drafted: (rows,) the x.
        has: (rows,) whether anything was drafted, None: everywhere.

    Returns:
        Whether each is kept (rows,), and the law of the token where it is not: the residual (p − q)₊, (rows, vocab), not normalised to
        one unless several candidates are tried.
    """
    chosen = drafted[:, None]
    u = torch.rand(chosen.shape, device=p.device)
    kept = (u * q.gather(-1, chosen) < p.gather(-1, chosen)).squeeze(-1)
    if has is not None:
        kept &= has
    if bool(kept.all()):
        return kept, p
    residual = (p - q).clamp_min(0)
    total = residual.sum(-1, keepdim=True)
    # p = q up to rounding leaves nothing: then the draw is from p itself.
    return kept, torch.where(total <= torch.finfo(p.dtype).tiny, p, residual / total)
