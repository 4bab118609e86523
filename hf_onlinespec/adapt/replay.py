"""A bounded memory of past requests with the target's top-k probabilities: learning from it costs no target forward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..state import State
from .feedback import Feedback

PROFILE = 256  # bins of a request's token profile; chosen
LIKENESS_SCALE = 8.0  # how much likelier requests with a like profile are sampled by "near": up to exp of this; chosen
# Of hidden states that are remembered for a head, or of encoder outputs and speech; chosen. 16,384 tokens of a small target fit (3 × 576 numbers of bfloat16 each: 57 MB),
# 10,922 of one that is 4,096 wide, where all of them would take 403 MB.
MOST_FEATURES_BYTES = 256 * 2**20
LOSS_RANGE = (1e-6, 1e3)  # losses by which requests are sampled by "loss"; chosen


@dataclass(frozen=True)
class ReplayConstants:
    """Of what is remembered, and how often it is learned from."""

    recent_share: float = 0.5  # of the room, for the newest requests; chosen
    window: int = 8  # requests that decide on the number of passes; chosen
    least_return: float = 0.5  # per second, of a pass over that of a step on new tokens; chosen


@dataclass
class Remembered:
    """One request in the replay."""

    feedback: Feedback
    profile: Tensor  # (PROFILE,) how often its tokens fall into each bin, of length one
    size: int  # tokens that it takes of the room
    loss: float = float("inf")  # when it was last learned from; never: infinite


class Replay:
    """Requests that fit into `max_tokens`, at `top_k` target probabilities per generated position.

    Once the room is full, half of it is for the newest requests; in the other half, every earlier request of the same length has
    the same chance to be (a reservoir), so that old domains stay alive.

    Bytes are bounded by `max_tokens * (12 + 12 * top_k)`, an int64 token, a float32 tail, and float32 + int64 per kept
    probability, and a profile of 1 KiB per request. A draft head's requests hold hidden states beside: of these there are at most
    `MOST_FEATURES_BYTES`, and where `max_tokens` tokens would take more, fewer tokens are kept. Tokens of a source take the room of
    tokens; a source of speech, or of encoder outputs, as many tokens' as it is a part of `MOST_FEATURES_BYTES`.

    Args:
        sampling: which requests are replayed, a key of `SAMPLING`.
        seed: of all choices.
    """

    def __init__(
        self,
        max_tokens: int,
        top_k: int,
        seed: int,
        sampling: str = "uniform",
        constants: ReplayConstants = ReplayConstants(),
    ) -> None:
        self.max_tokens = max_tokens  # fewer once their hidden states would take too much
        self._recent_share = constants.recent_share
        self.top_k = top_k
        self.refused = 0  # requests longer than the bound
        self.recent: list[Remembered] = []  # the newest last
        self.old: list[Remembered] = []
        self._left = 0  # requests that have left the newest
        self._sample = SAMPLING[sampling]
        self._random = random.Random(seed)

    def add(self, feedback: Feedback, loss: float = float("inf")) -> None:
        """Remembers a request, and forgets others beyond the bound. One that is longer than the bound is counted, not kept."""
        if feedback.features is not None:
            width = feedback.features.shape[-1] * feedback.features.element_size()
            self.max_tokens = min(self.max_tokens, MOST_FEATURES_BYTES // width)
        small = replace(feedback, teacher=feedback.teacher.top(self.top_k).for_the_loss())
        size = self._room_of(small)
        if size > self.max_tokens:
            self.refused += 1
            return
        self.recent.append(Remembered(small, profile(small.tokens), size, loss))
        while self.tokens > self.max_tokens:
            if len(self.recent) > 1 and self._size(self.recent) > self._recent_tokens:
                self._retire(self.recent.pop(0))
            else:
                self.old.pop(self._random.randrange(len(self.old)))

    def _room_of(self, feedback: Feedback) -> int:
        """Tokens that a request takes of the room, its source included."""
        size, source = len(feedback.tokens), feedback.source
        if source is None:
            return size
        if source.tokens is not None:
            return size + source.tokens.numel()
        return size + math.ceil(self.max_tokens * source.nbytes / MOST_FEATURES_BYTES)

    @property
    def _recent_tokens(self) -> float:
        """Room for the newest requests."""
        return self._recent_share * self.max_tokens

    def _retire(self, request: Remembered) -> None:
        """Into the reservoir, with the chance that any earlier request has to be there."""
        self._left += 1
        if self._size(self.old) + request.size <= self.max_tokens - self._recent_tokens:
            self.old.append(request)
        elif self.old and self._random.random() < len(self.old) / self._left:
            self.old[self._random.randrange(len(self.old))] = request

    @staticmethod
    def _size(requests: list[Remembered]) -> int:
        return sum(request.size for request in requests)

    def sample(self, n: int) -> list[Remembered]:
        """Up to n different requests."""
        n = min(n, len(self))
        return self._sample(self._random, self.recent, self.old, n) if n else []

    def random_state(self) -> Tensor:
        """The state (626,) of the generator of all choices."""
        version, words, _ = self._random.getstate()
        return torch.tensor([version, *words])

    def resume_random(self, saved: State) -> None:
        """The inverse of `random_state`."""
        version, *words = saved.tensor("random", self.random_state()).tolist()
        try:
            self._random.setstate((version, tuple(words), None))
        except (ValueError, TypeError, OverflowError) as error:
            raise ArtifactError(f"The saved random state is none ({error}).") from error

    @property
    def requests(self) -> list[Feedback]:
        """Everything that is remembered."""
        return [r.feedback for r in (*self.old, *self.recent)]

    @property
    def tokens(self) -> int:
        return self._size(self.recent) + self._size(self.old)

    def __len__(self) -> int:
        return len(self.recent) + len(self.old)

    @property
    def nbytes(self) -> int:
        return sum(r.feedback.nbytes + r.profile.nbytes for r in (*self.recent, *self.old))


def profile(tokens: Tensor) -> Tensor:
    """Counts (PROFILE,) of tokens by bin, scaled to length one: requests of one domain have similar ones."""
    counts = torch.bincount(tokens % PROFILE, minlength=PROFILE).float().cpu()
    return counts / counts.norm().clamp_min(1.0)


class ReplaySchedule:
    """How many replay passes after a request are worth their time; one at least, so that old domains are not forgotten.

    What a step brought is told by the gradient g of the next request, which no step has seen: −⟨g, Δw⟩ is, to first order, how
    far it lowered that request's loss. One pass more is worth its time while a pass brings as much per second as the step on new
    tokens does, or nearly so.

    Args:
        most: passes after one request.
    """

    def __init__(self, most: int, constants: ReplayConstants = ReplayConstants()) -> None:
        self.most, self.now, self._constants = most, most, constants
        self._new: list[tuple[float, float]] = []  # what it brought, seconds
        self._old: list[tuple[float, float]] = []  # of one pass

    def observe(self, new: tuple[float, float], old: tuple[float, float]) -> None:
        """What the step on new tokens and what one pass brought, each with the seconds that it took."""
        if not all(math.isfinite(x) for x in (*new, *old)):
            return
        self._new.append(new)
        self._old.append(old)
        if len(self._old) < self._constants.window:
            return
        per_s = [sum(g for g, _ in some) / max(sum(s for _, s in some), 1e-9) for some in (self._old, self._new)]
        worth = per_s[0] > 0 and per_s[0] >= self._constants.least_return * per_s[1]
        self.now = min(self.most, self.now + 1) if worth else max(min(1, self.most), self.now - 1)
        self._new, self._old = [], []


Sample = Callable[[random.Random, list[Remembered], list[Remembered], int], list[Remembered]]


def _uniform(rng: random.Random, recent: list[Remembered], old: list[Remembered], n: int) -> list[Remembered]:
    """Every remembered request alike."""
    return rng.sample(recent + old, n)


def _recent(rng: random.Random, recent: list[Remembered], old: list[Remembered], n: int) -> list[Remembered]:
    """Of the newest requests alone."""
    return rng.sample(recent, min(n, len(recent)))


def _mixed(rng: random.Random, recent: list[Remembered], old: list[Remembered], n: int) -> list[Remembered]:
    """Half of them new, half of them old."""
    from_old = min(n // 2, len(old))
    from_recent = min(n - from_old, len(recent))
    return rng.sample(recent, from_recent) + rng.sample(old, min(n - from_recent, len(old)))


def _loss(rng: random.Random, recent: list[Remembered], old: list[Remembered], n: int) -> list[Remembered]:
    """The more likely, the higher the loss was; what was never learned from comes first."""
    everything = recent + old
    least, most = LOSS_RANGE
    return _weighted(
        rng, everything, [min(max(r.loss, least), most) if r.loss == r.loss else most for r in everything], n
    )


def _near(rng: random.Random, recent: list[Remembered], old: list[Remembered], n: int) -> list[Remembered]:
    """The more likely, the more alike their tokens are to those of the newest request."""
    everything = recent + old
    likeness = torch.stack([r.profile for r in everything]) @ recent[-1].profile
    return _weighted(rng, everything, (LIKENESS_SCALE * likeness).exp().tolist(), n)


def _weighted(rng: random.Random, requests: list[Remembered], weights: list[float], n: int) -> list[Remembered]:
    """n different ones, one after the other, each with a chance by its weight (Efraimidis & Spirakis 2006)."""
    keys = [rng.random() ** (1 / weight) for weight in weights]
    best = sorted(range(len(requests)), key=lambda i: keys[i], reverse=True)[:n]
    return [requests[i] for i in best]


SAMPLING: dict[str, Sample] = {"uniform": _uniform, "recent": _recent, "mixed": _mixed, "loss": _loss, "near": _near}
