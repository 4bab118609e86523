"""A trial's result as one HTML file: it loads nothing from elsewhere, and holds no text of a prompt or an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape

from ..share.provenance import provenance
from .exactness import FAULT, IDENTICAL, ROUNDING
from .records import PLAIN, Record, by_arm
from .summary import KindSummary, Summary
from .tables import exactness_lines, learned_lines
from .trial import DRAFT, OURS, Learned, Outcome
from .verdict import Models

WINDOW = 5  # prompts in a running mean
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 48, 16, 10, 34  # of a chart, and its margins, in pixels

# Okabe and Ito's colours, told apart by colour-blind eyes too; plain stays in the background.
OTHER_COLOURS = ("#56b4e9", "#0072b2", "#cc79a7")
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --line: #ddd; --paper: #fff; --tint: #f4f5f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a0a0a0; --line: #3a3a3a; --paper: #161616; --tint: #222; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 800px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2.2rem; } p, li { max-width: 46rem; }
.verdict { font-size: 1.1rem; padding: .8rem 1rem; background: var(--tint); border-radius: 6px; }
.fault { border-left: 5px solid #d55e00; padding-left: .8rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
pre { background: var(--tint); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .grid { stroke: var(--line); } svg .ring { stroke: var(--paper); stroke-width: 1.5; }
.legend span { margin-right: 1.1rem; white-space: nowrap; } .legend i { display: inline-block; width: 1.1rem; height: .25rem; margin-right: .4rem; vertical-align: middle; }
"""


@dataclass(frozen=True)
class Report:
    """What is written with `--out`."""

    models: Models
    outcome: Outcome
    summary: Summary
    learned: Learned
    code: str

    def html(self) -> str:
        """The page."""
        records = self.outcome.records
        arms = by_arm(records)
        title = f"hf-onlinespec try: {self.models.target}"
        fault = " fault" if self.summary.faults else ""
        drafting = {arm: own for arm, own in arms.items() if arm != PLAIN}
        parts = [
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict{fault}">{escape(self.summary.verdict.text(self.outcome.prompt_s))}</p>',
            _paragraphs(self.outcome.notes),
            _table(*self._arms()),
            "<h2>Over the prompts</h2>",
            _legend(arms),
            _figure(_lines(arms, "wall_time_s"), f"Tokens/s, learning included: mean of the last {WINDOW} prompts."),
            _figure(
                _lines(drafting, "target_forwards"),
                f"Tokens per forward of the target: mean of the last {WINDOW} prompts. Plain generation has 1.",
            ),
            "<h2>By kind of prompt</h2>",
            _figure(_dots(self.summary.kinds), "Tokens/s of each way."),
            _table(*self._kinds()),
            "<h2>Are the answers plain generation's?</h2>",
            _paragraphs(exactness_lines(self.summary)),
            self._differences(),
            "<h2>What was learned</h2>",
            _paragraphs(learned_lines(self.summary, self.learned)),
            "<h2>To paste into your code</h2>",
            f"<pre>{escape(self.code)}</pre>",
            "<h2>How it was measured</h2>",
            _paragraphs(self._method()),
        ]
        return (
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<body>\n"
            + "\n".join(parts)
            + "\n</body>\n</html>\n"
        )

    def _arms(self) -> tuple[list[str], list[list[str]]]:
        compared = any(arm.outputs for arm in self.summary.arms)
        head = [
            f"{self.summary.prompts} prompts",
            "tokens/s",
            "times plain (90 % interval)",
            "tokens per target forward",
        ]
        head += ["outputs identical to plain", "differ within rounding", "faults"] if compared else []
        rows = []
        for arm in self.summary.arms:
            ratio = "" if arm.over_plain is None else str(arm.over_plain)
            counts = [str(arm.outputs[kind]) if arm.outputs else "" for kind in (IDENTICAL, ROUNDING, FAULT)]
            row = [arm.arm, f"{arm.tokens_per_s:.1f}", ratio, f"{arm.acceptance_length:.2f}"]
            rows.append(row + (counts if compared else []))
        return head, rows

    def _kinds(self) -> tuple[list[str], list[list[str]]]:
        arms = [arm.arm for arm in self.summary.arms]
        rows = []
        for kind in self.summary.kinds:
            speeds = [f"{kind.tokens_per_s[arm]:.1f}" for arm in arms]
            rows.append(
                [
                    kind.kind,
                    *speeds,
                    f"{kind.ours_over_best:.2f}",
                    f"{kind.acceptance_length[OURS]:.2f}",
                    str(kind.prompts),
                ]
            )
        return ["tokens/s", *arms, "ours ÷ best other", "ours: tokens per forward", "prompts"], rows

    def _differences(self) -> str:
        rows = [
            [
                e.arm,
                str(e.request + 1),
                e.kind_of_prompt,
                str(e.difference.position + 1),
                f"{e.difference.gap:.4g}",
                f"{2 * e.difference.rounding:.4g}",
                "" if e.difference.gap_float32 is None else f"{e.difference.gap_float32:+.4g}",
                e.difference.kind,
            ]
            for e in self.outcome.examined
        ]
        if not rows:
            return ""
        head = ["first difference of", "prompt", "kind", "at token", "gap", "rounding allows", "gap in float32", ""]
        words = (
            "Gap: how much better plain generation scores its own token than the other one. Rounding allows twice the largest difference, "
            "on that prompt, between logits of one forward over several positions and of forwards over one each, in this precision. "
            "A negative gap in float32: there the other token is the better one."
        )
        return f'<details><summary>Each first difference</summary><p class="soft">{words}</p>{_table(head, rows)}</details>'

    def _method(self) -> list[str]:
        at, of = provenance(), self.models
        lines = [
            f"Target {of.target}, {'no draft' if of.draft is None else f'draft {of.draft}'}; {of.dtype} on {of.device}. "
            f"{self.summary.prompts} prompts, at most {self.outcome.new_tokens} new tokens each. Every prompt goes through all ways, in an "
            "order that rotates, before the next one starts. The best other way is chosen in "
            "hindsight, over the whole run. Intervals: paired bootstrap over prompts, 90 %.",
            f"{at.cpu}, {at.cores} cores, {at.threads} threads of torch; Python {at.python}; "
            f"{datetime.now(timezone.utc).isoformat(timespec='minutes')}.",
        ]
        return lines if self.outcome.calibration is None else [*lines, str(self.outcome.calibration)]


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{titles}</tr>\n{body}</table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def colours(arms: Sequence[str]) -> dict[str, str]:
    """The colour of each arm, in every chart."""
    left = iter(OTHER_COLOURS)
    fixed = {PLAIN: "#8a8a8a", OURS: "#009e73"}
    return {arm: fixed.get(arm) or ("#e69f00" if arm.startswith(DRAFT) else next(left)) for arm in arms}


def _legend(arms: Mapping[str, object]) -> str:
    keys = "".join(
        f'<span><i style="background: {colour}"></i>{escape(arm)}</span>' for arm, colour in colours(list(arms)).items()
    )
    return f'<p class="legend">{keys}</p>'


def _lines(arms: Mapping[str, Sequence[Record]], per: str) -> str:
    """One line per arm over the prompts: new tokens over the sum of the field `per`, in a running mean."""
    curves = {
        arm: [_mean(own[max(0, i + 1 - WINDOW) : i + 1], per) for i in range(len(own))] for arm, own in arms.items()
    }
    n = max(len(curve) for curve in curves.values())
    axis = _Axis(max(max(curve) for curve in curves.values()), 220)
    plot = WIDTH - LEFT - RIGHT

    def x(i: int) -> float:
        return LEFT + (plot * i / (n - 1) if n > 1 else plot / 2)

    parts = [axis.drawn()]
    for i in sorted({0, *range(4, n, 5), n - 1}):
        parts.append(f'<text x="{x(i):.1f}" y="{axis.height - 14}" text-anchor="middle">{i + 1}</text>')
    for arm, curve in curves.items():
        colour = colours(list(arms))[arm]
        points = [(x(i), axis.y(value)) for i, value in enumerate(curve)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{2.5 if arm == OURS else 2}"/>'
        )
        for i, (px, py) in enumerate(points):
            label = f"{arm}, prompt {i + 1}: {curve[i]:.2f}"
            parts.append(
                f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"><title>{escape(label)}</title></circle>'
            )
    return _svg(axis.height, parts)


def _mean(records: Sequence[Record], per: str) -> float:
    below = sum(record.wall_time_s if per == "wall_time_s" else record.target_forwards for record in records)
    return sum(record.new_tokens for record in records) / below if below else 0.0


def _dots(kinds: Sequence[KindSummary]) -> str:
    """A row per kind of prompt, in it a dot per arm at its tokens/s."""
    row, left = 26, 130
    most = max(max(kind.tokens_per_s.values()) for kind in kinds)
    step = _step(most)
    top = step * -(-most // step)
    height = TOP + row * len(kinds) + BOTTOM

    def x(value: float) -> float:
        return left + (WIDTH - left - RIGHT) * value / top

    parts = []
    for tick in range(int(top / step) + 1):
        at = x(tick * step)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 14}" text-anchor="middle">{tick * step:g}</text>')
    for i, kind in enumerate(kinds):
        y = TOP + row * (i + 0.5)
        values = kind.tokens_per_s
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(kind.kind[:18])}</text>')
        ends = x(min(values.values())), x(max(values.values()))
        parts.append(f'<line class="grid" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}" stroke-width="3"/>')
        for arm, colour in colours(list(values)).items():
            label = f"{kind.kind}, {arm}: {values[arm]:.1f} tokens/s"
            parts.append(
                f'<circle class="ring" cx="{x(values[arm]):.1f}" cy="{y}" r="5.5" fill="{colour}"><title>{escape(label)}</title></circle>'
            )
    return _svg(height, parts)


class _Axis:
    """A vertical axis from 0, with its grid."""

    def __init__(self, most: float, height: int) -> None:
        self.height, self._step = height, _step(most)
        self._top = self._step * max(1, -(-most // self._step))

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * value / self._top

    def drawn(self) -> str:
        parts = []
        for tick in range(int(self._top / self._step) + 1):
            at = self.y(tick * self._step)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick * self._step:g}</text>')
        return "".join(parts)


def _step(most: float) -> float:
    """A round distance between about five marks up to `most`."""
    scale = 1.0
    while most / scale >= 50:
        scale *= 10
    while most / scale < 5:
        scale /= 10
    return next(step for step in (1, 2, 5, 10) if most / (step * scale) <= 6) * scale


def _svg(height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
