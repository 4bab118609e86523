"""Which candidates are kept: greedy ones that are the target's own, sampled ones so that the target's law is kept (arXiv:2211.17192)."""

from __future__ import annotations

from collections import defaultdict

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
        some = Proposal(
            proposal.tokens[index],
            None if proposal.q is None else proposal.q[index],
            tuple(proposal.sources[row] for row in members),
        )
        own = Rows(rows.tokens[index], tuple(rows.lengths[row] for row in members))
        group = _Group(some, logits[index], own, None if scores is None else tuple(s[index] for s in scores))
        verdicts[tuple(members)] = group.accept(processors, stopping_criteria, sample)
    return _joined(proposal, verdicts)


class _Group:
    """Rows of one length in one round."""

    def __init__(self, proposal: Proposal, logits: Tensor, rows: Rows, scores: tuple[Tensor, ...] | None) -> None:
        self._proposal, self._logits = proposal, logits
        batch, length = len(rows.lengths), rows.lengths[0]
        self._tokens = rows.tokens[:, :length]  # of the rows that go on
        self._active = list(range(batch))
        self._earlier = scores
        self._steps: list[tuple[list[int], Tensor, Tensor]] = []  # rows that went on, their tokens and processed scores
        self.accepted = [0] * batch
        self.overlaps: list[list[float]] = [[] for _ in range(batch)]
        self.done = [False] * batch

    def accept(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, sample: bool) -> Verdict:
        before, lengths = self._tokens, self._proposal.lengths
        for i in range(max(lengths) + 1):
            active = self._active
            processed = processed_scores(processors, self._tokens, self._rows(self._logits)[:, i])  # (active, vocab)
            has = [lengths[row] > i for row in active]
            token, kept = self._sampled(i, processed, has) if sample else self._greedy(i, processed, has)
            self._tokens = torch.cat([self._tokens, token[:, None]], dim=-1)
            self._steps.append((active, token, processed))
            # generate() passes the scores to the criteria only where the caller asked for them.
            stops = criteria(self._tokens, self._scores_so_far())
            ends = [bool(stops.all())] if len(active) == 1 else stops.tolist()
            goes_on = []
            for place, (row, keeps) in enumerate(zip(active, kept, strict=True)):
                self.accepted[row] += keeps
                self.done[row] = ends[place]
                if keeps and not self.done[row]:
                    goes_on.append(place)
            if not goes_on:
                break
            if len(goes_on) < len(active):
                self._active = [active[place] for place in goes_on]
                self._tokens = self._tokens[torch.tensor(goes_on, device=token.device)]
        return self._verdict(before)

    def _rows(self, values: Tensor) -> Tensor:
        """The rows of `values` (batch, …) that go on."""
        if len(self._active) == values.shape[0]:
            return values
        return values[torch.tensor(self._active, device=values.device)]

    def _greedy(self, i: int, processed: Tensor, has: list[bool]) -> tuple[Tensor, list[bool]]:
        token = processed.argmax(-1)
        if not any(has):
            return token, has
        same = (token == self._rows(self._proposal.tokens)[:, i]).tolist()
        kept = [bool(one and there) for one, there in zip(same, has, strict=True)]
        for row, there, one in zip(self._active, has, kept, strict=True):
            if there:
                self.overlaps[row].append(float(one))
        return token, kept

    def _sampled(self, i: int, processed: Tensor, has: list[bool]) -> tuple[Tensor, list[bool]]:
        p = processed.softmax(-1)
        if not any(has):
            return draw(p).squeeze(1), has
        assert self._proposal.q is not None
        q = self._rows(self._proposal.q)[:, i]
        # A distribution is 0 at ids that the other one has alone; that of a row without a candidate is 0 throughout.
        p, q = widened(p, q.shape[-1], 0.0), widened(q, p.shape[-1], 0.0)
        some = None if all(has) else torch.tensor(has, device=p.device)
        token, kept = speculative_sample(p, q, self._rows(self._proposal.tokens)[:, i], some)
        for row, there, overlap in zip(self._active, has, torch.minimum(p, q).sum(-1).tolist(), strict=True):
            if there:
                self.overlaps[row].append(overlap)
        return token, kept.tolist()

    def _scores_so_far(self) -> tuple[Tensor, ...] | None:
        """What generate() would show the criteria of the rows that go on: the processed scores (active, vocab) of every token."""
        if self._earlier is None:
            return None
        found = [self._rows(scores) for scores in self._earlier]
        for rows, _, processed in self._steps:
            same = rows == self._active
            found.append(processed if same else processed[[rows.index(row) for row in self._active]])
        return tuple(found)

    def _verdict(self, before: Tensor) -> Verdict:
        batch = len(self.accepted)
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
            tuple(self.accepted),
            tuple(map(tuple, self.overlaps)),
            tuple(self.done),
            None if self._earlier is None else tuple(map(tuple, scores)),
        )


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
        tuple(verdict.accepted[i] for verdict, i in order),
        tuple(verdict.overlaps[i] for verdict, i in order),
        tuple(verdict.done[i] for verdict, i in order),
        scores,
    )


def speculative_sample(p: Tensor, q: Tensor, drafted: Tensor, has: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draws from p (rows, vocab) that reuse draws from q where they can: `(tokens, whether each is the drafted one)`, (rows,) both.

    Keeps x ~ q with probability min(1, p(x)/q(x)), else draws from the residual (p − q)₊ (arXiv:2211.17192); row by row.

    Args:
        has: (rows,) whether anything was drafted; where it was not, q is 0 throughout and the draw is one from p. None: everywhere.
    """
    chosen = drafted[:, None]
    u = torch.rand(chosen.shape, device=p.device)
    kept = (u * q.gather(-1, chosen) < p.gather(-1, chosen)).squeeze(-1)
    if has is not None:
        kept &= has
    if bool(kept.all()):
        return drafted, kept
    residual = (p - q).clamp_min(0)
    # p = q up to rounding leaves nothing: then the draw is from p itself.
    empty = residual.sum(-1, keepdim=True) <= torch.finfo(p.dtype).tiny
    return torch.where(kept, drafted, draw(torch.where(empty, p, residual)).squeeze(1)), kept
