"""Small tokenizers of several kinds, trained on a few sentences."""

from __future__ import annotations

import json
import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

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


def lowercasing(entries: int) -> PreTrainedTokenizerFast:
    """A byte-level one that reads capitals as small letters."""
    tokenizer = Tokenizer.from_str(byte_level(entries, chat=True).backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: whether a token has a space in front of it depends on the one before."""
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


class Slow(PreTrainedTokenizer):
    """One that is written in Python."""

    def __init__(self) -> None:
        self._words = ["a", "b", "<eos>"]
        super().__init__(eos_token="<eos>")

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words)}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]


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
