"""The commands for evolved drafts: inspect, push, pull, merge."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from . import card
from .artifact import ADAPTER, STATE, Artifact
from .audit import audit, check_privacy
from .bench import loaded
from .canaries import written
from .combining import combine, distil, no_evolved_draft, read
from .config import OnlineSpecConfig
from .draft import OnlineDraft
from .errors import ArtifactError, ConfigError, OnlineSpecError
from .export import merge_and_export
from .feedback import Feedback
from .hub import Push, known_parent
from .loading import locate
from .run import is_told_apart
from .warm_start import read_corpus

REFUSED = 1  # exit code: the audit speaks against a public push
# What an error calls by the name of an argument in Python, and what it is here; by the name of the option in the parser.
OPTIONS = {
    "public": (("with private=True", "without --public"), ("private=False", "--public")),
    "data_statement": (("data_statement=", "--data-statement"), ("a data_statement", "a --data-statement")),
    "skip_audit": (("skip_audit=True", "--skip-audit"),),
    "force": (("force=True", "--force"),),
    "base": (("base_model=", "--base"),),
    "license": (("license=", "--license "),),
}


def add_commands(commands: Any) -> None:
    """Adds them to the parser's commands."""
    inspect = commands.add_parser("inspect", help="what an evolved draft is, and what it measured")
    inspect.add_argument("source", metavar="FOLDER_OR_REPO")
    inspect.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    inspect.set_defaults(run=_by_options(_inspect))

    push = commands.add_parser(
        "push",
        help="push a saved draft to the Hub",
        description="Sends a folder in one commit. Repositories are private unless --public is given, which needs a data "
        "statement and passes the privacy audit first.",
    )
    push.add_argument("folder", type=Path, metavar="FOLDER", help="what save_pretrained wrote")
    push.add_argument("repo", metavar="USER/NAME")
    push.add_argument("--public", action="store_true", help="make it public")
    push.add_argument("--data-statement", metavar="TEXT", help="what it was trained on, and why it may be public")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--tag", metavar="NAME", help="a name for this state")
    push.add_argument("--force", action="store_true", help="over another's commit")
    push.add_argument("--skip-audit", action="store_true", help="for text that is public anyway")
    push.add_argument("--with-state", action="store_true", help="also what learning needs to go on (private: always)")
    push.add_argument("--license", metavar="NAME", help="of the adapter, as the Hub names it")
    push.add_argument("--base", metavar="NAME_OR_PATH", help="the base draft, for the audit (default: its own)")
    push.set_defaults(run=_by_options(_push))

    pull = commands.add_parser("pull", help="download an evolved draft into a folder")
    pull.add_argument("repo", metavar="USER/NAME")
    pull.add_argument("folder", type=Path, metavar="FOLDER", help="a new one, or one with an earlier state")
    pull.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    pull.set_defaults(run=_by_options(_pull))

    merge = commands.add_parser(
        "merge",
        help="combine evolved drafts, distil them to a rank, or merge them into a plain model",
        description="Combines drafts of one base exactly: the rank of the result is the sum of theirs. --rank distils it, --export "
        "writes a plain causal language model for transformers, vLLM or SGLang instead of an adapter.",
    )
    merge.add_argument("sources", nargs="+", metavar="FOLDER_OR_REPO")
    merge.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    merge.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each draft (default: their mean)")
    merge.add_argument("--rank", type=int, metavar="R", help="distil to this rank")
    merge.add_argument("--base", metavar="NAME_OR_PATH", help="the base draft (default: the one they were made for)")
    merge.add_argument("--export", action="store_true", help="write a plain causal language model")
    merge.set_defaults(run=_by_options(_merge))

    audits = commands.add_parser(
        "audit",
        help="what an evolved draft gives away of the text it learned from",
        description="Plants canaries, secrets drawn at random, in a copy of the draft and probes how exposed they are; with texts it "
        "also compares the draft's own stream with text that it never saw. Exit code 1: a public push would be refused.",
    )
    audits.add_argument("source", metavar="FOLDER_OR_REPO")
    audits.add_argument("--canaries", type=int, default=8, metavar="N", help="how many (default: %(default)s)")
    audits.add_argument("--own", type=Path, metavar="FILE", help="texts of its stream: .txt, or .jsonl with text lines")
    audits.add_argument("--held-out", type=Path, metavar="FILE", help="texts of the same kind that it never saw")
    audits.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="for the texts (default: the base's)")
    audits.add_argument("--base", metavar="NAME_OR_PATH", help="the base draft (default: the one that it was made for)")
    audits.add_argument("--seed", type=int, default=0, help="chooses the canaries (default: %(default)s)")
    audits.set_defaults(run=_by_options(_audit))


def _by_options(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command whose errors name its options instead of Python's arguments."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except OnlineSpecError as error:
            raise type(error)(in_options(str(error), set(vars(arguments)))) from error

    return run


def in_options(message: str, known: set[str]) -> str:
    """A message in the words of the command line.

    Args:
        known: the options that the command has.
    """
    for name in sorted(known & set(OPTIONS)):
        for argument, option in OPTIONS[name]:
            message = message.replace(argument, option)
    return message


def _inspect(arguments: argparse.Namespace) -> int:
    origin = locate(arguments.source, arguments.revision)
    if origin.folder is None or not origin.evolved:
        raise no_evolved_draft(arguments.source)
    artifact = Artifact.read(origin.folder)
    default = OnlineSpecConfig().to_dict()
    changed = {k: v for k, v in artifact.settings.to_dict().items() if v != default[k]}
    run, total = artifact.run, artifact.run.get("total")
    print(f"base: {printable(str(artifact.base))}")
    print(f"learner: {artifact.settings.learner}; settings that are not the defaults: {changed or 'none'}")
    print(f"came from: {printable(_came_from(artifact))}")
    print(f"targets: {printable(', '.join(run['targets'])) or 'none yet'}")
    print(
        f"served: {run.get('requests', 0)} requests, {run.get('new_tokens', 0)} new tokens, {run.get('updates', 0)} updates"
    )
    if total:
        parts = {"all of it": total}
        if is_told_apart(run):
            parts |= {"first tenth": run["before"], "last tenth": run["after"]}
        for name, figures in parts.items():
            print(
                f"{name}: acceptance length {figures['acceptance_length']:.2f}, {figures['tokens_per_s']:.0f} tokens/s, "
                f"{figures['decode_tokens_per_s']:.0f} without learning"
            )
    sizes = {ADAPTER: artifact.adapter} | ({STATE: artifact.state.tensors} if artifact.has_state else {})
    print(", ".join(f"{name}: {sum(t.nbytes for t in found.values()):,} bytes" for name, found in sizes.items()))
    return 0


def printable(text: str) -> str:
    """Text from elsewhere, without what a terminal would take for a command."""
    return "".join(c for c in text if c.isprintable())


def _came_from(artifact: Artifact) -> str:
    parent = artifact.lineage.get("parent")
    if parent is not None:
        return str(parent["source"]) + ("" if parent["revision"] is None else f" at {parent['revision']}")
    return f"{len(artifact.lineage['merged'])} drafts, merged" if artifact.lineage.get("merged") else "a new adapter"


def _push(arguments: argparse.Namespace) -> int:
    options = Push(
        arguments.repo,
        private=not arguments.public,
        data_statement=arguments.data_statement,
        message=arguments.message,
        tag=arguments.tag,
        force=arguments.force,
        skip_audit=arguments.skip_audit,
        with_state=True if arguments.with_state else None,
        license=arguments.license,
    )
    options.check(None)
    artifact = Artifact.read(arguments.folder)
    if arguments.public and not arguments.skip_audit:
        check_privacy(OnlineDraft.from_pretrained(arguments.folder, base_model=arguments.base))
    commit = options.commit(artifact, known_parent(artifact.lineage, arguments.repo))
    print(f"Pushed: {arguments.repo} at {commit}")
    options.name_it(commit)
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    origin = locate(arguments.repo, arguments.revision)
    if origin.folder is None or not origin.evolved:
        raise no_evolved_draft(arguments.repo)
    artifact = Artifact.read(origin.folder)
    artifact = replace(artifact, lineage=artifact.lineage | origin.lineage() | {"draft": uuid.uuid4().hex})
    card.write(artifact, arguments.folder, arguments.repo)
    print(f"Written: {arguments.folder}, {arguments.repo} at {origin.revision}")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ArtifactError(f"--out {arguments.out}: not empty. Name a new folder.")
    artifacts = [read(source) for source in arguments.sources]
    if len(artifacts) == 1 and arguments.rank is None and arguments.weights is None and arguments.export:
        draft = OnlineDraft.from_pretrained(arguments.sources[0], base_model=arguments.base)
    elif len(artifacts) == 1 and arguments.rank is None and arguments.weights is None:
        raise ConfigError(
            f"One draft, {arguments.sources[0]}, and nothing to do with it: give another one, --rank or --export."
        )
    else:
        draft = combine(artifacts, arguments.base, arguments.weights)
    if arguments.rank is not None:
        draft, distilled = distil(draft.artifact(), arguments.rank, arguments.base)
        print(f"Distilled to rank {distilled.rank}: {distilled.error:.1%} of the change is left out.")
    if arguments.export:
        merge_and_export(draft, arguments.out)
    else:
        card.write(draft.artifact(), arguments.out)
    print(f"Written: {arguments.out}")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    if (arguments.own is None) != (arguments.held_out is None):
        raise ConfigError("Give --own and --held-out together: the one is compared with the other.")
    corpora = {
        name: read_corpus(path) for name, path in (("own", arguments.own), ("held_out", arguments.held_out)) if path
    }
    draft = OnlineDraft.from_pretrained(arguments.source, base_model=arguments.base)
    texts: dict[str, list[Feedback]] = {}
    if corpora:
        tokenizer = loaded(AutoTokenizer, "--tokenizer", arguments.tokenizer or str(draft.config._name_or_path))
        for name, parts in corpora.items():
            tokens = [tokenizer(text, return_tensors="pt").input_ids[0, : draft.positions] for p in parts for text in p]
            texts[name] = [written(one) for one in tokens if len(one) > 1]
    own, held_out = texts.get("own"), texts.get("held_out")
    report = audit(draft, arguments.canaries, own=own, held_out=held_out, seed=arguments.seed)
    print(report.text(), end="")
    return REFUSED if report.refusals() else 0
