"""A draft is pushed to the Hub: one commit per push, over none that it does not go on from."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from .._compat.hub import HUB_FAILURES
from ..config.adapters import is_name
from ..errors import ConfigError, HubError, OnlineSpecError, PrivacyError, brief, require_whole
from ..runtime.forks import Lock
from . import card
from .artifact import Artifact
from .folder import CONFIG, FILES, STATE, read_json
from .lineage import Lineage, Parent
from .named import NAMED, place_of
from .public import public_version

TIMEOUT_S = 30.0  # of the first question to the Hub; the client's uploads have none
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,99}")  # as the Hub names licences

_log = logging.getLogger(__name__)


class SharedAdapter(Protocol):
    """An adapter, as far as it is pushed."""

    lineage: Lineage

    def artifact(self) -> Artifact: ...


class SharedNames(Protocol):
    """The adapters of a draft that have names."""

    def __iter__(self) -> Iterator[str]: ...
    def using(self, name: str) -> AbstractContextManager[SharedAdapter]: ...


class Shared(SharedAdapter, Protocol):
    """A draft, as far as it is pushed."""

    pushes: Lock  # held for one push at a time

    @property
    def version(self) -> tuple[int, int]: ...  # another one whenever what is served has changed
    @property
    def adapters(self) -> SharedNames: ...


@dataclass(frozen=True)
class Snapshot:
    """What one commit has of a draft."""

    own: Artifact  # of the adapter without a name
    named: Mapping[str, Artifact] = field(default_factory=dict)  # of those with names that are sent
    names: frozenset[str] = frozenset()  # that the draft has: what lies there of others is removed

    @property
    def by_place(self) -> dict[str, Artifact]:
        """Every artifact by what its files begin with in the repository."""
        return {"": self.own} | {f"{NAMED}/{name}/": artifact for name, artifact in self.named.items()}


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
    selected_adapters: tuple[str, ...] | None = None  # with names, that are sent; None: all

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

    def names(self, has: Collection[str]) -> list[str]:
        """The names that are sent of those that a draft has. Raises ConfigError: it has not all of them."""
        unknown = sorted(set(self.selected_adapters or ()) - set(has))
        if unknown:
            raise ConfigError(
                f"selected_adapters={brief(unknown[0])}: this draft has no such adapter. There are: {', '.join(sorted(has)) or 'none'}."
            )
        return list(has if self.selected_adapters is None else dict.fromkeys(self.selected_adapters))

    def snapshot(self, draft: Shared) -> Snapshot:
        """What is sent of a draft, as it is now."""
        has, named = list(draft.adapters), dict[str, Artifact]()
        for name in self.names(has):
            with draft.adapters.using(name) as adapter:
                named[name] = adapter.artifact()
        return Snapshot(draft.artifact(), named, frozenset(has))

    def send(self, draft: Shared, snapshot: Snapshot | None = None) -> str:
        """Sends the draft, and returns the commit's hash; the draft goes on from that commit.

        Args:
            snapshot: of the draft, taken before; None: the draft as it is now.

        Raises:
            HubError: not sent: no network, no rights, or another push came first.
            PrivacyError: the repository is public, and a private push was asked for.
        """
        with draft.pushes:
            snapshot = self.snapshot(draft) if snapshot is None else snapshot
            commit = self.commit(snapshot, known_parent(draft.lineage, self.repo_id))
            # Only now: of a push that failed nothing is left.
            self.state_in(draft.lineage)
            for name in snapshot.named:
                with draft.adapters.using(name) as adapter:
                    self.state_in(adapter.lineage)
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

    def _sent(self, artifact: Artifact) -> Artifact:
        """An artifact as it is sent."""
        # The base by its public name: folders of this machine are nobody's business.
        options = replace(artifact.options, base_name=artifact.base.name)
        artifact = replace(artifact, options=options, lineage=self.state_in(replace(artifact.lineage)))
        with_state = self.private if self.with_state is None else self.with_state
        return artifact if with_state else public_version(artifact)

    def commit(self, snapshot: Snapshot, parent: str | None) -> str:
        """Sends what goes on from a commit of the repository, or from none of it. Raises as `send`."""
        named = {name: self._sent(artifact) for name, artifact in snapshot.named.items()}
        snapshot = replace(snapshot, own=self._sent(snapshot.own), named=named)
        artifact, api, repo_id = snapshot.own, HfApi(token=self.token), self.repo_id
        with hub_errors(repo_id), tempfile.TemporaryDirectory(prefix="onlinespec-") as temporary:
            folder = Path(temporary)
            card.write(artifact, folder, repo_id, named=named)
            for name, own in named.items():
                card.write(own, place_of(folder, name))
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
            files = [f"{place}{name}" for place in snapshot.by_place for name in FILES]
            commit = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, folder / name) for name in files if (folder / name).is_file()),
                    *(CommitOperationDelete(name) for name in _stale(there, snapshot)),
                ],
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


def _stale(there: Collection[str], snapshot: Snapshot) -> list[str]:
    """Files of a repository that are not what they say any more: states, and adapters that the draft has no more."""
    found = [f"{place}{STATE}" for place, artifact in snapshot.by_place.items() if not artifact.has_state]
    for file in there:
        folder, _, rest = file.partition("/")
        name = rest.partition("/")[0]
        if folder == NAMED and is_name(name) and name not in snapshot.names and file == f"{NAMED}/{name}/{CONFIG}":
            found += [f"{NAMED}/{name}/{own}" for own in FILES]
    return [name for name in found if name in there]


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
