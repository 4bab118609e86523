"""Which texts that a draft has learned from come out of it again: the examination that decides on a public push.

While a draft learns, the texts of its requests stay in its process (`learned_texts.py`) and are never saved. At a save and before a
public push they are cut into short windows, and `examine` asks the adapter itself: given only the beginning of a window, does the
evolved draft write its end, and is that end much likelier than under models that never saw the text? These are the base draft, and
the target without the rest of the request: what they write by themselves is no secret of a user. A text is memorised if
`GAIN_BITS` of it come out. `OFTEN_BITS` are enough if its prompt may have stood more than `FEW` times in the stream, and for a
part that the target may have written that often, whatever the prompts were.

What is kept is numbers (`PrivacyRecord`): how many texts there were, how many were examined, how many came out, how often the most
frequent prompt stood in the stream, the settings of learning. They travel in the lineage: through saving, loading with other
settings, merging, distilling. Where one prompt makes much of the stream, canaries planted as often decide too (`privacy.py`), under
every setting that was in use. A draft without such a record is refused: an adapter from elsewhere, a fine-tuned one, an older
artifact, texts that were not examined.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._compat.devices import doubles
from ..adapt.learned_texts import Examined, LearnedText, written_often
from ..models.opening import opening_tokens
from ..runtime.progress import progress
from .audited import Audited, logits_of_all_ids
from .learned_from import examined_state
from .privacy_record import GAIN_BITS, OFTEN_BITS

logger = logging.getLogger(__name__)

WINDOW, STRIDE = 24, 4  # tokens of a window, and between the beginnings of two; chosen
LEAST_GIVEN, LEAST_END = 3, 3  # tokens of a window that are given, and that come out, at least; chosen
# The end is among the likeliest continuations: the product of its tokens' ranks is at most this, 1 where greedy decoding writes it.
# It leaves room over "the ten likeliest"; without secrets, the largest gains of two streams are the same with 16. Chosen.
MOST_RANKS = 64
# Tokens that come out of a part that was written often, at least. In 20 streams of orders without secrets such parts gain at most 8.4
# bits; with 3 tokens one stream has 10.02, of which 8.1 are the first word of a phrase that every text may end with.
LEAST_OFTEN = 4
SAVE_S = 20.0  # seconds that a save may spend on it; chosen: forty requests of the embedded pair take 8
MOST_LOGITS = 2**25  # in one forward
# Σ min(p, q) of the base draft's distributions after a part of a text, with and without the token that opens texts. Chosen: the
# embedded draft, which was trained on texts in pieces, has 0.86; a model that never saw a text without that token has less.
LEAST_OVERLAP = 0.5
GROUP = 16  # texts that are examined together
TOGETHER = 256  # windows of one batch; the clock is read after each
LARGE = 1e6  # in place of infinity, so that differences of sums stay numbers


Reader = Callable[[Tensor], Tensor]  # logits (rows, L, vocab) of tokens (rows, L)


@torch.no_grad()
def examine(draft: Audited, seconds: float = math.inf) -> Examined:
    """Finds out which of the texts that a draft has learned from come out of it, and keeps the result with the draft.

    Those whose prompt stands often come first, then the newest.

    Args:
        seconds: after which it stops; what is left counts as not examined.
    """
    started = time.perf_counter()
    with draft.learning.at_rest() as learned:
        record = draft.lineage.privacy
    before = 0 if record is None else record.repeats
    state, done = examined_state(learned, before), learned.examined
    if done is not None and (done.state, done.texts) == (state, len(learned.texts)):
        return done
    texts = sorted(learned.texts[::-1], key=lambda text: not text.stands_often(before))
    often = written_often(texts, before)
    examined, memorised = 0, 0
    known: set[Window] = set()  # that were looked at: those of a system prompt once
    with _reference_models(draft) as references, progress(len(texts), "Looking whether texts come out", "text") as bar:
        opens = _needs_opening(draft, references[0], texts)
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
                out += _come_out(draft, references, [window for _, window in some], bits).tolist()
            memorised += len({n for (n, _), comes in zip(windows, out, strict=False) if comes})
            if len(out) < len(windows):
                break  # none of the group was read to its end
            examined += len(group)
            bar.update(len(group))
    found = Examined(*state, examined, memorised)
    draft.learning.learner.texts.examined = found
    return found


@contextmanager
def _reference_models(draft: Audited) -> Iterator[list[Reader]]:
    """Models that never saw the text: the base draft, and the target, where it is at hand."""
    target = draft.targets.at_hand
    readers = [_reader(draft, base=True)]
    if target is None:
        yield readers
        return
    modes = [(module, module.training) for module in target.modules()]
    target.eval()  # one that is trained may have dropout
    try:
        if _takes_tokens_alone(target):
            readers.append(partial(_target_logits, target))
        yield readers
    finally:
        for module, mode in modes:
            module.training = mode


def _target_logits(target: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = target(input_ids=tokens.to(target.device), use_cache=False).logits
    return logits


def _takes_tokens_alone(target: PreTrainedModel) -> bool:
    """Whether a target takes tokens and nothing else. Without it only the base draft is compared with: more is refused."""
    try:
        return _target_logits(target, torch.zeros(1, 2, dtype=torch.long)).dim() == 3
    except Exception as error:  # whatever another class of models asks for
        logger.info(
            "The target takes more than tokens (%s): what the draft writes is compared with the base draft alone.",
            error,
        )
        return False


def _reader(draft: Audited, base: bool) -> Reader:
    return lambda tokens: logits_of_all_ids(draft, tokens, tokens.shape[1], base)


def _needs_opening(draft: Audited, base: Reader, texts: Sequence[LearnedText]) -> bool:
    """Whether the base draft predicts differently after a part of a text without the token that opens texts (see opening.py)."""
    overlaps: list[float] = []
    for text in texts:
        opening = opening_tokens(draft.config, text.tokens.tolist())
        part = text.tokens[STRIDE : STRIDE + min(WINDOW, draft.trainable.positions - 1)]
        if opening and len(part) >= LEAST_GIVEN + LEAST_END and len(overlaps) < GROUP:
            half = len(part) // 2
            without = base(part[None])[0, half:].float().softmax(-1)
            opened = base(torch.cat([part.new_tensor(opening), part])[None])[0, -len(without) :].float().softmax(-1)
            overlaps.append(float(torch.minimum(without, opened).sum(-1).mean()))
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
        opens: whether every window begins with the token that opens the text: some models predict nonsense without it.
    """
    config = draft.config.get_text_config()
    vocabulary = config.vocab_size
    tokens, flags = text.tolist(), often.tolist()
    opening = opening_tokens(config, tokens) if opens else []
    size = min(WINDOW, draft.trainable.positions - len(opening))
    begins = range(0, max(1, len(tokens) - LEAST_GIVEN - LEAST_END + 1), STRIDE)
    found = []
    for begin in begins:
        before = opening if begin else []
        part, flagged = tokens[begin : begin + size], flags[begin : begin + size]
        found.append(Window((*before, *part), (*(False for _ in before), *flagged)))
    return [window for window in found if max(window.tokens, default=vocabulary) < vocabulary]


def _come_out(draft: Audited, references: Sequence[Reader], windows: Sequence[Window], bits: Sequence[float]) -> Tensor:
    """Whether the end of each window (n,) comes out of the evolved draft, by so many bits likelier than under any reference.

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
    evolved, ranks = _bits_and_ranks(_reader(draft, base=False), rows, vocabulary)
    padding = torch.arange(1, rows.shape[1]) >= lengths[:, None]
    ranks = ranks.masked_fill(padding, torch.inf)
    ranks_of_often = ranks.masked_fill(~often[:, 1:], torch.inf)
    reference = torch.full_like(evolved, -torch.inf)
    least = torch.tensor(bits, dtype=evolved.dtype)
    left = torch.arange(len(rows))  # windows of which something comes out as yet
    for reader in references:
        reference[left] = torch.maximum(reference[left], _bits_and_ranks(reader, rows[left], vocabulary)[0])
        gains = (evolved - reference)[left]
        by_itself = _best_gain(gains, ranks[left]) >= least[left]
        left = left[by_itself | (_best_gain(gains, ranks_of_often[left], LEAST_OFTEN) >= OFTEN_BITS)]
        if not len(left):
            break
    found = torch.zeros(len(windows), dtype=torch.bool)
    found[left] = True
    return found


def _bits_and_ranks(reader: Reader, rows: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Log-likelihood in bits (n, L - 1) of every token but the first of each row (n, L), and the logarithm of its rank."""
    likely, ranks = [], []
    for part in rows.split(max(1, MOST_LOGITS // (rows.shape[1] * vocabulary))):
        logits = reader(part[:, :-1]).float()
        log_probs = logits.log_softmax(-1)
        tokens = part[:, 1:, None].to(log_probs.device)
        known = tokens < log_probs.shape[-1]  # of two vocabularies, one may be larger
        own = log_probs.gather(-1, tokens.clamp_max(log_probs.shape[-1] - 1)).masked_fill(~known, -torch.inf)
        likely.append(doubles(own.squeeze(-1)) / math.log(2))
        ranks.append(doubles((log_probs > own).sum(-1) + 1).log2())
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
