"""An evolved adapter goes through an ordinary PEFT fine-tune with transformers' Trainer, and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.metrics import Counts
from tests.conftest import tiny_gpt2, tiny_llama
from tests.drafts import learn_segment

SETTINGS = OnlineSpecConfig(rank=4, alpha=8.0)
# What PEFT and transformers say to a fine-tune of such an adapter, whoever made it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def untied(**settings: Any) -> PreTrainedModel:
    return tiny_llama(2, **settings)


def tied() -> PreTrainedModel:
    return tiny_llama(2, tie_word_embeddings=True)


def gpt2() -> PreTrainedModel:
    return tiny_gpt2(2)


def evolved(base: PreTrainedModel, target: PreTrainedModel, tokens: torch.Tensor) -> OnlineDraft:
    draft = OnlineDraft(base, SETTINGS)
    with torch.no_grad():
        teacher = Teacher.from_logits(target(tokens).logits[0, :-1])
    for _ in range(5):
        learn_segment(draft, tokens, [teacher], Counts())
    return draft


def fine_tune(model: PeftModel, tokens: torch.Tensor, folder: Path) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    Trainer(model, args, train_dataset=[{"input_ids": tokens[0], "labels": tokens[0]}]).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("embedding", [False, "auto"], ids=["adapter-alone", "embedding-beside"])
@pytest.mark.parametrize("base", [untied, tied, gpt2])
def test_out_and_back(base, embedding, dtype, target, prompt, tmp_path) -> None:
    draft = evolved(base(), target, prompt)
    draft.save_pretrained(tmp_path / "evolved")

    model = PeftModel.from_pretrained(base(), tmp_path / "evolved", is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(prompt).logits, draft(prompt).logits, atol=1e-4, rtol=1e-4)
    fine_tune(model, prompt, tmp_path / "trainer")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path / "tuned", save_embedding_layers=embedding)
    model = model.float().eval()

    back = OnlineDraft.from_pretrained(tmp_path / "tuned", base_model=base())
    with torch.no_grad():
        tuned = model(prompt).logits
    torch.testing.assert_close(back(prompt).logits, tuned, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tuned, draft(prompt).logits, atol=1e-2)
    assert (back.settings.rank, back.settings.alpha) == (4, 8.0)
    # It learns on.
    counts = Counts()
    with torch.no_grad():
        teacher = Teacher.from_logits(target(prompt).logits[0, :-1])
    learn_segment(back, prompt, [teacher], counts)
    assert counts.updates == 1
    assert not torch.allclose(back(prompt).logits, tuned, atol=1e-3)
