"""Streamers that are told where tokens come from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.verify.streaming import OriginStreamer
from tests.conftest import tiny_llama


class Told(OriginStreamer):
    def __init__(self) -> None:
        self.prompt: list[int] = []
        self.rounds: list[tuple[list[int], int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.prompt, "a round came token by token"
        self.prompt = value.view(-1).tolist()

    def put_round(self, tokens: Tensor, accepted: int) -> None:
        self.rounds.append((tokens.tolist(), accepted))

    def end(self) -> None:
        self.ends += 1


class Plain(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.view(-1).tolist()

    def end(self) -> None:
        pass


def test_a_streamer_is_told_how_many_tokens_of_a_round_were_drafted(prompt: Tensor) -> None:
    target = tiny_llama(1)
    draft = OnlineDraft(
        tiny_llama(1), OnlineSpecConfig(lookahead=3, memory_tokens=0)
    )  # the same model: much is accepted
    told, plain = Told(), Plain()
    out = target.generate(prompt, assistant_model=draft, streamer=told, max_new_tokens=12, do_sample=False)
    new = out[0, prompt.shape[1] :].tolist()
    assert told.prompt == prompt[0].tolist() and told.ends == 1
    assert [token for tokens, _ in told.rounds for token in tokens] == new
    assert sum(accepted for _, accepted in told.rounds) == draft.metrics.last.accepted_tokens > 0
    assert len(told.rounds) == draft.metrics.last.rounds
    assert all(len(tokens) - accepted in (0, 1) for tokens, accepted in told.rounds)
    out = target.generate(prompt, assistant_model=draft, streamer=plain, max_new_tokens=12, do_sample=False)
    assert plain.tokens == out[0].tolist() and torch.equal(out[0, prompt.shape[1] :], torch.tensor(new))
