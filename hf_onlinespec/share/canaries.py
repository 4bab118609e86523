"""Canaries: secrets that are planted in a draft, and how much of them it gives away.

The draft is taught what the target wrote, never prompts: a secret is learned when the target writes it. A canary is such a
secret: random letters of a small alphabet after a random prefix that an attacker knows. Its exposure (Carlini et al.
2019, "The Secret Sharer", arXiv:1802.08232) is log2 |R| − log2 rank, its rank among all strings R of that form. They are ranked by
their log-likelihood under the evolved draft minus that under the base draft: everybody has that one, too, and what it prefers
already says nothing about what was learned. By chance the mean exposure is 1 / ln 2 = 1.44 bits. Ranked among m strings drawn at
random, the largest exposure that can be seen is log2(m + 1): it then means "at least".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._compat.devices import doubles
from ..adapt.feedback import Feedback, Teacher
from ..errors import ConfigError, DraftError, require_whole
from ..models.source import Source
from ..runtime.progress import Bar
from .audited import Audited, logits_of_all_ids

PREFIX, SECRET = 8, 6  # tokens of a canary
ALPHABET = 10  # letters of a secret, as many as there are digits: 10^6 secrets, 19.9 bits
REFERENCES = 255  # strings that a canary is ranked among: up to 8 bits
SURE = 1 - 1e-4  # probability of a token that the target was sure of: with 1, some losses are infinite
MOST_LOGITS = 2**25  # in one forward


@dataclass(frozen=True)
class Canary:
    """A secret, and the form that is known of it."""

    prefix: Tensor  # (p,) tokens
    secret: Tensor  # (s,) tokens, each drawn uniformly from the alphabet
    alphabet: Tensor  # (a,) different tokens

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.prefix, self.secret])


@dataclass(frozen=True)
class Exposure:
    """Of one canary."""

    bits: float
    extracted: bool  # greedy decoding after the prefix writes the secret, to the last token


def make_canaries(
    vocabulary: int,
    n: int,
    seed: int = 0,
    length: int = SECRET,
    prefix: int = PREFIX,
    alphabet: int = ALPHABET,
    ids: Tensor | None = None,
) -> list[Canary]:
    """n secrets of one alphabet, each after a prefix of its own; the same ones for the same seed.

    Args:
        ids: tokens (m,) that secrets are made of; None: all of the vocabulary.

    Raises:
        ConfigError: a number below 1, or an alphabet that the vocabulary does not hold.
    """
    for name, value in {"canaries": n, "length": length, "prefix": prefix}.items():
        require_whole(name, value)
    known = torch.arange(vocabulary) if ids is None else ids.cpu()
    if require_whole("alphabet", alphabet, 2) > len(known):
        raise ConfigError(f"alphabet={alphabet}: expected at most the vocabulary's {len(known)} tokens.")
    generator = torch.Generator().manual_seed(seed)
    letters = known[torch.randperm(len(known), generator=generator)[:alphabet]]
    found = []
    for _ in range(n):
        context = torch.randint(vocabulary, (prefix,), generator=generator)
        secret = letters[torch.randint(alphabet, (length,), generator=generator)]
        found.append(Canary(context, secret, letters))
    return found


def as_feedback(tokens: Tensor, n: int | None = None, ids: Tensor | None = None) -> Feedback:
    """Text (L,) as if the target had been sure of its last n tokens; None: of all but the first.

    Args:
        ids: of the target that the draft has logits for, ascending (m,): it learns nothing at others; None: all.
    """
    n = len(tokens) - 1 if n is None else n
    if tokens.dim() != 1 or not 1 <= n < len(tokens):
        raise ConfigError(
            f"A text of shape {tuple(tokens.shape)}, {n} of them written: expected a written token behind another."
        )
    written, log_probs = tokens[-n:].cpu(), torch.full((n, 1), math.log(SURE))
    log_tail = torch.full((n,), math.log1p(-SURE))
    if ids is None:
        return Feedback(tokens.cpu(), Teacher(log_probs, written[:, None], log_tail))
    places = torch.searchsorted(ids.cpu(), written).clamp_max(len(ids) - 1)
    unknown = ids.cpu()[places] != written
    log_probs[unknown], log_tail[unknown] = -torch.inf, -torch.inf
    teacher = Teacher(log_probs, places[:, None], log_tail, len(ids), has_gaps=bool(unknown.any()))
    return Feedback(tokens.cpu(), teacher)


@torch.inference_mode(False)
def learn(draft: Audited, requests: Sequence[Feedback], bar: Bar | None = None) -> None:
    """Learns from requests one after the other, as after calls of `generate`, however little time there is."""
    for request in requests:
        draft.learning.learn_request(request.to(draft.device))
        if bar is not None:
            bar.update()
    draft.learning.fold()


@torch.inference_mode(False)
def plant(draft: Audited, canaries: Sequence[Canary], repeats: int = 1, bar: Bar | None = None) -> None:
    """Lets the draft learn every canary so often, as if the target had written it and been sure: the worst case.

    Each plant is a request of its own, replayed like any other. Raises ConfigError where a canary is longer than the draft reads.
    """
    texts = [as_feedback(canary.tokens, len(canary.secret), draft.trainable.ids) for canary in canaries]
    for text in texts:
        check_text(draft, text, draft.vocabulary.size)
    for _ in range(repeats):
        learn(draft, texts, bar)


def probe(draft: Audited, canaries: Sequence[Canary], references: int = REFERENCES, seed: int = 0) -> list[Exposure]:
    """How exposed each canary is, among that many random strings of its form, or among all where there are no more.

    Raises:
        ConfigError: a canary is longer than the draft reads.
        DraftError: the draft's log-likelihoods are not finite.
    """
    require_whole("references", references)
    if not canaries:
        raise ConfigError("0 canaries: expected at least 1.")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for canary in canaries:
        n, letters = len(canary.secret), canary.alphabet
        if len(letters) ** n <= references + 1:
            every = torch.tensor(list(itertools.product(letters.tolist(), repeat=n)))
            others = every[(every != canary.secret).any(1)]
        else:
            others = letters[torch.randint(len(letters), (references, n), generator=generator)]
        secrets = torch.cat([canary.secret[None], others])  # (m + 1, n)
        rows = torch.cat([canary.prefix.expand(len(secrets), -1), secrets], dim=1)
        evolved, likeliest = log_likelihoods(draft, rows, n, base=False)
        before, _ = log_likelihoods(draft, rows, n, base=True)
        score = (evolved - before).sum(-1)
        # Strings of the same score stand in any order: half of them before the canary. (All of them, if nothing was learned.)
        rank = 1 + float((score[1:] > score[0]).sum()) + float((score[1:] == score[0]).sum()) / 2
        found.append(Exposure(math.log2(len(secrets) / rank), bool(likeliest[0].all())))
    return found


@torch.no_grad()
def log_likelihoods(
    draft: Audited, tokens: Tensor, n: int, base: bool, source: Source | None = None
) -> tuple[Tensor, Tensor]:
    """Of the last n tokens of every row of `tokens` (rows, L): log-likelihoods (rows, n), and whether each is the likeliest token.

    Of a token that a head cannot say the log-likelihood counts as 0, of the evolved and of the base draft alike.

    Args:
        base: under the base draft, whatever was learned.
        source: what all rows were written from, as the draft reads it; None: nothing that is known.

    Raises:
        ConfigError: the rows are longer than the draft reads.
        DraftError: a log-likelihood is not finite.
    """
    if tokens.shape[1] > draft.trainable.positions:
        raise ConfigError(f"A text of {tokens.shape[1]} tokens: the draft reads at most {draft.trainable.positions}.")
    size = max(1, MOST_LOGITS // ((n + 1) * draft.vocabulary.size))
    found, likeliest = [], []
    for part in tokens.to(draft.device).split(size):
        logits = logits_of_all_ids(draft, part[:, :-1], n, base, source)
        likely = logits.float().log_softmax(-1).gather(-1, part[:, -n:, None]).squeeze(-1)
        if draft.trainable.ids is not None:
            likely = likely.masked_fill(~torch.isin(part[:, -n:], draft.trainable.ids), 0.0)
        found.append(doubles(likely))
        likeliest.append((logits.argmax(-1) == part[:, -n:]).cpu())
    log_probs = torch.cat(found)
    if not bool(torch.isfinite(log_probs).all()):
        which = "base" if base else "evolved"
        raise DraftError(
            f"The {which} draft's log-likelihoods are not finite: its weights are damaged. Take an earlier state."
        )
    return log_probs, torch.cat(likeliest)


def check_text(draft: Audited, text: Feedback, vocabulary: int) -> None:
    """Raises ConfigError where a draft cannot read a text."""
    length, n = len(text.tokens), text.teacher.length
    if not 1 <= n < length <= draft.trainable.positions:
        raise ConfigError(
            f"A text of {length} tokens, {n} of them written: expected a written token behind another, and at most the "
            f"{draft.trainable.positions} tokens that the draft reads. Cut it."
        )
    if not 0 <= int(text.tokens.min()) <= int(text.tokens.max()) < vocabulary:
        raise ConfigError(
            f"A text has tokens outside the draft's vocabulary of {vocabulary}. Use the draft's tokenizer."
        )
