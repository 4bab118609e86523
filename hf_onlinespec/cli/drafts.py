"""The commands for evolved drafts: inspect, push, pull, merge, audit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec

from transformers import PreTrainedModel

from .._compat.models import model_name
from ..adapt.feedback import Feedback
from ..config import OnlineSpecConfig
from ..draft import OnlineDraft
from ..errors import ArtifactError, ConfigError, OnlineSpecError
from ..heads.outline import HeadOutline
from ..metrics.summary import counted
from ..share import card
from ..share.artifact import Artifact, Outline
from ..share.canaries import as_feedback
from ..share.export import merge_and_export
from ..share.folder import ADAPTER, STATE
from ..share.heads import head_folder
from ..share.hub import Push, Snapshot, known_parent
from ..share.lineage import Lineage
from ..share.loading import locate
from ..share.manifest import Manifest
from ..share.named import named_folders, place_of, remove_others
from ..share.privacy import audit
from ..share.pushing import check_adapter
from ..training.combining import combine, distil, no_evolved_draft, read_evolved
from ..training.corpus import read_corpus
from .common import FOUND, check_own, check_seed, check_writable, quiet_libraries
from .loading import best_device, load_model, load_tokenizer

P = ParamSpec("P")

# What an error calls by the name of an argument in Python, and what it is here; by the name of the option in the parser.
OPTIONS = {
    "public": (("with private=True", "without --public"), ("private=False", "--public")),
    "data_statement": (("data_statement=", "--data-statement"), ("a data_statement", "a --data-statement")),
    "skip_audit": (("skip_audit=True", "--skip-audit"),),
    "force": (("force=True", "--force"),),
    "base": (("base_model=", "--base"),),
    "target": (("target=", "--target"),),
    "license": (("license=", "--license "),),
}

FORCED = ", or force=True if you know that they are alike"  # a way out that not every command has


def in_own_options(command: Callable[P, int]) -> Callable[P, int]:
    """A command whose errors name its options instead of Python's"""
    known = set(inspect.signature(command).parameters)

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        quiet_libraries(bars=True)
        try:
            return command(*args, **kwargs)
        except OnlineSpecError as error:
            raise type(error)(in_options(str(error), known)) from error

    return run


def in_options(message: str, known: set[str]) -> str:
    """A message in the words of the command line.

    Args:
        known: the options that the command has.
    """
    if "force" not in known:
        message = message.replace(FORCED, "")
    for name in sorted(known & set(OPTIONS)):
        for argument, option in OPTIONS[name]:
            message = message.replace(argument, option)
    return message


@in_own_options
def run_inspect(source: str, revision: str | None = None) -> int:
    """Prints what an evolved draft or a draft head is; of the former also what it measured."""
    origin = locate(source, revision)
    head = head_folder(source, revision) if origin.folder is None else None
    if head is not None:
        print("\n".join(_head_lines(HeadOutline.read(head))))
        return 0
    if origin.folder is None or not origin.evolved:
        raise no_evolved_draft(source)
    outline = Outline.read(origin.folder)
    settings, serving = outline.settings, outline.manifest.serving
    default = OnlineSpecConfig().to_dict()
    changed = {k: v for k, v in settings.to_dict().items() if v != default[k]}
    print(f"base: {printable(str(outline.manifest.base))}")
    facts, target = outline.manifest.head, outline.manifest.target
    if facts is not None:
        print(f"draft head: {facts.kind}, reads {facts.reads_text}; it proposes {facts.vocabulary_text}")
    if outline.manifest.early_exit is not None:
        print(f"early exit: the first {counted(outline.manifest.early_exit, 'layer')} of its base, which is its target")
    if target is not None:
        print(f"learned for the target: {printable(str(target))}")
    print(f"learner: {settings.learner}; settings that are not the defaults: {changed or 'none'}")
    print(f"came from: {printable(_came_from(outline.manifest.lineage))}")
    print(f"targets: {printable(', '.join(serving.targets)) or 'none yet'}")
    print(f"served: {serving.requests} requests, {serving.new_tokens} new tokens, {serving.updates} updates")
    if serving.total is not None:
        parts = {"all of it": serving.total}
        if serving.before_and_after is not None:
            parts |= dict(zip(("first tenth", "last tenth"), serving.before_and_after, strict=True))
        for name, figures in parts.items():
            print(
                f"{name}: acceptance length {figures.acceptance_length:.2f}, {figures.tokens_per_s:.0f} tokens/s, "
                f"{figures.decode_tokens_per_s:.0f} without learning"
            )
    sizes = {ADAPTER: outline.adapter} | ({STATE: outline.state} if outline.state else {})
    print(", ".join(f"{name}: {sum(t.nbytes for t in found.values()):,} bytes" for name, found in sizes.items()))
    return 0


def _head_lines(head: HeadOutline) -> list[str]:
    """What is printed of a draft head that has learned nothing here."""
    if head.reads is None:
        reads = "hidden_states[2, L // 2, L - 3] of a target of L layers, as nothing is said"
    else:
        reads = "the last hidden state" if head.reads == (-1,) else f"hidden_states[{', '.join(map(str, head.reads))}]"
    of = "" if head.vocabulary is None else f" of the target's {head.vocabulary:,}"
    own = "all tokens of the target" if head.draft_vocabulary is None else f"{head.draft_vocabulary:,}{of} tokens"
    return [
        f"draft head: {head.kind}, in the form {head.form!r}",
        f"reads: {reads}",
        f"proposes: {own}",
        f"size: {head.parameters:,} parameters, {head.nbytes:,} bytes",
        "It drafts for the target that it was trained for: --draft of chat, serve and try.",
    ]


def _target_of(manifest: Manifest | Artifact, named: str | None) -> PreTrainedModel | None:
    """The target that a draft head needs, as `--target` or the draft names it; None: the draft is no head. Raises ConfigError."""
    if manifest.early_exit is not None:  # its base is the target
        return None if named is None else load_model("--target", named, device=best_device())
    if manifest.head is None:
        if named is not None:
            raise ConfigError(f"--target {named}: the draft is a whole model, and needs none. Leave it out.")
        return None
    name = named or (manifest.target.name if manifest.target is not None else "")
    if not name:
        raise ConfigError(
            "The draft is a draft head, and does not say for which target: name it, --target NAME_OR_PATH."
        )
    return load_model("--target", name, device=best_device())


def printable(text: str) -> str:
    """Text from elsewhere, without what a terminal would take for a command."""
    return "".join(c for c in text if c.isprintable())


def _came_from(lineage: Lineage) -> str:
    parent = lineage.parent
    if parent is not None:
        return parent.source + ("" if parent.revision is None else f" at {parent.revision}")
    return f"{len(lineage.merged)} drafts, merged" if lineage.merged else "a new adapter"


@in_own_options
def run_push(
    folder: Path,
    repo: str,
    public: bool,
    data_statement: str | None,
    message: str | None,
    tag: str | None,
    force: bool,
    skip_audit: bool,
    with_state: bool,
    license: str | None,
    base: str | None,
    target: str | None = None,
) -> int:
    """Pushes a saved draft to the Hub."""
    options = Push(
        repo,
        private=not public,
        data_statement=data_statement,
        message=message,
        tag=tag,
        force=force,
        skip_audit=skip_audit,
        with_state=True if with_state else None,
        license=license,
    )
    options.check(None)
    options = options.with_user()
    artifact = Artifact.read(folder)
    named = {name: Artifact.read(place) for name, place in named_folders(folder).items()}
    if public and not skip_audit:
        draft = OnlineDraft.from_pretrained(folder, base_model=base, target=_target_of(artifact, target))
        check_adapter(draft, None)
        for name in named:
            with draft.adapters.using(name) as adapter:
                check_adapter(adapter, name)
    snapshot = Snapshot(artifact, named, frozenset(named))
    commit = options.commit(snapshot, known_parent(artifact.lineage, options.repo_id))
    print(f"Pushed: {options.repo_id} at {commit}")
    options.create_tag(commit)
    return 0


@in_own_options
def run_pull(repo: str, folder: Path, revision: str | None) -> int:
    """Downloads an evolved draft into a folder."""
    check_writable(folder, str(folder))
    if folder.is_dir():
        check_own(folder, str(folder))
    origin = locate(repo, revision)
    if origin.folder is None or not origin.evolved:
        raise no_evolved_draft(repo)

    def pulled(place: Path) -> Artifact:
        artifact = Artifact.read(place)
        return replace(artifact, lineage=replace(artifact.lineage, draft=Lineage.new().draft, parent=origin.parent))

    named = {name: pulled(place) for name, place in named_folders(origin.folder).items()}
    card.write(pulled(origin.folder), folder, repo, named=named)
    for name, artifact in named.items():
        card.write(artifact, place_of(folder, name))
    remove_others(folder, named)
    print(f"Written: {folder}, {repo}{'' if origin.revision is None else f' at {origin.revision}'}")
    return 0


@in_own_options
def run_merge(
    sources: Sequence[str],
    out: Path,
    weights: Sequence[float] | None,
    rank: int | None,
    base: str | None,
    export: bool,
    form: str | None = None,
    target: str | None = None,
) -> int:
    """Combines, distils or exports evolved drafts."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"--out {out}: not empty. Name a new folder.")
    check_writable(out, f"--out {out}")
    artifacts = [read_evolved(source) for source in sources]
    alone = len(artifacts) == 1 and rank is None and weights is None
    if alone and not export:
        raise ConfigError(f"One draft, {sources[0]}, and nothing to do with it: give another one, --rank or --export.")
    if form is not None and (not export or artifacts[0].head is None):
        raise ConfigError(f"--form {form}: it is that of a draft head that is exported. Leave it out, or add --export.")
    model = _target_of(artifacts[0], target)
    if alone:
        draft = OnlineDraft.from_pretrained(sources[0], base_model=base, target=model)
    else:
        draft = combine(artifacts, base, weights, target=model)
    if rank is not None:
        draft, distilled = distil(draft.artifact(), rank, base, target=model)
        print(f"Distilled to rank {distilled.rank}: {distilled.error:.1%} of the change is left out.")
    if export:
        merge_and_export(draft, out, form=form)
    else:
        card.write(draft.artifact(), out)
    print(f"Written: {out}")
    return 0


@in_own_options
def run_audit(
    source: str,
    canaries: int,
    own: Path | None,
    held_out: Path | None,
    tokenizer: str | None,
    base: str | None,
    seed: int,
    target: str | None = None,
) -> int:
    """Prints what an evolved draft gives away; the exit code says whether a public push would be refused."""
    check_seed(seed)
    if (own is None) != (held_out is None):
        raise ConfigError("Give --own and --held-out together: the one is compared with the other.")
    corpora = {name: read_corpus(path) for name, path in (("own", own), ("held_out", held_out)) if path}
    origin = locate(source)
    if origin.evolved:
        assert origin.folder is not None
        model = _target_of(Manifest.read(origin.folder), target)
    else:
        model = None
    draft = OnlineDraft.from_pretrained(source, base_model=base, target=model)
    texts: dict[str, list[Feedback]] = {}
    if corpora:
        of = draft.config if model is None else model.config
        tokenize = load_tokenizer("--tokenizer", tokenizer or model_name(of))
        for name, parts in corpora.items():
            tokens = [
                tokenize(text, return_tensors="pt").input_ids[0, : draft.trainable.positions]
                for p in parts
                for text in p
            ]
            texts[name] = [as_feedback(one, ids=draft.trainable.ids) for one in tokens if len(one) > 1]
    report = audit(draft, canaries, own=texts.get("own"), held_out=texts.get("held_out"), seed=seed)
    print(report.text(), end="")
    return FOUND if report.refusals() else 0
