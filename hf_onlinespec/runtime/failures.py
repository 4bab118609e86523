"""What fails beside decoding costs no answer: it is left out, counted and logged, and tried again later.

Decoding is the target's forward and the choice of its tokens. Drafting, learning, the suffix memory and the records only make it
faster, so an `Exception` in them ends inside `Backoff.attempt`. What has failed is left out for a number of requests that doubles
with every failure: memory that has run out is not asked for again at once, and a failure that stays costs next to nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

# Requests. Chosen: a failure that happens once costs one request; of 100 requests in which everything fails, 6 try.
FIRST_PAUSE, LONGEST_PAUSE = 1, 64

PACKAGE = Path(__file__).parents[1]

logger = logging.getLogger(__name__)


class Backoff:
    """One thing that may fail, and for how many requests it is left out after it did.

    Args:
        what: as the subject of a sentence, for the log.
        instead: what goes on without it.
    """

    def __init__(self, what: str, instead: str) -> None:
        self.failures = 0
        self.reason = ""  # of the last failure, in a sentence
        self._what, self._instead = what, instead
        self._pause = 0  # requests that the last failure cost
        self._left = 0  # of them still to come
        self._logged: set[type[Exception]] = set()

    @property
    def failing(self) -> bool:
        """Whether it has failed and not worked since."""
        return self._pause > 0

    @property
    def paused(self) -> bool:
        """Whether it is left out now."""
        return self._left > 0

    def begin(self) -> bool:
        """Counts a request that begins; whether it is tried in this one."""
        tried = self._left <= 0
        self._left = max(0, self._left - 1)
        return tried

    def resume(self) -> None:
        """Ends the pause; the next one, if it fails again, is still the longer one."""
        self._left = 0

    def worked(self) -> bool:
        """It did what it is for: the next pause is a short one again. Whether it was failing before."""
        failing, self._pause = self.failing, 0
        return failing

    def attempt(self, after: Callable[[], None] | None = None) -> Attempt:
        """A `with` block that an `Exception` leaves without going further; KeyboardInterrupt and SystemExit do.

        Args:
            after: called after a failure.
        """
        return Attempt(self, after)

    def failed(self, error: Exception, callers: BaseException | None = None) -> None:
        """Counts a failure, tells it in the log once for each type of error, and lets go of what the error holds.

        The log and `reason` say what was raised and where, not its text, which may quote a prompt; nor does the log show what was
        being handled before.

        Args:
            callers: an exception that was being handled before, which is left as it is.
        """
        self.failures += 1
        self._pause = min(2 * self._pause or FIRST_PAUSE, LONGEST_PAUSE)
        self._left = self._pause
        self.reason = (
            f"{self._what} failed ({kind_and_place(error)}), {self.failures} so far: {self._instead}, and it is "
            f"tried again after {self._pause} more requests"
        )
        if type(error) not in self._logged:
            self._logged.add(type(error))
            frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
            logger.warning("%s. Told once for each type of error.\n%s", self.reason, frames)
        _release(error, callers)


class Attempt:
    """See `Backoff.attempt`."""

    def __init__(self, backoff: Backoff, after: Callable[[], None] | None) -> None:
        self._backoff, self._after = backoff, after
        self._callers: BaseException | None = None  # being handled when the block was entered

    def __enter__(self) -> None:
        self._callers = sys.exc_info()[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._backoff.failed(error, self._callers)
        if self._after is not None:
            self._after()
        return True


class Failures:
    """All that may fail beside decoding, of one draft."""

    def __init__(self) -> None:
        self.preparing = Backoff("Preparing the draft model for a request", "the target goes on without it")
        self.proposing = Backoff("Deciding who drafts", "the target goes on alone")
        self.drafting = Backoff("Drafting", "the target goes on without the draft model")
        self.learning = Backoff("Learning", "the draft stays as it is")
        self.memory = Backoff("The suffix memory", "drafting goes on without it")
        self.records = Backoff("A counter, a name or a checkpoint", "the answer does not need it")


def kind_and_place(error: BaseException) -> str:
    """What was raised and where, such as "OutOfMemoryError in learner.py:184", without its text.

    The place is the innermost line of this package; of an error from elsewhere it is where that was raised. What the operating
    system says ("No space left on device") quotes nothing, and is kept.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    place = (own or frames)[-1:]
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        kind += f": {os.strerror(error.errno)}"
    return "".join([kind, *(f" in {Path(frame.filename).name}:{frame.lineno}" for frame in place)])


def _release(error: BaseException, callers: BaseException | None) -> None:
    """Frees the tensors that the frames of an error keep alive: after running out of memory they are what is missing.

    Args:
        callers: what the caller of `generate` was handling already, whose frames are not ours.
    """
    link: BaseException | None = error
    seen = {id(callers)}
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__context__
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of an accelerator did not suffice."""
    # torch reports the CPU's as a plain RuntimeError: "[enforce fail …] DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
