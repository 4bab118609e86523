"""Whether two states of the package do the same to the last bit: digests of one repeatable run, to be compared line by line.

    python benchmarks/same_bits.py > before.txt
    git switch --detach OTHER_COMMIT
    python benchmarks/same_bits.py | diff before.txt -

The embedded pair, 20 requests in float32 on one thread, lookahead=4, update_every=1, greedy but for the last arm; no clock decides
anything. Public names only, so that it runs on earlier commits too. Bits are comparable on one machine with one build of torch.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_memory
from hf_onlinespec.embedded import DOMAINS, EmbeddedPair, load_draft, load_pair, prompts

REQUESTS, NEW_TOKENS = 20, 18
COUNTED = (  # of a request; times differ from run to run
    "rounds",
    "new_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "verified_positions",
    "overlap",
    "updates",
    "learned_tokens",
    "skipped_updates",
)
ADAPTER, STATE = "adapter_model.safetensors", "onlinespec_state.safetensors"
FIXED: dict[str, Any] = {"lookahead": 4, "update_every": 1, "seed": 0}
# name -> settings, and whether tokens are drawn; no settings: the suffix memory drafts alone.
ARMS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "draft": ({"update_when": "round"}, False),
    "request": ({"update_when": "request"}, False),
    "ensemble": ({"update_when": "request", "learner": "ensemble", "rank": 8}, False),
    "no_memory": ({"update_when": "request", "memory_tokens": 0, "replay_tokens": 0}, False),
    "memory": (None, False),
    "sampled": ({"update_when": "request", "top_k": 32, "loss": "reverse_kl"}, True),
}


class Rounds(BaseStreamer):
    """How many tokens each target forward gave: a streamer for the tokens, a hook for the forwards; 0: of a probe."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def begin(self, *_: Any) -> None:
        self.lengths.append(0)

    def put(self, value: Tensor) -> None:
        if self.lengths:  # the prompt comes before the first forward
            self.lengths[-1] += value.numel()

    def end(self) -> None:
        pass


def stream() -> list[str]:
    """Prompts of the three domains in blocks of four, the first of them again at the end."""
    texts = {domain: prompts(domain) for domain in DOMAINS}
    blocks = [texts[DOMAINS[at % len(DOMAINS)]][4 * at : 4 * at + 4] for at in range(REQUESTS // 4 - 1)]
    return [text for block in [*blocks, blocks[0]] for text in block]


def digest(parts: Iterable[str | bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else part.encode())
    return found.hexdigest()[:16]


def tensor_bits(file: Path) -> Iterable[str | bytes]:
    """Names, shapes and bits of a file's tensors, by name."""
    for name, tensor in sorted(load_file(file).items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def run(name: str, pair: EmbeddedPair) -> None:
    settings, sample = ARMS[name]
    known = {f.name for f in fields(OnlineSpecConfig)}
    config = OnlineSpecConfig(**FIXED, **{"audit_tokens": 0} if "audit_tokens" in known else {}, **settings or {})
    draft = online_memory(pair.target, config) if settings is None else OnlineDraft(load_draft(), config)
    assistant = {} if settings is None else {"assistant_model": draft}
    options = {"do_sample": True, "temperature": 0.9, "top_k": 50} if sample else {"do_sample": False}
    outputs: list[str] = []
    rounds: list[str] = []
    counts: list[str] = []
    for at, text in enumerate(stream()):
        inputs = pair.tokenizer(text, return_tensors="pt")
        seen = Rounds()
        hook = pair.target.register_forward_pre_hook(seen.begin)
        torch.manual_seed(at)
        output = pair.target.generate(
            **inputs, max_new_tokens=NEW_TOKENS, streamer=seen, onlinespec=True, **assistant, **options
        )
        hook.remove()
        outputs.append(repr(output[0].tolist()))
        rounds.append(repr([n for n in seen.lengths if n]))
        counts.append(repr([getattr(draft.metrics.last, key) for key in COUNTED]))
    lengths = f"{draft.metrics.new_tokens / draft.metrics.rounds:.4f}"
    print(f"{name:10} outputs            {digest(outputs)}")
    print(f"{name:10} acceptance lengths {digest(rounds)}  mean {lengths}")
    print(f"{name:10} counts             {digest(counts)}  {draft.metrics.updates} updates")
    if isinstance(draft, OnlineDraft):
        with tempfile.TemporaryDirectory() as folder:
            draft.save_pretrained(folder)
            print(f"{name:10} adapter            {digest(tensor_bits(Path(folder, ADAPTER)))}")
            print(f"{name:10} learner's state    {digest(tensor_bits(Path(folder, STATE)))}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what this or that commit warns of is not compared
    pair = load_pair()
    for name in ARMS:
        run(name, pair)


if __name__ == "__main__":
    main()
