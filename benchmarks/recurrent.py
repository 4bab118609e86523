"""What drafting brings on targets with a recurrent state, by how many of the drafted tokens are right.

python benchmarks/recurrent.py [--share 0.2 0.4] [--rounds 5]

Random weights of 80 to 100 million parameters in bfloat16: no trained model of these classes is at hand, and the time of a forward does
not depend on what the weights say. What is drafted is the plain answer, in which a share of the tokens was replaced at random, so that
the draft itself takes no time; where rounding lets the two answers part, fewer are accepted than were right. Plain decoding and ours alternate; the median of the ratios, and their 90 % interval.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.fakes import PlainDraft, ScriptedProposer

SIZE: dict[str, Any] = dict(vocab_size=49152, hidden_size=576)
ATTENTION: dict[str, Any] = dict(
    num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1536
)
MAMBA: dict[str, Any] = dict(mamba_d_head=64, mamba_d_state=64, mamba_chunk_size=64)
DELTA = {f"linear_{name}": 8 for name in ("num_key_heads", "num_value_heads")}
DELTA |= {f"linear_{name}_head_dim": 64 for name in ("key", "value")}


def qwen3_next() -> PreTrainedModel:
    dense = dict(num_experts=0, mlp_only_layers=list(range(8)))
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SIZE, **ATTENTION, **DELTA, **dense, head_dim=64))


def falcon_h1() -> PreTrainedModel:
    return FalconH1ForCausalLM(
        FalconH1Config(**SIZE, **ATTENTION, **MAMBA, mamba_d_ssm=1024, mamba_n_heads=16, head_dim=64)
    )


def granite_hybrid() -> PreTrainedModel:
    layers = (["mamba"] * 3 + ["attention"]) * 2
    dense = dict(num_local_experts=0, shared_intermediate_size=1536)
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(**SIZE, **ATTENTION, **MAMBA, **dense, layer_types=layers, mamba_n_heads=18)
    )


def mamba2() -> PreTrainedModel:
    return Mamba2ForCausalLM(
        Mamba2Config(**SIZE, num_hidden_layers=12, num_heads=18, head_dim=64, state_size=64, n_groups=1, chunk_size=64)
    )


def forward_costs(target: PreTrainedModel, prompt: torch.Tensor) -> dict[int, float]:
    """Time of a forward over so many tokens, in forwards over one."""
    cache, times = DynamicCache(config=target.config), dict[int, list[float]]()
    with torch.no_grad():
        target(prompt, cache=cache)
        for _ in range(8):
            for n in (1, 2, 4, 8, 16, 32):
                started = time.perf_counter()
                target(prompt[:, :n], cache=cache, logits_to_keep=n)
                times.setdefault(n, []).append(time.perf_counter() - started)
    return {n: statistics.median(seen) / statistics.median(times[1]) for n, seen in times.items()}


def compare(plain: Callable[[], float], ours: Callable[[], float], rounds: int) -> str:
    ratios = []
    for _ in range(rounds):
        before, own, after = plain(), ours(), plain()
        ratios.append((before + after) / 2 / own)
    ratios.sort()
    edge = max(1, round(0.05 * rounds))
    return f"{statistics.median(ratios):.3f} ({ratios[edge - 1]:.3f}-{ratios[-edge]:.3f})"


def measure(name: str, target: PreTrainedModel, shares: list[float], rounds: int, tokens: int) -> None:
    prompt = torch.randint(3, 1000, (1, 64))
    costs = ", ".join(f"{n}: {cost:.2f}" for n, cost in forward_costs(target, prompt).items())
    print(f"{name}: forwards over n tokens, in steps: {costs}", flush=True)
    arguments: dict[str, Any] = dict(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)

    def timed(**arm: Any) -> float:
        started = time.perf_counter()
        target.generate(prompt, **arguments, **arm)
        return time.perf_counter() - started

    script = target.generate(prompt, **arguments)
    for share in shares:
        wrong = torch.rand(script.shape, generator=torch.Generator().manual_seed(1)) < share
        draft = PlainDraft(ScriptedProposer(torch.where(wrong, script + 1, script), vocab=SIZE["vocab_size"]))
        timed(assistant_model=draft)  # tries the target
        found = compare(timed, functools.partial(timed, assistant_model=draft), rounds)
        kept = draft.metrics.accepted_tokens / max(1, draft.metrics.drafted_tokens)
        print(f"  {share:.0%} wrong, {kept:.0%} of 4 accepted: net {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.7])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for make in (qwen3_next, falcon_h1, granite_hybrid, mamba2):
        torch.manual_seed(0)
        measure(make.__name__, make().eval().to(torch.bfloat16), options.share, options.rounds, options.tokens)


if __name__ == "__main__":
    main()
