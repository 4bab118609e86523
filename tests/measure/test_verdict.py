"""What the numbers of a trial say in words, how sure that is, and the code that is recommended."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from hf_onlinespec.embedded import FOLDER
from hf_onlinespec.measure.records import PLAIN, Ratio, Record
from hf_onlinespec.measure.trial import OURS, static_arguments
from hf_onlinespec.measure.verdict import Models, Verdict, code_for, judge


def verdict(low: float, value: float, high: float, prompts: int = 16, best: str = "prompt lookup 3") -> Verdict:
    return Verdict(prompts, best, Ratio(2.0, 1.9, 2.1), Ratio(value, low, high))


def test_it_pays_only_where_the_whole_interval_lies_above_one() -> None:
    assert verdict(1.03, 1.1, 1.18).pays
    assert verdict(1.03, 1.1, 1.18).text() == (
        "It pays: ours is 1.10 (1.03–1.18) times as fast as the best other way in hindsight, prompt lookup 3, and 2.00 (1.90–2.10) "
        "times as fast as plain generation, learning included (90 % intervals over 16 prompts)."
    )
    assert verdict(0.8, 0.9, 0.97).text().startswith("It does not pay here: ours is 0.90 (0.80–0.97) times as fast as")
    for found in (verdict(0.95, 1.2, 1.52), verdict(1.0, 1.1, 1.2), verdict(0.9, 0.95, 1.01)):
        assert not found.is_decided and not found.pays
        assert found.text().startswith("Not decided: ") and "The interval contains 1: it takes about" in found.text()


def test_an_undecided_trial_says_how_many_more_prompts_it_takes() -> None:
    found = verdict(1 / 1.2, 1.1, 1.1 * 1.1 * 1.2, prompts=16)  # in logarithms: log 1.1, plus and minus about log 1.32
    assert found.more_prompts is not None and 100 < found.more_prompts < 150
    assert f"it takes about {found.more_prompts} more prompts to tell (about 24 min more)." in found.text(prompt_s=12.0)
    assert verdict(0.99, 1.1, 1.22).more_prompts == 4
    assert verdict(0.9, 1.0, 1.11).more_prompts is None  # nothing to tell apart
    assert "take the two for equally fast" in verdict(0.9, 1.001, 1.11).text()


def test_few_prompts_decide_nothing() -> None:
    found = verdict(1.3, 1.3, 1.3, prompts=1)
    assert not found.is_decided and "over 1 prompt). Fewer than 8 prompts decide nothing" in found.text()


def test_plain_is_named_once_where_it_is_the_best_other_way() -> None:
    text = Verdict(9, PLAIN, Ratio(0.9, 0.8, 0.95), Ratio(0.9, 0.8, 0.95)).text()
    assert text.count("plain generation") == 1 and "hindsight" not in text


def test_the_best_other_way_is_that_of_the_whole_run() -> None:
    seconds = {PLAIN: (2.0, 2.0), "prompt lookup 3": (1.0, 1.6), "prompt lookup 10": (1.8, 1.0), OURS: (1.0, 1.0)}
    records = [
        Record(
            i,
            1,
            "math",
            arm,
            new_tokens=10,
            target_forwards=5,
            wall_time_s=times[i % 2],
            update_time_s=0.0,
            output=None,
        )
        for i in range(10)
        for arm, times in seconds.items()
    ]
    found = judge(records)
    assert found.best == "prompt lookup 3" and found.prompts == 10
    assert found.over_plain.value == pytest.approx(2.0) and found.over_best.value == pytest.approx(1.3)
    assert (
        found.over_plain.low <= 2.0 <= found.over_plain.high
        and 1 < found.over_best.low < 1.3 < found.over_best.high < 1.6
    )


@pytest.mark.parametrize(
    ("found", "draft", "expected"),
    [
        (verdict(1.03, 1.1, 1.18), None, "hf_onlinespec.attach(model)  #"),
        (verdict(0.9, 1.1, 1.3), "draft", "hf_onlinespec.attach(model, draft)  #"),
        (verdict(0.8, 0.9, 0.97), None, "max_new_tokens=200, prompt_lookup_num_tokens=3)"),
        (verdict(0.8, 0.9, 0.97, best="draft 5"), "draft", "draft.generation_config.num_assistant_tokens = 5"),
        (verdict(0.8, 0.9, 0.97, best=PLAIN), "draft", "max_new_tokens=200)"),
    ],
)
def test_the_recommended_code_runs(
    found: Verdict, draft: str | None, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = str(FOLDER / "target"), draft and str(FOLDER / draft)
    code = code_for(found, Models(*folders, dtype="torch.float32", device="cpu", is_chat=False))
    assert expected in code and ("hf_onlinespec" in code.replace(str(FOLDER), "")) == (found.over_best.value > 1)
    names: dict[str, Any] = {}
    exec(code.replace("200", "4"), names)
    text = capsys.readouterr().out
    assert (
        text.strip() == names["tokenizer"].decode(names["output"][0, names["inputs"]["input_ids"].shape[1] :]).strip()
    )
    draft_is_used = "assistant_model=draft" in code or "attach(model, draft)" in code
    assert ("draft = " in code) == draft_is_used


def test_the_recommended_code_uses_the_chat_template_and_the_device() -> None:
    code = code_for(verdict(1.03, 1.1, 1.18), Models("me/chat", None, "torch.bfloat16", "cuda:0", is_chat=True))
    compile(code, "code", "exec")
    assert "from_pretrained('me/chat', dtype=torch.bfloat16).to('cuda:0')" in code and "apply_chat_template(" in code


def test_static_ways_are_told_by_their_names() -> None:
    assert static_arguments("prompt lookup 10") == {"prompt_lookup_num_tokens": 10}
    assert static_arguments("draft 3")["num_assistant_tokens"] == 3
    assert static_arguments(PLAIN) == static_arguments(OURS) == {}
    assert AutoTokenizer.from_pretrained(FOLDER / "target").chat_template is None  # what the test above runs without
