"""Small tokenizers of several kinds, trained on a few sentences."""

from __future__ import annotations

import json
import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The little dog ran to the house, and the other dogs ran too.\n",
    "SELECT name, COUNT(*) FROM houses WHERE price > 1200 GROUP BY name;\n",
    "Ça va? Müller wrote “日本語” and 中文 – 42 °C, naïve café 😀.\n",
    "  def run(x):\n\treturn x + 1  # two  spaces\n",
)


@cache
def byte_level(entries: int, chat: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's: every byte is a character, and a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", *(["<|im_start|>", "<|im_end|>"] if chat else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    end = marks[-1]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=marks[0], eos_token=end, pad_token=end)


@cache
def sentencepiece(entries: int) -> PreTrainedTokenizerFast:
    """As Llama 2's: ▁ is a space, one stands in front of every text, and unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [
        word if at == 0 else f" {word}"
        for line in SENTENCES[:2]
        for at, word in enumerate(line.rstrip("\n").split(" "))
    ]
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def strings(*tokens: str, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of these tokens, which spell what they are."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_text(rng: random.Random) -> str:
    """Parts of the sentences, and characters of any kind between them."""
    parts = []
    for _ in range(rng.randint(1, 6)):
        sentence = rng.choice(SENTENCES)
        begin = rng.randrange(len(sentence))
        parts.append(sentence[begin : begin + rng.randint(1, 20)])
        parts.append(
            rng.choice(
                ["", " ", "  ", "\n", "\t", "é", "中", "😀", "\u200d", "<s>", "</s>", "<|im_end|>", "<0x41>", "▁", "Ġ"]
            )
        )
    return "".join(parts)
