"""Who asks: a suffix memory and recycled tokens for every API key, so that no client can feel in the timing what another one was
answered."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from ..commit.base import Draft
from ..commit.recycling import RecyclingTable
from ..commit.suffix_memory import SuffixMemory

MOST_CLIENTS = (
    64  # clients that are kept; the one that was not served for longest leaves. Chosen: 80 MB of memories with the defaults, and
    # as many tables of 32 bytes per token of the vocabulary
)


def client_of(authorization: str | None) -> bytes:
    """A client by its `Authorization` header, as a digest: the key itself is not kept. Who sends none is one client."""
    return hashlib.sha256((authorization or "").encode("utf-8", "replace")).digest()


class ClientMemories:
    """Gives a draft the suffix memory and the recycled tokens of whoever is served; one request at a time.

    The draft model and what it learned, and the measured times and acceptance rates, stay common to all clients.
    """

    def __init__(self, draft: Draft, isolate: bool) -> None:
        self._draft, self._isolate = draft, isolate
        self._memories: OrderedDict[bytes, tuple[SuffixMemory | None, RecyclingTable | None]] = OrderedDict()

    def use(self, client: bytes) -> None:
        """From now on the draft reads and extends what is remembered of this client."""
        if not self._isolate:
            return
        if client not in self._memories:
            size = self._draft.settings.memory_tokens
            table = RecyclingTable() if self._draft.settings.recycle else None
            self._memories[client] = SuffixMemory(size) if size else None, table
            if len(self._memories) > MOST_CLIENTS:
                self._memories.popitem(last=False)
        self._memories.move_to_end(client)
        with self._draft.lock:
            self._draft.memory, self._draft.recycled = self._memories[client]

    def __len__(self) -> int:
        return len(self._memories)
