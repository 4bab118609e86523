"""Speculative decoding with a draft that learns online: the whole idea in one file, with torch and transformers only.

A large target p writes text slowly: one forward per token. A small draft q guesses the next k tokens, and one target
forward checks them all. How many survive depends on how well q agrees with p, here and now. The check itself says
what p would have written at every accepted position, so the draft can learn from it at no cost in target forwards.

    repeat:  1. commit   the draft proposes k tokens                                          propose()
             2. verify   one target forward over the k + 1 positions                          verify()
                         accept the guesses up to the first wrong one, and one more token     accept()
             3. adapt    move the draft towards what the target just said                     adapt()

The text is the target's own, whatever the draft proposes:
  - greedy: a guess is accepted if it is argmax p; otherwise argmax p is written in its place.
  - sampling: x ~ q is accepted with probability min(1, p(x) / q(x)), otherwise a token is drawn from (p - q)+ / Σ (p - q)+.
    The distribution of the accepted token is p: min(p, q) + (1 - Σ min(p, q)) · (p - q)+ / Σ (p - q)+ = min(p, q) + (p - q)+ = p.
A round therefore writes 1 to k + 1 tokens with one target forward; their mean is the acceptance length, which is what
this file measures (counts, not seconds). Under sampling a guess survives with probability Σ min(p, q) = 1 - TV(p, q).
TV <= sqrt(KL(p || q) / 2) (Pinsker), so the draft descends KL(p || q) = Σ p (log p - log q). It moves only between
requests: the q that drafted must be the q of the accept test.

References: speculative sampling, Leviathan et al., arXiv:2211.17192 (algorithm 1); learning the draft online, Liu et
al., arXiv:2310.07177; the same seen as online learning, arXiv:2603.12617; LoRA, Hu et al., arXiv:2106.09685.

Shapes: a tensor's name ends in its axes. 1 one row, N rows, T tokens of a request so far (prompt included), K drafted
tokens, C = K + 1 checked positions, G generated tokens, V vocabulary. So p_CV is (checked positions, vocabulary).

    python examples/onlinespec_from_scratch.py --domain orders --requests 60
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM, PreTrainedModel

PAIR = Path(__file__).resolve().parents[1] / "hf_onlinespec" / "embedded_pair"
# What a forward calls the KV cache: newer transformers have shortened the name.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
RANK = 32
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.99)  # a stream changes: Adam's metric must forget sooner than with the usual 0.999
CLIP = 1.0
REPLAY_STEPS, REPLAY_ROWS = 4, 4  # after each request: gradient steps on earlier ones, and how many in each
REPLAY_REQUESTS = 128  # the latest ones, with the target's log-probabilities (48 tokens · 2048 words: 0.4 MB each)


# The draft's adapter


class LoRA(nn.Module):
    """y = W x + B A x with W frozen. A layer W is a linear layer or an embedding, where A x is the row A[x]."""

    def __init__(self, base: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.on = True
        size_out, size_in = base.weight.shape
        if isinstance(base, nn.Embedding):
            size_in, size_out = size_out, size_in  # its table is stored the other way round
        # B = 0: a new adapter changes nothing. Its gradient is not 0, so it starts to move at the first step.
        self.A = nn.Parameter(torch.randn(size_in, RANK) * RANK**-0.5)
        self.B = nn.Parameter(torch.zeros(RANK, size_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.on:
            return y
        return y + (F.embedding(x, self.A) if isinstance(self.base, nn.Embedding) else x @ self.A) @ self.B


def add_lora(model: nn.Module) -> list[nn.Parameter]:
    """Puts an adapter on every linear layer, the head included, and on the embedding; returns what is to be learned."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | nn.Embedding):
                setattr(parent, name, LoRA(child))
    return [p for p in model.parameters() if p.requires_grad]


def switch(model: nn.Module, on: bool) -> None:
    """Off: the base draft, as it was before it learned anything."""
    for module in model.modules():
        if isinstance(module, LoRA):
            module.on = on


# The loop


def rewind(cache: DynamicCache, length: int) -> None:
    """Forgets what a KV cache holds beyond `length` tokens: what was rejected. (crop(-n) removes n tokens.)"""
    excess = cache.get_seq_length() - length
    if excess > 0:
        cache.crop(-excess)


def propose(
    draft: PreTrainedModel, tokens_1T: Tensor, k: int, temperature: float, cache: DynamicCache
) -> tuple[Tensor, list[Tensor]]:
    """1. Commit: k guesses drafted_1K, one after another, and the distribution q_V of each (greedy: none is needed)."""
    drafted_1K, probs = tokens_1T[:, :0], []
    rewind(cache, tokens_1T.shape[1] - 1)
    feed = tokens_1T[:, cache.get_seq_length() :]  # what the draft has not read yet: at least the last token
    for _ in range(k):
        logits_1V = draft(input_ids=feed, **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
        if temperature > 0:
            q_1V = (logits_1V / temperature).softmax(-1)
            probs.append(q_1V[0])
            feed = torch.multinomial(q_1V, 1)
        else:
            feed = logits_1V.argmax(-1, keepdim=True)
        drafted_1K = torch.cat([drafted_1K, feed], dim=1)
    return drafted_1K, probs


def verify(target: PreTrainedModel, tokens_1T: Tensor, drafted_1K: Tensor, cache: DynamicCache) -> Tensor:
    """2. Verify: the target's logits_CV after the text so far and after each guess, in one forward."""
    rewind(cache, tokens_1T.shape[1] - 1)
    feed = torch.cat([tokens_1T, drafted_1K], dim=1)[:, cache.get_seq_length() :]
    checked = drafted_1K.shape[1] + 1
    return target(input_ids=feed, **{CACHE: cache}, logits_to_keep=checked).logits[0, -checked:]


def accept(logits_CV: Tensor, drafted_1K: Tensor, probs: list[Tensor], temperature: float) -> Tensor:
    """The accepted guesses and one token of the target's own: 1 to K + 1 tokens."""
    drafted_K = drafted_1K[0]
    if temperature == 0:
        own_C = logits_CV.argmax(-1)
        # The leading run of agreement; the target's own token follows it, right or wrong guess alike.
        agreed = int((own_C[:-1] == drafted_K).long().cumprod(0).sum())
        return own_C[: agreed + 1]
    p_CV = (logits_CV / temperature).softmax(-1)
    for i, x in enumerate(drafted_K):
        p_V, q_V = p_CV[i], probs[i]
        if torch.rand(()) * q_V[x] < p_V[x]:
            continue
        residual_V = (p_V - q_V).clamp_min(0)
        # p = q up to rounding leaves no residual: then p itself is drawn from.
        return torch.cat([drafted_K[:i], torch.multinomial(residual_V if residual_V.sum() > 0 else p_V, 1)])
    return torch.cat([drafted_K, torch.multinomial(p_CV[-1], 1)])  # all accepted: one token more, for free


@torch.no_grad()
def serve(
    target: PreTrainedModel, draft: PreTrainedModel, prompt_1T: Tensor, new_tokens: int, k: int, temperature: float
) -> tuple[Tensor, Tensor, int]:
    """One request: its tokens_1T, the target's log_p_GV at every generated token, and the number of rounds."""
    tokens_1T, feedback, rounds = prompt_1T, [], 0
    draft_cache, target_cache = DynamicCache(config=draft.config), DynamicCache(config=target.config)
    end = prompt_1T.shape[1] + new_tokens
    eos = target.generation_config.eos_token_id  # a number, a list or None
    ends = torch.tensor([] if eos is None else eos, dtype=torch.long)
    done = False
    while not done:
        # 1. The draft commits. A round's last token is the target's own, so one place is left for it.
        room = end - tokens_1T.shape[1] - 1
        drafted_1K, probs = propose(draft, tokens_1T, min(k, room), temperature, draft_cache)
        # 2. The target verifies, and the text grows.
        logits_CV = verify(target, tokens_1T, drafted_1K, target_cache)
        new_G = accept(logits_CV, drafted_1K, probs, temperature)
        stops = torch.isin(new_G, ends).nonzero()
        if len(stops):
            new_G = new_G[: int(stops[0]) + 1]
        tokens_1T = torch.cat([tokens_1T, new_G[None]], dim=1)
        # The feedback for step 3: row i predicts token i. The row of the first wrong guess belongs to it, as its
        # context was accepted; the rows behind it follow a text that was not written, and are dropped.
        feedback.append(logits_CV[: len(new_G)].log_softmax(-1))
        rounds += 1
        done = len(stops) > 0 or tokens_1T.shape[1] == end
    return tokens_1T, torch.cat(feedback), rounds


def adapt(draft: PreTrainedModel, optimizer: torch.optim.Optimizer, requests: Sequence[tuple[Tensor, Tensor]]) -> float:
    """3. Adapt: one step on the mean KL(p || q) over all generated tokens of the requests (tokens_1T, log_p_GV)."""
    # Rows are padded at their end: attention looks back only, so no real token sees the padding and no mask is needed.
    tokens_NT = nn.utils.rnn.pad_sequence([tokens_1T[0] for tokens_1T, _ in requests], batch_first=True)
    logits_NTV = draft(input_ids=tokens_NT, use_cache=False).logits
    losses = []
    for (tokens_1T, log_p_GV), logits_TV in zip(requests, logits_NTV, strict=True):
        last = tokens_1T.shape[1] - 1  # the logits that predict token j sit at position j - 1
        log_q_GV = logits_TV[last - len(log_p_GV) : last].log_softmax(-1)
        losses.append((log_p_GV.exp() * (log_p_GV - log_q_GV)).sum(-1))
    loss = torch.cat(losses).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
    optimizer.step()
    return loss.item()


# Main


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="A draft that learns while it serves, beside the base draft, which does not."
    )
    parser.add_argument("--pair", type=Path, default=PAIR, help="folder with target/, draft/ and prompts.jsonl")
    parser.add_argument("--domain", default="orders", help="whose prompts to stream")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--lookahead", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    started = time.perf_counter()
    torch.manual_seed(args.seed)
    choose = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "target")
    target, draft = (
        AutoModelForCausalLM.from_pretrained(args.pair / name, dtype=torch.float32).eval()
        for name in ("target", "draft")
    )
    optimizer = torch.optim.Adam(add_lora(draft), lr=LEARNING_RATE, betas=BETAS)
    replay: deque[tuple[Tensor, Tensor]] = deque(maxlen=REPLAY_REQUESTS)
    items = [json.loads(line) for line in (args.pair / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = ["<|endoftext|>" + item["prompt"] for item in items if item["domain"] == args.domain][: args.requests]
    if not prompts:
        parser.error(f"--domain {args.domain!r} --requests {args.requests}: no prompts in {args.pair}.")

    print(f"{len(prompts)} requests of the domain {args.domain!r}; acceptance length = tokens per target forward")
    print("requests     base  learning")  # each request is served before it is learned from
    written, rounds = {True: [], False: []}, {True: [], False: []}  # per arm (learning or not), one entry per request
    identical = 0
    for i, prompt in enumerate(prompts, start=1):
        inputs = tokenizer(prompt, return_tensors="pt")
        for learning in (False, True):  # in this order: the adapter is on when it adapts
            switch(draft, learning)
            tokens_1T, log_p_GV, n = serve(
                target, draft, inputs.input_ids, args.new_tokens, args.lookahead, args.temperature
            )
            written[learning].append(len(log_p_GV))
            rounds[learning].append(n)
        # 3. The draft adapts: to this request, and to some of the earlier ones, so that it does not forget them.
        adapt(draft, optimizer, [(tokens_1T, log_p_GV)])
        replay.append((tokens_1T, log_p_GV))
        for _ in range(REPLAY_STEPS):
            adapt(draft, optimizer, choose.sample(list(replay), min(REPLAY_ROWS, len(replay))))

        if args.temperature == 0:
            plain = target.generate(**inputs, do_sample=False, max_new_tokens=args.new_tokens)
            identical += torch.equal(tokens_1T, plain)
        if i % 10 == 0 or i == len(prompts):
            first = (i - 1) // 10 * 10
            base, learned = (sum(written[arm][first:]) / sum(rounds[arm][first:]) for arm in (False, True))
            print(f"{first + 1:3d} - {i:3d} {base:8.2f} {learned:9.2f}", flush=True)

    base, learned = (sum(written[arm]) / sum(rounds[arm]) for arm in (False, True))
    outputs = f"{identical} of {len(prompts)} outputs identical to plain greedy generate"
    if args.temperature > 0:
        outputs = "outputs sampled from the target's distribution"
    print(f"all: base {base:.2f}, learning {learned:.2f}; {outputs}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
