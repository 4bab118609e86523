"""What of the texts that a draft has learned from comes out of it again: the record that decides on a public push.

While a draft learns, the texts of the requests stay in its process (`learned_texts.py`), never saved. At a save and before a public
push they are cut into short windows, and the adapter itself is asked (`examine`): given the beginning of a window and nothing
else, does the evolved draft write its end, and more likely so than whoever never saw the text? That is the original draft, and the
target without the request around it: what either says by itself is no secret of a user. A text of which `GAIN_BITS` come out is
memorised; one whose prompt may have stood more than `FEW` times, if `OFTEN_BITS` do, and so is one with a part that the target
may have written so often, behind whatever prompts, if `OFTEN_BITS` of that part do.
What is kept is numbers (`History`): requests, how many were examined, how many came out, how often one prompt stood in the
stream, the settings of learning. They travel in the lineage: through saving, loading with other settings, merging, distilling.
Where one prompt makes much of the stream, canaries planted as often decide too (`privacy.py`): under every setting that ever learned.
Whatever has no such record (adapters from elsewhere, fine-tuned ones, older artifacts, texts that were not examined) is refused.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._compat import doubles
from ..adapt.learned_texts import FEW, Examined, Learned, LearnedText, written_often
from ..config import ENSEMBLE, OnlineSpecConfig, one_expert
from ..errors import ConfigError
from ..models.opening import opening_tokens
from ..runtime.progress import progress
from .audited import Audited

logger = logging.getLogger(__name__)

KEY = "privacy"  # of the record in the lineage
WINDOW, STRIDE = 24, 4  # tokens of a window, and between the beginnings of two; chosen
LEAST_GIVEN, LEAST_END = 3, 3  # tokens of a window that are given, and that come out, at least; chosen
# The end is among the likeliest continuations: the product of its tokens' ranks is at most this, 1 where greedy decoding writes it.
# It leaves room over "the ten likeliest"; without secrets, the largest gains of two streams are the same with 16. Chosen.
MOST_RANKS = 64
# How much likelier the end has to be than for whoever never saw it. By chance 2^-GAIN_BITS per window (Markov's inequality);
# measured on the embedded pair: at most 15.3 in 20 streams without secrets (benchmarks/results/audit.md).
GAIN_BITS = 20.0
# The same of a text whose prompt stands often: a secret of three digits. By chance in 2 % of such texts, of twenty windows each.
OFTEN_BITS = 10.0
# Tokens that come out of a part that was written often, at least. In 20 streams of orders without secrets such parts gain at most 8.4
# bits; with 3 tokens one stream has 10.02, of which 8.1 are the first word of a phrase that every text may end with.
LEAST_OFTEN = 4
MOST_SHARE = 0.1  # of the texts: a prompt that stands often, and more often than that, makes much of the stream; chosen
SAVE_S = 20.0  # seconds that a save may spend on it; chosen: forty requests of the embedded pair take 8
MOST_LOGITS = 2**25  # in one forward
# Σ min(p, q) of what the base draft says to a part of a text with and without the token that opens it: chosen, between 0.86 of the
# embedded draft, which was trained on texts in pieces, and what a model says that never saw a text without.
LEAST_OVERLAP = 0.5
GROUP = 16  # texts that are examined together
TOGETHER = 256  # windows between two looks at the clock
LARGE = 1e6  # in place of infinity, so that differences of sums stay numbers
MOST_SETTINGS = 8  # that a history tells apart
LEARNING = (
    "learner", "preconditioner", "lr", "hint_memory", "radius", "max_grad_norm", "gradient_cap", "loss", "temperature", "top_k",
    "replay_passes", "replay_batch", "replay_tokens", "replay_top_k",
)  # fmt: skip
# Why a draft cannot be judged.
OLDER = "it comes from a version that kept no record of what it learned from"
ELSEWHERE = "its adapter was trained elsewhere"
AMPLIFIED = "its adapter was scaled up: what was hidden under the old scale may come out under the new one"
EARLIER = "an earlier state of the adapter took over, which was not examined while its texts were at hand"
EXPERTS = "its experts were examined as they served, and weigh otherwise by now"
CONFUSED = "the record of what it learned from cannot be read"
CROWDED = "it learned with more settings than a record tells apart"
ONE_ADAPTER = "it learned with other experts than its adapter has now, so that canaries cannot be planted as it learned"


def _state(here: Learned, before: int) -> tuple[int, int, int, int, int]:
    """Like `Examined.state`; `before`: see `LearnedText.stands_often`."""
    return here.steps, here.rollbacks, here.seen, here.often(before), here.stood


@dataclass(frozen=True)
class History:
    """What a draft has learned from, in numbers."""

    texts: int = 0
    unexamined: int = 0  # of which it is not known whether they come out
    memorised: int = 0
    repeats: int = 0  # how often the most frequent prompt stood in the stream, at most
    settings: tuple[dict[str, Any], ...] = ()  # of learning, every one that was in use
    unknown: tuple[str, ...] = ()  # why it cannot be judged

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"settings": list(self.settings), "unknown": list(self.unknown)}

    @classmethod
    def of(cls, lineage: Mapping[str, Any]) -> History | None:
        """From a lineage; None: it has none. One that is malformed counts as unknown."""
        found = lineage.get(KEY)
        if found is None:
            return None
        counts = ("texts", "unexamined", "memorised", "repeats")
        try:
            if any(type(found[name]) is not int or not 0 <= found[name] < 2**63 for name in counts):
                return cls(unknown=(CONFUSED,))
            learned = tuple({name: one[name] for name in LEARNING} for one in found["settings"])
            for one in learned:
                OnlineSpecConfig.from_dict(one)
            if not all(isinstance(reason, str) for reason in found["unknown"]):
                return cls(unknown=(CONFUSED,))
            unknown = tuple(found["unknown"])
        except (KeyError, TypeError, ConfigError):
            return cls(unknown=(CONFUSED,))
        return cls(**{name: found[name] for name in counts}, settings=learned, unknown=unknown)

    def plus(self, *reasons: str) -> History:
        """The same with more reasons why it cannot be judged."""
        return replace(self, unknown=tuple(dict.fromkeys((*self.unknown, *reasons))))

    def joined(self, other: History) -> History:
        """Of a draft that learned from what both learned from. One prompt may have stood in both streams."""
        both = [*self.settings, *other.settings]
        settings = [one for n, one in enumerate(both) if one not in both[:n]]
        found = History(
            self.texts + other.texts,
            self.unexamined + other.unexamined,
            self.memorised + other.memorised,
            self.repeats + other.repeats,
            tuple(settings[:MOST_SETTINGS]),
            self.unknown,
        )
        return found.plus(*other.unknown, *([CROWDED] if len(settings) > MOST_SETTINGS else []))

    @property
    def has_main_prompt(self) -> bool:
        """Whether one prompt makes much of the stream: then the adapter tells more of it than its own text shows."""
        return self.repeats > max(FEW, MOST_SHARE * self.texts)

    def reasons(self) -> list[str]:
        """Why it should not be public, as far as the numbers tell."""
        found = []
        if self.memorised:
            found.append(
                f"It has memorised {self.memorised} of the {self.texts} texts that it learned from: given the beginning of a part "
                f"of them, it writes the end, at least 2^{GAIN_BITS:g} times as likely as whoever never saw the text "
                f"(2^{OFTEN_BITS:g} where its prompt may have stood, or the target have written that part, more than {FEW} times)."
            )
        if self.unexamined:
            found.append(
                f"It cannot be judged: of the {self.texts} texts that it learned from, {self.unexamined} were not examined while "
                "they were at hand (they are never saved). `check_privacy(draft)` before saving examines all of them; "
                "`audit_tokens` says how many stay at hand."
            )
        return found + [f"It cannot be judged: {reason}." for reason in self.unknown]


def history(draft: Audited) -> History:
    """What a draft has learned from, here and before."""
    with draft.at_rest() as here:
        before, done = History.of(draft.lineage), draft.examined
        went_back = here.rollbacks > draft.loaded_rollbacks
    if before is None:
        before = History(unknown=(OLDER,) if here.steps and not here.seen else ())
    if before.texts and went_back:
        before = before.plus(EARLIER)
    if before.texts and here.seen and draft.settings.learner == ENSEMBLE:
        before = before.plus(EXPERTS)
    if not here.seen or not here.steps:
        return before
    known = done is not None and done.state == _state(here, before.repeats)
    settings = draft.settings.to_dict()
    own = History(
        here.seen,
        here.seen - (done.texts if known and done is not None else 0),
        done.memorised if known and done is not None else 0,
        max(1, here.repeats),
        ({name: settings[name] for name in LEARNING},),
    )
    return before.joined(own)


def loaded_history(lineage: Mapping[str, Any], then: float, now: float) -> dict[str, Any]:
    """The record of a draft that goes on from an artifact of this lineage.

    Args:
        then, now: alpha over rank of the artifact, and of the draft.
    """
    found = History.of(lineage) or History(unknown=(OLDER,))
    return (found.plus(AMPLIFIED) if now > then * (1 + 1e-6) else found).to_dict()


def merged_history(lineages: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The record of a draft that was combined from others."""
    found = History()
    for lineage in lineages:
        found = found.joined(History.of(lineage) or History(unknown=(OLDER,)))
    return (found.plus(AMPLIFIED) if sum(map(abs, weights)) > 1 + 1e-6 else found).to_dict()


def learned_settings(draft: Audited, learned: Mapping[str, Any]) -> OnlineSpecConfig | None:
    """A draft's settings with those of learning that a record holds; None: the adapter has not the experts that they ask for."""
    many = draft.settings.learner == ENSEMBLE
    if learned["learner"] == ENSEMBLE:
        return replace(draft.settings, **learned) if many else None
    return replace(one_expert(draft.settings), **learned)


Reader = Callable[[Tensor], Tensor]  # logits (rows, L, vocab) of tokens (rows, L)


@torch.no_grad()
def examine(draft: Audited, seconds: float = math.inf) -> Examined:
    """Looks which of the texts that a draft has learned from come out of it, and notes it with the draft.

    Those whose prompt stands often come first, then the newest.

    Args:
        seconds: after which it stops; what is left counts as not examined.
    """
    started = time.perf_counter()
    with draft.at_rest() as here:
        done, lineage = draft.examined, History.of(draft.lineage)
    before = 0 if lineage is None else lineage.repeats
    state = _state(here, before)
    if done is not None and (done.state, done.texts) == (state, len(here.texts)):
        return done
    texts = sorted(here.texts[::-1], key=lambda text: not text.stands_often(before))
    often = written_often(texts, before)
    examined, memorised = 0, 0
    known: set[Window] = set()  # that were looked at: those of a system prompt once
    with _publics(draft) as publics, progress(len(texts), "Looking whether texts come out", "text") as bar:
        opens = _needs_opening(draft, publics[0], texts)
        for at in range(0, len(texts), GROUP):
            if time.perf_counter() - started > seconds:
                break
            group = texts[at : at + GROUP]
            windows = [
                (n, window)
                for n, text in enumerate(group)
                for window in _windows(draft, text.tokens, often[at + n], opens)
            ]
            windows = [(n, window) for n, window in windows if window not in known]
            known.update(window for _, window in windows)
            out: list[bool] = []
            for part in range(0, len(windows), TOGETHER):
                if time.perf_counter() - started > seconds:
                    break
                some = windows[part : part + TOGETHER]
                bits = [OFTEN_BITS if group[n].stands_often(before) else GAIN_BITS for n, _ in some]
                out += _come_out(draft, publics, [window for _, window in some], bits).tolist()
            memorised += len({n for (n, _), comes in zip(windows, out, strict=False) if comes})
            if len(out) < len(windows):
                break  # none of the group was read to its end
            examined += len(group)
            bar.update(len(group))
    draft.examined = Examined(*state, examined, memorised)
    return draft.examined


@contextmanager
def _publics(draft: Audited) -> Iterator[list[Reader]]:
    """Who never saw the text: the original draft, and the target, where it is at hand."""
    target = draft.target_at_hand
    readers = [_reader(draft, frozen=True)]
    if target is None:
        yield readers
        return
    modes = [(module, module.training) for module in target.modules()]
    target.eval()  # one that is trained may have dropout
    try:
        if _speaks_alone(target):
            readers.append(partial(_said_by, target))
        yield readers
    finally:
        for module, mode in modes:
            module.training = mode


def _said_by(target: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = target(input_ids=tokens.to(target.device), use_cache=False).logits
    return logits


def _speaks_alone(target: PreTrainedModel) -> bool:
    """Whether a target takes tokens and nothing else. Without it the original draft alone is compared with: more is refused."""
    try:
        return _said_by(target, torch.zeros(1, 2, dtype=torch.long)).dim() == 3
    except Exception as error:  # whatever another class of models asks for
        logger.info(
            "The target says nothing to tokens alone (%s): its word does not excuse what the draft writes.", error
        )
        return False


def _reader(draft: Audited, frozen: bool) -> Reader:
    return lambda tokens: draft.logits(tokens, tokens.shape[1], frozen)


def _needs_opening(draft: Audited, base: Reader, texts: Sequence[LearnedText]) -> bool:
    """Whether the base draft says something else to a part of a text without the token that opens the text (see opening.py)."""
    overlaps: list[float] = []
    for text in texts:
        opening = opening_tokens(draft.config, text.tokens.tolist())
        part = text.tokens[STRIDE : STRIDE + min(WINDOW, draft.positions - 1)]
        if opening and len(part) >= LEAST_GIVEN + LEAST_END and len(overlaps) < GROUP:
            half = len(part) // 2
            without = base(part[None])[0, half:].float().softmax(-1)
            behind = base(torch.cat([part.new_tensor(opening), part])[None])[0, -len(without) :].float().softmax(-1)
            overlaps.append(float(torch.minimum(without, behind).sum(-1).mean()))
    return bool(overlaps) and sum(overlaps) / len(overlaps) < LEAST_OVERLAP


@dataclass(frozen=True)
class Window:
    """A piece of a text."""

    tokens: tuple[int, ...]
    often: tuple[bool, ...]  # which of them stand in a part that the target wrote often


def _windows(draft: Audited, text: Tensor, often: Tensor, opens: bool) -> list[Window]:
    """A text (L,) in overlapping windows, without those that the draft has no tokens for.

    Args:
        often: (L,) which of its tokens stand in a part that the target wrote often.
        opens: whether every window opens as the text does: some models say nothing sensible without that.
    """
    config = draft.config.get_text_config()
    vocabulary = config.vocab_size
    tokens, flags = text.tolist(), often.tolist()
    opening = opening_tokens(config, tokens) if opens else []
    size = min(WINDOW, draft.positions - len(opening))
    begins = range(0, max(1, len(tokens) - LEAST_GIVEN - LEAST_END + 1), STRIDE)
    found = []
    for begin in begins:
        before = opening if begin else []
        part, written = tokens[begin : begin + size], flags[begin : begin + size]
        found.append(Window((*before, *part), (*(False for _ in before), *written)))
    return [window for window in found if max(window.tokens, default=vocabulary) < vocabulary]


def _come_out(draft: Audited, publics: Sequence[Reader], windows: Sequence[Window], bits: Sequence[float]) -> Tensor:
    """Whether the end of each window (n,) comes out of the evolved draft, by so many bits likelier than of everybody else.

    Of an end that the target wrote often, `OFTEN_BITS` are enough.
    """
    lengths = torch.tensor([len(window.tokens) for window in windows])
    rows = torch.zeros(len(windows), int(lengths.max()), dtype=torch.long)
    often = torch.zeros_like(rows, dtype=torch.bool)
    for row, flags, window in zip(rows, often, windows, strict=True):
        row[: len(window.tokens)] = torch.tensor(window.tokens)
        flags[: len(window.often)] = torch.tensor(window.often)
    if rows.shape[1] < LEAST_GIVEN + LEAST_END:
        return torch.zeros(len(windows), dtype=torch.bool)
    vocabulary = draft.config.get_text_config().vocab_size
    evolved, ranks = _read(_reader(draft, frozen=False), rows, vocabulary)
    padding = torch.arange(1, rows.shape[1]) >= lengths[:, None]
    ranks = ranks.masked_fill(padding, torch.inf)
    ranks_of_often = ranks.masked_fill(~often[:, 1:], torch.inf)
    public = torch.full_like(evolved, -torch.inf)
    least = torch.tensor(bits, dtype=evolved.dtype)
    left = torch.arange(len(rows))  # windows of which something comes out as yet
    for reader in publics:
        public[left] = torch.maximum(public[left], _read(reader, rows[left], vocabulary)[0])
        gains = (evolved - public)[left]
        by_itself = _best_gain(gains, ranks[left]) >= least[left]
        left = left[by_itself | (_best_gain(gains, ranks_of_often[left], LEAST_OFTEN) >= OFTEN_BITS)]
        if not len(left):
            break
    found = torch.zeros(len(windows), dtype=torch.bool)
    found[left] = True
    return found


def _read(reader: Reader, rows: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Log-likelihood in bits (n, L - 1) of every token but the first of each row (n, L), and the logarithm of its rank."""
    likely, ranks = [], []
    for part in rows.split(max(1, MOST_LOGITS // (rows.shape[1] * vocabulary))):
        logits = reader(part[:, :-1]).float()
        law = logits.log_softmax(-1)
        said = part[:, 1:, None].to(law.device)
        known = said < law.shape[-1]  # of two vocabularies, one may be larger
        own = law.gather(-1, said.clamp_max(law.shape[-1] - 1)).masked_fill(~known, -torch.inf)
        likely.append(doubles(own.squeeze(-1)) / math.log(2))
        ranks.append(doubles((law > own).sum(-1) + 1).log2())
    return torch.cat(likely), torch.cat(ranks)


def _best_gain(gains: Tensor, ranks: Tensor, least: int = LEAST_END) -> Tensor:
    """Of the parts of each row that are among the likeliest continuations, the largest sum of gains (n,).

    What is given before a part is at most half as long again as the part, and four tokens: a secret's first half, and some.

    Args:
        gains, ranks: (n, L - 1) in bits.
        least: tokens of such a part.
    """
    none = torch.zeros(len(gains), 1, dtype=gains.dtype)
    gained = torch.cat([none, gains.nan_to_num(0.0, LARGE, -LARGE).cumsum(1)], dim=1)  # (n, L)
    ranked = torch.cat([none, ranks.clamp_max(LARGE).cumsum(1)], dim=1)
    places = torch.arange(gained.shape[1])
    length = places[None] - places[:, None]  # (begin, end)
    given = places[:, None] + 1
    allowed = (length >= least) & (given >= LEAST_GIVEN) & (given <= 1.5 * length + 4)
    likely = ranked[:, None] - ranked[:, :, None] <= math.log2(MOST_RANKS)
    sums = (gained[:, None] - gained[:, :, None]).masked_fill(~(allowed & likely), -torch.inf)
    return sums.flatten(1).amax(1)
