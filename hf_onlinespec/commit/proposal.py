"""How a proposal for one row grows: first candidate by candidate, each behind the one before, then by guesses beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..govern.acceptance import Continuation, TokenSource
from ..govern.guesses import Guess, Place
from ..rounds import Proposal
from .suffix_memory import REACH


class OpenPlace(NamedTuple):
    """A prefix that guesses may follow."""

    parent: int  # the candidate that it ends with; -1: the row
    depth: int  # candidates in it
    context: list[int]  # its last tokens
    survival: float  # estimated chance that it is kept
    guesses: list[Guess] | None  # beside what was drafted behind it; None: nobody was asked yet


class ProposalBuilder:
    """A proposal while it grows. What was guessed becomes a tensor once somebody needs it."""

    def __init__(self, input_ids: Tensor, context: list[int] | None, eos: set[int]) -> None:
        self.context = context  # the last tokens; None: nobody asks for them, or they are not known on the host
        self.survival = 1.0  # estimated chance that all candidates of the chain are kept
        self.ended = False
        self.drafted: list[TokenSource] = []
        self.chances: list[float] = []  # of every candidate: estimated chance that it is kept
        self.model_s = 0.0
        self.read = 0  # tokens of a prompt that the draft model has to read first
        self.has_model_token = False  # whether the draft model has drafted
        self.own: set[int] = set()  # candidates of the draft model's that no guess would have had
        self.expansions = 0  # forwards of the draft model behind several candidates at once
        self.places: dict[
            int, Place
        ] = {}  # by the candidate that a prefix ends with (-1: the row): what was said of it
        self.beside: dict[int, list[Guess]] = {}  # the same, beside a token of the draft model's
        self._length = input_ids.shape[1]
        self._prefix, self._pending = input_ids, list[int]()  # the chain so far, and tokens that it still lacks
        self._open: list[OpenPlace] = []  # of the chain, those before its end
        self._q: list[tuple[int, Tensor | Continuation]] = []  # candidates that were drawn, and (batch, V) what from
        self._branches: list[tuple[int, int]] = []  # parents and tokens of what is beside the chain
        self._eos = eos

    @property
    def prefix(self) -> Tensor:
        """(batch, L + i) with the chain so far."""
        if self._pending:
            self._prefix = torch.cat([self._prefix, self._prefix.new_tensor([self._pending])], dim=-1)
            self._pending = []
        return self._prefix

    @property
    def _end(self) -> int:
        """The last candidate of the chain; -1: there is none yet."""
        return len(self.drafted) - len(self._branches) - 1

    def add_model_token(
        self,
        token: Tensor,
        known: int | None,
        probs: Tensor | None,
        drafted: TokenSource,
        chance: float,
        beside: list[Guess],
        guessed: bool = False,
    ) -> None:
        """A token (batch, 1) of the draft model's at the end of the chain.

        Args:
            known: the token, where the host has it.
            probs: (batch, V) what it was drawn from, 0 at further ids; None: it was not drawn.
            beside: guesses that may take its place.
            guessed: whether it would be there without the model, too.
        """
        self._prefix = torch.cat([self.prefix, token], dim=-1)
        self.has_model_token = True
        if not guessed:
            self.own.add(len(self.drafted))
        if probs is not None:
            self._q.append((len(self.drafted), probs))
        if beside:
            self.beside[self._end] = beside
        self._extend(known, drafted, chance, beside)

    def add_guess(self, guess: Guess) -> None:
        """A guess at the end of the chain, of those that were noted there in `places`."""
        self._pending.append(guess.token)
        if guess.law is not None:
            self._q.append((len(self.drafted), guess.law))
        others = [other for other in self.places[self._end].guesses if other.token != guess.token]
        self._extend(guess.token, TokenSource(guess.source, len(self.drafted)), guess.chance, others)

    def _extend(self, known: int | None, drafted: TokenSource, chance: float, others: list[Guess]) -> None:
        if self.context is not None:
            self._open.append(OpenPlace(self._end, self._end + 1, self.context, self.survival, others))
            self.context = None if known is None else [*self.context[1 - REACH :], known]
        self.drafted.append(drafted)
        self.survival *= chance
        self.chances.append(self.survival)
        self.ended = known is not None and known in self._eos

    def open_places(self, branches: bool) -> list[OpenPlace]:
        """Where guesses may join: at the end of the chain, and beside its candidates if it may branch."""
        found = list(self._open) if branches else []
        if self.context is not None and not self.ended:
            place = self.places.get(self._end)
            guesses = None if place is None else place.guesses
            found.append(OpenPlace(self._end, self._end + 1, self.context, self.survival, guesses))
        return found

    def add_branch(self, guess: Guess, parent: int, depth: int, chance: float) -> int:
        """A guess behind any candidate, once the chain is complete; its number. chance: that all of its path is kept."""
        self.chances.append(chance)
        self._branches.append((parent, guess.token))
        if guess.source == "model":
            self.own.add(len(self.drafted))
        if guess.law is not None:
            self._q.append((len(self.drafted), guess.law))
        self.drafted.append(TokenSource(guess.source, depth))
        return len(self.drafted) - 1

    def cut(self, n: int) -> None:
        """Leaves the first n candidates, and all that the model drafted or that were drawn: these are verified in any case."""
        asked = [i for i, token in enumerate(self.drafted) if token.is_drafted] + [i for i, _ in self._q]
        n = max(n, max(asked, default=-1) + 1)
        chain = self._end + 1
        self._prefix = self.prefix[:, : self._length + min(n, chain)]
        self._branches = self._branches[: max(0, n - chain)]
        self.drafted, self.chances = self.drafted[:n], self.chances[:n]
        self.own = {i for i in self.own if i < n}

    def proposal(self, vocab: int) -> Proposal:
        """What has become of it; `vocab`: size of the distributions, 0: greedy."""
        tokens = self.prefix[:, self._length :]
        chain = tokens.shape[1]
        parents = None
        if self._branches:
            tokens = torch.cat([tokens, tokens.new_tensor([[token for _, token in self._branches]])], dim=-1)
            parents = (*range(-1, chain - 1), *(parent for parent, _ in self._branches))
            if parents == tuple(range(-1, len(parents) - 1)):
                parents = None
        q, drawn = None, None
        if vocab and self._q:
            # In float32 whatever the default is: q is the distribution that was drawn from.
            q = torch.zeros(len(tokens), len(self._q), vocab, dtype=torch.float32, device=tokens.device)
            for i, (_, probs) in enumerate(self._q):
                if isinstance(probs, Continuation):
                    places = torch.tensor(probs.tokens, device=q.device)
                    q[:, i, places] = torch.tensor(probs.probs, dtype=q.dtype, device=q.device)
                else:
                    q[:, i, : probs.shape[-1]] = probs
            drawn = tuple(candidate for candidate, _ in self._q)
        return Proposal(
            tokens,
            q,
            (tuple(self.drafted),),
            self.model_s,
            None if parents is None else (parents,),
            None if drawn is None or drawn == tuple(range(len(self.drafted))) else (drawn,),
        )
