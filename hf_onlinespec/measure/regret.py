"""What online learning lost against hindsight, on a recorded stream, and what theory says that this means for speed.

Every request is one round of the online game: the draft as it served the request has a mean loss f_t(w_t) on it, and learns
from it afterwards. Comparators are found by training the same adapter on all requests at once, or on those of one segment:
for a deep network they are the best that was found, not a proven optimum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapt.feedback import Feedback, acceptance
from ..adapt.losses import LOSSES
from ..adapt.segment import Segment
from ..config import OnlineSpecConfig
from ..draft import OnlineDraft
from ..errors import ConfigError
from ..metrics import Counts
from ..runtime.progress import each
from ..share.resuming import adopt
from .recording import Recorded, Recording

COMPARATOR_LR = 1e-3  # of Adam, whatever the learner's is
EPOCHS = 30  # of a comparator's training, at most
ENOUGH = 0.01  # relative improvement of an epoch below which it is over
BATCH = 4  # requests in one step of it
WINDOW = 8  # requests in a running mean


@dataclass
class Curve:
    """One way of serving a stream: a number per request."""

    losses: list[float] = field(default_factory=list)  # mean loss f_t
    tv: list[float] = field(default_factory=list)  # mean total variation distance of p and q, as in the accept test
    kl: list[float] = field(default_factory=list)  # mean KL(p‖q) of these
    rounds: list[float] = field(default_factory=list)  # expected rounds of verification

    def extend(self, later: Curve) -> None:
        """Appends the requests of another stretch."""
        for name, values in vars(later).items():
            vars(self)[name].extend(values)


@dataclass
class RegretReport:
    """Losses of what served and of its comparators, request by request."""

    domains: list[str]
    new_tokens: list[int]
    lookahead: int
    served: Curve
    frozen: Curve  # the base draft, which learns nothing
    fixed: Curve  # the best adapter for the whole stream in hindsight
    segments: Curve  # the best one for each segment
    path_length: float  # Σ ‖u_{s+1} − u_s‖ over the segments' adapters
    gradient_variation: float  # Σ ‖g_t − g_{t−1}‖² along the learner's own path: it moves between the two
    gradient_norm: float  # mean ‖g_t‖²

    def static_regret(self) -> list[float]:
        """Cumulative Σ f_t(w_t) − f_t(best fixed)."""
        return _cumulative(self.served.losses, self.fixed.losses)

    def dynamic_regret(self) -> list[float]:
        """Cumulative Σ f_t(w_t) − f_t(best of the segment)."""
        return _cumulative(self.served.losses, self.segments.losses)

    def acceptance_length(self, curve: Curve) -> float:
        return sum(self.new_tokens) / sum(curve.rounds)

    def bound(self, curve: Curve) -> float:
        """Least acceptance length by Pinsker's inequality from the mean KL: (k + 1) · [1 − (k/2) √(KL/2)], at least 1.

        The theorem takes the mean over lookahead positions of equal weight (arXiv:2603.12617); this one is over the positions of
        the text, which makes it a diagnostic. In greedy decoding KL is infinite, and the bound empty.
        """
        return self._bound((_mean(curve.kl, self.new_tokens) / 2) ** 0.5)

    def tv_bound(self, curve: Curve) -> float:
        """The same from the mean total variation itself, without Pinsker's loss."""
        return self._bound(_mean(curve.tv, self.new_tokens))

    def _bound(self, tv: float) -> float:
        k = self.lookahead
        return max(1.0, (k + 1) * (1 - k / 2 * tv))

    def tokens_to_half_way(self) -> int | None:
        """New tokens until the acceptance length is half-way from the frozen draft's to that of the best adapter per segment.

        Over the last `WINDOW` requests, each against its own comparators; None: never.
        """
        for end in range(WINDOW, len(self.domains) + 1):
            span = range(end - WINDOW, end)
            n = sum(self.new_tokens[i] for i in span)
            served, frozen, best = (
                n / sum(curve.rounds[i] for i in span) for curve in (self.served, self.frozen, self.segments)
            )
            if served >= (frozen + best) / 2:
                return sum(self.new_tokens[:end])
        return None

    def text(self) -> str:
        """The report in Markdown."""
        lines = [f"{len(self.domains)} requests, {sum(self.new_tokens)} new tokens, lookahead {self.lookahead}", ""]
        lines += [
            "| | mean loss | mean TV | acceptance length | bound from TV | bound from KL |",
            "|---|---|---|---|---|---|",
        ]
        for name, curve in self.curves().items():
            lines.append(
                f"| {name} | {_mean(curve.losses, self.new_tokens):.3f} | {_mean(curve.tv, self.new_tokens):.3f} "
                f"| {self.acceptance_length(curve):.2f} | {self.tv_bound(curve):.2f} | {self.bound(curve):.2f} |"
            )
        t = len(self.domains)
        static, dynamic = self.static_regret()[-1], self.dynamic_regret()[-1]
        lines += [
            "",
            f"Static regret {static:.2f} ({static / t:.3f} per request), dynamic regret {dynamic:.2f} ({dynamic / t:.3f}).",
            f"Path length of the segments' adapters {self.path_length:.2f}; gradient variation along the path {self.gradient_variation:.3g}, "
            f"{self.gradient_variation / max(t - 1, 1) / max(self.gradient_norm, 1e-12):.2f} times the mean squared gradient per request "
            "(2: gradients of two requests have nothing in common).",
            f"Half-way from frozen to the best adapter per segment: {_after(self.tokens_to_half_way())}.",
        ]
        return "\n".join(lines) + "\n"

    def curves(self) -> dict[str, Curve]:
        return {
            "served": self.served,
            "frozen": self.frozen,
            "best fixed adapter": self.fixed,
            "best adapter per segment": self.segments,
        }


def _after(tokens: int | None) -> str:
    return "never" if tokens is None else f"after {tokens} new tokens"


def _cumulative(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(x - y for x, y in zip(a, b, strict=True)))


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def expected_rounds(kept: Sequence[float], lookahead: int) -> float:
    """Expected rounds of verification for a text whose tokens are kept with these chances.

    A round ends behind a token that was not kept, or behind the target's own token after `lookahead` kept ones. With chances
    min(1, q(x) / p(x)) at the tokens x of the text, this is the mean over all runs that say this text.
    """
    n = len(kept)
    begins = [0.0] * (n + lookahead + 2)  # chance that a round begins at each position
    begins[0] = 1.0
    for at in range(n):
        reach = begins[at]
        for k in range(lookahead):
            if at + k >= n:
                break
            begins[at + k + 1] += reach * (1 - kept[at + k])
            reach *= kept[at + k]
        else:
            begins[at + lookahead + 1] += reach
    return sum(begins[:n])


def kept_chances(request: Recorded, logits: Tensor, temperature: float, draft_ids: Tensor | None = None) -> list[float]:
    """Chance that each new token was drafted, given the draft's logits (n, vocab) there.

    Args:
        draft_ids: (vocab,) the ids that the logits are of; None: all of the target's, in order. Other tokens are never drafted.
    """
    text = request.feedback.tokens[-len(request.log_p) :].to(logits.device)
    drafts = torch.ones_like(text, dtype=torch.bool)
    if draft_ids is not None:
        same = text[:, None] == draft_ids.to(text)
        text, drafts = same.long().argmax(-1), same.any(-1)
    if not temperature:
        return [float(kept) for kept in ((logits.argmax(-1) == text) & drafts).tolist()]
    log_q = (logits.float() / temperature).log_softmax(-1).gather(-1, text[:, None]).squeeze(-1)
    found: list[float] = ((log_q.cpu() - request.log_p).exp().clamp_max(1.0) * drafts.cpu()).tolist()
    return found


def evaluate(
    recording: Recording,
    model: Callable[[], PreTrainedModel],
    config: OnlineSpecConfig,
    lookahead: int = 5,
    epochs: int = EPOCHS,
    show: Callable[[str], None] = lambda text: None,
    target: PreTrainedModel | None = None,
) -> RegretReport:
    """Replays a stream: learning after every request, and the comparators.

    Args:
        model: loads the draft anew; every comparator gets its own.
        config: how to learn; its schedule is not used.
        epochs: of a comparator's training, at most.
        show: is told what is done now.
        target: that a draft head reads the hidden states of; None: the draft reads none. It reads every request once, and nothing of
            them is written.

    Raises:
        ConfigError: before anything is replayed, if the settings or the draft do not fit the recording.
    """
    if config.temperature != 1.0 or config.top_k is not None:
        raise ConfigError(
            f"temperature={config.temperature}, top_k={config.top_k}: a recording holds the target's distributions as they are. Use 1 and None."
        )
    if lookahead < 1:
        raise ConfigError(f"lookahead={lookahead}: expected at least 1.")
    config = replace(config, update_every=1)
    draft = OnlineDraft(model(), config)
    requests, temperature = _fitting(recording, draft, target), recording.temperature
    show("learning")
    served, frozen, gradients = _online(requests, draft, temperature, lookahead)

    def best(requests: Sequence[Recorded], name: str) -> tuple[Curve, Tensor]:
        return _comparator(requests, model, config, temperature, lookahead, epochs, name)

    show("the best fixed adapter")
    fixed, whole = best(requests, "The best fixed adapter")
    segments, states = Curve(), []
    groups = [list(group) for _, group in itertools.groupby(requests, key=lambda r: r.domain)]
    for group in groups:
        domain = group[0].domain
        show(f"the best adapter for {domain}")
        part, state = (fixed, whole) if len(groups) == 1 else best(group, f"The best adapter for {domain}")
        states.append(state)
        segments.extend(part)
    path = sum(float((b - a).norm()) for a, b in itertools.pairwise(states))
    domains, new_tokens = [r.domain for r in requests], [len(r.log_p) for r in requests]
    return RegretReport(
        domains, new_tokens, lookahead, served, frozen, fixed, segments, path, gradients.variation, gradients.mean
    )


def _online(
    requests: Sequence[Recorded], draft: OnlineDraft, temperature: float, lookahead: int
) -> tuple[Curve, Curve, _Gradients]:
    """Learns after every request: how the learned draft and the base draft did on each before that, and the gradients."""
    served, frozen, gradients = Curve(), Curve(), _Gradients()
    for request in each(requests, "Learning", "request"):
        _add(served, draft, request, temperature, lookahead, base=False)
        _add(frozen, draft, request, temperature, lookahead, base=True)
        feedback = request.feedback
        draft.learning.learn_segment(Segment.of(feedback, temperature), Counts())
        gradients.add(draft.trainable.adapter.grads.clone())
        draft.learning.remember(feedback)
        draft.learning.replay_steps(Counts(), draft.settings.replay_passes)
    return served, frozen, gradients


def _fitting(recording: Recording, draft: OnlineDraft, target: PreTrainedModel | None) -> list[Recorded]:
    """The requests on the draft's device, with the hidden states that it reads. Raises ConfigError where it cannot read them."""
    requests, ids, vocab = recording.requests, draft.trainable.ids, draft.vocabulary.size
    own, recorded = (None if some is None else some.cpu() for some in (ids, recording.draft_ids))
    same = own is recorded if own is None or recorded is None else torch.equal(own, recorded)
    if not same:
        raise ConfigError(
            f"The stream was recorded for {_proposing(recorded)}; the draft is {_proposing(own)}. Record it for this draft."
        )
    for number, r in enumerate(requests, 1):
        most = int(r.feedback.tokens.max())
        if r.feedback.teacher.tokens is not None and ids is None:
            most = max(most, int(r.feedback.teacher.tokens.max()))
        if most >= vocab or len(r.feedback.tokens) > draft.trainable.positions:
            raise ConfigError(
                f"Request {number} has token {most} and {len(r.feedback.tokens)} tokens; the draft knows {vocab} and reads "
                f"{draft.trainable.positions}. Take the draft that the stream was recorded for."
            )
    if target is not None:
        draft.serves(target)
    found = []
    for r in requests:
        tokens = r.feedback.tokens.to(draft.device)
        features = draft.trainable.features(tokens[None, :-1])
        feedback = Feedback(tokens, r.feedback.teacher.to(draft.device), None if features is None else features[0])
        found.append(replace(r, feedback=feedback))
    return found


def _proposing(ids: Tensor | None) -> str:
    return "a draft that proposes all tokens" if ids is None else f"a head that proposes {len(ids)} tokens"


class _Gradients:
    """Σ ‖g_t − g_{t−1}‖² and the mean ‖g_t‖², each gradient where the learner was then."""

    def __init__(self) -> None:
        self.variation = 0.0
        self._norms: list[float] = []
        self._last: Tensor | None = None

    def add(self, grads: Tensor) -> None:
        if not bool(torch.isfinite(grads).all()):
            return
        if self._last is not None:
            self.variation += float((grads - self._last).square().sum())
        self._norms.append(float(grads.square().sum()))
        self._last = grads

    @property
    def mean(self) -> float:
        return sum(self._norms) / max(len(self._norms), 1)


@torch.no_grad()
def _add(curve: Curve, draft: OnlineDraft, request: Recorded, temperature: float, lookahead: int, base: bool) -> None:
    """What the draft as it is now does on a request."""
    tokens, n, features = request.feedback.tokens[None], len(request.log_p), request.feedback.features
    features = None if features is None else features[None, :-1]
    logits = draft.trainable.logits(tokens[:, :-1], n, base, features=features)[0]
    teacher = request.feedback.teacher
    logits = teacher.common(logits)
    settings = draft.settings
    tail = settings.loss != "cross_entropy"
    curve.losses.append(float(LOSSES[settings.loss](*teacher.compare(logits, settings.temperature, tail)).mean()))
    # Of p and q as in the accept test: greedy ones are point masses, whose TV is the share of different tokens.
    curve.tv.append(1 - float(acceptance([teacher], logits[None], temperature).mean()))
    kl = float("inf")
    if temperature:
        kl = float(LOSSES["forward_kl"](*teacher.compare_at(logits, temperature)).mean())
    curve.kl.append(kl)
    chances = kept_chances(request, logits, temperature, draft.trainable.ids)
    curve.rounds.append(expected_rounds(chances, lookahead))


def _comparator(
    requests: Sequence[Recorded],
    model: Callable[[], PreTrainedModel],
    config: OnlineSpecConfig,
    temperature: float,
    lookahead: int,
    epochs: int,
    name: str,
) -> tuple[Curve, Tensor]:
    """The same adapter, trained on all of the requests until that brings nothing more; and its parameters."""
    single = replace(config, learner="ogd", preconditioner="adam", lr=COMPARATOR_LR, radius=None, snapshots=0)
    draft = OnlineDraft(model(), single)
    generator = torch.Generator().manual_seed(config.seed)
    weights = [len(r.log_p) for r in requests]
    base = Curve()
    for request in requests:
        _add(base, draft, request, temperature, lookahead, base=True)
    best, best_params = _mean(base.losses, weights), draft.learning.adapter_params()  # the base draft is one, too
    for _ in each(range(epochs), name, "epoch"):  # at most: it may be done sooner
        order = torch.randperm(len(requests), generator=generator).tolist()
        for start in range(0, len(order), BATCH):
            draft.learning.learn([requests[i].feedback for i in order[start : start + BATCH]], Counts())
        curve = Curve()
        for request in requests:
            _add(curve, draft, request, temperature, lookahead, base=False)
        mean = _mean(curve.losses, weights)
        improved = best - mean
        if improved > 0:
            best, best_params = mean, draft.learning.adapter_params()
        if improved < ENOUGH * abs(best):
            break
    adopt(draft, best_params)
    curve = Curve()
    for request in requests:
        _add(curve, draft, request, temperature, lookahead, base=False)
    return curve, torch.cat([part.flatten() for part in best_params.values()])
