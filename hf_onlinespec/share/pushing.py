"""A draft is pushed: audited where the push is public, and again from time to time where checkpoints are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from ..errors import PrivacyError
from ..runtime.forks import Lock
from .artifact import Artifact
from .audited import Audited
from .checkpoints import Checkpoints
from .hub import Push, SharedAdapter, Snapshot
from .privacy import check_privacy

LAST_WAIT_S = 5.0  # for a push that is under way when the draft goes, or the process ends


class PushedAdapter(Audited, SharedAdapter, Protocol):
    """An adapter, as far as it is audited and pushed."""


class PushedNames(Protocol):
    """The adapters of a draft that have names."""

    def __iter__(self) -> Iterator[str]: ...
    def using(self, name: str) -> AbstractContextManager[PushedAdapter]: ...


class Pushed(PushedAdapter, Protocol):
    """A draft, as far as it is audited and pushed: see `Shared`."""

    pushes: Lock
    checkpoints: Checkpoints | None

    @property
    def version(self) -> tuple[int, int]: ...
    @property
    def adapters(self) -> PushedNames: ...


def push(draft: Pushed, options: Push, checkpoint_every: int | None = None) -> str:
    """Pushes a draft in one commit, and returns the commit's hash, see `OnlineDraft.push_to_hub`.

    Args:
        checkpoint_every: requests between further pushes in the background; None: checkpoints that are on go on.

    Raises:
        ConfigError: an option is not well-formed.
        HubError: not pushed; the draft is as it was.
        PrivacyError: a public push without a statement, or one that would show what was in users' text.
    """
    options.check(checkpoint_every)
    has, named = list(draft.adapters), dict[str, Artifact]()
    names = options.names(has)
    options = options.with_user()
    audits = not options.private and not options.skip_audit
    own = _judged(draft, None, audits)
    for name in names:
        with draft.adapters.using(name) as adapter:
            named[name] = _judged(adapter, name, audits)
    commit = options.send(draft, Snapshot(own, named, frozenset(has)))
    if checkpoint_every is not None:
        if draft.checkpoints is not None:
            draft.checkpoints.close()
        again = replace(options, message=None, tag=None, force=False)
        draft.checkpoints = Checkpoints(draft, again, checkpoint_every)
        weakref.finalize(draft, draft.checkpoints.close, LAST_WAIT_S)  # at the end of the process too
    return commit


def check_adapter(adapter: Audited, name: str | None) -> None:
    """Judges one of a draft's adapters before a public push; name: None: it has none. Raises PrivacyError."""
    try:
        check_privacy(adapter)
    except PrivacyError as error:
        if name is None:
            raise
        raise PrivacyError(
            f"The adapter {name!r}: {error} To push the others, leave it out (selected_adapters=), or remove its folder."
        ) from error


def _judged(adapter: PushedAdapter, name: str | None, audits: bool) -> Artifact:
    """An adapter as it is now, after the audit. Raises PrivacyError."""
    with adapter.learning.steps_lock:  # whatever is sent, the audit has seen
        if audits:
            check_adapter(adapter, name)
        return adapter.artifact()
