"""A kind of draft that the package does not know: a table of bigrams that learns online, added without touching the package."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_onlinespec.commit.base import Call, Draft, Proposer
from hf_onlinespec.govern.acceptance import RequestStats, TokenSource
from hf_onlinespec.rounds import Proposal, Rows, Verdict
from hf_onlinespec.share.state_file import read_state, write_state
from hf_onlinespec.state import State
from tests.conftest import tiny_llama


class BigramDraft(Draft):
    """The token that followed the last one most often so far."""

    model = generation_config = None

    def __init__(self, vocabulary: int, **settings: object) -> None:
        super().__init__(**settings)
        self.counts = torch.zeros(vocabulary, vocabulary)

    def proposer(self, call: Call) -> Proposer:
        return Bigrams(self, call)

    def state(self) -> State:
        return State({"counts": self.counts.clone()})

    def resume(self, state: State) -> None:
        self.counts = state.tensor("counts", self.counts)

    def generating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def serves(self, target: PreTrainedModel, own_tokens: bool = True) -> None: ...

    def begin_anew_if_changed(self, model: object = None) -> None: ...

    def _title(self) -> str:
        return "BigramDraft"

    def _rows(self) -> list[tuple[str, str]]:
        return [("bigrams", str(int((self.counts > 0).sum())))]


class Bigrams(Proposer):
    def __init__(self, draft: BigramDraft, call: Call) -> None:
        self.draft, self.call, self.stats = draft, call, RequestStats()

    def propose(self, rows: Rows, room: int, trees: bool) -> Proposal:
        plan = self.draft.governor.plan(True, self.stats, room)
        last, drafted, q = int(rows.row(0)[0, -1]), list[int](), list[Tensor]()
        while len(drafted) < min(room, self.call.lookahead or plan.lookahead):
            q.append((self.draft.counts[last] + 1e-3) / (self.draft.counts[last] + 1e-3).sum())
            last = int(torch.multinomial(q[-1], 1) if self.call.sample else q[-1].argmax())
            drafted.append(last)
        sources = tuple(TokenSource("model", i, (0,)) for i in range(len(drafted)))
        tokens = rows.tokens.new_tensor([drafted]).view(1, -1)
        return Proposal(tokens, torch.stack(q)[None] if q and self.call.sample else None, (sources,), model_s=1e-6)

    def read(self, rows: Rows, proposal: Proposal, logits: Tensor, features: Tensor | None) -> None: ...

    def observe(self, verdict: Verdict) -> None:
        row = verdict.rows.row(0)[0, -verdict.new_tokens[0] - 1 :]
        self.draft.counts.index_put_((row[:-1], row[1:]), torch.ones(()), accumulate=True)
        sources, chances = verdict.proposal.sources[0], verdict.chances[0]
        outcomes = [(sources[candidate], chance) for candidate, chance in chances]
        self.draft.governor.observe(sources, outcomes, verdict.proposal.model_s, verdict.target_s, self.stats)

    def reset(self) -> None: ...

    def leave(self, rows: Rows) -> bool:
        return False

    def finish(self) -> bool:
        return self.draft.governor.request_ended(self.call.counts.new_tokens, self.stats, self.call.lookahead)


def test_it_drafts_losslessly_learns_is_governed_and_saved(tmp_path: Path) -> None:
    target, prompt = tiny_llama(1, layers=2), torch.tensor([[3, 14, 15, 9, 2, 6]])
    options = {"do_sample": False, "max_new_tokens": 48}
    plain = target.generate(prompt, **options)
    draft, lengths = BigramDraft(32, lookahead=4), []
    for _ in range(3):
        assert torch.equal(target.generate(prompt, assistant_model=draft, **options), plain)
        lengths.append(draft.metrics.last.acceptance_length)
    assert lengths[2] > lengths[0] and lengths[2] > 1.5  # it has learned the answer's bigrams
    write_state(draft.state(), tmp_path / "bigrams.safetensors")
    again = BigramDraft(32, lookahead=4)
    again.resume(read_state(tmp_path / "bigrams.safetensors"))
    assert torch.equal(target.generate(prompt, assistant_model=again, **options), plain)
    assert again.metrics.last.acceptance_length >= lengths[2]
    governed = BigramDraft(32)  # lookahead="auto"
    for _ in range(4):
        assert torch.equal(target.generate(prompt, assistant_model=governed, **options), plain)
    decisions = governed.metrics.decisions
    assert decisions.rounds["model"] > 0 and decisions.rounds["plain"] > 0 and decisions.acceptance > 0
    assert "lookahead" in decisions.drafting or "plain decoding" in decisions.drafting


def test_its_samples_are_the_target_s() -> None:
    """The first two tokens of 2,000 calls, while the table learns: their frequencies are the target's probabilities."""
    target, prompt = tiny_llama(1, vocab=5, layers=2, initializer_range=0.3), torch.tensor([[1, 2, 3]])
    draft, n, found = BigramDraft(5, lookahead=2), 2000, torch.zeros(25)
    torch.manual_seed(3)
    for _ in range(n):
        out = target.generate(prompt, assistant_model=draft, do_sample=True, top_k=0, max_new_tokens=2)
        found[int(out[0, 3]) * 5 + int(out[0, 4])] += 1
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    with torch.no_grad():
        logits = target(torch.cat([prompt.expand(25, -1), pairs], dim=-1)).logits[:, 2:4].double()
    law = logits.softmax(-1).gather(-1, pairs[..., None]).squeeze(-1).prod(-1)
    assert draft.metrics.accepted_tokens > 500
    statistic = float(((found - n * law) ** 2 / (n * law)).sum())
    assert statistic < 60  # chi square with 24 degrees of freedom exceeds it once in 15,000 times
