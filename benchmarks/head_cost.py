"""What a draft head costs beside its target: the time of a step, and the memory of learning.

    python benchmarks/head_cost.py MODEL random
    python benchmarks/head_cost.py MODEL HEAD_FOLDER

The target in bfloat16 on one thread, the head in turns with it, medians; `random`: an EAGLE-3 head of the target's width with 6,144
tokens, as speed and memory ask for no training. The memory is that of the default settings, after a few requests and with the replay
filled up to its bound by requests of 512 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_onlinespec import Feedback, OnlineDraft
from hf_onlinespec._compat.caches import CACHE
from hf_onlinespec._compat.hidden_states import hidden_states_inputs
from hf_onlinespec._compat.rollback import crop
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.config import Eagle3Config
from hf_onlinespec.heads.eagle3 import Eagle3Head
from hf_onlinespec.heads.reading import read_head


def random_head(target: PreTrainedModel, draft_vocabulary: int = 6144) -> Head:
    """An EAGLE-3 head of the target's width."""
    config = target.config
    layers = config.num_hidden_layers
    made = Eagle3Config(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        draft_vocab_size=draft_vocabulary,
        reads=(2, layers // 2, layers - 3),
        max_position_embeddings=config.max_position_embeddings,
    )
    return Eagle3Head(made).to(target.dtype).eval()


def medians_ms(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Each way's median time, taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(repeats + 3):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if at >= 3:
                spent[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in spent.items()}


@torch.inference_mode()
def steps_ms(target: PreTrainedModel, draft: OnlineDraft, context: int, repeats: int) -> dict[str, float]:
    """One token of the target's, one drafted token of the head's, and the head's first step over two true rows behind `context` tokens."""
    tokens = torch.randint(0, target.config.vocab_size, (1, context))
    caches = {name: DynamicCache() for name in ("target", "head")}
    asked = hidden_states_inputs(draft.reads)
    states = target(tokens, **{CACHE: caches["target"]}, **asked, logits_to_keep=1).hidden_states
    features = torch.cat([states[i] for i in draft.reads], dim=-1)
    one = tokens[:, :1]

    def of_target() -> None:
        target(one, **{CACHE: caches["target"]}, logits_to_keep=1)
        crop(caches["target"], 1)

    def with_states() -> None:
        target(one, **{CACHE: caches["target"]}, **asked, logits_to_keep=1)
        crop(caches["target"], 1)

    with draft.trainable.serving() as head:
        read = head(tokens=tokens, features=features, **{CACHE: caches["head"]}, use_cache=True, logits_to_keep=1)
        hidden = read.hidden[:, -1:]

        def of_head() -> None:
            head(tokens=one, hidden=hidden, **{CACHE: caches["head"]}, use_cache=True, logits_to_keep=1)
            crop(caches["head"], 1)

        def first() -> None:
            rows = dict(tokens=tokens[:, :2], features=features[:, :2])
            head(**rows, **{CACHE: caches["head"]}, use_cache=True, logits_to_keep=1)
            crop(caches["head"], 2)

        ways = {"target": of_target, "target, hidden states asked": with_states, "head": of_head, "head, first": first}
        return medians_ms(ways, repeats)


def filled(draft: OnlineDraft, features: int, dtype: torch.dtype, vocabulary: int) -> None:
    """Fills the replay up to its bound with requests of 512 tokens, half of them answers."""
    replay = draft.learning.learner.replay
    held = -1
    while replay.nbytes > held:
        held = replay.nbytes
        for _ in range(8):
            teacher = Teacher.from_logits(torch.randn(256, vocabulary)).top(draft.settings.replay_top_k)
            replay.add(Feedback(torch.randint(0, vocabulary, (512,)), teacher, torch.zeros(511, features, dtype=dtype)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the target")
    parser.add_argument("head", help="its head, or 'random'")
    parser.add_argument("--context", type=int, default=256, help="tokens in front of a step")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--requests", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    made = options.head == "random"
    head = random_head(target) if made else read_head(options.head, target.config, dtype=torch.bfloat16)
    draft = OnlineDraft(head, update_every=1)
    for _ in range(options.requests):
        tokens = torch.randint(0, target.config.vocab_size, (1, 64))
        mask = torch.ones_like(tokens)
        target.generate(tokens, attention_mask=mask, assistant_model=draft, max_new_tokens=32, do_sample=False)
    assert draft.metrics.updates
    ms = steps_ms(target, draft, options.context, options.repeats)
    own = sum(weight.nbytes for weight in head.parameters())
    after = draft.learning_bytes
    vocabulary = len(head.draft_ids) if head.draft_ids is not None else target.config.vocab_size
    filled(draft, head.features_size, target.dtype, vocabulary)
    full, replay = draft.learning_bytes, draft.learning.learner.replay
    print(", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()) + f" behind {options.context} tokens")
    print(f"head step ÷ target step: {ms['head'] / ms['target']:.3f}")
    print(
        f"head {own / 1e6:.1f} MB; learning {after / 1e6:.1f} MB after {options.requests} requests, {full / 1e6:.1f} MB with a full "
    )
    print(f"replay of {replay.tokens} tokens, {replay.nbytes / 1e6:.1f} MB")
    print(f"memory of learning ÷ head: {after / own:.2f}, {full / own:.2f} with a full replay")


if __name__ == "__main__":
    main()
