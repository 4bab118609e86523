"""Trains a pair of models whose tokenizers differ: a byte-level one of 8,000 tokens, one as of SentencePiece of 2,000.

    python benchmarks/train_two_tokenizers.py --data DIR --work /tmp/two [--resume]

The target knows shell pages and SQL, the draft shell pages alone, as the embedded pair of `train_pair.py` does. Nothing of it is
shipped: `other_tokenizer.py` measures with it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from train_pair import (
    Document,
    build,
    held_out_loss,
    make_tokenizer,
    pack,
    shell_documents,
    split,
    sql_documents,
    train_on_windows,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TARGET_TOKENS, DRAFT_TOKENS = 8000, 2000
TARGET = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
DRAFT = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3)
MIX = {"shell": 4, "sql": 4}  # rows of each batch of the target


def sentencepiece_tokenizer(texts: list[str], entries: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the layout of Llama 2's: spaces are ▁, one is put before the text, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Without a pre-tokenizer the trainer takes a whole text for a word: it is trained on words, each with its space.
    words = [word for text in texts for word in re.findall(r" ?[A-Za-z]+|\d| ?[^ \nA-Za-z\d]+|\n| ", text)]
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=entries, special_tokens=special, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def packed(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> torch.Tensor:
    """All documents in one row of tokens, each between a beginning and an end."""
    rows = tokenizer([prompt + rest for prompt, rest in documents]).input_ids
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


def with_marks(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A model whose beginning and end of a text are the tokenizer's."""
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpora/")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and results go here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-steps", type=int, default=500)
    parser.add_argument("--draft-steps", type=int, default=1200)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    corpora = args.data / "corpora"
    splits = {
        "shell": split(shell_documents((corpora / "shell_tldr.txt").read_text()), args.seed),
        "sql": split(sql_documents((corpora / "sql_text2sql.txt").read_text()), args.seed),
    }
    sample = [prompt + rest for train_set, _ in splits.values() for prompt, rest in train_set[:6000]]
    pairs = (
        ("draft", sentencepiece_tokenizer(sample, DRAFT_TOKENS), DRAFT, {"shell": 8}, args.draft_steps, packed),
        ("target", make_tokenizer(sample, TARGET_TOKENS), TARGET, MIX, args.target_steps, pack),
    )
    record: dict[str, object] = {"seed": args.seed, "torch": torch.__version__}
    for name, tokenizer, shape, mix, steps, tokens_of in pairs:
        streams = {domain: tokens_of(tokenizer, documents) for domain, (documents, _) in splits.items()}
        held_out = {domain: tokens_of(tokenizer, documents) for domain, (_, documents) in splits.items()}
        model = with_marks(build(shape, len(tokenizer), args.seed + (name == "draft")), tokenizer)
        print(name, model.num_parameters(), "parameters", {d: len(t) for d, t in streams.items()}, flush=True)
        train_on_windows(model, streams, held_out, mix, steps, args.seed, args.work / f"{name}.pt", args.resume)
        record |= {
            f"{name}_steps": steps,
            f"{name}_parameters": model.num_parameters(),
            f"{name}_held_out_loss": {domain: held_out_loss(model, tokens) for domain, tokens in held_out.items()},
        }
        model.save_pretrained(args.work / name)
        tokenizer.save_pretrained(args.work / name)
    with open(args.work / "prompts.jsonl", "w") as file:
        for domain, (_, documents) in splits.items():
            for prompt, rest in documents:
                file.write(json.dumps({"domain": domain, "prompt": prompt, "reference": rest}) + "\n")
    (args.work / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
