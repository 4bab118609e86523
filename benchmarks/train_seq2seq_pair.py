"""Trains the encoder-decoder pair: question to SQL, a deep and narrow target on two domains, a small draft on one.

    python benchmarks/train_seq2seq_pair.py --data DIR --work /tmp/seq2seq            # tokenizer, target, draft
    python benchmarks/train_seq2seq_pair.py --data DIR --work /tmp/seq2seq --resume   # goes on from the last checkpoint

`DIR/corpora/sql_text2sql.txt` holds WikiSQL (BSD-3) and the advising questions (CC-BY-4.0). The result is copied to
`hf_onlinespec/seq2seq_pair/` with `--export`; the whole folder stays under 4 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from train_pair import Document, split, sql_documents, train
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

PAD, EOS = "<pad>", "</s>"
DRAFT_DOMAIN = "wikisql"
MIX = {"wikisql": 24, "advising": 8}  # pairs of each batch
LONGEST = {"wikisql": 200, "advising": 640}  # characters of a query; a few longer ones are left out
SHIPPED = 150  # held-out questions of each domain that go into the package
SHAPE = dict(
    dropout_rate=0.0,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=64,
)
TARGET = dict(d_model=128, d_kv=32, num_heads=3, d_ff=192, num_layers=2, num_decoder_layers=7)
DRAFT = dict(d_model=96, d_kv=32, num_heads=2, d_ff=128, num_layers=1, num_decoder_layers=1)
ADVISING = "database: advising\n-- "

Rows = list[tuple[list[int], list[int]]]  # tokens of a question, tokens of its query


def domains(corpus: str) -> dict[str, list[Document]]:
    """Question and query of each domain, in the corpus's order."""
    found: dict[str, list[Document]] = {"wikisql": [], "advising": []}
    for prompt, rest in sql_documents(corpus):
        question = prompt.removesuffix("\nSELECT").removeprefix("-- ")
        domain = "advising" if question.startswith(ADVISING) else "wikisql"
        query = "SELECT" + rest
        if len(query) <= LONGEST[domain]:
            found[domain].append((question.removeprefix(ADVISING), query))
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every text ends in the end token, as T5's tokenizer writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=[PAD, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build(shape: dict[str, int], vocab_size: int, seed: int) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab_size,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            decoder_layers=shape["num_decoder_layers"],  # `generate` sizes the cache by BART's name for it
            **SHAPE,
            **shape,
        )
    )


def tokenized(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> Rows:
    questions, queries = zip(*documents, strict=True)
    return list(zip(tokenizer(list(questions)).input_ids, tokenizer(list(queries)).input_ids, strict=True))


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """(rows, longest) of tokens, padded to the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def loss_of(model: T5ForConditionalGeneration, rows: Rows) -> torch.Tensor:
    """Mean cross-entropy in nats per token of the queries."""
    source = padded([question for question, _ in rows], 0)
    labels = padded([query for _, query in rows], -100)
    return model(input_ids=source, attention_mask=(source != 0).long(), labels=labels, use_cache=False).loss


def held_out_losses(model: T5ForConditionalGeneration, held_out: dict[str, Rows]) -> dict[str, float]:
    with torch.no_grad():
        return {domain: round(loss_of(model, rows).item(), 4) for domain, rows in held_out.items()}


def train_on(
    model: T5ForConditionalGeneration,
    rows: dict[str, Rows],
    held_out: dict[str, Rows],
    mix: dict[str, int],
    steps: int,
    seed: int,
    checkpoint: Path,
    resume: bool,
) -> float:
    """Each domain of a batch goes through the model by itself, with queries of similar length. Returns the seconds."""

    def batch_loss(generator: torch.Generator) -> torch.Tensor:
        loss = torch.zeros(())
        for domain, count in mix.items():
            drawn = torch.randint(len(rows[domain]), (8 * count,), generator=generator).tolist()
            drawn.sort(key=lambda i: len(rows[domain][i][1]))
            eighth = count * int(torch.randint(8, (), generator=generator))
            chosen = [rows[domain][i] for i in drawn[eighth : eighth + count]]
            loss = loss + loss_of(model, chosen) / len(mix)
        return loss

    return train(model, batch_loss, lambda: held_out_losses(model, held_out), steps, 3e-3, seed, checkpoint, resume)


def exact_matches(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> float:
    """Share of the questions whose greedy query is the reference, letter by letter."""
    hits = 0
    for start in range(0, len(documents), 50):
        part = documents[start : start + 50]
        inputs = tokenizer([question for question, _ in part], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=300
        )
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        hits += sum(text == query for text, (_, query) in zip(texts, part, strict=True))
    return hits / len(documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpora/")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and results go here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-steps", type=int, default=720)
    parser.add_argument("--draft-steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1, help="more than the free cores slow it down")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    parser.add_argument("--export", type=Path, help="also write the pair (float16) and its prompts to this folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    corpus = args.data / "corpora" / "sql_text2sql.txt"
    splits = {domain: split(documents, args.seed) for domain, documents in domains(corpus.read_text()).items()}
    advising, _ = splits["advising"]
    sample = advising + random.Random(args.seed).sample(splits["wikisql"][0], 6000)
    tokenizer = make_tokenizer([question + "\n" + query for question, query in sample])
    rows = {domain: tokenized(tokenizer, documents) for domain, (documents, _) in splits.items()}
    held_out = {domain: tokenized(tokenizer, documents[:64]) for domain, (_, documents) in splits.items()}
    record = {
        "seed": args.seed,
        "sources": {corpus.name: hashlib.sha256(corpus.read_bytes()).hexdigest()},
        "train_pairs": {domain: len(documents) for domain, documents in rows.items()},
        "train_query_tokens": {domain: sum(len(query) for _, query in found) for domain, found in rows.items()},
        "target_steps": args.target_steps,
        "draft_steps": args.draft_steps,
        "mix": MIX,
        "torch": torch.__version__,
        "machine": f"{args.threads} of {os.cpu_count()} cores, {platform.machine()}, other jobs beside",
    }
    print(json.dumps(record, indent=1), flush=True)

    target, draft = build(TARGET, len(tokenizer), args.seed), build(DRAFT, len(tokenizer), args.seed + 1)
    mixes = {"draft": (draft, {DRAFT_DOMAIN: 24}, args.draft_steps), "target": (target, MIX, args.target_steps)}
    for name, (model, mix, steps) in mixes.items():
        print(name, model.num_parameters(), "parameters", flush=True)
        checkpoint = args.work / f"{name}.pt"
        record[f"{name}_parameters"] = model.num_parameters()
        record[f"{name}_train_s"] = round(
            train_on(model, rows, held_out, mix, steps, args.seed, checkpoint, args.resume)
        )
        record[f"{name}_held_out_loss"] = held_out_losses(model, held_out)
        model.to(torch.float16).to(torch.float32)  # what is measured is what is shipped
    record["target_exact_matches"] = {
        domain: exact_matches(target, tokenizer, documents[:100]) for domain, (_, documents) in splits.items()
    }
    print(json.dumps(record, indent=1), flush=True)

    if args.export:
        for name, (model, _, _) in mixes.items():
            model.to(torch.float16).save_pretrained(args.export / name)
        tokenizer.save_pretrained(args.export / "target")
        with open(args.export / "prompts.jsonl", "w", encoding="utf-8") as file:
            for domain, (_, documents) in splits.items():
                for question, query in documents[:SHIPPED]:
                    item = {"domain": domain, "prompt": question, "reference": query}
                    file.write(json.dumps(item, ensure_ascii=False) + "\n")
        (args.export / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
