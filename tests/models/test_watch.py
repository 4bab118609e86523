"""A draft that was changed after it was wrapped is noticed, said, and begins anew on its new weights."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_draft
from hf_onlinespec.models.watch import ModelWatch
from tests.conftest import tiny_llama

SETTINGS = OnlineSpecConfig(rank=4, alpha=4.0, lookahead=3, update_every=1, replay_passes=0)
TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7]])


def other_head(model: PreTrainedModel) -> None:
    model.set_output_embeddings(nn.Linear(16, 32, bias=False))


def one_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torch.enable_grad():
        model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.zero_grad()


@torch.no_grad()
def written_through_data(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        weight.data += 0.5


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], object], str]] = {
    "dtype": (lambda model: model.to(torch.bfloat16), "bfloat16"),
    "trained": (one_step, "was written"),
    "loaded": (lambda model: model.load_state_dict(tiny_llama(7).state_dict()), "was written"),
    "assigned": (lambda model: model.load_state_dict(tiny_llama(7).state_dict(), assign=True), "another parameter"),
    "data": (written_through_data, "was written"),
    "resized": (lambda model: (model.resize_token_embeddings(40), model.resize_token_embeddings(32)), "embed_tokens"),
    "head": (other_head, "other modules"),
    "layers": (lambda model: model.model.layers.append(tiny_llama(3, layers=2).model.layers[1]), "other modules"),
}


def serve(target: PreTrainedModel, draft: object, prompt: torch.Tensor) -> None:
    plain = target.generate(prompt, do_sample=False, max_new_tokens=8)
    found = target.generate(prompt, assistant_model=draft, onlinespec=SETTINGS, do_sample=False, max_new_tokens=8)
    assert torch.equal(plain, found)


@pytest.mark.parametrize("wrap", [lambda model: OnlineDraft(model, SETTINGS), lambda model: model], ids=["own", "kept"])
@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_changed_draft_is_said_and_begins_anew(target, draft_model, prompt, wrap, change, words: str) -> None:
    passed = wrap(draft_model)
    serve(target, passed, prompt)
    draft = online_draft(passed)
    steps, number = draft.steps, draft.lineage.draft
    change(draft_model)
    with pytest.warns(UserWarning, match=f"changed after it was wrapped.*{words}"):
        serve(target, passed, prompt)
    assert online_draft(passed) is draft and steps == draft.steps == 1 and draft.lineage.draft != number
    with torch.no_grad(), draft.trainable.serving(base=True) as base:
        assert torch.equal(base(TOKENS).logits, draft_model(TOKENS).logits)
    served = draft(TOKENS).logits
    with torch.no_grad():
        beside = draft.trainable.logits_with(draft.learning.adapter_params(), input_ids=TOKENS)
    torch.testing.assert_close(served, beside, atol=1e-2, rtol=1e-2)
    serve(target, passed, prompt)  # said once
    assert draft.steps == 2 and draft.metrics.requests == 3


def test_a_draft_that_can_no_longer_draft_says_why(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, SETTINGS)
    serve(target, draft, prompt)
    draft_model.to("meta")
    with pytest.raises(ValueError, match="meta"):
        target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=4)
    assert draft.steps == 1


def test_what_changes_no_weight_is_no_change(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, SETTINGS)
    serve(target, draft, prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draft_model.train().requires_grad_(False).eval()
        draft_model.to("cpu").float()
        draft_model.tie_weights()
        draft_model(TOKENS)
        draft_model.register_forward_hook(lambda *args: None)
        serve(target, draft, prompt)
    assert draft.steps == 2


def test_a_model_that_is_gone_cannot_have_been_changed(target, prompt) -> None:
    model = tiny_llama(2)
    draft = OnlineDraft(model, SETTINGS)
    weight = model.lm_head.weight
    del model
    with torch.no_grad():
        weight.mul_(1.0)
    serve(target, draft, prompt)
    assert draft.steps == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_a_peft_model_is_watched_with_its_adapter(target, draft_model, prompt) -> None:
    passed = get_peft_model(
        draft_model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    serve(target, passed, prompt)
    draft = online_draft(passed)
    with torch.no_grad():
        passed.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.mul_(2.0)
    with pytest.warns(UserWarning, match=r"lora_B.*was written"):
        serve(target, passed, prompt)
    with torch.no_grad(), draft.trainable.serving(base=True) as base:
        torch.testing.assert_close(base(TOKENS).logits, passed(TOKENS).logits, atol=1e-4, rtol=1e-4)
    merged = passed.merge_and_unload()
    with pytest.warns(UserWarning, match="changed after it was wrapped"):
        serve(target, merged, prompt)
    assert isinstance(passed, PeftModel) and online_draft(merged) is draft


def test_a_callable_notices_too(target, draft_model, prompt) -> None:
    draft = OnlineDraft(draft_model, SETTINGS)
    one_step(draft_model)
    with pytest.warns(UserWarning, match="changed after it was wrapped"):
        target.generate(prompt, custom_generate=draft.generate_fn(), do_sample=False, max_new_tokens=4)


def test_of_two_threads_that_notice_a_change_one_begins_anew(
    target, draft_model, prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the second would throw away what was learned since the first."""
    draft = OnlineDraft(draft_model, SETTINGS)
    serve(target, draft, prompt)
    one_step(draft_model)
    noticed, change = threading.Barrier(2, timeout=30), ModelWatch.change
    looks: dict[int, int] = {}

    def both(self: ModelWatch) -> str | None:
        """Neither begins before both have looked."""
        found, own = change(self), threading.get_ident()
        looks[own] = looks.get(own, 0) + 1
        if looks[own] == 1:
            noticed.wait()
        return found

    monkeypatch.setattr(ModelWatch, "change", both)
    numbers: list[str] = []

    def begin() -> None:
        draft.begin_anew_if_changed()
        numbers.append(draft.lineage.draft)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(told) == 1 and "begins anew" in str(told[0].message)
    assert len(numbers) == 2 and numbers[0] == numbers[1]
