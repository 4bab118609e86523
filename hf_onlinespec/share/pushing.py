"""A draft is pushed: audited where the push is public, and again from time to time where checkpoints are asked for."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Protocol

from .audited import Audited
from .checkpoints import Checkpoints
from .hub import Push, Shared
from .privacy import check_privacy

LAST_WAIT_S = 5.0  # for a push that is under way when the draft goes, or the process ends


class Pushed(Audited, Shared, Protocol):
    """A draft, as far as it is audited and pushed."""

    checkpoints: Checkpoints | None


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
    options = options.with_user()
    with draft.learning.steps_lock:  # whatever is sent, the audit has seen
        if not options.private and not options.skip_audit:
            check_privacy(draft)
        artifact = draft.artifact()
    commit = options.send(draft, artifact)
    if checkpoint_every is not None:
        if draft.checkpoints is not None:
            draft.checkpoints.close()
        again = replace(options, message=None, tag=None, force=False)
        draft.checkpoints = Checkpoints(draft, again, checkpoint_every)
        weakref.finalize(draft, draft.checkpoints.close, LAST_WAIT_S)  # at the end of the process too
    return commit
