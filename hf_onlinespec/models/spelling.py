"""What the tokens of a tokenizer spell, in bytes: in this form the tokens of two tokenizers can be compared."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .._compat.tokenizers import backend, component
from ..errors import DraftError

BYTES = 256


class Spelling:
    """The tokens of one tokenizer, as it writes and reads them.

    Attributes:
        spelled: what each ordinary token stands for.
        marks: the names of special tokens, which stand for no text.
        single: the tokens that spell one byte, by byte.
        eos: the end of a text; None: it has none.
        opening: what it puts in front of every text.
        spaced: whether it puts a space in front of every text.

    Args:
        name: whose tokenizer it is, for errors: "target" or "draft".

    Raises:
        DraftError: the strings of its tokens cannot be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        own = backend(tokenizer)
        if own is None:
            raise DraftError(
                f"The {name}'s tokenizer {type(tokenizer).__name__} is a slow one, and what its tokens spell cannot be read. Load a fast "
                "one (AutoTokenizer.from_pretrained), or use a draft with the target's own tokenizer."
            )
        kinds = {part["type"]: part for part in _parts(component(own.decoder))}
        unknown = sorted(kinds.keys() & _UNREADABLE)
        if unknown:
            raise DraftError(
                f"The {name}'s tokenizer {type(tokenizer).__name__} decodes with {unknown[0]}: what its tokens spell depends on those "
                "around them. Use a draft with the target's own tokenizer."
            )
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        spell = _ByteLevel() if "ByteLevel" in kinds else _Replaced(kinds)
        self.spelled: dict[int, bytes] = {}
        self.marks: dict[int, str] = {}
        self.single: dict[int, int] = {}
        for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if i in special:
                self.marks[i] = token
                continue
            text = self.spelled[i] = token.encode() if i in added else spell(token)
            if len(text) == 1:
                self.single.setdefault(text[0], i)
        self.eos = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
        alone, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        opening: list[int] = next((whole[:at] for at in range(len(whole)) if whole[at : at + len(alone)] == alone), [])
        self.opening = tuple(opening)
        self.spaced = self.write(alone).startswith(b" ")
        self._own = own

    @cached_property
    def _reader(self) -> Tokenizer:
        """Reads a text as if it stood in the middle of another one; what looks like a special token there is text."""
        reader = Tokenizer.from_str(json.dumps(_in_the_middle(json.loads(self._own.to_str()))))
        reader.encode_special_tokens = True
        return reader

    def read(self, text: str) -> list[int]:
        """The tokens of a text that stands in the middle of another one."""
        return list(self._reader.encode(text, add_special_tokens=False).ids)

    def write(self, tokens: Sequence[int]) -> bytes:
        """What ordinary tokens spell together; special ones are left out."""
        return b"".join(self.spelled.get(i, b"") for i in tokens)


# Decoders whose output for a token depends on its neighbours, or whose strings are no text.
_UNREADABLE = {"WordPiece", "BPEDecoder", "CTC"}


def _parts(state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer's file, or all that a sequence of them is made of."""
    if state is None:
        return
    inner = next((state[key] for key in ("decoders", "normalizers", "pretokenizers") if key in state), None)
    if inner is None:
        yield state
    for part in inner or ():
        yield from _parts(part)


class _ByteLevel:
    """The strings of a byte-level vocabulary: one character for each byte."""

    def __init__(self) -> None:
        self._bytes = byte_of_character()

    def __call__(self, token: str) -> bytes:
        found = [self._bytes.get(character) for character in token]
        return token.encode() if None in found else bytes(byte for byte in found if byte is not None)


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The byte behind every character of a byte-level vocabulary: printable ones are themselves, the others follow 255 in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(BYTES + i): byte for i, byte in enumerate(others)}


class _Replaced:
    """The strings of a vocabulary in which a sign stands for a space, and <0xNN> for a byte, as in SentencePiece's."""

    def __init__(self, kinds: dict[str, dict[str, Any]]) -> None:
        self._falls_back = "ByteFallback" in kinds
        self._signs: list[tuple[str, str]] = []
        if "Metaspace" in kinds:
            self._signs.append((kinds["Metaspace"]["replacement"], " "))
        pattern = kinds.get("Replace", {}).get("pattern", {})
        if "String" in pattern:
            self._signs.append((pattern["String"], kinds["Replace"]["content"]))

    def __call__(self, token: str) -> bytes:
        if self._falls_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        for sign, text in self._signs:
            token = token.replace(sign, text)
        return token.encode()


def _in_the_middle(state: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's file without what it does at the beginning and at the end of a text."""
    state = state | {"post_processor": None, "truncation": None, "padding": None}
    normalizers = [part for part in _parts(state.get("normalizer")) if part["type"] != "Prepend"]
    state["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    alone: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    parts = [part | alone.get(part["type"], {}) for part in _parts(state.get("pre_tokenizer"))]
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts} if parts else None
    return state
