"""Tables of what `benchmarks/learning.py` measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One request through one learner."""

    stream: str
    temperature: float
    seed: int
    learner: str
    request: int
    domain: str
    tokens: int
    rounds: float  # expected
    update_time_s: float
    rollbacks: int
    weights: tuple[float, ...] = ()


def acceptance_length(rows: Sequence[Row]) -> float:
    return sum(r.tokens for r in rows) / sum(r.rounds for r in rows)


def segments(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs of one domain, or the whole where they are short."""
    found: list[list[Row]] = []
    for row in rows:
        if found and found[-1][-1].domain == row.domain:
            found[-1].append(row)
        else:
            found.append([row])
    return found if len(found) <= 5 else [list(rows)]


def back(runs: list[list[list[Row]]]) -> list[str]:
    """How it is back in the first segment's domain, against what was reached there before."""
    tenths, wholes = [], []
    for first, *_, last in runs:
        size = max(1, len(first) // 4)
        quarters = [acceptance_length(first[i : i + size]) for i in range(0, size * 4, size) if first[i : i + size]]
        tenths.append(acceptance_length(last[: max(1, len(last) // 10)]) / max(quarters))
        wholes.append(acceptance_length(last) / acceptance_length(first[-size:]))
    return [interval(tenths), interval(wholes)]


def interval(values: Sequence[float]) -> str:
    """Mean over seeds ± two standard errors."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {2 * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def against(runs: Mapping[int, Sequence[Row]], others: Mapping[int, Sequence[Row]]) -> str:
    """Acceptance length over that of another learner, on the same requests."""
    both = [seed for seed in runs if seed in others]
    return interval([acceptance_length(runs[s]) / acceptance_length(others[s]) for s in both]) if both else ""


def report(rows: list[Row], order: Sequence[str]) -> str:
    """A table per stream and temperature; learners in the order given."""
    lines = []
    for name, temperature in sorted({(r.stream, r.temperature) for r in rows}):
        some = [r for r in rows if (r.stream, r.temperature) == (name, temperature)]
        learners = [k for k in order if any(r.learner == k for r in some)]
        runs = {
            k: {
                seed: sorted((r for r in some if r.learner == k and r.seed == seed), key=lambda r: r.request)
                for seed in sorted({r.seed for r in some if r.learner == k})
            }
            for k in learners
        }
        parts = segments(next(iter(runs[learners[0]].values())))
        law = f"temperature {temperature:g}" if temperature else "greedy"
        lines += [f"## {name}, {law}, {sum(map(len, parts))} requests", ""]
        lines += ["Acceptance length, mean over seeds ± two standard errors; ÷: paired by seed.", ""]
        heads = [f"{' and '.join(sorted({r.domain for r in p}))} ({len(p)}), all | last quarter" for p in parts]
        returns = len(parts) > 1 and parts[0][0].domain == parts[-1][0].domain
        heads += ["back, first tenth ÷ best quarter before", "back, all ÷ last quarter before"] * returns
        lines += [
            f"| learner | seeds | {' | '.join(heads)} | ÷ frozen, all | ÷ frozen, last quarter | ÷ ogd, all | ms per token |"
        ]
        lines += ["|---" * (6 + 2 * len(parts) + 2 * returns) + "|"]
        last = {k: {seed: run[-(len(run) // 4) :] for seed, run in found.items()} for k, found in runs.items()}
        for k, by_seed in runs.items():
            cells = []
            for at in range(len(parts)):
                own = [segments(run)[at] for run in by_seed.values()]
                cells.append(interval([acceptance_length(s) for s in own]))
                cells.append(interval([acceptance_length(s[-max(1, len(s) // 4) :]) for s in own]))
            if returns:
                cells += back([segments(run) for run in by_seed.values()])
            cells += [against(by_seed, runs.get("frozen", {})), against(last[k], last.get("frozen", {}))]
            cells += [against(by_seed, runs.get("ogd", {}))]
            spent = [1e3 * sum(r.update_time_s for r in run) / sum(r.tokens for r in run) for run in by_seed.values()]
            lines.append(f"| {k} | {len(by_seed)} | {' | '.join(cells)} | {statistics.median(spent):.2f} |")
        lines.append("")
    return "\n".join(lines)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Row(**row) for row in rows if "learner" in row]
