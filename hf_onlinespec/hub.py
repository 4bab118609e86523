"""The draft is shared: one commit per push, and checkpoints from a thread that no call of `generate` waits for."""

from __future__ import annotations

import logging
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from . import card
from .artifact import CONFIG, FILES, Artifact
from .errors import ConfigError, HubError, OnlineSpecError, PrivacyError

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0  # between two attempts of a checkpoint: doubled each time

_log = logging.getLogger(__name__)


def check_push(repo_id: str, private: bool, data_statement: str | None, checkpoint_every: int | None) -> None:
    """Refuses a push that is not well-formed, before anything is sent. Raises ConfigError, PrivacyError."""
    if not isinstance(repo_id, str) or repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ConfigError(f'repo_id={repo_id!r}: expected "user/name".')
    whole = isinstance(checkpoint_every, int) and not isinstance(checkpoint_every, bool)
    if checkpoint_every is not None and (not whole or checkpoint_every < 1):
        raise ConfigError(
            f"checkpoint_every={checkpoint_every!r}: expected a number of requests of at least 1, or None."
        )
    if private:
        return
    if not (data_statement or "").strip():
        raise PrivacyError(
            "private=False: a draft that was trained on prompts is user data. Say in data_statement= what it was trained on "
            "and why it may be public, or push with private=True."
        )
    if checkpoint_every is not None:
        raise PrivacyError(
            "checkpoint_every with private=False: every public push is audited, and what is learned later was not seen by "
            "the audit. Send checkpoints to a private repository."
        )


def push(
    artifact: Artifact,
    repo_id: str,
    *,
    private: bool = True,
    data_statement: str | None = None,
    parent: str | None = None,
    token: str | None = None,
    message: str | None = None,
    tag: str | None = None,
    force: bool = False,
) -> str:
    """Sends an artifact with its card in one commit, and returns the commit's hash.

    Args:
        parent: the commit that this state goes on from, if it is one of the repository.
        force: also over a commit that this state does not go on from.

    Raises:
        HubError: not sent: no network, no rights, or another push came first.
        PrivacyError: the repository is public, and a private push was asked for.
    """
    # The base by its public name: folders of this machine are nobody's business.
    shared = dict(artifact.adapter_config) | {"base_model_name_or_path": artifact.base.name}
    artifact = replace(artifact, adapter_config=shared)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="onlinespec-") as folder, told(repo_id):
        card.write(artifact, folder, repo_id, data_statement)
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise PrivacyError(
                f"{repo_id} is public. Push to a private repository, or with private=False and a data_statement."
            )
        holds = any(file.rfilename == CONFIG for file in info.siblings or [])
        if holds and not force and info.sha != parent:
            raise HubError(
                f"{repo_id} holds an evolved draft of commit {info.sha}, and this one goes on from {parent or 'none of its'}: "
                "another push came first. Load that one and combine the two, push to another repository, or use force=True."
            )
        files = [Path(folder) / name for name in FILES if (Path(folder) / name).is_file()]
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, file) for file in files],
            commit_message=message or f"Evolved draft after {artifact.run.get('new_tokens', 0)} new tokens",
            parent_commit=info.sha,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return str(commit.oid)


@contextmanager
def told(repo_id: str) -> Iterator[None]:
    """What the client of the Hub raises, as one error that says what to do."""
    try:
        yield
    except OnlineSpecError:
        raise
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise HubError(
            f"{repo_id}: not pushed ({type(error).__name__}: {error}). The live draft is as it was. Check the network, the "
            "name, and that the token may write (hf auth login)."
        ) from error


class Checkpoints:
    """Pushes again after every so many requests, from a thread; a push that fails is tried again with the state of then.

    Args:
        push: a bound method (kept weakly, so that its owner can go) that sends the state as it is when it is called.
        every: requests between two pushes. Those that come due during a push are one more.
    """

    def __init__(self, push: Callable[[], Any], every: int) -> None:
        self.pushed, self.failures = 0, 0
        self.error = ""  # of the last attempt, if it failed
        self._push, self._every = weakref.WeakMethod(push), every
        self._requests = 0  # since the last snapshot
        self._busy, self._closed = False, False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hf_onlinespec checkpoints", daemon=True)
        self._thread.start()

    def request_done(self) -> None:
        """Counts a finished request; never waits for a push."""
        with self._change:
            self._requests += 1
            self._change.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until what is due has been pushed; False: the time was too short."""
        with self._change:
            return self._change.wait_for(lambda: not self._busy and self._requests < self._every, timeout_s)

    def close(self) -> None:
        """Ends the thread, after the push that is under way; what was learned since is not pushed."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        wait_s = 0.0
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._requests >= self._every)
                if wait_s:
                    self._change.wait_for(lambda: self._closed, wait_s)
                if self._closed:
                    return
                self._busy, due, self._requests = True, self._requests, 0
            push = self._push()
            if push is None:
                return
            try:
                push()
                error = ""
            except OnlineSpecError as failure:
                error = str(failure)
                _log.warning("A checkpoint was not pushed and will be tried again: %s", error)
            del push
            with self._change:
                self._busy, self.error = False, error
                if error:
                    self.failures += 1
                    self._requests += due
                    wait_s = min(LONGEST_WAIT_S, 2 * wait_s or FIRST_WAIT_S)
                else:
                    self.pushed += 1
                    wait_s = 0.0
                self._change.notify_all()
