"""Which candidates are kept: greedy ones that are the target's own, sampled ones so that the target's law is kept (arXiv:2211.17192)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from .._compat.generation import processed_scores
from ..commit.sampling import draw
from ..rounds import Proposal, Rows, Verdict
from .rejection import Drawn, speculative_sample


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
    groups = defaultdict[int, list[int]](list)
    for row, length in enumerate(rows.lengths):
        groups[length].append(row)
    if not proposal.tokens.shape[1] and (len(groups) == 1 or not (sample or processors or scores is not None)):
        return _next_tokens(proposal, logits[:, 0], rows, groups, processors, stopping_criteria, sample, scores)
    if len(groups) == 1:
        return _Group(proposal, logits, rows, scores).accept(processors, stopping_criteria, sample)
    verdicts = {}
    for members in groups.values():
        index = torch.tensor(members, device=logits.device)
        own = Rows(rows.tokens[index], tuple(rows.lengths[row] for row in members))
        earlier = None if scores is None else tuple(s[index] for s in scores)
        group = _Group(proposal.of(members), logits[index], own, earlier)
        verdicts[tuple(members)] = group.accept(processors, stopping_criteria, sample)
    return joined(proposal, verdicts)


def _next_tokens(
    proposal: Proposal,
    logits: Tensor,
    rows: Rows,
    groups: Mapping[int, list[int]],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    sample: bool,
    scores: tuple[Tensor, ...] | None,
) -> Verdict:
    """One token for every row, of a proposal that has no candidate.

    Args:
        logits: (batch, vocab) behind the rows.
        groups: rows by their length; several only where there are neither processors nor scores, and nothing is drawn.
    """
    batch, longest = len(rows.lengths), max(rows.lengths)
    before = rows.tokens[:, :longest]
    processed = processed_scores(processors, before, logits) if processors else logits
    token = draw(processed.softmax(-1)) if sample else processed.argmax(-1, keepdim=True)  # (batch, 1)
    found = None if scores is None else (*scores, processed)
    if len(groups) == 1:
        tokens = torch.cat([before, token], dim=-1)
        done = _said(criteria(tokens, found), batch)
    else:
        ends = torch.tensor(rows.lengths, device=before.device)[:, None]
        tokens = torch.cat([before, before.new_zeros(batch, 1)], dim=-1).scatter(1, ends, token)
        done = [False] * batch
        for length, members in groups.items():
            index = torch.tensor(members, device=before.device)
            for row, end in zip(members, _said(criteria(tokens[index, : length + 1], None), len(members)), strict=True):
                done[row] = end
    nothing = ((),) * batch
    return Verdict(
        proposal,
        Rows(tokens, tuple(length + 1 for length in rows.lengths)),
        (1,) * batch,
        nothing,
        nothing,
        nothing,
        tuple(done),
        None if scores is None else tuple((own,) for own in processed),
    )


def _said(stops: Tensor, rows: int) -> list[bool]:
    """What a criterion says of so many rows; of one it may say a single thing."""
    return [bool(stops.all())] if rows == 1 else stops.tolist()


class _Walk:
    """The way of one row through its tree of candidates."""

    def __init__(self, proposal: Proposal, row: int) -> None:
        self._followers: dict[int, list[int]] = {}  # of a candidate, and of the row itself (-1)
        for candidate, parent in enumerate(proposal.parents_of(row)):
            self._followers.setdefault(parent, []).append(candidate)
        self.q_places = {candidate: i for i, candidate in enumerate(proposal.drawn_of(row))}  # of the drawn candidates
        for followers in self._followers.values():  # a guess that is also drawn is kept as the drawn one
            followers.sort(key=lambda candidate: candidate not in self.q_places)
        self.path: list[int] = []
        self.places: list[list[int]] = []  # the candidates behind every prefix that was kept, where there are any
        self.done = False
        self.candidates = self._followers.get(-1, [])  # behind what was kept so far

    @property
    def place(self) -> int:
        """Where the logits behind what was kept so far stand."""
        return self.path[-1] + 1 if self.path else 0

    def keep(self, candidate: int) -> None:
        self.path.append(candidate)
        self.candidates = self._followers.get(candidate, [])


class _Group:
    """Rows of one length in one round."""

    def __init__(self, proposal: Proposal, logits: Tensor, rows: Rows, scores: tuple[Tensor, ...] | None) -> None:
        self._proposal, self._logits = proposal, logits
        batch, length = len(rows.lengths), rows.lengths[0]
        self._tokens = rows.tokens[:, :length]  # of the rows that go on
        self._active = list(range(batch))
        self._earlier = scores
        self._steps: list[tuple[list[int], Tensor, Tensor]] = []  # rows that went on, their tokens and processed scores
        self._walks = [_Walk(proposal, row) for row in range(batch)]
        # (row, candidate) and their chances: read once the round is over, for which an accelerator is waited.
        self._told: list[tuple[int, int]] = []
        self._chances: list[Tensor] = []

    def accept(self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, sample: bool) -> Verdict:
        before = self._tokens
        while self._active:
            places = [self._walks[row].place for row in self._active]
            processed = processed_scores(processors, self._tokens, self._at(self._logits, places))  # (active, vocab)
            token = self._sampled(processed) if sample else processed.argmax(-1, keepdim=True)  # (active, 1)
            self._tokens = torch.cat([self._tokens, token], dim=-1)
            self._steps.append((self._active, token, processed))
            # generate() passes the scores to the criteria only where the caller asked for them.
            self._walk(token, criteria(self._tokens, self._scores_so_far()))
        return self._verdict(before, sample)

    @cached_property
    def _known(self) -> list[list[int]]:
        """The candidates' tokens on the host; an accelerator is waited for, so that its forward should have been asked for."""
        return self._proposal.tokens.tolist()

    def _at(self, values: Tensor, places: Sequence[int]) -> Tensor:
        """(active, …) of `values` (batch, n, …): one place for every row that goes on."""
        if len(self._active) == values.shape[0] and len(set(places)) == 1:
            return values[:, places[0]]
        return values[self._active, list(places)]

    def _walk(self, token: Tensor, stops: Tensor) -> None:
        """Every row goes to the candidate that is its token; it ends where there is none, or where it has to stop."""
        goes_on = []
        ends = _said(stops, len(self._active))
        for i, (row, (own,), end) in enumerate(zip(self._active, token.tolist(), ends, strict=True)):
            walk = self._walks[row]
            walk.done = end
            if not walk.candidates:
                continue
            walk.places.append(walk.candidates)
            known = self._known[row]
            kept = next((candidate for candidate in walk.candidates if known[candidate] == own), None)
            if kept is not None:
                walk.keep(kept)
                if not end:
                    goes_on.append(i)
        if len(goes_on) < len(self._active):
            self._active = [self._active[i] for i in goes_on]
            if goes_on:
                self._tokens = self._tokens[goes_on]

    def _sampled(self, processed: Tensor) -> Tensor:
        p = processed.softmax(-1)
        told: list[tuple[int, int]] = []  # (row, candidate) as their chances come
        drawn, guesses = [], dict[tuple[int, int], tuple[int, int]]()
        own = [[c for c in self._walks[row].candidates if c in self._walks[row].q_places] for row in self._active]
        for candidates in zip_longest(*own, fillvalue=-1):  # one of every row; -1: it has no more
            drawn.append(self._drawn(candidates))
            told += zip(self._active, candidates, strict=True)
        for i, row in enumerate(self._active):
            for candidate in self._walks[row].candidates[len(own[i]) :]:
                # The target has no chance for ids beyond its own, and none twice for the same.
                if (token := self._known[row][candidate]) < p.shape[-1]:
                    guesses.setdefault((i, token), (row, candidate))
        told += guesses.values()
        if not told:
            return draw(p)
        tokens, chances = speculative_sample(p, drawn, list(guesses))
        self._told += told
        self._chances += chances
        return tokens

    def _drawn(self, candidates: tuple[int, ...]) -> Drawn:
        """A drawn candidate of every row that goes on; -1: it has none."""
        assert self._proposal.q is not None
        q_places = [self._walks[row].q_places.get(c, 0) for row, c in zip(self._active, candidates, strict=True)]
        tokens, q = self._at(self._proposal.tokens, candidates), self._at(self._proposal.q, q_places)
        if -1 not in candidates:
            return Drawn(tokens, q)
        has = torch.tensor([c >= 0 for c in candidates], device=q.device)
        return Drawn(tokens, torch.where(has[:, None], q, 0.0), has)

    def _scores_so_far(self) -> tuple[Tensor, ...] | None:
        """What generate() would show the criteria of the rows that go on: the processed scores (active, vocab) of every token."""
        if self._earlier is None:
            return None
        found = [scores if len(self._active) == scores.shape[0] else scores[self._active] for scores in self._earlier]
        for rows, _, processed in self._steps:
            same = rows == self._active
            found.append(processed if same else processed[[rows.index(row) for row in self._active]])
        return tuple(found)

    def _verdict(self, before: Tensor, sample: bool) -> Verdict:
        batch = len(self._walks)
        scores: list[list[Tensor]] = [[] for _ in range(batch)]
        if batch == 1:
            tokens, counts = self._tokens, [len(self._steps)]
        else:
            tokens = torch.cat([before, before.new_zeros(batch, len(self._steps))], dim=-1)
            counts = [0] * batch
            for i, (rows, token, _) in enumerate(self._steps):
                tokens[rows, before.shape[1] + i] = token[:, 0]
                for row in rows:
                    counts[row] += 1
        if self._earlier is not None:
            for rows, _, processed in self._steps:
                for row, own in zip(rows, processed, strict=True):
                    scores[row].append(own)
        chances = self._chances_of_places(sample)
        return Verdict(
            self._proposal,
            Rows(tokens, tuple(before.shape[1] + n for n in counts)),
            tuple(counts),
            tuple(tuple(walk.path) for walk in self._walks),
            tuple(tuple(sum(chance for _, chance in place) for place in places) for places in chances),
            tuple(tuple(one for place in places for one in place) for places in chances),
            tuple(walk.done for walk in self._walks),
            None if self._earlier is None else tuple(map(tuple, scores)),
        )

    def _chances_of_places(self, sample: bool) -> list[list[list[tuple[int, float]]]]:
        """Per row and place: (candidate, chance that it was kept). What is kept of greedy decoding was certain."""
        found: dict[tuple[int, int], float] = {}
        if not sample:
            found = {(row, candidate): 1.0 for row, walk in enumerate(self._walks) for candidate in walk.path}
        elif self._told:
            found = dict(zip(self._told, torch.cat(self._chances).tolist(), strict=True))
        return [
            [[(candidate, found.get((row, candidate), 0.0)) for candidate in place] for place in walk.places]
            for row, walk in enumerate(self._walks)
        ]


def joined(proposal: Proposal, groups: dict[tuple[int, ...], Verdict]) -> Verdict:
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
