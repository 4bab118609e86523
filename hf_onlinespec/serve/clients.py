"""Who asks: a suffix memory for every API key, so that no client can feel in the timing what another one was answered."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from ..commit.base import Draft
from ..commit.suffix_memory import SuffixMemory

MOST_CLIENTS = (
    64  # memories that are kept; the one that was not used for longest leaves. Chosen: 80 MB with the defaults
)


def client_of(authorization: str | None) -> bytes:
    """A client by its `Authorization` header, as a digest: the key itself is not kept. Who sends none is one client."""
    return hashlib.sha256((authorization or "").encode("utf-8", "replace")).digest()


class ClientMemories:
    """Gives a draft the suffix memory of whoever is served; one request at a time.

    The draft model and what it learned, and the measured times and acceptance rates, stay common to all clients.
    """

    def __init__(self, draft: Draft, isolate: bool) -> None:
        self._draft, self._isolate = draft, isolate and draft.memory is not None
        self._memories: OrderedDict[bytes, SuffixMemory] = OrderedDict()

    def use(self, client: bytes) -> None:
        """From now on the draft reads and extends the memory of this client."""
        if not self._isolate:
            return
        if client not in self._memories:
            self._memories[client] = SuffixMemory(self._draft.settings.memory_tokens)
            if len(self._memories) > MOST_CLIENTS:
                self._memories.popitem(last=False)
        self._memories.move_to_end(client)
        with self._draft.lock:
            self._draft.memory = self._memories[client]

    def __len__(self) -> int:
        return len(self._memories)
