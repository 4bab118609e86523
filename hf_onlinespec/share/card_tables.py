"""What a model card says of a draft's learning and measuring: rows and tables."""

from __future__ import annotations

import json
import re

from ..config import ENSEMBLE, OnlineSpecConfig
from .folder import ADAPTER_CONFIG, CURVE
from .history import Figures, ServingHistory
from .provenance import Provenance
from .public import WITHHELD

LONGEST = 200  # characters of a name
MOST_LAYERS = 12  # that are named
NO_REQUEST = "It has served no request yet: there are no figures."
NO_NAME = "a model without a name"


def learner_text(settings: OnlineSpecConfig) -> str:
    many = f" of {settings.experts} × {settings.expert_learner}" if settings.learner == ENSEMBLE else ""
    layers = "every linear layer, the embedding and the head"
    if settings.target_modules is not None and len(settings.target_modules) > MOST_LAYERS:
        layers = f"{len(settings.target_modules):,} layers, named in {ADAPTER_CONFIG}"
    elif settings.target_modules is not None:
        layers = ", ".join(map(code_span, settings.target_modules))
    return (
        f"{settings.learner}{many}, step size {settings.lr}; loss {settings.loss}; LoRA of rank {settings.rank}, "
        f"alpha {settings.alpha}, on {layers}"
    )


def schedule_text(settings: OnlineSpecConfig) -> str:
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


def served_text(serving: ServingHistory) -> str:
    if not serving.requests:
        return "nothing yet"
    return (
        f"{serving.requests:,} requests with {serving.new_tokens:,} new tokens, which the target verified in {serving.rounds:,} "
        f"forwards; it learned at once from {serving.learned_tokens:,} of these, from others by the replay at most"
    )


def steps_text(serving: ServingHistory) -> str:
    steps = f"{serving.updates:,} while generating, those on remembered requests included"
    if serving.idle_updates:
        steps += (
            f"; {serving.idle_updates:,} in {serving.idle_time_s:.0f} s between calls, which no speed below includes"
        )
    if serving.rollbacks:
        steps += f"; {serving.rollbacks:,} times an earlier state of the adapter took over"
    return steps


def machine_text(machine: Provenance) -> str:
    if machine.cpu == WITHHELD:
        return WITHHELD
    gpu = "" if machine.gpu is None else f", {machine.gpu}"
    return plain_text(f"{machine.cpu}, cores: {machine.cores}, threads of torch: {machine.threads}{gpu}")


def measured_text(serving: ServingHistory, settings: OnlineSpecConfig, curve: bool) -> str:
    if serving.total is None:
        return NO_REQUEST
    rows = [
        "| on what it served | requests | acceptance length | acceptance rate | net tokens/s | decode-only tokens/s | update share |",
        "|---|---|---|---|---|---|---|",
    ]
    compared = serving.before_and_after
    if compared is not None:
        before, after = compared
        rows += [_row("before: the first tenth of the requests", before), _row("after: the last tenth", after)]
    rows.append(_row("all", serving.total))
    words = (
        "Acceptance length: tokens per target forward (1 without a draft). Acceptance rate: mean probability that a drafted token which "
        "was verified is kept. Net tokens/s: learning time included; decode-only: left out. Update share: learning time over all time. "
        "Speeds are those of the machine above, where the draft was saved, beside whatever else it did; what a resumed draft did "
        "elsewhere before is in them too."
    )
    if compared is not None:
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


def _row(name: str, figures: Figures) -> str:
    return (
        f"| {name} | {figures.requests:,} | {figures.acceptance_length:.2f} | {figures.acceptance_rate:.2f} "
        f"| {figures.tokens_per_s:.1f} | {figures.decode_tokens_per_s:.1f} | {figures.update_share:.1%} |"
    )


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def plain_text(text: str) -> str:
    """Text that cannot break a line or a table; what is not seen is left out."""
    seen = "".join(c for c in text if c.isprintable() or c.isspace())
    plain = " ".join(seen.replace("`", "").replace("|", "/").split())
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}…"


def escaped(text: str) -> str:
    """Text as it is, in Markdown and HTML."""
    return re.sub(r"([\\`*\[\]<>&])", r"\\\1", text)


def quote(text: str) -> str:
    """A statement as a quotation: whoever made it, it can be taken for nothing that the card says itself."""
    lines = ("".join(c for c in line if c.isprintable()) for line in text.strip().splitlines())
    return "\n".join(f"> {escaped(line)}".rstrip() for line in lines)


def code_span(text: str) -> str:
    return f"`{plain_text(text)}`"


def named(name: str | None) -> str:
    return code_span(name) if name else NO_NAME
