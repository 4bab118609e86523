"""Which tokens a new head can propose: the target's own frequent ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from .head_answers import Answer

# How often a token of an answer counts, against once for one of a prompt. SmolLM2-135M, 82,000 answer tokens, 6,144 ids: they are
# 88.6 % of the tokens of held-out answers, against 87.6 % by answers alone.
ANSWER_WEIGHT = 3


def frequent_tokens(answers: Iterable[Answer], size: int, always: Iterable[int], vocab_size: int) -> Tensor:
    """(size,) the tokens that stand most often in answers, ascending; tokens of prompts count less, and `always` are among them.

    Of tokens that are equally frequent the lower ids are taken: tokenizers give them to the more frequent ones.
    """
    counts: Counter[int] = Counter()
    for answer in answers:
        for token in answer.tokens:
            counts[token] += ANSWER_WEIGHT
        for token in answer.prompt:
            counts[token] += 1
    chosen = [token for token in dict.fromkeys(always) if 0 <= token < vocab_size][:size]
    ranked = sorted(set(range(vocab_size)) - set(chosen), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(chosen + ranked[: size - len(chosen)]))
