"""Trains the embedded pair: one tokenizer, a deep and narrow target on three domains, a small draft on one of them.

    python benchmarks/train_pair.py --data DIR --work /tmp/pair            # tokenizer, target, draft, prompts
    python benchmarks/train_pair.py --data DIR --work /tmp/pair --resume   # goes on from the last checkpoint

`DIR/corpora` holds `shell_tldr.txt` (CC-BY-4.0) and `sql_text2sql.txt` (BSD-3 / CC-BY-4.0); the third domain is written
by `order_notes.py`. The result is copied to `hf_onlinespec/embedded_pair/` with `--export`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from order_notes import order_note
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
CONTEXT = 256
HELD_OUT = 200  # documents per domain, never trained on
DRAFT_DOMAIN = "shell"
MIX = {"shell": 14, "sql": 11, "orders": 7}  # rows of each batch
TARGET = dict(
    hidden_size=256, intermediate_size=448, num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=2
)
DRAFT = dict(hidden_size=192, intermediate_size=352, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
TABLES = ("embed", "shared", "relative_attention_bias")  # in the names of parameters that are looked up, not multiplied

Document = tuple[str, str]  # prompt, continuation


def shell_documents(text: str) -> list[Document]:
    """A tldr page: its name and description are the prompt, its examples the continuation."""
    documents = []
    for page in text.split(EOS):
        head, bullet, tail = page.strip().partition("\n\n- ")
        if bullet and head.startswith("# "):
            documents.append((head + "\n\n-", " " + tail))
    return documents


def sql_documents(text: str) -> list[Document]:
    """A question as a comment, then its query, without the corpus's alias and `_FIELD` boilerplate."""
    documents = []
    for pair in text.split("\n\n"):
        question, _, query = pair.strip().rpartition("\n")
        if not question:
            continue
        query = re.sub(r"(\w+)alias0", r"\1", query)
        query = re.sub(r"(\w+)alias(\d)", r"\1_\2", query)
        query = re.sub(r"\b(\w+) AS \1\b", r"\1", query)
        query = re.sub(r"\bTABLE\.", "", query)
        documents.append((question + "\nSELECT", re.sub(r"(\S+)_FIELD\b", r"\1", query).removeprefix("SELECT")))
    return documents


def order_documents(n: int, seed: int) -> list[Document]:
    rng = random.Random(seed)
    return [order_note(rng) for _ in range(n)]


def split(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Shuffles, drops repeated prompts and holds some out: `(train, held_out)`."""
    unique = list({prompt: (prompt, rest) for prompt, rest in documents}.values())
    random.Random(seed).shuffle(unique)
    return unique[HELD_OUT:], unique[:HELD_OUT]


def make_tokenizer(texts: list[str], entries: int = 2048) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=entries, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """All documents in one row of tokens, each opened by the end-of-text token."""
    rows = tokenizer([prompt + rest for prompt, rest in documents]).input_ids
    return torch.tensor([token for row in rows for token in [tokenizer.eos_token_id, *row]] + [tokenizer.eos_token_id])


def build(shape: dict[str, int], vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **shape,
    )
    return LlamaForCausalLM(config)


def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean cross-entropy in nats per token over consecutive windows."""
    rows = tokens[: (len(tokens) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)[:64]
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def train(
    model: PreTrainedModel,
    batch_loss: Callable[[torch.Generator], torch.Tensor],
    held_out_losses: Callable[[], dict[str, float]],
    steps: int,
    lr: float,
    seed: int,
    checkpoint: Path,
    resume: bool,
) -> float:
    """Muon for the matrices, AdamW for embeddings and norms; constant rate, then a linear decay over the last 40 %.

    Returns the seconds it took, earlier runs that it resumed included.
    """
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and not any(part in n for part in TABLES)]
    others = [p for n, p in named if p.ndim != 2 or any(part in n for part in TABLES)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    generator = torch.Generator().manual_seed(seed)
    first, earlier_s = 0, 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        first, earlier_s = state["step"], state["seconds"]
    started = time.perf_counter()
    for step in range(first, steps):
        rate = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        loss = batch_loss(generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            pace = (time.perf_counter() - started) / (step + 1 - first)
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print("held out", held_out_losses(), flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator.get_state(),
                "step": step + 1,
                "seconds": earlier_s + time.perf_counter() - started,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
    return earlier_s + time.perf_counter() - started


def train_on_windows(
    model: LlamaForCausalLM,
    streams: dict[str, torch.Tensor],
    held_out: dict[str, torch.Tensor],
    mix: dict[str, int],
    steps: int,
    seed: int,
    checkpoint: Path,
    resume: bool,
) -> None:
    """Next-token training on windows of `CONTEXT` tokens; `mix` says how many of each domain a batch holds."""

    def batch_loss(generator: torch.Generator) -> torch.Tensor:
        rows = []
        for domain, count in mix.items():
            starts = torch.randint(len(streams[domain]) - CONTEXT - 1, (count,), generator=generator)
            rows += [streams[domain][s : s + CONTEXT + 1] for s in starts.tolist()]
        batch = torch.stack(rows)  # (rows, CONTEXT + 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def losses() -> dict[str, float]:
        return {domain: round(held_out_loss(model, tokens), 4) for domain, tokens in held_out.items()}

    train(model, batch_loss, losses, steps, 3e-3, seed, checkpoint, resume)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpora/")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and results go here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-steps", type=int, default=1600)
    parser.add_argument("--draft-steps", type=int, default=1500)
    parser.add_argument(
        "--mix", type=json.loads, default=MIX, help="JSON: rows of each domain in a batch of the target"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    parser.add_argument("--export", type=Path, help="also write the pair (float16) and its prompts to this folder")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.work.mkdir(parents=True, exist_ok=True)

    sources = {name: args.data / "corpora" / name for name in ("shell_tldr.txt", "sql_text2sql.txt")}
    splits = {
        "shell": split(shell_documents(sources["shell_tldr.txt"].read_text()), args.seed),
        "sql": split(sql_documents(sources["sql_text2sql.txt"].read_text()), args.seed),
        "orders": split(order_documents(30_000, args.seed), args.seed),
    }
    sample = [prompt + rest for train_set, _ in splits.values() for prompt, rest in train_set[:6000]]
    tokenizer = make_tokenizer(sample)
    tokenizer.save_pretrained(args.work / "tokenizer")
    streams = {domain: pack(tokenizer, documents) for domain, (documents, _) in splits.items()}
    held_out = {domain: pack(tokenizer, documents) for domain, (_, documents) in splits.items()}
    record = {
        "seed": args.seed,
        "sources": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()}
        | {"order_notes.py": hashlib.sha256(Path(__file__).with_name("order_notes.py").read_bytes()).hexdigest()},
        "train_tokens": {domain: len(tokens) for domain, tokens in streams.items()},
        "target_steps": args.target_steps,
        "draft_steps": args.draft_steps,
        "mix": args.mix,
        "context": CONTEXT,
        "torch": torch.__version__,
    }
    print(json.dumps(record, indent=1), flush=True)

    draft = build(DRAFT, len(tokenizer), args.seed + 1)
    target = build(TARGET, len(tokenizer), args.seed)
    for name, model in (("draft", draft), ("target", target)):
        record[f"{name}_parameters"] = model.num_parameters()
        print(name, model.num_parameters(), "parameters", flush=True)
    for name, model, mix, steps in (
        ("draft", draft, {DRAFT_DOMAIN: 16}, args.draft_steps),
        ("target", target, args.mix, args.target_steps),
    ):
        train_on_windows(model, streams, held_out, mix, steps, args.seed, args.work / f"{name}.pt", args.resume)
    for name, model in (("draft", draft), ("target", target)):
        record[f"{name}_held_out_loss"] = {domain: held_out_loss(model, tokens) for domain, tokens in held_out.items()}
    record["uniform_loss"] = math.log(len(tokenizer))

    if args.export:
        for name, model in (("draft", draft), ("target", target)):
            model.to(torch.float16).save_pretrained(args.export / name)
            tokenizer.save_pretrained(args.export / name)
        with open(args.export / "prompts.jsonl", "w") as file:
            for domain, (_, documents) in splits.items():
                for prompt, rest in documents:
                    file.write(json.dumps({"domain": domain, "prompt": prompt, "reference": rest}) + "\n")
        (args.export / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
