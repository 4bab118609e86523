"""What is committed to in one round, and how it grows token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..govern.acceptance import Continuation, TokenSource
from .suffix_memory import REACH


@dataclass(frozen=True)
class Proposal:
    """What is committed to in one round; k may be 0."""

    tokens: Tensor  # (batch, k) drafted tokens
    q: Tensor | None  # (batch, k, target's vocab) the law each was drawn from; None: greedy, no law needed
    drafted: tuple[TokenSource, ...] = ()  # k times: where each came from
    model_s: float = 0.0  # time that the neural draft took


class ProposalBuilder:
    """A proposal while it grows. What the memory says becomes tensors once somebody needs them."""

    def __init__(self, input_ids: Tensor, context: list[int] | None, eos: set[int]) -> None:
        self.context = context  # the last tokens; None: nobody asks for them, or they are not known on the host
        self.survival = 1.0  # estimated chance that all drafted tokens are kept
        self.ended = False
        self.drafted: list[TokenSource] = []
        self.model_s = 0.0
        self.neural = False  # whether the neural draft has spoken
        self._length = input_ids.shape[1]
        self._prefix, self._recited = input_ids, list[int]()  # what was drafted so far, and tokens that it still lacks
        self._laws: list[Tensor | Continuation] = []
        self._eos = eos

    @property
    def prefix(self) -> Tensor:
        """(batch, L + i) with what was drafted so far."""
        if self._recited:
            self._prefix = torch.cat([self._prefix, self._prefix.new_tensor([self._recited])], dim=-1)
            self._recited = []
        return self._prefix

    def add_model_token(
        self, token: Tensor, known: int | None, law: Tensor | None, drafted: TokenSource, chance: float
    ) -> None:
        """A token (batch, 1) of the neural draft's, and its law (batch, V), 0 at further ids; `known` where the host has it."""
        self._prefix = torch.cat([self.prefix, token], dim=-1)
        self.neural = True
        self._add(known, law, drafted, chance)

    def add_memory_token(self, known: int, found: Continuation, drafted: TokenSource, chance: float) -> None:
        """A token of the memory's."""
        self._recited.append(known)
        self._add(known, found, drafted, chance)

    def _add(self, known: int | None, law: Tensor | Continuation | None, drafted: TokenSource, chance: float) -> None:
        self.drafted.append(drafted)
        if law is not None:
            self._laws.append(law)
        self.survival *= chance
        self.ended = known is not None and known in self._eos
        if self.context is not None:
            self.context = None if known is None else [*self.context[1 - REACH :], known]

    def proposal(self, vocab: int) -> Proposal:
        """What has become of it; `vocab`: size of the laws, 0: greedy."""
        tokens = self.prefix[:, self._length :]
        q = None
        if vocab and self._laws:
            # In float32 whatever the default is: q is the law that was drawn from.
            q = torch.zeros(*tokens.shape, vocab, dtype=torch.float32, device=tokens.device)
            for i, law in enumerate(self._laws):
                if isinstance(law, Continuation):
                    q[0, i, torch.tensor(law.tokens, device=q.device)] = torch.tensor(
                        law.probs, dtype=torch.float32, device=q.device
                    )
                else:
                    q[:, i, : law.shape[-1]] = law
        return Proposal(tokens, q, tuple(self.drafted), self.model_s)
