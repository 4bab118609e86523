"""A text of the target's in the draft's tokens, as the draft is to read it; built up while the text grows."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from .common_strings import CommonStrings

MOST_KEPT = 65_536  # texts whose tokens are remembered; chosen
LONGEST_CHARACTER = 4  # bytes of UTF-8


class Group(NamedTuple):
    """Tokens of the target's that end where a character ends, and what the draft reads in their place."""

    length: int  # tokens of the target's
    tokens: tuple[int, ...]  # of the draft's
    is_spelled: bool  # whether the draft's spell the same


class Open(NamedTuple):
    """What is left of a text behind its last group."""

    begun: bool = False  # whether there was any text before
    rest: bytes = b""  # the beginning of a character
    length: int = 0  # tokens of the target's that it consists of


class Retokenizer:
    """Turns the target's tokens into the draft's: common ones are taken as they are, of all others the text is read anew.

    So every place between two of the target's tokens is one between two of the draft's, where a character ends; and what was
    read once never changes, however the text goes on.
    """

    def __init__(self, common: CommonStrings) -> None:
        self.common = common
        self._single = {i: Group(1, (j,), True) for i, j in common.draft_of.items()}
        self._spaced = (
            common.target.spaced or common.draft.spaced
        )  # whether texts begin with a space that is none of theirs
        self._kept: dict[bytes, Group] = {}

    @property
    def opening(self) -> tuple[int, ...]:
        """What the draft reads in front of every text."""
        return self._readable(self.common.draft.opening)

    def read(self, tokens: Sequence[int], before: Open) -> tuple[list[Group], Open]:
        """What `tokens` are behind a text that has left `before`: whole groups, and what is left behind them."""
        groups, (begun, rest, length) = list[Group](), before
        spelled, single = self.common.target.spelled, self._single
        for token in tokens:
            if token in single and not rest and (begun or not (self._spaced or token in self.common.target.marks)):
                groups.append(single[token])
                begun = True
                continue
            text = spelled.get(token)
            if text is None:  # a special token, or an id that no tokenizer knows
                if rest:
                    groups.append(self._group(rest, length))
                groups.append(self._mark(token, begun))
                begun, rest, length = True, b"", 0
                continue
            rest, length = rest + text, length + 1
            if not rest:
                groups.append(Group(length, (), True))
                length = 0
            elif not is_open(rest):
                groups.append(self._group(rest, length) if begun else self._first(rest, length))
                begun, rest, length = True, b"", 0
        return groups, Open(begun, rest, length)

    def unfinished(self, left: Open) -> tuple[int, ...]:
        """The draft's tokens for the beginning of a character, as far as there are tokens of single bytes."""
        single = self.common.draft.single
        return self._readable([single[byte] for byte in left.rest if byte in single])

    def _readable(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Those that the draft has an embedding for."""
        return tuple(token for token in tokens if token < self.common.size)

    def _first(self, text: bytes, length: int) -> Group:
        """The first words of a text: the space that a tokenizer puts in front of them is none of the text's."""
        if self.common.target.spaced:
            text = text.removeprefix(b" ")
        return self._group(b" " + text if self.common.draft.spaced else text, length)

    def _group(self, text: bytes, length: int) -> Group:
        found = self._kept.get(text)
        if found is None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            found = self._kept[text] = self._read(text)
        return found._replace(length=length)

    def _read(self, text: bytes) -> Group:
        draft = self.common.draft
        try:
            tokens = draft.read(text.decode())
        except UnicodeDecodeError:
            tokens = [draft.single[byte] for byte in text if byte in draft.single]
        readable = self._readable(tokens)
        return Group(1, readable, draft.write(readable) == text)

    def _mark(self, token: int, begun: bool) -> Group:
        mapped = self.common.draft_of.get(token)
        if mapped is None or (not begun and mapped in self.opening):
            return Group(1, (), True)
        return Group(1, (mapped,), True)


def is_open(text: bytes) -> bool:
    """Whether a text of UTF-8 ends in the middle of a character that may still be completed."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return False
    return bool(decoder.getstate()[0])
