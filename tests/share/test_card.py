"""The model card says what was measured and nothing else, its lines run, and no text of a prompt is in it."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from hf_onlinespec import ArtifactError, OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import FOLDER, EmbeddedPair, load_draft, load_pair, prompts
from hf_onlinespec.metrics import HISTORY_BUCKETS, Counts, DraftMetrics
from hf_onlinespec.models.identity import EMBEDDED, EMBEDDED_TARGET, BaseFingerprint
from hf_onlinespec.share import card
from hf_onlinespec.share.artifact import Artifact
from hf_onlinespec.share.card import model_card
from hf_onlinespec.share.curve import curve
from hf_onlinespec.share.folder import CARD, CONFIG, CURVE
from hf_onlinespec.share.history import ServingHistory
from hf_onlinespec.share.lineage import Lineage, WarmStart
from hf_onlinespec.share.lora_options import LoraOptions
from hf_onlinespec.state import State
from hf_onlinespec.training.combining import combine, distil
from hf_onlinespec.training.warm_start import default_arguments, warm_start

CARDS = Path(__file__).parents[2] / "model_cards"
PNG = b"\x89PNG\r\n\x1a\n"
SMALL: dict[str, Any] = {"rank": 2, "lookahead": 2, "update_every": 1, "memory_tokens": 0}
WARM = {"target": "org/target", "texts": 0, "prompts": 12, "tokens": 4321}
WARM_WORDS = "trained offline on 12 prompts (4,321 tokens) for `org/target`"
ALIGNED = {"target": None, "updates": 3, "tokens": 1500}
ALIGNED_WORDS = "aligned with a model without a name while that was fine-tuned, on 1,500 tokens of its training"
BASE = BaseFingerprint("org/base", "0123abcd", config="c0ffee", weights="beef", tokenizer=None)


OPTIONS = LoraOptions(4, 4.0, ("q_proj",), "org/base", None, {})


def from_file(path: Path) -> Artifact:
    """An artifact as far as its run file tells it, which is all that a card needs."""
    told = json.loads(path.read_text(encoding="utf-8"))
    settings, base = OnlineSpecConfig.from_dict(told["settings"]), BaseFingerprint.from_dict(told["base"])
    serving, lineage = ServingHistory.from_dict(told["run"], str(path)), Lineage.from_dict(told["lineage"], str(path))
    return Artifact(settings, base, OPTIONS, {}, State(), serving, lineage, told["versions"])


def evolved_orders() -> str:
    """The card of the demo's draft, made anew; its figure has a name of its own in that folder."""
    return model_card(from_file(CARDS / "evolved_orders.json")).replace(CURVE, "evolved_orders.png")


def served(requests: int) -> DraftMetrics:
    """Request number i: i + 1 tokens in two rounds, a second of which a quarter is learning."""
    metrics = DraftMetrics()
    for i in range(requests):
        call = Counts(rounds=2, new_tokens=i + 1, verified_positions=4, overlap=1.0, updates=3, learned_tokens=i)
        call.wall_time_s, call.update_time_s = 1.0, 0.25
        metrics.close(call)
    return metrics


def artifact(requests: int = 20, lineage: dict[str, Any] | None = None, **kwargs: Any) -> Artifact:
    values: dict[str, Any] = dict(settings=OnlineSpecConfig(), base=BASE)
    values["serving"] = ServingHistory.of(served(requests), ["org/target"])
    values["lineage"] = Lineage.from_dict(lineage or {}, "a lineage")
    return Artifact(options=OPTIONS, adapter={}, state=State(), **values | kwargs)


RUN = ServingHistory.of(served(2), []).to_dict()


def check(value: Any, schema: dict[str, Any], path: str = "$") -> None:
    """The part of JSON schema that ours uses; fails at a keyword that it does not know."""
    words = {"type", "required", "properties", "additionalProperties", "items", "description", "title", "$schema"}
    assert set(schema) <= words, f"{path}: {set(schema) - words}"
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    allowed = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(isinstance(value, kinds[kind]) for kind in allowed) and not isinstance(value, bool), f"{path}: {value!r}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        assert set(schema.get("required", [])) <= set(value), f"{path}: missing {set(schema['required']) - set(value)}"
        assert schema.get("additionalProperties", True) or set(value) <= set(known), (
            f"{path}: {set(value) - set(known)}"
        )
        for key in set(value) & set(known):
            check(value[key], known[key], f"{path}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            check(item, schema["items"], f"{path}[{i}]")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CARDS / "schema.json").read_text(encoding="utf-8"))
    return found


def cells(text: str, name: str) -> list[str]:
    """A row of a table, by the beginning of its first cell."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


# The files of model_cards/


def test_card_and_run_file_agree() -> None:
    assert (CARDS / "evolved_orders.md").read_text(encoding="utf-8") == evolved_orders()
    assert (CARDS / "evolved_orders.png").read_bytes().startswith(PNG)
    serving = from_file(CARDS / "evolved_orders.json").serving
    assert serving.targets == (EMBEDDED_TARGET,) and serving.requests == sum(row[0] for row in serving.history) == 90
    assert serving.new_tokens == sum(row[1] for row in serving.history)
    # Of 45 pairs of requests 4 and 5.
    assert [part.requests for part in serving.before_and_after] == [8, 10]


def test_template_is_the_packaged_one() -> None:
    packaged = card.TEMPLATE
    assert packaged.read_bytes() == (CARDS / "template.md").read_bytes()
    setup = configparser.ConfigParser()
    setup.read(CARDS.parent / "setup.cfg", encoding="utf-8")
    place = packaged.relative_to(CARDS.parent / "hf_onlinespec").as_posix()
    assert place in setup["options.package_data"]["hf_onlinespec"].split()


def test_run_files_fit_the_schema(schema: dict[str, Any], tmp_path: Path, draft_model: PreTrainedModel) -> None:
    check(json.loads((CARDS / "evolved_orders.json").read_text(encoding="utf-8")), schema)
    OnlineDraft(draft_model, OnlineSpecConfig(**SMALL)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    check(told, schema)
    for path, value in ((("run", "rounds"), 1.5), (("run", "total"), []), (("base", "weights"), None)):
        wrong = json.loads(json.dumps(told))
        wrong[path[0]][path[1]] = value
        with pytest.raises(AssertionError, match=path[1]):
            check(wrong, schema)
        del wrong[path[0]][path[1]]
        with pytest.raises(AssertionError, match=f"missing.*{path[1]}"):
            check(wrong, schema)
    told["run"]["prompts"] = ["a text"]
    with pytest.raises(AssertionError, match="prompts"):
        check(told, schema)


# The record


def test_record_counts() -> None:
    run = ServingHistory.of(served(20), ["a", "b"]).to_dict()
    assert run["targets"] == ["a", "b"]
    assert (run["requests"], run["rounds"], run["new_tokens"], run["updates"]) == (20, 40, 210, 60)
    assert run["learned_tokens"] == 190
    # 1 + 2 tokens in 4 rounds, 19 + 20 in 4, 210 in 40; two seconds each, and 20.
    assert [run[part]["acceptance_length"] for part in ("before", "after", "total")] == [0.75, 9.75, 5.25]
    assert [run[part]["tokens_per_s"] for part in ("before", "after", "total")] == [1.5, 19.5, 10.5]
    assert [run[part]["decode_tokens_per_s"] for part in ("before", "after", "total")] == [2.0, 26.0, 14.0]
    assert [run[part]["requests"] for part in ("before", "after", "total")] == [2, 2, 20]
    assert run["total"]["update_share"] == run["total"]["acceptance_rate"] == 0.25
    assert run["history"] == [[1, i + 1, 2, 1.0, 0.25] for i in range(20)]
    assert {"cpu", "cores", "threads", "python", "torch", "transformers", "peft", "hf_onlinespec"} <= set(
        run["machine"]
    )


def test_history_is_bounded() -> None:
    serving = ServingHistory.of(served(10 * HISTORY_BUCKETS), [])
    assert len(serving.history) <= HISTORY_BUCKETS
    assert sum(row[0] for row in serving.history) == serving.requests == 10 * HISTORY_BUCKETS


def test_resumed_run_goes_on(tmp_path: Path, target: PreTrainedModel, draft_model: PreTrainedModel) -> None:
    target.config._name_or_path = "org/target"
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**SMALL))
    draft.lineage.warm_start = WarmStart.from_dict(WARM, "a warm start")
    draft.lineage.data_statement = "Our orders."
    prompt = torch.tensor([[3, 14, 15]])
    target.generate(prompt, max_new_tokens=4, do_sample=False, assistant_model=draft)
    draft.save_pretrained(tmp_path)
    again = OnlineDraft.from_pretrained(tmp_path, base_model=draft_model)
    assert again.artifact().serving == draft.artifact().serving
    target.generate(prompt, max_new_tokens=4, do_sample=False, assistant_model=again)
    serving = again.artifact().serving
    assert (serving.requests, serving.new_tokens, serving.targets) == (2, 8, ("org/target",))
    text = model_card(again.artifact())
    assert WARM_WORDS in cells(text, "lineage")[0] and "## Data\n\n> Our orders.\n" in text


def test_learned_tokens_are_those_that_a_step_took(target: PreTrainedModel, draft_model: PreTrainedModel) -> None:
    found = []
    for when in ("round", "request", "idle"):
        draft = OnlineDraft(draft_model, OnlineSpecConfig(**SMALL | {"update_when": when}))
        for learn in (True, False):
            target.generate(
                torch.tensor([[3, 14, 15]]), max_new_tokens=6, do_sample=False, assistant_model=draft, onlinespec=learn
            )
        draft.catch_up()
        found.append((draft.metrics.new_tokens, draft.metrics.learned_tokens))
    assert found == [(12, 6)] * 3


@pytest.mark.parametrize("targets", ["org/target", [1], None])
def test_targets_of_another_kind(targets: Any) -> None:
    with pytest.raises(ArtifactError, match="targets="):
        ServingHistory.from_dict(ServingHistory.of(served(2), []).to_dict() | {"targets": targets}, "a history")


def test_targets_are_named_once_and_without_folders(
    tmp_path: Path, target: PreTrainedModel, draft_model: PreTrainedModel
) -> None:
    draft = OnlineDraft(draft_model, OnlineSpecConfig(**SMALL))
    (tmp_path / "here").mkdir()
    for name in ("", "org/one", str(tmp_path / "here"), "org/one", str(tmp_path / "gone"), str(FOLDER / "target")):
        target.config._name_or_path = name
        target.generate(torch.tensor([[3, 14]]), max_new_tokens=2, do_sample=False, assistant_model=draft)
    assert draft.targets.names == ["org/one", "here", "gone", EMBEDDED_TARGET]
    assert "| target | `org/one`, `here`, `gone`" in model_card(draft.artifact())


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from strings(item)


def test_no_text_of_prompts(tmp_path: Path, pair: EmbeddedPair) -> None:
    secret = "Zyxwvu-Plugh"
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(rank=2, update_every=1, lookahead=3))
    heard = []
    for number in range(2):
        inputs = pair.tokenizer(f"{prompts('orders')[number]} {secret} {number}", return_tensors="pt")
        out = pair.target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=draft)
        heard.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    draft.save_pretrained(tmp_path)
    assert draft.memory is not None and draft.metrics.updates > 0  # it did read and learn them
    for name in (CARD, CONFIG):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert secret not in text and secret.split("-")[1] not in text
        squeezed = re.sub(r"\s", "", text)
        for answer in heard:
            assert pair.tokenizer.decode(answer).strip() not in text
            assert ",".join(map(str, answer[:4])) not in squeezed
    run = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))["run"]
    assert set(strings(run)) == set(strings(run["machine"])) | {EMBEDDED_TARGET}


# The card


def test_numbers_of_the_card() -> None:
    made = artifact()
    text = model_card(made)
    assert cells(text, "before") == ["2", "0.75", "0.25", "1.5", "2.0", "25.0%"]
    assert cells(text, "after") == ["2", "9.75", "0.25", "19.5", "26.0", "25.0%"]
    assert cells(text, "all") == ["20", "5.25", "0.25", "10.5", "14.0", "25.0%"]
    assert "20 requests with 210 new tokens, which the target verified in 40 forwards" in cells(text, "served")[0]
    assert "at once from 190 of these" in cells(text, "served")[0]
    assert cells(text, "gradient steps") == ["60 while generating, those on remembered requests included"]
    made = replace(made, serving=replace(made.serving, idle_updates=7, idle_time_s=3.2, rollbacks=2))
    told = cells(model_card(made), "gradient steps")[0]
    assert "; 7 in 3 s between calls" in told and "; 2 times an earlier state" in told


def test_metadata() -> None:
    made = artifact()
    data = ModelCard(model_card(made, "me/draft")).data
    assert (data.library_name, data.base_model, data.model_name) == ("peft", "org/base", "draft")
    assert {"hf_onlinespec", "speculative-decoding", "lora"} <= set(data.tags)
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "acceptance_length": made.serving.after.acceptance_length,
        "tokens_per_s": made.serving.after.tokens_per_s,
    }
    assert results["tokens_per_s"].dataset_name == "the prompts that it served"
    assert results["tokens_per_s"].metric_args["requests"] == 2
    assert all("last tenth of the requests" in result.metric_name for result in results.values())


@pytest.mark.parametrize(
    ("name", "revision"), [("folder", None), (EMBEDDED, None), ("org/base", None), ("no name of a repo", "0123")]
)
def test_base_is_named_only_if_it_is_on_the_hub(name: str, revision: str | None) -> None:
    text = model_card(artifact(base=replace(BASE, name=name, revision=revision)))
    assert ModelCard(text).data.base_model is None
    assert f"| base draft | `{name}`" in text


def test_no_request_yet(tmp_path: Path, draft_model: PreTrainedModel) -> None:
    OnlineDraft(draft_model, OnlineSpecConfig(**SMALL)).save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    assert "It has served no request yet: there are no figures." in text
    assert "| served | nothing yet |" in text and "| target | a model without a name |" in text
    assert ModelCard(text).data.eval_results is None
    assert CURVE not in text and not (tmp_path / CURVE).exists()


@pytest.mark.parametrize("requests", [1, 2, 19])
def test_a_few_requests_have_no_before_and_after(requests: int) -> None:
    made = artifact(requests)
    text = model_card(made)
    assert cells(text, "all")[0] == str(requests)
    assert not any(words in text for words in ("| before", "| after", "“Before”", "tenth"))
    for result in ModelCard(text).data.eval_results:
        assert result.metric_name.endswith(", all requests") and result.metric_args["requests"] == requests
        assert result.metric_value == round(made.serving.total.to_dict()[result.metric_type], 2)


def test_requests_of_one_group_have_no_before_and_after() -> None:
    serving = artifact(20).serving
    serving = replace(serving, before=serving.total, after=serving.total)  # all of them in one bucket
    assert "| before" not in model_card(artifact(serving=serving))


def test_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    made = artifact()
    card.write(made, tmp_path)
    assert (tmp_path / CURVE).read_bytes().startswith(PNG)
    assert f"]({CURVE})" in (tmp_path / CARD).read_text(encoding="utf-8")
    assert curve(artifact(3).serving) != curve(made.serving)
    monkeypatch.setattr("hf_onlinespec.share.curve.find_spec", lambda name: None)
    card.write(made, tmp_path / "plain")
    assert not (tmp_path / "plain" / CURVE).exists()
    assert CURVE not in (tmp_path / "plain" / CARD).read_text(encoding="utf-8")


def test_lineage() -> None:
    assert "| lineage | begun on the base draft |" in model_card(artifact(lineage={"draft": "1f"}))
    parent = {"source": "me/draft", "revision": "77aa"}
    merged = [{"parent": parent, "weight": 0.5}, {"parent": {"source": "old", "revision": None}, "weight": 1 / 3}]
    for lineage, words in (
        ({"draft": "1f", "parent": parent}, "goes on from `me/draft` at `77aa`"),
        ({"merged": merged}, "merged: [goes on from `me/draft` at `77aa`] × 0.5 + [goes on from `old`] × 0.3333"),
        (
            {"merged": [{"draft": "2e", "weight": 1.0}], "distilled": {"rank": 4, "relative_error": 0.123}},
            "merged: [begun on the base draft] × 1; distilled to rank 4, which left out 12.3% of the change",
        ),
    ):
        assert cells(model_card(artifact(lineage=lineage)), "lineage") == [words]


@pytest.mark.parametrize(
    ("lineage", "row", "data"),
    [
        ({"warm_start": WARM}, f"begun on the base draft; {WARM_WORDS}", WARM_WORDS),
        ({"alignment": ALIGNED}, f"begun on the base draft; {ALIGNED_WORDS}", ALIGNED_WORDS),
        (
            {"parent": {"source": "old", "revision": None}, "warm_start": WARM | {"texts": 3}, "alignment": ALIGNED},
            f"goes on from `old`; {WARM_WORDS.replace('on 12', 'on 3 texts and 12')}; {ALIGNED_WORDS}",
            f"{WARM_WORDS.replace('on 12', 'on 3 texts and 12')}; {ALIGNED_WORDS}",
        ),
        (
            {"merged": [{"warm_start": WARM, "weight": 1.0}], "distilled": {"rank": 4, "relative_error": 0.5}},
            f"merged: [begun on the base draft; {WARM_WORDS}] × 1; distilled to rank 4, which left out 50.0% of the change",
            WARM_WORDS,
        ),
    ],
)
def test_training_beside_serving_is_told(lineage: dict[str, Any], row: str, data: str) -> None:
    text = model_card(artifact(0, lineage=lineage))
    assert cells(text, "lineage") == [row]
    assert f"\n\nIt was taught by other text than what it served, too: {data}.\n" in text
    assert "taught by other text" not in model_card(artifact(0))


def test_a_real_warm_start_is_told(pair: EmbeddedPair) -> None:
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(rank=2))
    args = default_arguments(draft, "unused")
    args.max_steps = 1
    warm_start(draft, pair.target, pair.tokenizer, ["set -e"], ["Create an order"], new_tokens=4, training_args=args)
    (told,) = cells(model_card(draft.artifact()), "lineage")
    tokens = draft.lineage.warm_start.tokens
    assert tokens > 0
    assert told.endswith(f"; trained offline on 1 texts and 1 prompts ({tokens} tokens) for `{EMBEDDED_TARGET}`")


def test_lineage_of_a_merged_and_distilled_draft(draft_model: PreTrainedModel) -> None:
    one, other = (OnlineDraft(draft_model, OnlineSpecConfig(**SMALL | {"seed": seed})).artifact() for seed in (0, 1))
    small, _ = distil(combine([one, other], draft_model).artifact(), 2, draft_model)
    (told,) = cells(model_card(small.artifact()), "lineage")
    assert told.startswith(
        "merged: [begun on the base draft] × 0.5 + [begun on the base draft] × 0.5; distilled to rank 2"
    )


def test_a_history_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    made = artifact()
    with pytest.raises(ArtifactError, match="run has rounds=10000000000000000: expected a whole number"):
        card.write(replace(made, serving=replace(made.serving, rounds=10**16)), tmp_path / "new")
    assert not (tmp_path / "new" / CONFIG).exists()


def test_settings_are_told() -> None:
    settings = OnlineSpecConfig(learner="ensemble", experts=4, lr=0.5, update_every=7, target_modules=("q_proj",))
    text = model_card(artifact(settings=settings))
    assert "ensemble of 4 × ogd, step size 0.5" in text and "on `q_proj`" in text
    assert "suffix memory of earlier text" in model_card(artifact())
    assert "suffix memory of earlier text" not in model_card(artifact(settings=OnlineSpecConfig(memory_tokens=0)))


ONCE = "once a request, or more often where it has over 512 new tokens"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"update_when": "request", "update_every": 7}, f"request: {ONCE}"),
        ({"update_when": "request"}, f"request: {ONCE}, as far as it pays, at most 10% of the time"),
        ({"update_when": "idle", "update_every": 7}, f"idle: {ONCE}"),
        ({"update_when": "idle"}, f"idle: {ONCE}"),
        ({"update_when": "round", "update_every": 7}, "round: every 7 rounds"),
        ({"update_when": "round"}, "round: after a round, as far as it pays, at most 10% of the time"),
    ],
)
def test_schedule(settings: dict[str, Any], words: str) -> None:
    for replay, told in (
        ({"replay_passes": 3}, "up to 3 steps on remembered requests after each request"),
        ({"replay_passes": 0}, "no replay"),
        ({"replay_tokens": 0}, "no replay"),
    ):
        text = model_card(artifact(settings=OnlineSpecConfig(**settings, **replay, lookahead=4)))
        assert cells(text, "when it learns") == [f"update_when={words}; {told}; lookahead 4"]


def test_data_statement_of_the_lineage() -> None:
    made = artifact(lineage={"data_statement": "Our orders."})
    assert "## Data\n\n> Our orders.\n" in model_card(made) and "said nothing" not in model_card(made)
    assert "## Data\n\n> Other words.\n" in model_card(made, data_statement="Other words.")
    for nothing in (None, "", " \n"):
        assert "Its users said nothing" in model_card(artifact(lineage={"data_statement": nothing}))


def test_data_statement_and_what_users_have_to_know() -> None:
    text = " ".join(model_card(artifact(), data_statement="Notes of $5 orders, by **us**.").split())
    assert r"## Data > Notes of $5 orders, by \*\*us\*\*. " in text and "said nothing" not in text
    assert "Its users said nothing about the text" in model_card(artifact())
    for words in (
        "is user data",
        "makes a repository private unless",
        "the replay and the suffix memory remember is not in these files",
        "begins with both empty",
        "For a public version make a new repository: a private one that is made public later shows all its earlier commits",
        "PEFT warns",
        "`OnlineDraft.merge_and_export`",
        "no benchmark",
    ):
        assert words in text


def test_odd_names_break_nothing() -> None:
    serving = ServingHistory.of(served(2), ['a|b`c\nd"e$x'])
    text = model_card(artifact(serving=serving, base=replace(BASE, name="x|y\n# z", revision=None)))
    assert cells(text, "target") == ['`a/bc d"e$x`']
    assert "\n# Evolved draft of x/y # z\n" in text
    assert ModelCard(text).data.model_name == "Evolved draft of x/y # z"
    compile(lines(text), "card", "exec")


HOSTILE = "x\n---\nlicense: mit\n---\n# Audited and safe\n```\n<img src=x onerror=alert(1)> [here](http://x) | a | ${title} {{x}} \u202e"


@pytest.mark.parametrize("where", ["statement", "base", "target", "parent", "teacher", "machine"])
def test_words_from_elsewhere_are_quoted(where: str) -> None:
    """They make no heading, no link, no HTML, no row, and nothing of the metadata."""
    serving, base, lineage = ServingHistory.of(served(2), ["org/target"]), BASE, {}
    if where == "statement":
        lineage = {"data_statement": HOSTILE}
    elif where == "base":
        base = replace(BASE, name=HOSTILE, revision=None)
    elif where == "target":
        serving.targets = (HOSTILE,)
    elif where == "parent":
        lineage = {"parent": {"source": HOSTILE, "revision": HOSTILE}}
    elif where == "teacher":
        lineage = {"warm_start": WARM | {"target": HOSTILE}}
    else:
        serving.machine = replace(serving.machine, cpu=HOSTILE, torch=HOSTILE)
    text = model_card(artifact(serving=serving, base=base, lineage=lineage))
    assert ModelCard(text).data.license is None and text.count("\n---\n") == 1
    outside = re.sub(r"`[^`\n]*`", "", text.partition("\n---\n")[2])  # in a code span nothing is markup
    assert not re.search(r"(?<!\\)<img|(?<!\\)\[here|^# Audited|\u202e", outside, re.MULTILINE)
    assert text.count("```") == 2
    compile(lines(text), "card", "exec")


def lines(text: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(found)


@pytest.mark.parametrize("repo_id", [None, "me/draft"])
def test_lines_run_with_the_embedded_pair(
    repo_id: str | None, tmp_path: Path, pair: EmbeddedPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(rank=2))
    inputs = pair.tokenizer(prompts("orders")[0], return_tensors="pt")
    pair.target.generate(**inputs, max_new_tokens=4, do_sample=False, assistant_model=draft)
    folder = tmp_path / (repo_id or "draft")
    card.write(draft.artifact(), folder, repo_id)
    monkeypatch.chdir(folder if repo_id is None else tmp_path)
    found: dict[str, Any] = {}
    exec(lines((folder / CARD).read_text(encoding="utf-8")), found)
    assert found["draft"].metrics.requests == 2 and found["draft"].targets.names == [EMBEDDED_TARGET]
    question = pair.tokenizer("A prompt", return_tensors="pt")
    assert torch.equal(found["out"], pair.target.generate(**question, max_new_tokens=64))


@pytest.mark.parametrize("repo_id", [None, "me/draft"])
def test_lines_run_once_the_names_are_filled_in(
    repo_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = load_pair()
    for model, name in ((own.target, "own_target"), (own.draft, "own_base")):
        model.save_pretrained(name)
        own.tokenizer.save_pretrained(name)
        model.config._name_or_path = name
    draft = OnlineDraft(own.draft, OnlineSpecConfig(rank=2))
    inputs = own.tokenizer(prompts("orders")[0], return_tensors="pt")
    own.target.generate(**inputs, max_new_tokens=4, do_sample=False, assistant_model=draft)
    folder = tmp_path / "me" / "draft"
    card.write(draft.artifact(), folder, repo_id)
    text = (folder / CARD).read_text(encoding="utf-8")
    assert (
        "First fill in what is not known to be on the Hub: `NAME_OR_FOLDER_OF_ITS_BASE` (here it was `own_base`) and "
        "`NAME_OR_FOLDER_OF_ITS_TARGET` (here it was `own_target`):\n\n```python\n"
    ) in text
    (tmp_path / "own_base").rename(tmp_path / "elsewhere")  # as on another machine
    filled = lines(text).replace("NAME_OR_FOLDER_OF_ITS_BASE", str(tmp_path / "elsewhere"))
    filled = filled.replace("NAME_OR_FOLDER_OF_ITS_TARGET", str(tmp_path / "own_target"))
    monkeypatch.chdir(tmp_path if repo_id is not None else folder)
    found: dict[str, Any] = {}
    exec(filled, found)
    assert found["target"].config._name_or_path == str(tmp_path / "own_target")
    assert found["draft"].metrics.requests == 2


@pytest.mark.parametrize(
    ("base", "target", "places"),
    [
        (BASE, "org/target", []),
        (replace(BASE, name=EMBEDDED, revision=None), EMBEDDED_TARGET, []),
        (replace(BASE, revision=None), "org/target", ["base"]),
        (replace(BASE, revision=None), EMBEDDED_TARGET, ["base"]),
        (BASE, "folder", ["target"]),
        (BASE, "/gone/folder", ["target"]),
        (BASE, None, ["target"]),
    ],
)
def test_only_unknown_names_have_to_be_filled_in(base: BaseFingerprint, target: str | None, places: list[str]) -> None:
    text = model_card(artifact(serving=ServingHistory.of(served(2), [] if target is None else [target]), base=base))
    for place, line in (
        ("base", 'from_pretrained(".", base_model="{}")'),
        ("target", 'CausalLM.from_pretrained("{}")'),
    ):
        name = f"NAME_OR_FOLDER_OF_ITS_{place.upper()}"
        assert (line.format(name) in lines(text)) == (place in places)
        assert (f"`{name}`" in text) == (place in places)
    assert ("First fill in" in text) == bool(places)


if __name__ == "__main__":
    (CARDS / "evolved_orders.md").write_text(evolved_orders(), encoding="utf-8")
