"""One call of `generate` from the draft's side: propose, observe, learn, and nothing of it fails the call."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from .._compat.hidden_states import Reads
from ..adapt.schedules import Schedule
from ..govern.governor import NOTHING_LEARNS
from ..metrics import CandidateCounts
from ..rounds import Proposal, Rows, Verdict
from ..runtime.failures import Attempt
from .base import Call, Draft, Proposer
from .lookahead import fixed_lookahead, replaced
from .text_rows import TextRows


class Request:
    """Drives a draft's proposer through one call, and what is learned of it.

    What raised of late is left out of this request; what raises in it, of the rest of it: see runtime/failures.py.

    Raises:
        ConfigError: `num_assistant_tokens` is no whole number of at least 1.
    """

    def __init__(self, draft: Draft, call: Call) -> None:
        own = draft.generation_config
        lookahead = fixed_lookahead(call.config, draft.settings, own)
        draft.warn_once(replaced(call.config, own, lookahead))
        waits = call.timed and (lookahead is None or draft.settings.update_every == "auto")
        self._text = TextRows.of(call)  # what the draft is shown of the row; None: all of it
        call = call if self._text is None else self._text.call(call)
        self.call = replace(call, lookahead=lookahead, waits=waits)
        self.counts = call.counts
        self._draft, self._failures = draft, draft.failures
        self.proposes = self._failures.proposing.begin()  # whether anything is drafted
        self._raw: Tensor | None = None  # of the round at hand, the target's logits
        self.proposer: Proposer | None = None  # None: it could not be made
        with self._beside_proposing():
            self.proposer = draft.proposer(self.call)

    @property
    def schedule(self) -> Schedule | None:
        """When the call is learned; None: there is nothing to train."""
        return None if self.proposer is None else self.proposer.schedule

    @property
    def reads(self) -> Reads:
        """What is read of the target in this call, see `Draft.reads`; (): nothing."""
        return () if self.proposer is None else self.proposer.reads

    def _proposing(self) -> Attempt:
        return self._failures.proposing.attempt(self.stop_proposing)

    def _beside_proposing(self) -> AbstractContextManager[Any]:
        """Where proposing is left out, what the call shows is learned nevertheless, and a failure is not counted again."""
        return self._proposing() if self.proposes else suppress(Exception)

    def stop_proposing(self) -> None:
        """The request goes on plain."""
        self.counts.failed_drafts += 1
        self.proposes = False
        proposer = self.proposer
        if proposer is not None:
            with self._failures.proposing.attempt(self._drop):
                proposer.reset()

    def _drop(self) -> None:
        """Not even its caches could be emptied: nothing of the call is learned, either."""
        self.proposer = None

    def propose(self, rows: Rows, room: int, trees: bool = False) -> Proposal:
        """What the draft commits to; nothing where something failed in it: what there is of such a round may be half of it.

        Args:
            room: how far a row may reach.
            trees: whether several candidates may follow the same prefix.
        """
        failed = self.counts.failed_drafts
        rows = self.seen(rows)
        proposal = nothing = Proposal.nothing(rows)
        if self.proposer is not None and self.proposes:
            with self._proposing():
                proposal = self.proposer.propose(rows, room, trees)
                self.check(proposal, rows, room)
        self.begin(rows)
        return nothing if self.counts.failed_drafts > failed else proposal

    def seen(self, rows: Rows) -> Rows:
        """What the draft is shown of the rows."""
        rows = self.call.shown(rows)
        return rows if self._text is None else self._text.rows(rows)

    def check(self, proposal: Proposal, rows: Rows, room: int) -> None:
        """Raises ValueError where a proposal cannot be verified behind the rows."""
        proposal.check(rows, room, None if self.call.vocabulary is None else self.call.vocabulary.said)

    def begin(self, rows: Rows) -> None:
        """Before the first round of rows is verified: their prompts are noted for learning."""
        if self.schedule is not None:
            self.schedule.begin(rows)

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None = None) -> None:
        """Hands on the target's raw logits (batch, n + 1, vocab) of a round, and keeps them until it is observed if they are learned from.

        A copy: processors may write into them.

        Args:
            features: (batch, fed, width) the hidden states that the draft reads, of all that the target was fed.
        """
        gaps = self.call.gaps
        if gaps is not None and features is not None:
            features = gaps.shown_features(features, rows.of_call, proposal.tokens.shape[1])
        if self._text is not None and features is not None:
            features = self._text.features(features, rows.lengths[0] + proposal.tokens.shape[1])
        rows = self.seen(rows)
        if self.proposer is not None:
            with self._beside_proposing():
                self.proposer.read(rows, proposal, logits, features)
        if self.schedule is not None:
            with self.schedule.attempt():
                self._raw = self.schedule.copied(logits)

    def observe(self, verdict: Verdict, reads_prompts: bool = False) -> None:
        """Counts a round, and hands its outcome on.

        Args:
            reads_prompts: whether the target has read the prompts in it, or instead of candidates tokens that it had read before: no
                round's time. In the first round of a row alone it always reads the prompt.
        """
        self.count(verdict)
        if self.proposer is not None:
            verdict = replace(verdict, rows=self.seen(verdict.rows))
            if reads_prompts or self.counts.rounds == 1:  # the time of that says nothing about a round's
                verdict = replace(verdict, target_s=0.0)
            with self._beside_proposing():
                self.proposer.observe(verdict)
        self.learn_of(verdict)

    def learn_of(self, verdict: Verdict) -> None:
        """Records a round, and learns what is recorded where that is due."""
        schedule = self.schedule
        if schedule is not None:
            with schedule.attempt():
                schedule.record(verdict.rows, None if self._raw is None else verdict.of_new_tokens(self._raw))
            self._raw = None  # what was rejected is not held while the draft learns
            schedule.learn_of_round()

    def count(self, verdict: Verdict) -> None:
        """Counts a round."""
        counts = self.counts
        counts.draft_time_s += verdict.draft_s
        counts.target_time_s += verdict.target_s
        counts.rounds += len(verdict.rows.lengths)
        counts.new_tokens += sum(verdict.new_tokens)
        counts.drafted_tokens += sum(verdict.proposal.lengths)
        counts.accepted_tokens += sum(verdict.accepted)
        counts.verified_positions += sum(map(len, verdict.overlaps))
        counts.overlap += sum(map(sum, verdict.overlaps))
        sources = verdict.proposal.sources
        if not any(sources):
            counts.plain_rounds += len(sources)
            return
        verified = Counter((token.source, token.position) for row in sources for token in row)
        kept = Counter(
            (row[i].source, row[i].position) for row, path in zip(sources, verdict.paths, strict=True) for i in path
        )
        counts.candidates += CandidateCounts(verified, kept)
        for row in sources:
            names = {token.source for token in row}
            counts.drafted_by(bool(names - {"model"}), "model" in names)

    def leave(self, rows: Rows) -> None:
        """Rows have ended, and others go on or are still to begin: these are remembered and learned as at the end of a request."""
        if self.proposer is None:
            return
        unseen, rows = False, self.seen(rows)
        with self._beside_proposing():
            unseen = self.proposer.leave(rows)
        if self.schedule is not None:
            self.schedule.finish(unseen, rows)

    def finish(self) -> None:
        """Ends the request: it is remembered, what is left of it learned and others are replayed, as far as that is worth it."""
        if self.proposer is None:
            return
        unseen, schedule = False, self.schedule
        with self._beside_proposing():
            unseen = self.proposer.finish()
        if schedule is not None:
            schedule.finish(unseen)
        failures, governor = self._failures, self._draft.governor
        with failures.records.attempt(), self._draft.lock:
            if schedule is not None and schedule.worked and failures.learning.worked():
                governor.budget.say(f"learning works again after: {failures.learning.reason}")
            verdict = governor.budget.verdict if schedule is not None else ""
            outcome = NOTHING_LEARNS if schedule is None else schedule.outcome()
            governor.decisions.learning = f"{outcome}; {verdict}" if verdict else outcome
        if self.proposes and failures.proposing.worked():
            governor.decisions.drafting = f"drafting works again after: {failures.proposing.reason}"

    def close(self, started: float) -> None:
        """The end of the call, finished or broken off; `started`: when it began."""
        if self.schedule is not None:
            self.schedule.close()
        self.counts.wall_time_s = time.perf_counter() - started
        failures, decisions = self._failures, self._draft.governor.decisions
        with failures.records.attempt(), self._draft.lock:
            self._draft.metrics.close(self.counts)
            for what in (failures.learning, failures.preparing):
                if what.failing:
                    decisions.learning = what.reason
            for what in (failures.memory, failures.drafting, failures.proposing, failures.preparing):
                if what.failing:
                    decisions.drafting = what.reason
        with failures.records.attempt():
            self._draft.report(self.counts)
