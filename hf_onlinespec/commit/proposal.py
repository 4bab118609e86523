"""How a proposal for one row grows, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..govern.acceptance import Continuation, TokenSource
from ..rounds import Proposal
from .suffix_memory import REACH


class ProposalBuilder:
    """A proposal while it grows. What the memory says becomes tensors once somebody needs them."""

    def __init__(self, input_ids: Tensor, context: list[int] | None, eos: set[int]) -> None:
        self.context = context  # the last tokens; None: nobody asks for them, or they are not known on the host
        self.survival = 1.0  # estimated chance that all drafted tokens are kept
        self.ended = False
        self.drafted: list[TokenSource] = []
        self.model_s = 0.0
        self.has_model_token = False  # whether the draft model has drafted
        self._length = input_ids.shape[1]
        self._prefix, self._pending = input_ids, list[int]()  # what was drafted so far, and tokens that it still lacks
        self._q: list[Tensor | Continuation] = []
        self._eos = eos

    @property
    def prefix(self) -> Tensor:
        """(batch, L + i) with what was drafted so far."""
        if self._pending:
            self._prefix = torch.cat([self._prefix, self._prefix.new_tensor([self._pending])], dim=-1)
            self._pending = []
        return self._prefix

    def add_model_token(
        self, token: Tensor, known: int | None, probs: Tensor | None, drafted: TokenSource, chance: float
    ) -> None:
        """A token (batch, 1) of the draft model's, and the distribution (batch, V) that it was drawn from, 0 at further ids; `known` where the host has it."""
        self._prefix = torch.cat([self.prefix, token], dim=-1)
        self.has_model_token = True
        self._add(known, probs, drafted, chance)

    def add_memory_token(self, known: int, found: Continuation, drafted: TokenSource, chance: float) -> None:
        """A token of the memory's."""
        self._pending.append(known)
        self._add(known, found, drafted, chance)

    def _add(self, known: int | None, probs: Tensor | Continuation | None, drafted: TokenSource, chance: float) -> None:
        self.drafted.append(drafted)
        if probs is not None:
            self._q.append(probs)
        self.survival *= chance
        self.ended = known is not None and known in self._eos
        if self.context is not None:
            self.context = None if known is None else [*self.context[1 - REACH :], known]

    def proposal(self, vocab: int) -> Proposal:
        """What has become of it; `vocab`: size of the distributions, 0: greedy."""
        tokens = self.prefix[:, self._length :]
        q = None
        if vocab and self._q:
            # In float32 whatever the default is: q is the distribution that was drawn from.
            q = torch.zeros(*tokens.shape, vocab, dtype=torch.float32, device=tokens.device)
            for i, probs in enumerate(self._q):
                if isinstance(probs, Continuation):
                    q[0, i, torch.tensor(probs.tokens, device=q.device)] = torch.tensor(
                        probs.probs, dtype=torch.float32, device=q.device
                    )
                else:
                    q[:, i, : probs.shape[-1]] = probs
        return Proposal(tokens, q, (tuple(self.drafted),), self.model_s)
