"""The texts that a draft has learned from, in its process alone: what the privacy audit looks for (`memorization.py`).

They are kept as tokens and never saved. Beside them it is counted how often each prompt stood in the stream.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A prompt stands often that stands more often than this. Measured on orders, default settings of learning, two of 20 prompts
# repeated: the own text of those that stand twice gains 11 to 14 bits, 4 times 16 to 19, 8 times 19 to 21: from there on it comes out.
FEW = 4
MOST_PROMPTS = 65_536  # that are counted, about 9 MB; chosen
PROMPT_BYTES = 8  # of a hash
WRITTEN_BYTES = 4  # of the number of tokens that the target wrote
# Tokens of a part that was written in several texts. Measured on 20 streams of orders without secrets: what lies in such parts gains
# the same with 4, 5 and 6 (see memorization.LEAST_OFTEN), where whole windows around parts of 6 gain up to 13.6 bits.
PART = 6


@dataclass(frozen=True)
class LearnedText:
    """A text that was learned from."""

    tokens: Tensor  # (L,)
    times: int  # that its prompt stood in the stream, at most
    prompt: bytes = b""  # which prompt that is
    written: int = 0  # tokens at the end that the target wrote, at most

    def stands_often(self, before: int) -> bool:
        """Whether its prompt may have stood often.

        Args:
            before: times that the most frequent prompt stood before the draft was loaded, at most: it may have been this one. One
                that has come once since then is counted as new.
        """
        return self.times + (before if self.times > 1 else 0) > FEW


@dataclass(frozen=True)
class Learned:
    """What a draft has learned from in this process, as it is at one moment."""

    steps: int  # gradient steps that its adapter has taken, here and before
    rollbacks: int  # to earlier states of the adapter, here and before
    loaded_rollbacks: int  # of them, before it was loaded
    seen: int  # texts, those that have left included
    repeats: int  # times that the most frequent prompt stood in the stream, at most
    texts: tuple[LearnedText, ...]  # that are at hand, the newest last
    examined: Examined | None  # what came out of them, when that was last looked at
    elsewhere: bool = False  # whether other processes have learned of the adapter, too, from other texts

    def often(self, before: int) -> int:
        """How many of the texts have a prompt that stands often, see `LearnedText.stands_often`."""
        return sum(text.stands_often(before) for text in self.texts)

    @property
    def stood(self) -> int:
        """How often the prompts of the texts stood, together."""
        return sum(text.times for text in self.texts)


def written_often(texts: Sequence[LearnedText], before: int) -> list[Tensor]:
    """For each text which of its tokens (L,) stand in a part that the target wrote often, behind whatever prompts.

    Args:
        before: see `LearnedText.stands_often`. How often parts stood behind different prompts before a load is not known.
    """
    prompts: dict[bytes, tuple[int, set[bytes]]] = {}  # how often it stood, and what was written behind it
    for text in texts:
        times, parts = prompts.get(text.prompt, (0, set()))
        prompts[text.prompt] = max(times, text.times), parts | {part for _, part in _written_parts(text)}
    stood = Counter[bytes]()
    for times, parts in prompts.values():
        for part in parts:
            stood[part] += times
    often = {part for part, times in stood.items() if times + (before if times > 1 else 0) > FEW}
    found = []
    for text in texts:
        covered = torch.zeros(len(text.tokens), dtype=torch.bool)
        for at, part in _written_parts(text):
            if part in often:
                covered[at : at + len(part) // 4] = True
        found.append(covered)
    return found


def _written_parts(text: LearnedText) -> Iterator[tuple[int, bytes]]:
    """Each part of what the target wrote, and where it begins; of a short answer, the whole."""
    data, end = _bytes(text.tokens), len(text.tokens)
    size = min(PART, text.written)
    for at in range(end - text.written, end - size + 1) if size else ():
        yield at, data[4 * at : 4 * (at + size)]


@dataclass(frozen=True)
class Examined:
    """What came out of some texts, when the adapter had taken so many steps."""

    steps: int
    rollbacks: int  # to earlier states, by then: they leave the steps as they are
    seen: int  # texts learned from by then
    often: int  # of those at hand, whose prompt stood often
    stood: int  # how often their prompts stood, together
    texts: int  # that were examined
    memorised: int  # of which a part came out

    @property
    def state(self) -> tuple[int, int, int, int, int]:
        """What tells the draft of then from another one."""
        return self.steps, self.rollbacks, self.seen, self.often, self.stood


@dataclass(frozen=True, eq=False)
class Request:
    """A request that is learned from while others may be, too; each is itself alone."""

    prompt: int = 0  # tokens before the first that the target wrote, padding included


@dataclass(frozen=True)
class _Row:
    """Of a request that was learned from and is not finished."""

    text: bytes
    prompt: bytes  # the hash that was counted
    written: int  # tokens at its end


class LearnedTexts:
    """The texts that a draft has learned from in this process, each once; the oldest leave beyond `max_tokens`.

    Of more than `max_prompts` prompts those that stood least often leave. One that comes back is counted from as often as any of
    those that left may have stood: never less than it stood. Of a longer prompt the last `prompt_tokens` tell which it is: the
    replay keeps no more of it.

    Not safe with several threads by itself: the caller holds the draft's lock.
    """

    def __init__(self, max_tokens: int, max_prompts: int = MOST_PROMPTS, prompt_tokens: int = 2**31) -> None:
        self.max_tokens, self.max_prompts, self.prompt_tokens = max_tokens, max_prompts, prompt_tokens
        self.tokens = 0
        self.dropped = 0  # texts that have left, or were not taken
        self.repeats = 0  # how often the most frequent prompt stood in the stream, at most
        self.examined: Examined | None = None  # what came out of them, when that was last looked at
        # By int32 tokens, the newest last: the hash of the prompt, and how many tokens the target wrote.
        self._texts: dict[bytes, bytes] = {}
        self._prompts: dict[bytes, int] = {}
        self._left = 0  # a prompt that is not counted stood at most so often
        self._growing = weakref.WeakKeyDictionary[Request, list[_Row]]()
        self._alone = Request()  # the latest one that came without

    def grow(self, rows: Sequence[Tensor], written: int, request: Request | None = None) -> None:
        """Notes the rows of a request as they are now: each takes the place of its own beginning.

        Its prompts are counted when they come first: the request may be broken off, or a later step fail.

        Args:
            written: tokens at the end of each row that the target wrote.
            request: whose rows they are; None: of another one than those before.
        """
        before = self._growing.get(request or self._alone, [])
        found = [_Row(_bytes(row), self._hash(row, written), written) for row in rows]
        for at, row in enumerate(found):
            if request is None or at >= len(before) or before[at].prompt != row.prompt:
                self._count(row.prompt)
        for old in before:
            grown = [row.text for row in found if row.text.startswith(old.text)]
            if grown and old.text not in grown and old.text in self._texts:
                # The same text may have stood behind a more frequent prompt.
                found += [_Row(text, self._texts[old.text][:PROMPT_BYTES], written) for text in grown]
                self._drop(old.text)
        for row in found:
            self._add(row.text)
            self._label(row.text, row.prompt, row.written)
        self._growing[request or self._alone] = found[: len(rows)]

    def finish(self, tokens: Tensor, written: int, request: Request | None = None) -> None:
        """Notes a finished request (L,), of which the target wrote the last tokens, and counts its prompt if it is not yet."""
        text, prompt = _bytes(tokens), self._hash(tokens, written)
        growing = self._growing.get(request or self._alone, [])
        # The replay keeps less of a long prompt: its end, and the token that opens it.
        ends = (text, text[4:])
        at = next((at for at, row in enumerate(growing) if row.text.endswith(ends)), None)
        if at is None:
            self._count(prompt)
            self._add(text)
            self._label(text, prompt, written)
            return
        row = growing.pop(at)
        if row.prompt != prompt:
            self._count(prompt)
        self._label(row.text, prompt, written)

    def _hash(self, tokens: Tensor, written: int) -> bytes:
        """Of the prompt."""
        prompt = tokens[: len(tokens) - written][-self.prompt_tokens :]
        return hashlib.sha256(_bytes(prompt)).digest()[:PROMPT_BYTES]

    def _label(self, text: bytes, prompt: bytes, written: int) -> None:
        """Of the prompts of one text, the more frequent one counts; of what the target wrote, the most."""
        if text not in self._texts:
            return
        before, most = _labelled(self._texts[text])
        if self._times(prompt) < self._times(before):
            prompt = before
        self._texts[text] = prompt + max(written, most).to_bytes(WRITTEN_BYTES, "little")

    def _count(self, prompt: bytes) -> None:
        if prompt not in self._prompts and len(self._prompts) >= self.max_prompts:
            self._left = min(self._prompts.values())
            self._prompts = {key: times for key, times in self._prompts.items() if times > self._left}
        times = self._prompts[prompt] = self._times(prompt) + 1
        self.repeats = max(self.repeats, times)

    def _times(self, prompt: bytes) -> int:
        return self._prompts.get(prompt, self._left) if prompt else 0

    def _add(self, text: bytes) -> None:
        if text not in self._texts:
            self._texts[text] = b""
            self.tokens += len(text) // 4
            while self.tokens > self.max_tokens:
                self._drop(next(iter(self._texts)))
                self.dropped += 1

    def _drop(self, text: bytes) -> None:
        if text in self._texts:
            del self._texts[text]
            self.tokens -= len(text) // 4

    @property
    def texts(self) -> list[LearnedText]:
        """Those at hand, the newest last."""
        found = []
        for text, label in self._texts.items():
            prompt, written = _labelled(label)
            tokens = torch.frombuffer(bytearray(text), dtype=torch.int32).long()
            found.append(LearnedText(tokens, self._times(prompt), prompt, written))
        return found

    @property
    def seen(self) -> int:
        """How many texts were learned from, those that have left included."""
        return len(self._texts) + self.dropped

    @property
    def nbytes(self) -> int:
        """Of the tokens, and of Python's objects around them, at most."""
        empty = sys.getsizeof(b"")
        texts = (
            sys.getsizeof(self._texts) + len(self._texts) * (2 * empty + PROMPT_BYTES + WRITTEN_BYTES) + 4 * self.tokens
        )
        return texts + sys.getsizeof(self._prompts) + len(self._prompts) * (empty + PROMPT_BYTES)


def _labelled(label: bytes) -> tuple[bytes, int]:
    """The hash of a prompt, and how many tokens the target wrote behind it."""
    return label[:PROMPT_BYTES], int.from_bytes(label[PROMPT_BYTES:], "little")


def _bytes(tokens: Tensor) -> bytes:
    return tokens.detach().to("cpu", torch.int32).contiguous().numpy().tobytes()
