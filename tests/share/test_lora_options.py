"""Every option of the installed PEFT is known: without effect, read, or off by default."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig

from hf_onlinespec import ArtifactError
from hf_onlinespec.share.lora_options import FIRST_VALUES, READ, WITHOUT_EFFECT, check_options

PLAIN = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict() | {
    "peft_type": "LORA",
    "target_modules": ["q_proj"],
}


def test_every_option_of_peft_is_known() -> None:
    names = {field.name for field in fields(LoraConfig)}
    assert (WITHOUT_EFFECT | READ) - {"peft_version"} <= names
    check_options(PLAIN, Path("adapter_config.json"))
    for name in sorted(names - WITHOUT_EFFECT - READ):
        with pytest.raises(ArtifactError, match=f"{name}="):
            check_options(PLAIN | {name: 1}, Path("adapter_config.json"))


@pytest.mark.parametrize("first", FIRST_VALUES)
def test_first_values_change_nothing_of_the_base(first: bool | str | None) -> None:
    check_options(PLAIN | {"init_lora_weights": first}, Path("adapter_config.json"))
