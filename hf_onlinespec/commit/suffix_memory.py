"""A bounded memory of token sequences: what followed the last few tokens wherever they stood before.

A draft that costs no forward (suffix decoding, arXiv:2411.04975), built like LZ77's dictionary: a ring of tokens, and for
every short run of tokens a chain of the places where it occurred. It holds users' text: it lives in the process and is
never saved.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ..errors import ConfigError
from ..govern.acceptance import Continuation

# Measured on the embedded pair: runs of 1 answer at 96 % of the positions, runs of 3 find the long matches behind a
# frequent token. Runs of 2 alone leave up to 29 % of the positions without an answer.
GRAMS = (3, 1)  # lengths of the runs that are indexed, tried in this order; the last is the shortest match that counts
REACH = 16  # tokens of context that are compared: longer matches count as equally long
CANDIDATES = 16  # occurrences of a run that are compared, newest first
_END = -1  # stands in the ring behind every closed sequence; no token


class SuffixMemory:
    """The newest `max_tokens` tokens of all sequences; an end of sequence takes the place of one.

    Everything is allocated at once, 16 to 20 bytes per token; the oldest tokens are overwritten. Adding a token and asking
    a question take constant time: at most `CANDIDATES` occurrences per run are compared, over at most `REACH` tokens. Every
    answer is read off the ring itself, so neither a hash collision nor a link to an overwritten place can make a wrong one.

    Positions are counted from the first token ever added; position i lies in slot i % max_tokens.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens!r}: a memory holds at least 1 token.")
        self.max_tokens = max_tokens
        self._ring = array("i", [0]) * max_tokens
        self._chains = [_Chains(gram, max_tokens) for gram in GRAMS]
        self._tail: tuple[int, ...] = ()  # the last tokens of the current sequence, as many as a run has
        self._next = 0  # the position of the next token to come
        self._ends = 0  # ends of sequence in the ring

    def extend(self, tokens: Sequence[int]) -> None:
        """Goes on with the current sequence; tokens are 0 or more."""
        for token in tokens:
            # A run is indexed once something follows it: the tail of a sequence is no answer to a question about itself.
            for chains in self._chains:
                if len(self._tail) >= chains.gram:
                    chains.add(self._tail, self._next)
            self._put(token)
            self._tail = (*self._tail, token)[-max(GRAMS) :]

    def close(self) -> None:
        """Ends the current sequence: no match runs across this point."""
        if self._tail:
            self._put(_END)
            self._ends += 1
            self._tail = ()

    def continuation(self, context: Sequence[int]) -> Continuation | None:
        """The distribution of what followed the longest match of `context`, the last tokens; None: nothing matched.

        The longest among the newest `CANDIDATES` occurrences, that is. Each of those that match as far has one vote.
        """
        recent = tuple(context[-REACH:])
        for chains in self._chains:
            if len(recent) >= chains.gram:
                length, votes = self._vote(chains, recent)
                if votes:
                    support = sum(votes.values())
                    ranked = sorted(votes, key=votes.__getitem__, reverse=True)  # stable: ties stay newest first
                    return Continuation(
                        tuple(ranked), tuple(votes[token] / support for token in ranked), length, support
                    )
        return None

    def _vote(self, chains: _Chains, recent: tuple[int, ...]) -> tuple[int, dict[int, int]]:
        """Length of the longest match, and how often each token followed it, in the order of their newest occurrence."""
        ring, steps, size = self._ring, chains.steps, self.max_tokens
        oldest = max(0, self._next - size)
        position = chains.newest(recent)
        longest = chains.gram
        votes: dict[int, int] = {}
        recent = recent[::-1]
        for _ in range(CANDIDATES):
            limit = min(len(recent), position - oldest)  # what is left in the ring before it
            if limit < longest:  # older places have less
                break
            slot = position % size
            length = 0
            # Backwards; an index below 0 wraps, as the ring does.
            while length < limit and ring[slot - 1 - length] == recent[length]:
                length += 1
            if length > longest:
                longest, votes = length, {}
            if length == longest:
                votes[ring[slot]] = votes.get(ring[slot], 0) + 1
            position -= steps[slot]
        return longest, votes

    def __len__(self) -> int:
        """Tokens held."""
        return min(self._next, self.max_tokens) - self._ends

    @property
    def nbytes(self) -> int:
        tables = [self._ring, *(table for chains in self._chains for table in (chains.heads, chains.steps))]
        return sum(table.itemsize * len(table) for table in tables)

    def _put(self, token: int) -> None:
        slot = self._next % self.max_tokens
        if self._ring[slot] == _END:
            self._ends -= 1
        self._ring[slot] = token
        self._next += 1


class _Chains:
    """For every run of `gram` tokens the positions that follow it, linked from the newest back."""

    def __init__(self, gram: int, max_tokens: int) -> None:
        self.gram = gram
        buckets = 1 << max(max_tokens.bit_length() - 2, 0)  # the largest power of two up to max_tokens / 2
        self.heads = array("q", [-1]) * buckets  # per hash of a run: the newest position
        self.steps = array("i", [0]) * max_tokens  # per slot: how far back the next older position is

    def add(self, tail: tuple[int, ...], position: int) -> None:
        """`position` follows `tail`, whose last `gram` tokens are the run."""
        bucket = self._bucket(tail)
        size = len(self.steps)  # whatever is so far back is overwritten
        self.steps[position % size] = min(position - self.heads[bucket], size)
        self.heads[bucket] = position

    def newest(self, tail: tuple[int, ...]) -> int:
        return self.heads[self._bucket(tail)]

    def _bucket(self, tail: tuple[int, ...]) -> int:
        return hash(tail[-self.gram :]) & (len(self.heads) - 1)  # the hash of integers is the same in every process
