"""What an evolved draft says about itself: the model card, made from its lineage, its settings and its serving history.

All numbers come from there: `model_cards/` has the record's schema, the card's template, and an example of both. The card
holds no text of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCardData

from ..metrics.summary import counted
from ..models.identity import EMBEDDED_TARGET, BaseFingerprint, is_own_name
from .artifact import Artifact
from .card_tables import (
    NO_NAME,
    code_span,
    escaped,
    learner_text,
    machine_text,
    measured_text,
    named,
    plain_text,
    quote,
    quoted,
    schedule_text,
    served_text,
    steps_text,
)
from .curve import curve
from .head_facts import HeadFacts
from .history import ServingHistory
from .lineage import Lineage
from .named import NAMED
from .public import is_repo_id

TEMPLATE = Path(__file__).with_name("card_template.md")  # the same as model_cards/template.md, which is not installed
TAGS = ["hf_onlinespec", "speculative-decoding", "assisted-generation", "online-learning", "lora"]
PACKAGES = ("hf_onlinespec", "torch", "transformers", "peft")
SERVED = "the prompts that it served"
NO_STATE = " Neither is what the learner needs to go on: a draft that is loaded again begins to learn anew, from the adapter that lies here."
NO_STATEMENT = "Its users said nothing about the text that it was trained on. Take it for private."
YOUR_BASE, YOUR_TARGET = "NAME_OR_FOLDER_OF_ITS_BASE", "NAME_OR_FOLDER_OF_ITS_TARGET"  # for the reader to fill in

EMBEDDED_USAGE = """\
from hf_onlinespec import OnlineDraft
from hf_onlinespec.embedded import load_pair

pair = load_pair()
draft = OnlineDraft.from_pretrained({draft})
out = pair.target.generate(**pair.tokenizer("A prompt", return_tensors="pt"), max_new_tokens=64, assistant_model=draft)"""
USAGE = """\
from hf_onlinespec import OnlineDraft
from transformers import {auto}, AutoTokenizer

target, tokenizer = {auto}.from_pretrained({target}), AutoTokenizer.from_pretrained({target})
draft = OnlineDraft.from_pretrained({draft})
out = target.generate(**tokenizer("A prompt", return_tensors="pt"), max_new_tokens=64, assistant_model=draft)"""

# What is said of a draft model, and of a draft head.
ELSEWHERE = """\
With other libraries it is an ordinary PEFT adapter that
drafts and does not learn. Where the base ties its embedding to its head and both are adapted, PEFT warns about it when it loads the
adapter; it drafts correctly, but `merge_and_unload` gives wrong weights unless the two are untied first. `OnlineDraft.merge_and_export`
does that."""
HEAD_ELSEWHERE = """\
`draft.merge_and_export(FOLDER)` writes
the head with what it learned as an ordinary head folder, in the form that the head was read in."""
EAGLE3_ELSEWHERE = """ `form="eagle3"` is what vLLM and SGLang load,
`form="speculators"` what vLLM loads."""
OTHERS = """\
It was trained for the target and for prompts like those that it served. With another target, or prompts of another kind, it may draft
  worse than its base; it needs the target's tokenizer."""
HEAD_OTHERS = """\
It reads hidden states of its target, and was trained for this one and for prompts like those that it served. With prompts of another
  kind, or a copy of the target with other weights, it may draft worse than the head that it began with; another target is refused."""

EXIT_ELSEWHERE = """\
`draft.merge_and_export(FOLDER)` writes
these layers with what they learned as a causal language model of their own, a draft for other libraries. On the whole target the adapter
would change what the target says: it is not for that."""
EXIT_OTHERS = """\
It is made of its target's own layers, and was trained for prompts like those that it served. With prompts of another kind it may draft
  worse than these layers did before; another target is refused."""


def write(
    artifact: Artifact,
    folder: str | Path,
    repo_id: str | None = None,
    data_statement: str | None = None,
    draw: bool = True,
    named: Mapping[str, Artifact] | None = None,
) -> None:
    """Writes an artifact with its card, and with its curve where matplotlib is installed.

    Args:
        draw: whether the curve is wanted: it takes longer than everything else.
        repo_id, data_statement, named: as in `model_card`.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    png = curve(artifact.serving) if draw else None
    text = model_card(artifact, repo_id, data_statement, png is not None, artifact.has_state, named)
    artifact.write(folder, text, png)


def model_card(
    artifact: Artifact,
    repo_id: str | None = None,
    data_statement: str | None = None,
    curve: bool = True,
    state: bool = True,
    named: Mapping[str, Artifact] | None = None,
) -> str:
    """The model card of an evolved draft: a README.md with its metadata, every number from its serving history.

    Args:
        repo_id: where it will be on the Hub; None: in a folder.
        data_statement: what its users say about what it was trained on; None: what its lineage says that they said.
        curve: whether the figure lies beside the card.
        state: whether what learning needs to go on does.
        named: the adapters with names that lie beside it, each with a card of its own.
    """
    serving, settings, base = artifact.serving, artifact.settings, artifact.base
    title = f"Evolved draft of {plain_text(base.name) or 'a model'}" if repo_id is None else repo_id.rpartition("/")[2]
    license, machine = artifact.lineage.license, serving.machine.to_dict()
    usage_note, usage = _usage(artifact, repo_id)
    head = artifact.head
    of_layers = None if artifact.early_exit is None else f"target's first {counted(artifact.early_exit, 'layer')}"
    base_name = of_layers or ("base draft" if head is None else "draft head")
    what, begun_on = (
        ("A draft model", "its base draft")
        if head is None
        else (f"A draft head ({head.kind})", "the head that it began with")
    )
    elsewhere, others = (ELSEWHERE, OTHERS) if head is None else (_head_elsewhere(head), HEAD_OTHERS)
    if of_layers is not None:
        what, begun_on, elsewhere, others = "An early exit", f"its {of_layers}", EXIT_ELSEWHERE, EXIT_OTHERS
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=_metadata(serving, base, title, license).to_yaml(),
        title=escaped(title),
        what=what,
        begun_on=begun_on,
        base_name=base_name,
        base=_base(base),
        more_rows=("" if head is None else _head_rows(head)) + _named_rows(named or {}),
        targets=_targets(artifact),
        lineage=_lineage(artifact.lineage, base_name),
        learner=learner_text(settings),
        schedule=schedule_text(settings),
        served=served_text(serving),
        steps=steps_text(serving),
        machine=escaped(machine_text(serving.machine)),
        versions=escaped(plain_text(", ".join(f"{name} {machine[name]}" for name in PACKAGES))),
        measured=measured_text(serving, settings, curve),
        data=_data(artifact.lineage, data_statement),
        state="" if state else NO_STATE,
        license=f"The licence of the adapter is {code_span(license)}."
        if license
        else "No licence of the adapter is stated.",
        usage_note=usage_note,
        usage=usage,
        elsewhere=elsewhere,
        others=others,
    )


def _head_rows(head: HeadFacts) -> str:
    return f"| kind | {head.kind} |\n| reads | {head.reads_text} |\n| draft vocabulary | {head.vocabulary_text} |\n"


def _named_rows(adapters: Mapping[str, Artifact]) -> str:
    """A row for every adapter with a name: what it served, from how much it learned, and where its own card is."""
    rows = []
    for name, artifact in sorted(adapters.items()):
        privacy = artifact.lineage.privacy
        learned = "from texts that nobody counted" if privacy is None else f"from {counted(privacy.texts, 'text')}"
        place = f"{NAMED}/{name}"
        rows.append(
            f"| adapter {code_span(name)} | {served_text(artifact.serving)}; learned {learned}; in [{place}]({place}/README.md) |\n"
        )
    return "".join(rows)


def _head_elsewhere(head: HeadFacts) -> str:
    return HEAD_ELSEWHERE + (EAGLE3_ELSEWHERE if head.kind == "EAGLE-3" else "")


def _targets(artifact: Artifact) -> str:
    """What it drafted for; of the target that a head has learned for, how it is told from others."""
    names, target = list(artifact.serving.targets), artifact.target
    if target is None:
        return ", ".join(map(code_span, names)) or NO_NAME
    others = [code_span(name) for name in names if name != target.name]
    return ", ".join([_base(target), *others])


def _metadata(serving: ServingHistory, base: BaseFingerprint, title: str, license: str | None) -> ModelCardData:
    """What the Hub reads."""
    results = None
    if serving.total is not None:
        figures, which = serving.total, "all requests"
        if serving.before_and_after is not None:
            figures, which = serving.before_and_after[1], "last tenth of the requests"
        about = {"requests": figures.requests, "machine": machine_text(serving.machine)}
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="served-prompts",
                dataset_name=SERVED,
                metric_type=name,
                metric_name=f"{words}, {which}",
                metric_value=round(value, 2),
                metric_args=about,
            )
            for name, value, words in (
                ("acceptance_length", figures.acceptance_length, "acceptance length (tokens per target forward)"),
                ("tokens_per_s", figures.tokens_per_s, "net tokens/s (learning included)"),
            )
        ]
    return ModelCardData(
        base_model=base.name if _is_on_hub(base) else None,
        library_name="peft",
        license=license,
        pipeline_tag="text-generation",
        tags=list(TAGS),
        model_name=title,
        eval_results=results,
    )


def _is_on_hub(base: BaseFingerprint) -> bool:
    """Only a base with a commit is known to be there: others are names of folders."""
    return base.revision is not None and is_repo_id(base.name)


def _base(base: BaseFingerprint) -> str:
    revision = "" if base.revision is None else f" at {code_span(base.revision)}"
    return f"{named(base.name)}{revision}; fingerprints: weights {code_span(base.weights)}, configuration {code_span(base.config)}"


def _lineage(lineage: Lineage, base_name: str) -> str:
    """Where it came from, those that were merged into it with their own.

    Args:
        base_name: what its base is called.
    """
    steps = []
    if lineage.parent is not None:
        revision = "" if lineage.parent.revision is None else f" at {code_span(lineage.parent.revision)}"
        steps.append(f"goes on from {code_span(lineage.parent.source)}{revision}")
    if lineage.merged:
        parts = (f"[{_lineage(part, base_name)}] × {part.weight:.4g}" for part in lineage.merged)
        steps.append(f"merged: {' + '.join(parts)}")
    elif lineage.merged_left_out is not None:
        steps.append(f"merged from {lineage.merged_left_out:,} drafts, directly or not, which are left out here")
    steps = (steps or [f"begun on the {base_name}"]) + _trained(lineage)
    if lineage.distilled is not None:
        rank, error = lineage.distilled.rank, lineage.distilled.relative_error
        steps.append(f"distilled to rank {rank}, which left out {error:.1%} of the change")
    return "; ".join(steps)


def _trained(lineage: Lineage) -> list[str]:
    """What it was trained on beside what it served."""
    steps = []
    start, aligned = lineage.warm_start, lineage.alignment
    if start is not None:
        counts = {"texts": start.texts, "prompts": start.prompts}
        sources = " and ".join(f"{n:,} {kind}" for kind, n in counts.items() if n)
        steps.append(f"trained offline on {sources} ({start.tokens:,} tokens) for {named(start.target)}")
    if aligned is not None:
        steps.append(
            f"aligned with {named(aligned.target)} while that was fine-tuned, on {aligned.tokens:,} tokens of its training"
        )
    return steps


def _trained_in_all(lineage: Lineage) -> list[str]:
    """The same, with what those that were merged into it were trained on."""
    return _trained(lineage) + [step for part in lineage.merged for step in _trained_in_all(part)]


def _data(lineage: Lineage, statement: str | None) -> str:
    """What is known of the text that it was trained on."""
    if statement is None:
        statement = lineage.data_statement or ""
    text = quote(statement) if statement.strip() else NO_STATEMENT
    trained = _trained_in_all(lineage)
    if trained:
        text += f"\n\nIt was taught by other text than what it served, too: {'; '.join(trained)}."
    return text


def _usage(artifact: Artifact, repo_id: str | None) -> tuple[str, str]:
    """A sentence, and lines that run, once the names are filled in that only the reader knows."""
    base, targets = artifact.base, artifact.serving.targets
    source = quoted("." if repo_id is None else repo_id)
    target = targets[0] if targets else ""
    if artifact.target is not None:
        target = artifact.target.name
    if artifact.early_exit is not None:
        target = base.name
    unknown = []
    if artifact.early_exit is None and not is_own_name(base.name) and not _is_on_hub(base):
        source += f", base_model={quoted(YOUR_BASE)}"
        unknown.append(_to_fill_in(YOUR_BASE, base.name))
    lines = EMBEDDED_USAGE if target == EMBEDDED_TARGET else USAGE
    if artifact.head is not None or artifact.early_exit is not None:
        source += f", target={'pair.target' if target == EMBEDDED_TARGET else 'target'}"
    if target != EMBEDDED_TARGET and not ("/" in target and is_repo_id(target)):  # without "/": a folder's name, mostly
        unknown.append(_to_fill_in(YOUR_TARGET, target))
        target = YOUR_TARGET
    note = "In the folder of this card" if repo_id is None else "From the Hub, with a token where it is private"
    if unknown:
        note += f". First fill in what is not known to be on the Hub: {' and '.join(unknown)}"
    reads_source = artifact.options.other.get("task_type") == "SEQ_2_SEQ_LM"
    auto = "AutoModelForSeq2SeqLM" if reads_source else "AutoModelForCausalLM"
    return note + ":", lines.format(target=quoted(target), draft=source, auto=auto)


def _to_fill_in(place: str, name: str) -> str:
    return code_span(place) + (f" (here it was {code_span(name)})" if name else "")
