"""How often the suffix memory is right on the embedded target's own outputs, with no draft and no clock.

    python benchmarks/studies/memory_hits.py --prompts 100

Every prompt is generated from; at each generated position of the second half of the stream the memory is asked before the token joins it.
Cells: greedy, how often the target's argmax is among its answers; sampled, the target's chance to draw one of them. The likeliest
answer, and the likeliest four, as they are guessed in a tree. No answer counts as 0.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor
from transformers.utils import logging

from hf_onlinespec.commit.suffix_memory import REACH, SuffixMemory
from hf_onlinespec.embedded import DOMAINS, EmbeddedPair, load_pair, prompts
from hf_onlinespec.govern.acceptance import Continuation

SOURCES = ("both, the longest wins", "this request", "earlier requests")
GUESSES = (1, 4)  # at one place


@torch.no_grad()
def record(pair: EmbeddedPair, text: str, temperature: float, new_tokens: int) -> tuple[list[int], list[int], Tensor]:
    """Prompt tokens, new tokens, and the laws (n, V) that these were taken from."""
    ids = pair.tokenizer(text, return_tensors="pt").input_ids
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = pair.target.generate(ids, max_new_tokens=new_tokens, return_dict_in_generate=True, output_scores=True, **how)
    return ids[0].tolist(), out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.scores).softmax(-1)


def right(found: Continuation | None, p: Tensor, greedy: bool, guesses: int) -> float:
    if found is None:
        return 0.0
    guessed = list(found.tokens[:guesses])
    return float(int(p.argmax()) in guessed) if greedy else p[guessed].sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    pair = load_pair()
    columns = [f"{source}: {n}" for source in SOURCES for n in GUESSES]
    print("| domain | temperature | " + " | ".join(columns) + " |\n" + "|---" * (2 + len(columns)) + "|")
    for domain in DOMAINS:
        for temperature in (0.0, 0.8):
            torch.manual_seed(0)
            shared = SuffixMemory(65_536)
            scores: dict[str, list[float]] = {column: [] for column in columns}
            for number, text in enumerate(prompts(domain)[: args.prompts]):
                prompt, new, laws = record(pair, text, temperature, args.new_tokens)
                own = SuffixMemory(len(prompt) + len(new) + 1)
                own.extend(prompt)
                written = list(prompt)
                for token, p in zip(new, laws, strict=True):
                    here, before = own.continuation(written[-REACH:]), shared.continuation(written[-REACH:])
                    longest = before if here is None or (before and before.length > here.length) else here
                    if 2 * number >= args.prompts:
                        for source, found in zip(SOURCES, (longest, here, before), strict=True):
                            for n in GUESSES:
                                scores[f"{source}: {n}"].append(right(found, p, temperature == 0, n))
                    own.extend([token])
                    written.append(token)
                shared.extend(written)
                shared.close()
            cells = [f"{statistics.mean(scores[column]):.3f}" for column in columns]
            print(f"| {domain} | {temperature:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
