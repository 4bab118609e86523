"""What an evolved draft says about itself: the model card, made from its lineage, its settings and the record of its run.

All numbers come from there: `model_cards/` has the record's schema, the card's template, and an example of both. The card
holds no text of a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..config import ENSEMBLE, OnlineSpecConfig
from ..errors import ArtifactError
from ..models.identity import EMBEDDED, EMBEDDED_TARGET, Identity
from .artifact import ADAPTER_CONFIG, CONFIG, CURVE, Artifact
from .history import curve, is_told_apart
from .lineage import LEFT_OUT, check_lineage, check_run
from .public import NOT_TOLD, is_repo_id

TEMPLATE = Path(__file__).with_name("card_template.md")  # the same as model_cards/template.md, which is not installed
TAGS = ["hf_onlinespec", "speculative-decoding", "assisted-generation", "online-learning", "lora"]
PACKAGES = ("hf_onlinespec", "torch", "transformers", "peft")
SERVED = "the prompts that it served"
NO_STATE = " Neither is what the learner needs to go on: a draft that is loaded again begins to learn anew, from the adapter that lies here."
LONGEST = 200  # characters of a name
MOST_LAYERS = 12  # that are named
NO_STATEMENT = "Its users said nothing about the text that it was trained on. Take it for private."
NO_REQUEST = "It has served no request yet: there are no figures."
NO_NAME = "a model without a name"
YOUR_BASE, YOUR_TARGET = "NAME_OR_FOLDER_OF_ITS_BASE", "NAME_OR_FOLDER_OF_ITS_TARGET"  # for the reader to fill in

EMBEDDED_USAGE = """\
from hf_onlinespec import OnlineDraft
from hf_onlinespec.embedded import load_pair

pair = load_pair()
draft = OnlineDraft.from_pretrained({draft})
out = pair.target.generate(**pair.tokenizer("A prompt", return_tensors="pt"), max_new_tokens=64, assistant_model=draft)"""
USAGE = """\
from hf_onlinespec import OnlineDraft
from transformers import AutoModelForCausalLM, AutoTokenizer

target, tokenizer = AutoModelForCausalLM.from_pretrained({target}), AutoTokenizer.from_pretrained({target})
draft = OnlineDraft.from_pretrained({draft})
out = target.generate(**tokenizer("A prompt", return_tensors="pt"), max_new_tokens=64, assistant_model=draft)"""


def write(
    artifact: Artifact,
    folder: str | Path,
    repo_id: str | None = None,
    data_statement: str | None = None,
    draw: bool = True,
) -> None:
    """Writes an artifact with its card, and with its curve where matplotlib is installed.

    Args:
        draw: whether the curve is wanted: it takes longer than everything else.
        repo_id, data_statement: as in `model_card`.

    Raises:
        ArtifactError: the folder cannot be written, or the artifact's run or lineage is not of the form that a card tells.
    """
    try:
        check_run(artifact.run, CONFIG)
        check_lineage(artifact.lineage, CONFIG)
    except ArtifactError as error:
        raise ArtifactError(
            f"No card can be made of the draft's run and lineage ({error}). See model_cards/schema.json for what is expected."
        ) from error
    png = curve(artifact.run) if draw else None
    text = model_card(artifact, repo_id, data_statement, png is not None, artifact.has_state)
    artifact.write(folder, text, png)


def model_card(
    artifact: Artifact,
    repo_id: str | None = None,
    data_statement: str | None = None,
    curve: bool = True,
    state: bool = True,
) -> str:
    """The model card of an evolved draft: a README.md with its metadata, every number from the artifact's run.

    Args:
        repo_id: where it will be on the Hub; None: in a folder.
        data_statement: what its users say about what it was trained on; None: what its lineage says that they said.
        curve: whether the figure lies beside the card.
        state: whether what learning needs to go on does.
    """
    run, settings, base = artifact.run, artifact.settings, artifact.base
    title = f"Evolved draft of {_plain(base.name) or 'a model'}" if repo_id is None else repo_id.rpartition("/")[2]
    license = artifact.lineage.get("license")
    usage_note, usage = _usage(run["targets"], base, repo_id)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=_metadata(run, base, title, license).to_yaml(),
        title=_escaped(title),
        base=_base(base),
        targets=", ".join(map(_code, run["targets"])) or NO_NAME,
        lineage=_lineage(artifact.lineage),
        learner=_learner(settings),
        schedule=_schedule(settings),
        served=_served(run),
        steps=_steps(run),
        machine=_escaped(_machine(run["machine"])),
        versions=_escaped(_plain(", ".join(f"{name} {run['machine'][name]}" for name in PACKAGES))),
        measured=_measured(run, settings, curve),
        data=_data(artifact.lineage, data_statement),
        state="" if state else NO_STATE,
        license=f"The licence of the adapter is {_code(license)}."
        if license
        else "No licence of the adapter is stated.",
        usage_note=usage_note,
        usage=usage,
    )


def _metadata(run: Mapping[str, Any], base: Identity, title: str, license: str | None) -> ModelCardData:
    """What the Hub reads."""
    results = None
    if run["total"] is not None:
        apart = is_told_apart(run)
        figures, which = (run["after"], "last tenth of the requests") if apart else (run["total"], "all requests")
        about = {"requests": figures["requests"], "machine": _machine(run["machine"])}
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="served-prompts",
                dataset_name=SERVED,
                metric_type=name,
                metric_name=f"{words}, {which}",
                metric_value=round(figures[name], 2),
                metric_args=about,
            )
            for name, words in (
                ("acceptance_length", "acceptance length (tokens per target forward)"),
                ("tokens_per_s", "net tokens/s (learning included)"),
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


def _is_on_hub(base: Identity) -> bool:
    """Only a base with a commit is known to be there: others are names of folders."""
    return base.revision is not None and is_repo_id(base.name)


def _base(base: Identity) -> str:
    revision = "" if base.revision is None else f" at {_code(base.revision)}"
    return f"{_named(base.name)}{revision}; fingerprints: weights {_code(base.weights)}, configuration {_code(base.config)}"


def _lineage(lineage: Mapping[str, Any]) -> str:
    """Where it came from, those that were merged into it with their own."""
    told = []
    if lineage.get("parent") is not None:
        source, revision = lineage["parent"]["source"], lineage["parent"]["revision"]
        told.append(f"goes on from {_code(source)}" + ("" if revision is None else f" at {_code(revision)}"))
    if "merged" in lineage:
        parts = (f"[{_lineage(part)}] × {part['weight']:.4g}" for part in lineage["merged"])
        told.append(f"merged: {' + '.join(parts)}")
    elif LEFT_OUT in lineage:
        told.append(f"merged from {lineage[LEFT_OUT]:,} drafts, directly or not, which are left out here")
    told = (told or ["begun on the base draft"]) + _trained(lineage)
    if "distilled" in lineage:
        lower = lineage["distilled"]
        told.append(f"distilled to rank {lower['rank']}, which left out {lower['relative_error']:.1%} of the change")
    return "; ".join(told)


def _trained(lineage: Mapping[str, Any]) -> list[str]:
    """What it was trained on beside what it served."""
    told = []
    if "warm_start" in lineage:
        start = lineage["warm_start"]
        sources = " and ".join(f"{start[kind]:,} {kind}" for kind in ("texts", "prompts") if start[kind])
        told.append(f"trained offline on {sources} ({start['tokens']:,} tokens) for {_named(start['target'])}")
    if "alignment" in lineage:
        aligned = lineage["alignment"]
        told.append(
            f"aligned with {_named(aligned['target'])} while that was fine-tuned, on {aligned['tokens']:,} tokens of its training"
        )
    return told


def _trained_in_all(lineage: Mapping[str, Any]) -> list[str]:
    """The same, with what those that were merged into it were trained on."""
    return _trained(lineage) + [told for part in lineage.get("merged", []) for told in _trained_in_all(part)]


def _data(lineage: Mapping[str, Any], statement: str | None) -> str:
    if statement is None:
        statement = lineage.get("data_statement") or ""
    told = _quote(statement) if statement.strip() else NO_STATEMENT
    trained = _trained_in_all(lineage)
    if trained:
        told += f"\n\nIt was taught by other text than what it served, too: {'; '.join(trained)}."
    return told


def _learner(settings: OnlineSpecConfig) -> str:
    many = f" of {settings.experts} × {settings.expert_learner}" if settings.learner == ENSEMBLE else ""
    layers = "every linear layer, the embedding and the head"
    if settings.target_modules is not None and len(settings.target_modules) > MOST_LAYERS:
        layers = f"{len(settings.target_modules):,} layers, named in {ADAPTER_CONFIG}"
    elif settings.target_modules is not None:
        layers = ", ".join(map(_code, settings.target_modules))
    return (
        f"{settings.learner}{many}, step size {settings.lr}; loss {settings.loss}; LoRA of rank {settings.rank}, "
        f"alpha {settings.alpha}, on {layers}"
    )


def _schedule(settings: OnlineSpecConfig) -> str:
    auto = settings.update_every == "auto"
    when = f"once a request, or more often where it has over {settings.context_tokens} new tokens"
    if settings.update_when == "round":
        when = "after a round" if auto else f"every {settings.update_every} rounds"
    if auto and settings.update_when != "idle":  # what is learned when idle is free
        when += f", as far as it pays, at most {settings.update_budget:.0%} of the time"
    replay = "no replay"
    if settings.replay_tokens and settings.replay_passes:
        replay = f"up to {settings.replay_passes} steps on remembered requests after each request"
    return f"update_when={settings.update_when}: {when}; {replay}; lookahead {settings.lookahead}"


def _served(run: Mapping[str, Any]) -> str:
    if not run["requests"]:
        return "nothing yet"
    return (
        f"{run['requests']:,} requests with {run['new_tokens']:,} new tokens, which the target verified in {run['rounds']:,} "
        f"forwards; it learned at once from {run['learned_tokens']:,} of these, from others by the replay at most"
    )


def _steps(run: Mapping[str, Any]) -> str:
    steps = f"{run['updates']:,} while generating, those on remembered requests included"
    if run["idle_updates"]:
        steps += f"; {run['idle_updates']:,} in {run['idle_time_s']:.0f} s between calls, which no speed below includes"
    if run["rollbacks"]:
        steps += f"; {run['rollbacks']:,} times an earlier state of the adapter took over"
    return steps


def _machine(machine: Mapping[str, Any]) -> str:
    if machine["cpu"] == NOT_TOLD:
        return NOT_TOLD
    gpu = "" if machine["gpu"] is None else f", {machine['gpu']}"
    return _plain(f"{machine['cpu']}, cores: {machine['cores']}, threads of torch: {machine['threads']}{gpu}")


def _measured(run: Mapping[str, Any], settings: OnlineSpecConfig, curve: bool) -> str:
    total, before, after = run["total"], run["before"], run["after"]
    if total is None:
        return NO_REQUEST
    rows = [
        "| on what it served | requests | acceptance length | acceptance rate | net tokens/s | decode-only tokens/s | update share |",
        "|---|---|---|---|---|---|---|",
    ]
    apart = is_told_apart(run)
    if apart:
        rows += [_row("before: the first tenth of the requests", before), _row("after: the last tenth", after)]
    rows.append(_row("all", total))
    words = (
        "Acceptance length: tokens per target forward (1 without a draft). Acceptance rate: mean probability that a drafted token which "
        "was verified is kept. Net tokens/s: learning time included; decode-only: left out. Update share: learning time over all time. "
        "Speeds are those of the machine above, where the draft was saved, beside whatever else it did; what a resumed draft did "
        "elsewhere before is in them too."
    )
    if apart:
        words += (
            "\n\n“Before” and “after” are what was served first and last, in whole requests or equal groups of them: other prompts, "
            "perhaps of another kind, so that the difference is not learning's alone."
        )
    if settings.memory_tokens:
        words += (
            "\n\nWhat was drafted came from this draft or from a suffix memory of earlier text, whichever was expected to pay; the "
            "memory is not in these files."
        )
    figure = f"\n\n![acceptance length and net tokens/s over the requests served]({CURVE})" if curve else ""
    return "\n".join(rows) + "\n\n" + words + figure


def _row(name: str, figures: Mapping[str, float]) -> str:
    return (
        f"| {name} | {figures['requests']:,} | {figures['acceptance_length']:.2f} | {figures['acceptance_rate']:.2f} "
        f"| {figures['tokens_per_s']:.1f} | {figures['decode_tokens_per_s']:.1f} | {figures['update_share']:.1%} |"
    )


def _usage(targets: Sequence[str], base: Identity, repo_id: str | None) -> tuple[str, str]:
    """A sentence, and lines that run, once the names are filled in that only the reader knows."""
    source = _quoted("." if repo_id is None else repo_id)
    target = targets[0] if targets else ""
    unknown = []
    if base.name != EMBEDDED and not _is_on_hub(base):
        source += f", base_model={_quoted(YOUR_BASE)}"
        unknown.append(_to_fill_in(YOUR_BASE, base.name))
    lines = EMBEDDED_USAGE if target == EMBEDDED_TARGET else USAGE
    if target != EMBEDDED_TARGET and not ("/" in target and is_repo_id(target)):  # without "/": a folder's name, mostly
        unknown.append(_to_fill_in(YOUR_TARGET, target))
        target = YOUR_TARGET
    note = "In the folder of this card" if repo_id is None else "From the Hub, with a token where it is private"
    if unknown:
        note += f". First fill in what is not known to be on the Hub: {' and '.join(unknown)}"
    return note + ":", lines.format(target=_quoted(target), draft=source)


def _to_fill_in(place: str, name: str) -> str:
    return _code(place) + (f" (here it was {_code(name)})" if name else "")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text that cannot break a line or a table; what is not seen is left out."""
    seen = "".join(c for c in text if c.isprintable() or c.isspace())
    plain = " ".join(seen.replace("`", "").replace("|", "/").split())
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}…"


def _escaped(text: str) -> str:
    """Text as it is, in Markdown and HTML."""
    return re.sub(r"([\\`*\[\]<>&])", r"\\\1", text)


def _quote(text: str) -> str:
    """A statement as a quotation: whoever made it, it can be taken for nothing that the card says itself."""
    lines = ("".join(c for c in line if c.isprintable()) for line in text.strip().splitlines())
    return "\n".join(f"> {_escaped(line)}".rstrip() for line in lines)


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _named(name: str | None) -> str:
    return _code(name) if name else NO_NAME
