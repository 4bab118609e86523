"""A draft is pushed to the Hub: one commit per push, over none that it does not go on from."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from .._compat.hub import HUB_FAILURES
from ..errors import ConfigError, HubError, OnlineSpecError, PrivacyError, brief, require_whole
from ..runtime.forks import Lock
from . import card
from .artifact import Artifact
from .folder import CONFIG, FILES, STATE, read_json
from .lineage import Lineage, Parent
from .public import public_version

TIMEOUT_S = 30.0  # of the first question to the Hub; the client's uploads have none
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,99}")  # as the Hub names licences

_log = logging.getLogger(__name__)


class Shared(Protocol):
    """A draft, as far as it is pushed."""

    lineage: Lineage
    pushes: Lock  # held for one push at a time

    @property
    def version(self) -> tuple[int, int]: ...  # another one whenever what is served has changed
    def artifact(self) -> Artifact: ...


@dataclass(frozen=True)
class Push:
    """Where a draft is pushed to, and how; the arguments of `OnlineDraft.push_to_hub`."""

    repo_id: str
    private: bool = True
    data_statement: str | None = None
    token: str | bool | None = None
    message: str | None = None
    tag: str | None = None
    force: bool = False  # also over a commit that the draft does not go on from
    skip_audit: bool = False  # of a public push
    with_state: bool | None = None  # whether what learning needs to go on is sent, too; None: only in a private push
    license: str | None = None  # of the adapter, as the Hub names it; None: what was stated before, if anything was
    revision: str | None = None  # the branch, made where it does not exist; None: main
    create_pr: bool = False  # as a pull request, in place of a commit

    def check(self, checkpoint_every: int | None) -> None:
        """Refuses what is not well-formed, before anything is sent. Raises ConfigError, PrivacyError."""
        repo_id = self.repo_id
        if not isinstance(repo_id, str) or repo_id.count("/") > 1 or not all(repo_id.split("/")):
            raise ConfigError(f'repo_id={repo_id!r}: expected "user/name", or "name" for a repository of your own.')
        if self.revision is not None and not (isinstance(self.revision, str) and self.revision):
            raise ConfigError(f"revision={brief(self.revision)}: expected the name of a branch, or None.")
        if self.create_pr and (self.revision not in (None, "main") or checkpoint_every is not None):
            raise ConfigError(
                "create_pr=True opens one pull request against main: leave out revision= and checkpoint_every=. "
                'A pull request that is open is pushed to with revision="refs/pr/N".'
            )
        if checkpoint_every is not None:
            require_whole("checkpoint_every", checkpoint_every, otherwise=", or None")
        if self.data_statement is not None and not isinstance(self.data_statement, str):
            raise ConfigError(f"data_statement={self.data_statement!r}: expected text, or None.")
        if self.license is not None and not (isinstance(self.license, str) and LICENSE.fullmatch(self.license)):
            raise ConfigError(
                f"license={brief(self.license)}: expected the Hub's name of a licence, such as 'apache-2.0' or 'other', or None."
            )
        if self.private:
            return
        if not (self.data_statement or "").strip():
            raise PrivacyError(
                "private=False: a draft that was trained on prompts is user data. Say in data_statement= what it was trained "
                "on and why it may be public, or push with private=True."
            )
        if self.with_state and not self.skip_audit:
            raise PrivacyError(
                "with_state=True and private=False: the audit judges the adapter as it serves, not its moments and earlier states. "
                "Leave it out, or pass skip_audit=True if nothing that it learned from is private."
            )
        if checkpoint_every is not None:
            raise PrivacyError(
                "checkpoint_every with private=False: every public push is audited, and what is learned later was not seen "
                "by the audit. Send checkpoints to a private repository."
            )

    def with_user(self) -> Push:
        """The same with the user's name in front of a repository's own, as transformers takes it. Raises HubError."""
        if "/" in self.repo_id:
            return self
        with hub_errors(self.repo_id):
            user = HfApi(token=self.token).whoami()["name"]
        return replace(self, repo_id=f"{user}/{self.repo_id}")

    def send(self, draft: Shared, artifact: Artifact | None = None) -> str:
        """Sends the draft, and returns the commit's hash; the draft goes on from that commit.

        Args:
            artifact: of the draft, taken before; None: the draft as it is now.

        Raises:
            HubError: not sent: no network, no rights, or another push came first.
            PrivacyError: the repository is public, and a private push was asked for.
        """
        with draft.pushes:
            artifact = draft.artifact() if artifact is None else artifact
            commit = self.commit(artifact, known_parent(draft.lineage, self.repo_id))
            # Only now: of a push that failed nothing is left.
            self.state_in(draft.lineage)
            if not self.create_pr:  # else it goes on from where it was, until somebody merges it
                draft.lineage.parent = Parent(self.repo_id, commit)
        self.create_tag(commit)
        return commit

    def state_in(self, lineage: Lineage) -> Lineage:
        """Writes what the push says about the draft into its lineage, and returns that."""
        lineage.data_statement = self.data_statement or lineage.data_statement
        lineage.license = self.license or lineage.license
        return lineage

    def create_tag(self, commit: str) -> None:
        """Gives a commit the tag. Raises HubError where it cannot be given; the commit stays."""
        if self.tag is None:
            return
        try:
            HfApi(token=self.token).create_tag(self.repo_id, tag=self.tag, revision=commit)
        except HUB_FAILURES as error:
            raise HubError(
                f"{self.repo_id}: pushed as {commit}, but not tagged {self.tag!r} ({error}). Take a tag that is not there yet."
            ) from error

    def commit(self, artifact: Artifact, parent: str | None) -> str:
        """Sends an artifact that goes on from a commit of the repository, or from none of it. Raises as `send`."""
        # The base by its public name: folders of this machine are nobody's business.
        options = replace(artifact.options, base_name=artifact.base.name)
        artifact = replace(artifact, options=options, lineage=self.state_in(replace(artifact.lineage)))
        if not (self.private if self.with_state is None else self.with_state):
            artifact = public_version(artifact)
        api, repo_id = HfApi(token=self.token), self.repo_id
        with hub_errors(repo_id), tempfile.TemporaryDirectory(prefix="onlinespec-") as folder:
            card.write(artifact, folder, repo_id)
            info = self._branch(api)
            there = {file.rfilename for file in info.siblings or []}
            holds = CONFIG in there
            overwrites = holds and not self.create_pr and not self.force
            if overwrites and info.sha != parent and not _is_own(api, repo_id, info.sha, artifact):
                raise HubError(
                    f"{repo_id} holds an evolved draft of commit {info.sha}, and this one goes on from "
                    f"{parent or 'none of its'}: another push came first. Load that one and combine the two, push to another "
                    "repository, or use force=True."
                )
            files = [Path(folder) / name for name in FILES if (Path(folder) / name).is_file()]
            stale = [CommitOperationDelete(STATE)] if STATE in there and not artifact.has_state else []
            commit = api.create_commit(
                repo_id,
                [*(CommitOperationAdd(file.name, file) for file in files), *stale],
                commit_message=self.message or f"Evolved draft after {artifact.serving.new_tokens} new tokens",
                parent_commit=info.sha,
                revision=self.revision,
                create_pr=self.create_pr,
            )
            if commit.pr_url is not None:
                _log.info("%s: opened as %s", repo_id, commit.pr_url)
        return str(commit.oid)

    def _branch(self, api: HfApi) -> ModelInfo:
        """What the Hub says of the branch to push to, which is made where it does not exist. Raises PrivacyError."""
        api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        info = api.model_info(self.repo_id, timeout=TIMEOUT_S)
        if self.private and not info.private:
            raise PrivacyError(
                f"{self.repo_id} is public. Push to a private repository, or with private=False and a data_statement."
            )
        if not self.private and info.private:
            raise PrivacyError(
                f"{self.repo_id} is there already, and private. Push to a new repository: whoever makes that one public shows all "
                "its earlier commits, which no audit has seen."
            )
        if self.revision is None or self.create_pr:
            return info
        if not self.revision.startswith("refs/pr/"):
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        return api.model_info(self.repo_id, revision=self.revision, timeout=TIMEOUT_S)


def known_parent(lineage: Lineage, repo_id: str) -> str | None:
    """The commit of a repository that a draft goes on from, if it does."""
    parent = lineage.parent
    return parent.revision if parent is not None and parent.source == repo_id else None


def _is_own(api: HfApi, repo_id: str, commit: str | None, artifact: Artifact) -> bool:
    """Whether a commit was made by this very draft: of a push whose answer was lost nobody knew."""
    there = read_json(Path(api.hf_hub_download(repo_id, CONFIG, revision=commit)))
    lineage = there.get("lineage")
    return isinstance(lineage, dict) and lineage.get("draft") == artifact.lineage.draft


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Raises what the client of the Hub raises as one HubError that says what to do."""
    try:
        yield
    except OnlineSpecError:
        raise
    except HUB_FAILURES as error:
        raise HubError(
            f"{repo_id}: not pushed ({type(error).__name__}: {error}). The live draft is as it was. Check the network, the "
            "name, and that the token may write (hf auth login)."
        ) from error
