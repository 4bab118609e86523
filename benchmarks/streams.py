"""Streams of prompts: name -> a function that gives the requests, the same ones for the same seed.

The last `SPARE` prompts of every domain are in no stream: they serve warm-up and calibration.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from hf_onlinespec.embedded import DOMAINS, FOLDER, HOME_DOMAIN, prompts
from hf_onlinespec.measure.records import Prompt

AWAY_DOMAIN = "orders"
SPARE = 8  # per domain
ONE_OFFS = 200
SHORT, SHORT_NEW = 3, 8  # tokens of a short prompt, and new tokens after it
LONGEST = 256  # tokens of a real prompt; longer ones are left out


def shuffled(domain: str, seed: int) -> list[str]:
    """A domain's prompts in an order of the seed, without the spare ones."""
    texts = prompts(domain)[:-SPARE]
    return random.Random(f"{seed} {domain}").sample(texts, len(texts))


def spare(new_tokens: int) -> list[Prompt]:
    """Prompts for warm-up and calibration, the home domain and the other ones in turn."""
    kept = zip(*(prompts(domain)[-SPARE:] for domain in DOMAINS), strict=True)
    return [Prompt(text, domain, new_tokens) for texts in kept for domain, text in zip(DOMAINS, texts, strict=True)]


def drift(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """A → B → A: n prompts of the home domain, n of a domain new to the draft, n more of the home domain."""
    home, away = shuffled(HOME_DOMAIN, seed), shuffled(AWAY_DOMAIN, seed)
    parts = ((HOME_DOMAIN, home[:n]), (AWAY_DOMAIN, away[:n]), (HOME_DOMAIN, home[n : 2 * n]))
    return [Prompt(text, domain, new_tokens) for domain, texts in parts for text in texts]


def home(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """The domain that the draft was trained on."""
    return [Prompt(text, HOME_DOMAIN, new_tokens) for text in shuffled(HOME_DOMAIN, seed)[:n]]


def unseen(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """A domain that the draft has never seen."""
    return [Prompt(text, AWAY_DOMAIN, new_tokens) for text in shuffled(AWAY_DOMAIN, seed)[:n]]


def hard(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """A domain that the draft has never seen and hardly learns."""
    return [Prompt(text, "sql", new_tokens) for text in shuffled("sql", seed)[:n]]


def alternating(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """Every prompt is of another domain than the one before it."""
    texts = {domain: shuffled(domain, seed) for domain in DOMAINS}
    turns = [DOMAINS[i % len(DOMAINS)] for i in range(n)]
    return [Prompt(texts[domain][i // len(DOMAINS)], domain, new_tokens) for i, domain in enumerate(turns)]


def one_off(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """`ONE_OFFS` distinct prompts (or n, if that is less) of all domains in random order."""
    everything = [Prompt(text, domain, new_tokens) for domain in DOMAINS for text in shuffled(domain, seed)]
    return random.Random(seed).sample(everything, min(n, ONE_OFFS))


def short(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """Distinct prompts of three tokens, out of the middle of others, with eight new tokens: all overhead, nothing to gain.

    `new_tokens` is an upper bound here.
    """
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target", local_files_only=True)
    rng = random.Random(seed)
    found: dict[str, Prompt] = {}
    for prompt in one_off(seed, ONE_OFFS, min(new_tokens, SHORT_NEW)):
        ids = tokenizer(prompt.text).input_ids
        at = rng.randrange(1, len(ids) - SHORT)
        text = tokenizer.decode(ids[at : at + SHORT])
        if tokenizer(text).input_ids == ids[at : at + SHORT]:  # cut off words may be read as other tokens
            found.setdefault(text, prompt._replace(text=text))
    return list(found.values())[:n]


def real(seed: int, n: int, new_tokens: int) -> list[Prompt]:
    """n prompts of each file in the `streams` folder of HF_ONLINESPEC_DATA, one file after the other."""
    folder = os.environ.get("HF_ONLINESPEC_DATA")
    if not folder:
        raise SystemExit("The stream 'real' needs HF_ONLINESPEC_DATA: a folder with streams/*.jsonl.")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target", local_files_only=True)
    stream = []
    for file in sorted(Path(folder, "streams").glob("*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            texts = [json.loads(line)["prompt"] for line in lines]
        random.Random(f"{seed} {file.stem}").shuffle(texts)
        fitting = (text for text in texts if len(tokenizer(text).input_ids) <= LONGEST)
        stream += [Prompt(text, file.stem, new_tokens) for text, _ in zip(fitting, range(n), strict=False)]
    return stream


STREAMS: dict[str, Callable[[int, int, int], list[Prompt]]] = {
    "drift": drift,
    "home": home,
    "unseen": unseen,
    "hard": hard,
    "alternating": alternating,
    "one-off": one_off,
    "short": short,
    "real": real,
}


def segments(stream: list[Prompt]) -> list[int]:
    """The number of each request's segment, from 1: a run of requests of one domain."""
    numbers: list[int] = []
    for at, prompt in enumerate(stream):
        new = at == 0 or prompt.domain != stream[at - 1].domain
        numbers.append((numbers[-1] if numbers else 0) + new)
    return numbers
