"""Rows that leave it to the draft which adapter serves them: `adapter="auto"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..commit.base import Call
from ..commit.draft_model import DraftModel
from ..config.adapters import AUTO
from ..govern.acceptance import RequestStats
from ..govern.governor import Governor
from ..runtime.failures import Failures
from ..runtime.forks import Lock

Scores = dict[str | None, float]  # of a prompt under each adapter; None: the one without a name


class Routes(Protocol):
    """A draft that has adapters with names."""

    trainable: DraftModel
    governor: Governor
    failures: Failures
    lock: Lock


class Present(Protocol):
    """A draft with one of them, which is in the process."""

    trainable: DraftModel


@dataclass(frozen=True)
class Routing:
    """The adapters of a call's rows.

    Args:
        names: per row; None: the adapter without a name.
        favourites: of the rows that were routed, the adapter that the prompt speaks for.
    """

    draft: Routes
    names: tuple[str | None, ...]
    favourites: Mapping[int, str | None]

    @classmethod
    def of(cls, draft: Routes, present: Mapping[str, Present], call: Call) -> Routing:
        """Chooses for the rows that ask for it, among the adapters that are in the process and the one without a name."""
        names, favourites, known = list(call.adapters or (None,) * call.rows), {}, dict[tuple[int, ...], Scores]()
        models = {None: draft.trainable} | {name: own.trainable for name, own in present.items()}
        router = draft.governor.names
        for row, name in enumerate(names):
            if name != AUTO:
                continue
            assert call.prompts is not None
            prompt = call.prompts[row : row + 1, call.padding(row) :]
            key = tuple(prompt[0, -router.constants.prompt_tokens :].tolist())
            if key not in known:  # several sequences may have one prompt
                known[key] = _scores(models, prompt, call, router.constants.prompt_tokens)
            with draft.lock:
                favourites[row], names[row] = router.favourite(known[key]), router.choose(known[key])
        return cls(draft, tuple(names), favourites)

    def close(self, stats: Sequence[RequestStats]) -> None:
        """The end of the call: what the rows have shown of the adapters that were chosen for them."""
        least = self.draft.governor.constants.min_positions
        with self.draft.failures.records.attempt(), self.draft.lock:
            for row, favourite in self.favourites.items():
                seen = stats[row]
                if seen.positions >= least:
                    self.draft.governor.names.observe(favourite, self.names[row], seen.acceptance / seen.positions)


def _scores(models: Mapping[str | None, DraftModel], prompt: Tensor, call: Call, most: int) -> Scores:
    """All the same where the models cannot tell."""
    own = models[None].vocabulary
    if len(models) > 1 and call.vocabulary is not None and call.vocabulary.read > own.size:
        prompt = own.readable(prompt)
    found = {name: model.prompt_score(prompt, most) if len(models) > 1 else None for name, model in models.items()}
    return {name: 0.0 if score is None else score for name, score in found.items()}
