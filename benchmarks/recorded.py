"""Streams of requests, each with what the target said recorded: learners are compared on them without a target forward.

A draft that learns at the end of each request has constant weights inside it, so its acceptance length on a recorded text is
that of a live run: greedy, the rounds that are needed when every round keeps the drafted tokens that agree; sampled, their
expectation, where a token x of the text was drafted with chance min(1, q(x) / p(x)).
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from streams import LONGEST, shuffled
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_onlinespec.embedded import DOMAINS, load_draft, load_pair
from hf_onlinespec.rounds import Proposal

HOME, AWAY, HARD = "shell", "orders", "sql"


def gradual(n: int) -> list[str]:
    """From home to away, ever more often."""
    rng = random.Random(0)
    return [AWAY if rng.random() < i / (n - 1) else HOME for i in range(n)]


STREAMS: dict[str, Callable[[int], list[str]]] = {
    "stationary": lambda n: [AWAY] * n,
    "hard": lambda n: [HARD] * n,
    "home": lambda n: [HOME] * n,  # nothing to be gained: the draft was trained on it
    "drift": lambda n: [HOME] * (n // 2) + [AWAY] * n + [HOME] * (n // 2),
    "return": lambda n: [AWAY] * n + [HARD] * n + [AWAY] * (n // 3),  # back to what had to be learned
    "gradual": gradual,
    "alternating": lambda n: [(HOME, AWAY, HARD)[i % 3] for i in range(n)],
    # Prompts that are meant to lead it astray: random tokens, one token again and again.
    "burst": lambda n: [AWAY] * n + ["random"] * 10 + ["repeated"] * 10 + [AWAY] * (n // 2),
    # Needs HF_ONLINESPEC_DATA: real prompts of four kinds, one after the other; and, for `--pair stories`, beginnings of stories.
    "real": lambda n: [name for name in ("gsm8k", "mbpp", "shell_tldr", "nq_open") for _ in range(n)],
    "stories": lambda n: ["stories"] * n,
    "mix": lambda n: random.Random(1).choices((HOME, AWAY, HARD), k=n),
}


@dataclass(frozen=True)
class Recorded:
    """One request of a domain: `tokens` (L,) with the target's `logits` (n, vocab) for its last n tokens."""

    domain: str
    tokens: Tensor
    logits: Tensor


def data_folder() -> Path:
    folder = os.environ.get("HF_ONLINESPEC_DATA")
    if not folder:
        raise SystemExit("This stream needs HF_ONLINESPEC_DATA: a folder with streams/, corpora/ and models/.")
    return Path(folder)


class Source:
    """A pair, and what its target says.

    Args:
        pair: "embedded", or "stories": two real tiny models of the data folder.
    """

    def __init__(self, pair: str = "embedded") -> None:
        self._stories = pair == "stories"
        if self._stories:
            self.target = self._load(AutoModelForCausalLM, "stories260k").eval()
            self.tokenizer = self._load(AutoTokenizer, "stories260k")
        else:
            embedded = load_pair()
            self.target, self.tokenizer = embedded.target, embedded.tokenizer
        self._recorded: dict[tuple[str, float, int, str], Recorded] = {}

    def draft(self) -> PreTrainedModel:
        """A fresh one."""
        return self._load(AutoModelForCausalLM, "salty281k").eval() if self._stories else load_draft()

    def _load(self, kind: Any, name: str) -> Any:
        return kind.from_pretrained(data_folder() / "models" / name, local_files_only=True)

    def texts(self, domain: str, seed: int) -> list[str]:
        """All prompts of a domain, in the seed's order."""
        if domain in DOMAINS:
            return shuffled(domain, seed)
        if domain == "stories":
            whole = (data_folder() / "corpora" / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
            found = [" ".join(text.split()[:8]) for text in whole if len(text.split()) > 20]
        else:
            with open(data_folder() / "streams" / f"{domain}.jsonl", encoding="utf-8") as file:
                found = [json.loads(line)["prompt"] for line in file]
            found = [text for text in found if len(self.tokenizer(text).input_ids) <= LONGEST]
        return random.Random(f"{seed} {domain}").sample(found, len(found))

    def endless(self, domain: str, seed: int) -> Iterator[str]:
        """A domain's prompts in the seed's order, then in the next one's; the adversarial ones are made up."""
        rng = random.Random(f"{seed} {domain}")
        for again in itertools.count():
            if domain not in ("random", "repeated"):
                yield from self.texts(domain, seed + 1000 * again)
            else:
                size = len(self.tokenizer)
                ids = [rng.randrange(size) for _ in range(24)] if domain == "random" else [rng.randrange(size)] * 24
                yield self.tokenizer.decode(ids)

    @torch.no_grad()
    def record(self, domain: str, text: str, temperature: float, seed: int, new_tokens: int) -> Recorded:
        """What the target says after a prompt; the same for every learner."""
        key = (domain, temperature, seed if temperature else 0, text)
        if key not in self._recorded:
            torch.manual_seed(seed)
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            law = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            out = self.target.generate(
                ids, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, **law
            )
            self._recorded[key] = Recorded(domain, out.sequences[0], torch.cat(out.logits))
        return self._recorded[key]

    def stream(self, name: str, n: int, temperature: float, seed: int, new_tokens: int) -> list[Recorded]:
        """The requests, prompts in the seed's order; a domain that has run out of prompts begins anew with the next seed's."""
        domains = STREAMS[name](n)
        texts = {domain: self.endless(domain, seed) for domain in set(domains)}
        return [self.record(d, next(texts[d]), temperature, seed, new_tokens) for d in domains]


def kept_chances(request: Recorded, logits: Tensor, temperature: float) -> list[float]:
    """Chance that each token of the text was drafted, given the draft's logits (n, vocab) there."""
    n = len(request.logits)
    text = request.tokens[-n:]
    if not temperature:
        return (logits.argmax(-1) == text).float().tolist()
    p, q = (z.div(temperature).log_softmax(-1).gather(-1, text[:, None])[:, 0] for z in (request.logits, logits))
    return (q - p).exp().clamp_max(1.0).tolist()


def walk(proposal: Proposal, said: Sequence[int]) -> tuple[list[int], list[tuple[int, float]]]:
    """What a greedy target keeps of a proposal for one row, if it says these tokens: as `Verdict.paths` and `Verdict.chances`.

    Returns:
        The candidates that are kept, and of every candidate that was verified whether it was: (candidate, 0 or 1).
    """
    parents, tokens = proposal.parents_of(0), proposal.tokens[0].tolist()
    path: list[int] = []
    verified: list[tuple[int, float]] = []
    for token in said:
        here = [i for i, parent in enumerate(parents) if parent == (path[-1] if path else -1)]
        kept = next((i for i in here if tokens[i] == token), None)
        verified += [(i, float(i == kept)) for i in here]
        if kept is None:
            break
        path.append(kept)
    return path, verified
