"""What is counted while requests are decoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from .summary import counted


@dataclass(frozen=True)
class CandidateCounts:
    """What became of candidates, by where they came from: "memory", "recycled" or "model"; and by how many candidates lie before."""

    verified: Counter[tuple[str, int]] = field(default_factory=Counter)  # (source, depth)
    kept: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __add__(self, other: CandidateCounts) -> CandidateCounts:
        return CandidateCounts(self.verified + other.verified, self.kept + other.kept)

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Per source: candidates that were verified, those of them that were kept, and the kept ones by depth, from 0."""
        found = {}
        for source in sorted({source for source, _ in self.verified}):
            kept = {depth: n for (name, depth), n in self.kept.items() if name == source}
            by_depth = [kept.get(depth, 0) for depth in range(max(kept, default=-1) + 1)]
            verified = sum(n for (name, _), n in self.verified.items() if name == source)
            found[source] = {"verified": verified, "kept": sum(by_depth), "kept_by_depth": by_depth}
        return found


@dataclass(repr=False)
class Counts:
    """What is counted while a request is decoded; sums over requests are counts again."""

    requests: int = 0
    rounds: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verified_positions: int = 0
    overlap: float = 0.0  # sum of Σ min(p, q) over the verified positions
    updates: int = 0  # gradient steps taken, replay included
    learned_tokens: int = 0  # new tokens that a gradient step took; what only the replay took is not among them
    skipped_updates: int = 0  # steps left out because something was not finite: a loss, a gradient, a moment
    wall_time_s: float = 0.0  # inside generate's decoding loop, learning included
    draft_time_s: float = 0.0
    target_time_s: float = 0.0
    update_time_s: float = 0.0
    failed_updates: int = 0  # times that learning raised, see failures.py; the call went on without it
    failed_drafts: int = (
        0  # times that drafting raised; the call went on without what raised: draft model, memory or both
    )
    plain_rounds: int = 0  # in which nobody drafted
    memory_rounds: int = 0  # of guesses of the suffix memory or of recycled tokens alone
    model_rounds: int = 0  # in which the draft model alone drafted
    mixed_rounds: int = 0  # in which both drafted
    loss_sum: float = 0.0  # over `learned_tokens`: the loss at each before it was learned
    candidates: CandidateCounts = field(default_factory=CandidateCounts)  # by source and depth; in no file of a draft

    @property
    def acceptance_length(self) -> float:
        return _ratio(self.new_tokens, self.rounds)

    @property
    def acceptance_rate(self) -> float:
        return _ratio(self.overlap, self.verified_positions)

    @property
    def verified_per_kept(self) -> float:
        """Candidates that were verified for one that was kept; 0: none was kept."""
        return _ratio(self.drafted_tokens, self.accepted_tokens)

    @property
    def tokens_per_s(self) -> float:
        return _ratio(self.new_tokens, self.wall_time_s)

    @property
    def decode_tokens_per_s(self) -> float:
        return _ratio(self.new_tokens, self.wall_time_s - self.update_time_s)

    @property
    def update_share(self) -> float:
        return _ratio(self.update_time_s, self.wall_time_s)

    @property
    def mean_loss(self) -> float | None:
        """Per learned token, before it was learned; None: nothing was learned."""
        return self.loss_sum / self.learned_tokens if self.learned_tokens else None

    @property
    def sources(self) -> dict[str, int]:
        """Rounds by who drafted."""
        return {
            "plain": self.plain_rounds,
            "memory": self.memory_rounds,
            "model": self.model_rounds,
            "memory+model": self.mixed_rounds,
        }

    def drafted_by(self, memory: bool, model: bool) -> None:
        """Notes who drafted in a round."""
        self.plain_rounds += not memory and not model
        self.memory_rounds += memory and not model
        self.model_rounds += model and not memory
        self.mixed_rounds += memory and model

    def line(self) -> str:
        """The numbers in one line."""
        drafted = ", ".join(f"{source} {n}" for source, n in self.sources.items() if n)
        learning = f"learning {self.update_share:.1%} of the time in {self.updates} updates"
        if self.mean_loss is not None:
            learning += f", loss {self.mean_loss:.3f}"
        return (
            f"{self.new_tokens} tokens in {self.wall_time_s:.2f} s ({self.tokens_per_s:.1f} tokens/s, {self.decode_tokens_per_s:.1f} "
            f"without learning), {self.acceptance_length:.2f} tokens per target forward, acceptance rate {self.acceptance_rate:.2f}, "
            f"rounds: {drafted or 'none'}; {learning}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All counters, and the numbers that follow from them, as plain JSON values."""
        found = {
            f.name: _as_json(getattr(self, f.name)) for f in fields(self) if f.name not in ("history", "candidates")
        }
        return found | {
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_s": self.tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "update_share": self.update_share,
            "mean_loss": self.mean_loss,
            "sources": self.sources,
            "verified_per_kept": self.verified_per_kept,
            "candidates": self.candidates.by_source(),
        }

    def __repr__(self) -> str:
        return f"{counted(self.requests, 'request')}: {self.line()}"

    def add(self, other: Counts) -> None:
        for f in fields(Counts):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


NUMBERS = [f for f in fields(Counts) if f.name != "candidates"]  # of a file of a draft


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _as_json(value: Any) -> Any:
    if isinstance(value, Counts):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
