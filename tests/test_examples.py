"""The examples do what they print: run as they are, on few requests, and the functions of the one-file twin one by one."""

import ast
import copy
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_onlinespec.embedded import load_seq2seq_pair

from .conftest import tiny_llama

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FROM_SCRATCH = EXAMPLES / "onlinespec_from_scratch.py"
DROP_IN = EXAMPLES / "01_drop_in.py"


@pytest.fixture(scope="module")
def twin() -> dict[str, Any]:
    """The names of the one-file twin; its main is not run."""
    return runpy.run_path(str(FROM_SCRATCH), run_name="twin")


# The one-file twin, as a whole


def test_from_scratch_learns_and_writes_what_plain_generate_writes(twin, monkeypatch, capsys) -> None:
    lessons_per_step = []

    def adapt(draft, optimizer, lessons) -> float:
        assert all(module.on for module in draft.modules() if isinstance(module, twin["LoRA"]))
        lessons_per_step.append(len(lessons))
        return twin["adapt"](draft, optimizer, lessons)

    monkeypatch.setitem(twin["main"].__globals__, "adapt", adapt)
    twin["main"](["--requests", "12", "--new-tokens", "8", "--lookahead", "3"])
    # After each request: one step on it, four on up to four of the remembered ones.
    assert lessons_per_step == [n for i in range(1, 13) for n in [1] + 4 * [min(4, i)]]
    printed = capsys.readouterr().out.splitlines()
    groups = [re.fullmatch(r" *(\d+) - +(\d+) +([\d.]+) +([\d.]+)", line) for line in printed[2:-1]]
    assert [(int(g[1]), int(g[2])) for g in groups if g] == [(1, 10), (11, 12)]
    assert all(1 <= float(al) <= 4 for g in groups if g for al in g.groups()[2:])
    assert "; 12 of 12 outputs identical to plain greedy generate;" in printed[-1]
    # What the totals say is the mean that the groups say.
    totals = [float(x) for x in re.findall(r"(?:base|learning) ([\d.]+)", printed[-1])]
    for column, total in enumerate(totals, start=3):
        first, second = (float(g[column]) for g in groups if g)
        assert min(first, second) - 0.01 <= total <= max(first, second) + 0.01


def test_from_scratch_samples(twin, capsys) -> None:
    twin["main"](["--requests", "2", "--new-tokens", "8", "--temperature", "0.8", "--domain", "orders"])
    assert "outputs sampled from the target's distribution" in capsys.readouterr().out


def test_from_scratch_refuses_a_domain_without_prompts(twin, capsys) -> None:
    with pytest.raises(SystemExit):
        twin["main"](["--domain", "poems"])
    assert "--domain 'poems'" in capsys.readouterr().err


def test_from_scratch_is_one_short_file_of_torch_and_transformers() -> None:
    source = FROM_SCRATCH.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


# The one-file twin, function by function


def test_twin_lora_starts_as_the_draft_learns_and_switches_back(twin, prompt) -> None:
    target, draft = tiny_llama(1, layers=2), tiny_llama(2)
    before = draft(prompt).logits
    parameters = twin["add_lora"](draft)
    # Every layer has its A and its B: seven in a Llama block, the embedding and the head.
    assert len(parameters) == 2 * 9
    assert torch.equal(draft(prompt).logits, before)

    # All tokens of the vocabulary are seen, so that every row of the embedding's adapter is taught.
    tokens_1T, log_p_GV, _ = twin["serve"](target, draft, torch.arange(32)[None], 24, 4, 1.0)
    assert len(log_p_GV) == 24
    frozen = {name: p.clone() for name, p in draft.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = [twin["adapt"](draft, optimizer, [(tokens_1T, log_p_GV)]) for _ in range(10)]
    assert 0 < losses[-1] < 0.8 * losses[0]
    assert all(bool((p != 0).any()) for p in parameters)
    assert all(torch.equal(p, frozen[name]) for name, p in draft.named_parameters() if not p.requires_grad)

    assert not torch.allclose(draft(prompt).logits, before, atol=1e-2)
    twin["switch"](draft, False)
    assert torch.equal(draft(prompt).logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_twin_draft_that_is_the_target_is_always_kept_and_has_nothing_to_learn(twin, temperature) -> None:
    """Pins the position of the feedback: the logits that predict token j sit at j - 1, whatever the row's padding."""
    target = tiny_llama(1, layers=2)
    draft = copy.deepcopy(target)
    parameters = twin["add_lora"](draft)
    lessons = []
    for prompt, new_tokens in ((torch.tensor([[3, 14, 15, 9, 2, 6]]), 12), (torch.tensor([[7, 1]]), 7)):
        tokens_1T, log_p_GV, rounds = twin["serve"](target, draft, prompt, new_tokens, 3, temperature)
        assert tokens_1T.shape == (1, prompt.shape[1] + new_tokens)
        assert rounds == -(-new_tokens // 4)
        lessons.append((tokens_1T, log_p_GV))
    loss = twin["adapt"](draft, torch.optim.Adam(parameters, lr=1e-3), lessons)
    assert abs(loss) < 1e-5


@pytest.mark.parametrize("lookahead", [0, 1, 5])
@pytest.mark.parametrize("eos", [None, 5, [5, 11]])
def test_twin_greedy_equals_generate(twin, prompt, lookahead, eos) -> None:
    target, draft = tiny_llama(1, layers=2), tiny_llama(2)
    target.generation_config.eos_token_id = eos
    plain = target.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30)
    tokens_1T, log_p_GV, rounds = twin["serve"](target, draft, prompt, 30, lookahead, 0.0)
    assert torch.equal(tokens_1T, plain)
    assert len(log_p_GV) == tokens_1T.shape[1] - prompt.shape[1]
    # The feedback is the target's law at each generated token.
    with torch.no_grad():
        law = target(plain).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(log_p_GV, law, atol=1e-4, rtol=1e-4)
    assert rounds <= len(log_p_GV) if lookahead else rounds == len(log_p_GV)


def test_twin_stops_at_an_end_of_sequence_inside_a_round(twin, prompt) -> None:
    target = tiny_llama(1, layers=2)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 12}
    endless = target.generate(prompt, **options)[0, prompt.shape[1] :]
    target.generation_config.eos_token_id = int(endless[1])
    plain = target.generate(prompt, **options)
    assert plain.shape[1] - prompt.shape[1] <= 2
    # The target drafts for itself, so all six guesses are right, and those behind the end must go.
    tokens_1T, log_p_GV, rounds = twin["serve"](target, copy.deepcopy(target), prompt, 12, 6, 0.0)
    assert torch.equal(tokens_1T, plain)
    assert len(log_p_GV) == plain.shape[1] - prompt.shape[1]
    assert rounds == 1


def test_twin_acceptance_keeps_the_target_law(twin) -> None:
    """Fixed p and q at three positions: the first token follows p₀, the second p₁, and a guess survives by Σ min(p, q)."""
    p_CV = torch.tensor([[0.5, 0.2, 0.1, 0.2], [0.1, 0.1, 0.7, 0.1], [0.25, 0.25, 0.4, 0.1]])
    q_KV = torch.tensor([[0.2, 0.5, 0.3, 0.0], [0.3, 0.2, 0.4, 0.1]])
    temperature, draws = 0.7, 8000
    logits_CV = temperature * p_CV.log()
    drafted_NK = torch.stack([torch.multinomial(q_V, draws, replacement=True) for q_V in q_KV], dim=1)
    counts = torch.zeros(3, 4)
    for drafted_K in drafted_NK:
        for i, token in enumerate(twin["accept"](logits_CV, drafted_K[None], list(q_KV), temperature)):
            counts[i, token] += 1
    reached = counts.sum(-1)
    survival = torch.minimum(p_CV[:2], q_KV).sum(-1)
    assert reached[0] == draws
    for i in range(2):
        share = reached[i + 1] / reached[i]
        assert abs(share - survival[i]) < 4 * (survival[i] * (1 - survival[i]) / reached[i]) ** 0.5
    for i in range(3):
        # χ² with 3 degrees of freedom: above 16.3 once in a thousand; the seed is fixed.
        expected = reached[i] * p_CV[i]
        assert ((counts[i] - expected) ** 2 / expected).sum() < 16.3


# The shortest use of the library


def test_drop_in(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(DROP_IN), "6"])
    names = runpy.run_path(str(DROP_IN), run_name="__main__")
    printed = capsys.readouterr().out
    assert "last output: identical to plain generate\n" in printed
    assert re.search(r"^requests to   5: [1-6]\.\d\d tokens", printed)
    assert "requests to   6: " in printed
    metrics = names["metrics"]
    assert metrics.requests == 6 and metrics.updates > 0
    assert f"acceptance_length   {metrics.acceptance_length:.2f}\n" in printed
    assert 0 < metrics.tokens_per_s < metrics.decode_tokens_per_s
    assert len(DROP_IN.read_text(encoding="utf-8").splitlines()) <= 40


# Evolved drafts and fine-tuning


def run(name: str, *arguments: str, monkeypatch, capsys) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return names, capsys.readouterr().out


def test_warm_start(monkeypatch, capsys) -> None:
    names, printed = run("02_warm_start.py", "6", "1", monkeypatch=monkeypatch, capsys=capsys)
    assert printed.startswith(f"cold: {names['cold']:.2f} tokens per target forward on 1 unseen prompts\nwarm: ")
    assert names["warm"] > 1.3 * names["cold"]
    assert names["draft"].metrics.updates == 0


# What PEFT and transformers say to any fine-tune of an adapter on a tied model.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_round_trip(monkeypatch, capsys) -> None:
    _, printed = run("03_peft_round_trip.py", "4", "1", monkeypatch=monkeypatch, capsys=capsys)
    lengths = [float(x) for x in re.findall(r"([\d.]+) tokens per target forward", printed)]
    original, online, tuned, back = lengths
    assert 1.0 <= original < online < 6
    assert original < tuned and original < back


def test_target_fine_tune(monkeypatch, capsys) -> None:
    names, printed = run("04_target_fine_tune.py", "8", "12", "1", monkeypatch=monkeypatch, capsys=capsys)
    assert names["alignment"].updates == 8
    assert names["kept"] > 1.2 * names["left"]
    assert f"kept aligned {names['kept']:.2f}, " in printed


@pytest.mark.filterwarnings("ignore")  # of a trainer that is given a model and no name of one
def test_grpo_rollouts(monkeypatch, capsys) -> None:
    pytest.importorskip("trl")
    names, printed = run("05_grpo_rollouts.py", "2", monkeypatch=monkeypatch, capsys=capsys)
    assert "greedy answers equal plain generate's after 2 of 2 steps\n" in printed
    assert len(names["rewards"]) == len(names["comparison"].lengths) == 2
    assert names["draft"].metrics.requests == 1 + 2 * 3 + 1  # a rollout, a greedy and a sampled batch in each step
    assert all(seconds > 0 for seconds in names["comparison"].seconds)


def test_sequence_to_sequence(monkeypatch, capsys) -> None:
    options = ("--requests", "2", "--new-tokens", "16")
    names, printed = run("06_sequence_to_sequence.py", *options, monkeypatch=monkeypatch, capsys=capsys)
    assert printed.endswith("all outputs: identical to plain generate\n")
    assert [line.split(":")[0] for line in printed.splitlines() if line[0] != " "] == [
        "wikisql",
        "advising",
        "all outputs",
    ]
    assert names["drafts"]["learning draft"].metrics.updates > 0 == names["drafts"]["frozen draft"].metrics.updates


def test_sequence_to_sequence_of_another_model(tmp_path, monkeypatch, capsys) -> None:
    pair = load_seq2seq_pair()
    for part in (pair.target, pair.tokenizer):
        part.save_pretrained(tmp_path)
    options = ("--requests", "2", "--new-tokens", "12", "--model", str(tmp_path), "--language", "SELECT")
    _, printed = run("06_sequence_to_sequence.py", *options, monkeypatch=monkeypatch, capsys=capsys)
    assert "\n  SELECT" in printed and "  suffix memory " in printed
    assert printed.endswith("all outputs: identical to plain generate\n")
