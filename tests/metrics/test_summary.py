"""What is printed: a few lines with units; tables in notebooks; the same as values."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re

import pytest
import torch

from hf_onlinespec import DraftMetrics, OnlineDraft, OnlineSpecConfig, online_memory
from hf_onlinespec.metrics import Counts, Decisions
from hf_onlinespec.metrics.summary import Summary, size


@pytest.fixture
def served(target, draft_model, prompt) -> OnlineDraft:
    """A draft after two requests."""
    draft = OnlineDraft(draft_model, OnlineSpecConfig(lookahead=3, update_every=1, rank=4))
    mask = torch.ones_like(prompt)
    for _ in range(2):
        target.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, assistant_model=draft)
    return draft


def lines(printed: object) -> dict[str, str]:
    """The rows of a printed summary."""
    _, *rows = str(printed).splitlines()
    return dict(re.split(r"  +", row.strip(), maxsplit=1) for row in rows)


def test_a_config_prints_what_differs_from_the_default_as_it_is_written() -> None:
    assert repr(OnlineSpecConfig()) == "OnlineSpecConfig()"
    config = OnlineSpecConfig(lookahead=4, lr=1e-3, target_modules=["q_proj"])
    assert repr(config) == "OnlineSpecConfig(lr=0.001, target_modules=('q_proj',), lookahead=4)"
    values = {word.arg: ast.literal_eval(word.value) for word in ast.parse(repr(config), mode="eval").body.keywords}
    assert OnlineSpecConfig(**values) == config


def test_help_on_the_config_explains_every_setting() -> None:
    shown = inspect.getdoc(OnlineSpecConfig)
    assert shown is not None and shown.startswith("How the draft drafts")
    for setting in dataclasses.fields(OnlineSpecConfig):
        line = f"    {setting.name} ({setting.type}, default {setting.default!r}): {setting.metadata['help']}."
        assert line in shown.splitlines()


def test_a_draft_prints_what_it_is_and_what_it_did(served) -> None:
    metrics, rows = served.metrics, lines(repr(served))
    assert repr(served).startswith("OnlineDraft(LlamaForCausalLM, 9 adapted layers)\n")
    assert rows["settings"] == "OnlineSpecConfig(rank=4, lookahead=3, update_every=1)"
    assert rows["served"] == f"2 requests, 16 tokens: {metrics.acceptance_length:.2f} tokens per target forward"
    assert rows["speed"].startswith(f"{metrics.tokens_per_s:.1f} tokens/s ({metrics.decode_tokens_per_s:.1f} with")
    assert rows["learned"].startswith(f"{served.steps} gradient steps")
    assert rows["drafting"] == metrics.decisions.drafting and rows["learning"] == metrics.decisions.learning
    assert len(repr(served).splitlines()) <= 10


def test_a_new_draft_and_a_memory_print_too(target, draft_model, prompt) -> None:
    assert "served" not in lines(repr(OnlineDraft(draft_model)))
    mask = torch.ones_like(prompt)
    target.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, onlinespec=True)
    rows = lines(repr(online_memory(target)))
    assert rows["served"].startswith("1 request, 4 tokens: ") and rows["suffix memory"].startswith(
        "65,536 tokens at most"
    )


def test_metrics_print_their_numbers_with_units(served) -> None:
    metrics = served.metrics
    assert repr(metrics) == str(metrics.summary())
    assert repr(metrics).startswith("DraftMetrics: 2 requests, 16 new tokens in ")
    rows = lines(metrics)
    assert rows["acceptance length"] == f"{metrics.acceptance_length:.2f} tokens per target forward"
    assert rows["speed"].startswith(f"{metrics.tokens_per_s:.1f} tokens/s, {metrics.decode_tokens_per_s:.1f} with")
    assert rows["learning"].startswith(f"{metrics.update_share:.1%} of the time, {metrics.updates} gradient steps, ")
    assert rows["last request"] == metrics.last.line()
    assert "failed" not in rows and "expert weights" not in rows and "when idle" not in rows


def test_what_is_rare_is_printed_where_there_is_any() -> None:
    metrics = DraftMetrics(failed_updates=2, idle_updates=1, idle_time_s=0.5, rollbacks=1, expert_weights=(0.25, 0.75))
    rows = lines(metrics)
    assert rows["failed"] == "updates 2" and rows["left out"] == "rollbacks 1"
    assert rows["when idle"] == "1 gradient step in 0.50 s, 0 requests dropped"
    assert rows["expert weights"] == "0.25; the base draft 0.75"


def test_a_summary_is_also_a_dict_of_plain_values(served) -> None:
    metrics = served.metrics
    values = metrics.summary().to_dict()
    assert json.loads(json.dumps(values)) == values
    for name in ("tokens_per_s", "decode_tokens_per_s", "update_share", "acceptance_length", "acceptance_rate"):
        assert values[name] == getattr(metrics, name) and values["last"][name] == getattr(metrics.last, name)
    assert {f.name for f in dataclasses.fields(Counts)} <= set(values)
    assert values["requests"] == 2 and values["sources"] == metrics.sources
    assert values["decisions"]["drafting"] == metrics.decisions.drafting
    values["decisions"]["rounds"].clear()
    assert metrics.decisions.rounds["plain"] + metrics.decisions.rounds["model"] > 0


def test_decisions_and_counts_print_words_and_units(served) -> None:
    decisions = served.metrics.decisions
    rows = lines(decisions)
    assert rows["drafting"] == "lookahead=3 was asked for" and rows["served by"] == "the learned draft"
    assert "plain target steps" in rows["costs"] and "rollback" not in rows
    assert lines(Decisions(rounds={"model": 2, "memory+model": 1}))["rounds"].startswith("model 2, memory+model 1; ")
    assert lines(Decisions(rollback="a burst of odd prompts", serves_base=True))["rollback"] == "a burst of odd prompts"
    assert json.dumps(decisions.summary().to_dict())
    last = repr(served.metrics.last)
    assert last.startswith("1 request: 8 tokens in ") and len(last.splitlines()) == 1


def test_notebooks_show_tables_with_texts_escaped(served) -> None:
    for shown in (served, served.metrics, served.metrics.decisions, served.metrics.summary(), served.settings):
        html = shown._repr_html_()
        assert html.startswith("<table>") and html.count("<tr>") == html.count("</tr>") > 5
    assert served.settings._repr_html_().count("<tr>") == 1 + len(dataclasses.fields(OnlineSpecConfig))
    shown = Summary("<b>", (("a<script>", "&"),), {})._repr_html_()
    assert "<script>" not in shown and "a&lt;script&gt;" in shown and "&amp;" in shown and "&lt;b&gt;" in shown


def test_bytes_are_told_in_megabytes_where_there_are_many() -> None:
    assert (size(0), size(9_999), size(1_310_720)) == ("0 bytes", "9,999 bytes", "1.31 MB")
