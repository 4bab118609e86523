"""A head's logits and hidden states against the references, over a prompt and rounds with rejections at every place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_onlinespec._compat.caches import held_tokens
from hf_onlinespec._compat.rollback import crop
from hf_onlinespec.heads.base import Head
from hf_onlinespec.heads.reading import read_head
from tests.heads import files, references
from tests.heads.files import HeadFiles

CLOSE = dict(rtol=0.0, atol=1e-5)
Reference = Callable[..., Any]
EAGLE3: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_before_residual": dict(norm_before_residual=True),
    "norm_before_fc": dict(norm_before_fc=True),
    "fc_norm": dict(fc_norm=True),
    "norm_output": dict(norm_output=True),
    "fc_norm and norm_output": dict(fc_norm=True, norm_output=True),
    "bias": dict(bias=True),
    "two layers": dict(layers=2),
    "queries and keys normalised": dict(qk_norm=True),
    "another width": dict(h=32, own=True),
    "reduced vocabulary": dict(reduced=True),
}
KINDS: dict[str, tuple[HeadFiles, Reference]] = {
    **{f"EAGLE-3, {name}": (files.eagle3(**options), references.eagle3) for name, options in EAGLE3.items()},
    "EAGLE-3, five hidden states": (files.as_speculators(files.eagle3(reads=5), (1, 2, 3, 0, 4)), references.eagle3),
    "EAGLE-1": (files.eagle1(), references.eagle1),
    "EAGLE-1, no bias, own embedding": (files.eagle1(bias=False, own=True), references.eagle1),
    "EAGLE-1, two layers": (files.eagle1(layers=2), references.eagle1),
    "Hydra mlp": (files.hydra(), references.hydra),
    "Hydra mlp, three blocks": (files.hydra(blocks=3), references.hydra),
    "Hydra prefix-mlp": (files.hydra(prefix=True), references.hydra),
    "Hydra prefix-mlp, two blocks": (files.hydra(prefix=True, blocks=2), references.hydra),
}


def opened(kind: str, folder: Path) -> Head:
    head = read_head(KINDS[kind][0].write(folder / "head"), files.target_config())
    head.share(files.target())
    return head


class Rival:
    """The reference of a kind of head, with the weights of its files."""

    def __init__(self, kind: str) -> None:
        made, self.reference = KINDS[kind]
        model = files.target()
        self.weights = {
            "embed_tokens.weight": model.get_input_embeddings().weight.detach(),
            "target_lm_head.weight": model.get_output_embeddings().weight.detach(),
        } | {name.replace("midlayer.", "layers.0."): tensor for name, tensor in made.tensors.items()}
        self.settings = dict(eps=1e-5, theta=500.0, head_dim=8, hidden_size=files.T) | made.config | made.settings

    def __call__(self, tokens: Tensor, features: Tensor | None, hidden: Tensor | None, past: Any) -> Any:
        return self.reference(self.weights, self.settings, tokens, features, hidden, past)


class Inputs:
    """Random tokens and features, the same in every run."""

    def __init__(self, head: Head, batch: int = 2) -> None:
        self.generator, self.batch, self.size = torch.Generator().manual_seed(2), batch, head.features_size

    def tokens(self, n: int) -> Tensor:
        return torch.randint(files.V, (self.batch, n), generator=self.generator)

    def features(self, n: int) -> Tensor:
        return torch.randn(self.batch, n, self.size, generator=self.generator)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_head_says_what_its_formulas_say_over_a_prompt_and_rounds_of_rejections(kind: str, tmp_path: Path) -> None:
    head, rival = opened(kind, tmp_path), Rival(kind)
    inputs = Inputs(head)
    cache, past, rows, drafted = None, None, 9, head.most or 4
    for accepted in range(drafted + 1):  # of the drafted tokens, before the next round
        tokens, features = inputs.tokens(rows), inputs.features(rows)
        out = head(tokens, features=features, past_key_values=cache, use_cache=True)
        logits, hidden, past = rival(tokens, features, None, past)
        torch.testing.assert_close(out.logits, logits, **CLOSE)
        torch.testing.assert_close(out.hidden, hidden, **CLOSE)
        cache = out.cache
        length = 0 if cache is None else held_tokens(cache)
        ours, theirs, steps = out.hidden[:, -1:], hidden[:, -1:], past
        for _ in range(drafted - 1):
            token = inputs.tokens(1)
            out = head(token, hidden=ours, past_key_values=cache, use_cache=True)
            logits, theirs, steps = rival(token, None, theirs, steps)
            torch.testing.assert_close(out.logits, logits, **CLOSE)
            torch.testing.assert_close(out.hidden, theirs, **CLOSE)
            ours = out.hidden
        if cache is not None:
            crop(cache, held_tokens(cache) - length)
        rows = accepted + 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(kind: str, tmp_path: Path) -> None:
    head = opened(kind, tmp_path)
    inputs = Inputs(head)
    tokens, features = inputs.tokens(8), inputs.features(8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    whole = head(tokens, features=features, attention_mask=mask, use_cache=True)
    alone = head(tokens[1:, 3:], features=features[1:, 3:], use_cache=True)
    token = inputs.tokens(1)
    for step in range(3 if head.most is None else head.most):
        torch.testing.assert_close(whole.logits[1:, 3 if step == 0 else 0 :], alone.logits, **CLOSE)
        torch.testing.assert_close(whole.hidden[1:, 3 if step == 0 else 0 :], alone.hidden, **CLOSE)
        assert whole.logits.isfinite().all()
        if step + 1 == head.most:
            break
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        whole = head(token, hidden=whole.hidden[:, -1:], past_key_values=whole.cache, attention_mask=mask)
        alone = head(token[1:], hidden=alone.hidden[:, -1:], past_key_values=alone.cache)


WITH_CACHE = ["EAGLE-3, plain", "EAGLE-3, two layers", "EAGLE-1"]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("kind", WITH_CACHE)
@torch.no_grad()
def test_the_branches_of_a_tree_are_as_chains(kind: str, additive: bool, tmp_path: Path) -> None:
    """Two children of one row, told apart by a mask of their own."""
    head = opened(kind, tmp_path)
    inputs = Inputs(head, batch=1)
    read = head(inputs.tokens(6), features=inputs.features(6), use_cache=True)
    children, cache = inputs.tokens(2), read.cache
    seen = torch.ones(1, 1, 2, 8, dtype=torch.bool)
    seen[0, 0, 0, 7] = seen[0, 0, 1, 6] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    hidden, places = read.hidden[:, -1:].expand(-1, 2, -1), torch.tensor([[6, 6]])
    both = head(children, hidden=hidden, past_key_values=cache, attention_mask=mask, position_ids=places)
    for i in range(2):
        crop(cache, held_tokens(cache) - 6)
        alone = head(children[:, i : i + 1], hidden=read.hidden[:, -1:], past_key_values=cache)
        torch.testing.assert_close(both.logits[:, i : i + 1], alone.logits, **CLOSE)
        torch.testing.assert_close(both.hidden[:, i : i + 1], alone.hidden, **CLOSE)


@pytest.mark.parametrize("kind", WITH_CACHE)
@torch.no_grad()
def test_steps_at_every_position_at_once_are_as_drafting_behind_each(kind: str, tmp_path: Path) -> None:
    """The training-time test: a row of step k sees the first keys up to its position, and its own key of each later step."""
    head = opened(kind, tmp_path)
    inputs = Inputs(head, batch=1)
    n, steps = 7, 3
    text, features = inputs.tokens(n + steps), inputs.features(n)
    causal, own = torch.ones(n, n, dtype=torch.bool).tril(), torch.eye(n, dtype=torch.bool)
    out = head(text[:, :n], features=features, use_cache=True)
    found = [out.logits]
    for k in range(1, steps):
        out = head(
            text[:, k : n + k],
            hidden=out.hidden,
            past_key_values=out.cache,
            attention_mask=torch.cat([causal, *[own] * k], dim=1)[None, None],
            position_ids=torch.arange(k, n + k)[None],
        )
        found.append(out.logits)
    for t in range(n):
        alone = head(text[:, : t + 1], features=features[:, : t + 1], use_cache=True)
        for k in range(steps):
            torch.testing.assert_close(found[k][:, t], alone.logits[:, -1], **CLOSE)
            if k + 1 < steps:
                token = text[:, t + k + 1 : t + k + 2]
                alone = head(token, hidden=alone.hidden[:, -1:], past_key_values=alone.cache)


@pytest.mark.parametrize("kind", ["EAGLE-3, reduced vocabulary", "EAGLE-1", "Hydra prefix-mlp"])
@torch.no_grad()
def test_logits_to_keep_leaves_the_hidden_states_whole(kind: str, tmp_path: Path) -> None:
    head = opened(kind, tmp_path)
    inputs = Inputs(head)
    tokens, features = inputs.tokens(5), inputs.features(5)
    whole = head(tokens, features=features)
    some = head(tokens, features=features, logits_to_keep=2)
    torch.testing.assert_close(some.logits, whole.logits[:, -2:], **CLOSE)
    torch.testing.assert_close(some.hidden, whole.hidden, **CLOSE)
    chosen = head(tokens, features=features, logits_to_keep=torch.tensor([0, 3]))
    torch.testing.assert_close(chosen.logits, whole.logits[:, [0, 3]], **CLOSE)
