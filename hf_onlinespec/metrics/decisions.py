"""What the governor decided, as it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .summary import Summary, counted, parts


@dataclass(repr=False)
class Decisions:
    """What the governor decided since the draft was made, and why it decides so now."""

    rounds: dict[str, int] = field(
        default_factory=lambda: {"plain": 0, "model": 0, "memory": 0, "memory+model": 0}
    )  # by what was proposed; "memory": also recycled tokens
    probes: int = 0
    deferred_updates: int = 0  # requests that were not learned from at once: that was not affordable
    serves_base: bool = False  # the base draft served the latest request: what was learned does worse there
    budget_fraction: float = 1.0  # part of update_budget that learning may use
    acceptance: float = 0.0  # estimated, of the draft model's tokens
    draft_step: float = 0.0  # time of one more drafted token over a plain target step
    verify_step: float = 0.0  # time of one more verified position over a plain target step
    drafting: str = "nothing was decided yet"
    learning: str = "nothing was decided yet"
    replay_passes: int = 0  # after a request, as far as they are affordable
    rollback: str = ""  # why an earlier state of the adapter took over, the last time
    averaging: str = ""  # with other processes that learn the same adapter

    def summary(self) -> Summary:
        """What was decided, in lines with units, and as values."""
        rows = [
            ("drafting", self.drafting),
            ("learning", self.learning),
            ("rounds", f"{parts(self.rounds)}; {counted(self.probes, 'probe')} of a draft that was idle"),
            ("acceptance", f"{self.acceptance:.2f}, estimated, of the draft model's tokens"),
            (
                "costs",
                f"{self.draft_step:.2f} plain target steps for one more drafted token, {self.verify_step:.2f} for one more "
                "verified position",
            ),
            (
                "budget fraction",
                f"learning may use {self.budget_fraction:.3g} of update_budget; {self.replay_passes} replay passes a request",
            ),
            ("put off", f"{counted(self.deferred_updates, 'request')} not learned from at once"),
            ("served by", "the base draft" if self.serves_base else "the learned draft"),
        ]
        if self.rollback:
            rows.append(("rollback", self.rollback))
        if self.averaging:
            rows.append(("averaging", self.averaging))
        return Summary("Decisions", tuple(rows), asdict(self))

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()
