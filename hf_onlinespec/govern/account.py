"""Whether a draft model is worth asking beside guesses that cost none: the time that it has saved, against the time that it took.

Only what no guess would have had counts as saved. A model that does not pay is left alone for whole requests, and tried in one now
and then: its target hands out no hidden states for it meanwhile, and little time goes into its learning.
"""

from __future__ import annotations

from dataclasses import dataclass

from .backoff import Backoff
from .estimates import DecayedMean


@dataclass(frozen=True)
class AccountConstants:
    """Of when a draft model is left alone."""

    decay: float = 0.99  # of the rounds that tell: the last 100; chosen
    known_rounds: float = 48.0  # that have to tell before it is left alone; chosen
    # Requests until it is tried again, at first and at most. Chosen: a trial takes some percent more time than a request without it.
    first_pause: int = 2
    last_pause: int = 32
    # Of a round, in plain steps: that the target hands out hidden states, and that they are held. SmolLM2 on one core takes 1 to 2 of 57 ms
    # longer for it: LOG 2026-11-26 "A head that does not pay is left alone".
    reading: float = 0.02
    # Share of the decoding time that learning may take until the draft has clearly paid once: it may be worth it later. Chosen.
    unpaid_learning: float = 0.02
    clearly: float = 1.5  # times what it took, that a draft has saved which clearly pays; chosen


class DraftAccount:
    """What one draft model saves and takes in the requests that it takes part in; in plain target steps."""

    def __init__(self, constants: AccountConstants = AccountConstants()) -> None:
        self._constants = constants
        self._saved, self._taken = DecayedMean(constants.decay), DecayedMean(constants.decay)
        self._pause = Backoff(constants.first_pause, constants.last_pause)
        self._has_paid = False

    def observe(self, saved: float, taken: float, reads: bool = False) -> None:
        """Takes in a round of a request that it takes part in.

        Args:
            reads: whether the target handed out hidden states for it.
        """
        self._saved.add(saved)
        self._taken.add(taken + self._constants.reading * reads)
        self._has_paid |= self.known and self.saved > self._constants.clearly * self.taken

    @property
    def known(self) -> bool:
        """Whether there were enough rounds to tell."""
        return self._taken.weight >= self._constants.known_rounds

    @property
    def saved(self) -> float:
        """Plain steps that it saves in a round."""
        return self._saved.mean(0.0, 1.0)

    @property
    def taken(self) -> float:
        """Plain steps that it takes in a round."""
        return self._taken.mean(0.0, 1.0)

    @property
    def pays(self) -> bool:
        """Whether it saves what it takes; also while that is not known."""
        return not self.known or self.saved >= self.taken

    def takes_part(self) -> bool:
        """Counts a request; whether the model takes part in it."""
        if self.pays:
            self._pause.reset()
            return True
        return self._pause.due()

    @property
    def reason(self) -> str:
        """What is known of it, in words."""
        return f"the draft model saves {self.saved:.3f} and takes {self.taken:.3f} plain target steps a round"

    @property
    def learning_limit(self) -> float:
        """Largest share of the decoding time that learning may take, whatever its own budget is."""
        weighed = self._taken.weight > 0  # not so where the user has always fixed what is drafted
        return self._constants.unpaid_learning if weighed and not self._has_paid else 1.0
