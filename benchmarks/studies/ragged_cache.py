"""How the cache of rows that accept different numbers of tokens is kept: time of a round, in three layouts.

    python benchmarks/studies/ragged_cache.py

holes    rejected places stay, masked, as far as another row has accepted there
compact  the same, and the places of a row are moved together once a quarter of all places are holes
align    every round ends with all rows moved to the right, as the paddings of plain decoding

A Llama of 6 layers, 256 wide, in float32 on one thread; 4 candidates a round, each kept with a chance of 0.7; 64 new tokens per row.
"""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

K, CHANCE, NEW, WASTE = 4, 0.7, 64, 0.25


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def moved(states: Tensor, places: Tensor) -> Tensor:
    """The places (batch, n) of states (batch, heads, length, width), in this order."""
    return torch.stack([row.index_select(1, own) for row, own in zip(states, places, strict=True)])


@torch.no_grad()
def run(model: LlamaForCausalLM, layout: str, batch: int, context: int) -> tuple[float, float, float]:
    """Seconds of a round, of them for the cache alone, and the places in it over the tokens of the longest row, at the end."""
    rng = random.Random(1)
    cache = DynamicCache(config=model.config)
    model(torch.randint(4096, (batch, context)), past_key_values=cache, use_cache=True)
    seen = torch.ones(batch, context, dtype=torch.long)
    lengths = [context] * batch
    keeping, rounds, started = 0.0, 0, time.perf_counter()
    while min(lengths) < context + NEW:
        feed = torch.randint(4096, (batch, K + 1))
        positions = torch.tensor(lengths)[:, None] + torch.arange(K + 1)
        mask = torch.cat([seen, torch.ones_like(feed)], dim=1)
        model(feed, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        kept = [1 + next((i for i in range(K) if rng.random() > CHANCE), K) for _ in range(batch)]
        clock = time.perf_counter()
        cache.crop(max(kept) - K - 1)
        own = torch.arange(max(kept))[None] < torch.tensor(kept)[:, None]
        seen = torch.cat([seen, own.long()], dim=1)
        lengths = [n + more for n, more in zip(lengths, kept, strict=True)]
        wasted = seen.shape[1] - max(lengths)
        if layout == "align" or (layout == "compact" and wasted > WASTE * seen.shape[1]):
            # Holes first, in the order of the places.
            places = seen.argsort(dim=1, stable=True)[:, seen.shape[1] - max(lengths) :]
            for layer in cache.layers:
                layer.keys, layer.values = moved(layer.keys, places), moved(layer.values, places)
            seen = seen.gather(1, places)
        keeping += time.perf_counter() - clock
        rounds += 1
    return (time.perf_counter() - started) / rounds, keeping / rounds, seen.shape[1] / max(lengths)


def main() -> None:
    torch.set_num_threads(1)
    model = small_model()
    print("rows  context  layout    round ms  of it cache ms  places / tokens")
    for batch in (2, 8, 16):
        for context in (100, 1000):
            for layout in ("holes", "compact", "align"):
                found = sorted(run(model, layout, batch, context) for _ in range(3))[1]
                print(
                    f"{batch:4}  {context:7}  {layout:8}  {1e3 * found[0]:8.1f}  {1e3 * found[1]:14.2f}  {found[2]:15.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
