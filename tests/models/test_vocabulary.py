"""Vocabularies of two sizes: drafting and learning on the common ids, exactly; and what is refused, with the reason."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TrainingArguments,
)

from hf_onlinespec import (
    ConfigError,
    DraftError,
    OnlineDraft,
    OnlineSpecConfig,
    online_memory,
)
from hf_onlinespec.commit.base import Call
from hf_onlinespec.commit.request import Request
from hf_onlinespec.govern.acceptance import TokenSource
from hf_onlinespec.rounds import Proposal, Rows
from hf_onlinespec.verify.accept import accept
from tests.chi_square import THOUSAND, chi_square, quantile
from tests.conftest import answered, tiny_llama
from tests.drafts import move

SIZES = [(40, 32), (32, 40)]  # of target and draft
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def learning(model: PreTrainedModel, **settings: object) -> OnlineDraft:
    """A draft that learns from every request."""
    return OnlineDraft(
        model,
        OnlineSpecConfig(
            **(
                dict(
                    rank=4,
                    alpha=4.0,
                    lookahead=4,
                    update_when="request",
                    update_every=1,
                    replay_passes=1,
                    memory_tokens=0,
                )
                | settings
            )
        ),
    )


def prompt_of(n: int, vocabulary: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(vocabulary, (1, n), generator=torch.Generator().manual_seed(seed))


def widened_head(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """More rows in embedding and head than the configuration says."""
    torch.manual_seed(7)
    hidden = model.config.hidden_size
    model.model.embed_tokens = nn.Embedding(rows, hidden)
    model.lm_head = nn.Linear(hidden, rows, bias=False)
    nn.init.normal_(model.lm_head.weight, std=0.6)
    return model


class Sliced(type(tiny_llama(1))):
    """A model that leaves out the padded rows of its head."""

    said = 32

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., : self.said]
        return output


def sliced(seed: int) -> PreTrainedModel:
    model = tiny_llama(seed, vocab=40)
    model.__class__ = Sliced
    return model


def words(n: int, odd: dict[int, str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of n tokens, w0 to w(n - 1), or others at the ids in `odd`."""
    names = [(odd or {}).get(i, f"w{i}") for i in range(n)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# Exact


@pytest.mark.parametrize(
    ("own", "other", "learner"), [(*SIZES[0], "optimistic"), (*SIZES[1], "optimistic"), (*SIZES[0], "ensemble")]
)
def test_greedy_text_is_plain_text_while_the_draft_learns(own: int, other: int, learner: str) -> None:
    target, draft = (
        tiny_llama(1, vocab=own, layers=2),
        learning(tiny_llama(2, vocab=other), learner=learner, update_when="round", update_every=3),
    )
    said: set[int] = set()
    for seed in range(2):
        prompt = prompt_of(9, own, seed)  # tokens that the draft cannot read among them
        plain = target.generate(prompt, **GREEDY)
        with answered():
            ours = target.generate(prompt, assistant_model=draft, **GREEDY)
        assert torch.equal(plain, ours)
        said |= set(plain[0, 9:].tolist())
    assert own < other or max(said) >= other  # the target's argmax was outside of what the draft knows
    metrics = draft.metrics
    assert metrics.updates > 4 and metrics.skipped_updates == 0
    assert metrics.drafted_tokens > 2 * metrics.rounds  # it went on drafting behind tokens that it does not know


@pytest.mark.parametrize(("own", "other"), [(152_064, 151_936), (151_936, 152_064)])
def test_the_two_sizes_of_qwen(own: int, other: int) -> None:
    target, draft = tiny_llama(1, vocab=own, hidden=4), learning(tiny_llama(2, vocab=other, hidden=4))
    prompt = torch.tensor([[5, 17, own - 1]])
    plain = target.generate(prompt, do_sample=False, max_new_tokens=4)
    with answered():
        ours = target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=4)
        out = target.generate(prompt, assistant_model=draft, do_sample=True, max_new_tokens=4, top_k=20)
    assert torch.equal(plain, ours)
    assert out.shape == (1, 7) and draft.metrics.updates >= 2 and draft.metrics.skipped_updates == 0


@pytest.mark.parametrize("wide", ["target", "draft", "both"])
@pytest.mark.parametrize("sample", [False, True])
def test_a_head_may_have_more_rows_than_the_configuration_says(wide: str, sample: bool) -> None:
    target, model = tiny_llama(1, layers=2), tiny_llama(2)
    target = target if wide == "draft" else widened_head(target, 40)
    model = model if wide == "target" else widened_head(model, 40)
    draft = learning(model, memory_tokens=500)
    prompt = prompt_of(9, 32 if wide == "draft" else 40)
    settings = GREEDY | {"do_sample": sample}
    for assistant in ({"assistant_model": draft}, {"onlinespec": True}):
        with answered():
            out = target.generate(prompt, **settings, **assistant)
        assert out.shape == (1, 21) and int(out.max()) < (32 if wide == "draft" else 40)
        assert sample or torch.equal(out, target.generate(prompt, **settings))
    assert draft.metrics.updates > 0 and draft.metrics.skipped_updates == 0


@pytest.mark.parametrize("which", ["target", "draft", "both"])
@pytest.mark.parametrize("sample", [False, True])
def test_sizes_are_those_of_the_logits_where_a_forward_leaves_out_rows_of_its_head(which: str, sample: bool) -> None:
    target = tiny_llama(1, vocab=40, layers=2) if which == "draft" else sliced(1)
    draft = learning(tiny_llama(2, vocab=40) if which == "target" else sliced(2), memory_tokens=500)
    prompt, settings = prompt_of(9, 40), GREEDY | {"do_sample": sample}
    for bad in (None, [[7]]):
        with answered():
            out = target.generate(prompt, assistant_model=draft, bad_words_ids=bad, **settings)
        assert sample or torch.equal(out, target.generate(prompt, bad_words_ids=bad, **settings))
    assert draft.metrics.updates > 0 and draft.metrics.skipped_updates == 0
    assert target.generate(prompt, onlinespec=True, **settings).shape == (1, 21)


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "ngrams": {"no_repeat_ngram_size": 2},
    "min_length": {"min_new_tokens": 12, "eos_token_id": [3, 5, 35]},
    "bad_words": {"bad_words_ids": [[7], [8, 9], [33]]},
    "bias": {"sequence_bias": [[[11], 2.0], [[12, 13], 1.5], [[34], 2.0]]},
    "suppressed": {"suppress_tokens": [20, 21, 36]},
    "typical": {"typical_p": 0.9, "do_sample": True},
    "eta": {"eta_cutoff": 0.02, "do_sample": True},
    "epsilon": {"epsilon_cutoff": 0.02, "do_sample": True},
    "min_p": {"min_p": 0.05, "do_sample": True},
    "top_k": {"top_k": 36, "do_sample": True},
    "top_p": {"top_p": 0.8, "do_sample": True},
}


@pytest.mark.parametrize("settings", PROCESSORS.values(), ids=PROCESSORS)
def test_processors_index_the_target_s_vocabulary(settings: dict[str, Any]) -> None:
    """They are applied to the draft's scores too: no wrong shape, no law that is none."""
    target, draft = tiny_llama(1, vocab=40, layers=2), learning(tiny_llama(2), lookahead=3)
    prompt = prompt_of(9, 40)
    out = target.generate(prompt, assistant_model=draft, onlinespec=False, **(GREEDY | settings))
    if not settings.get("do_sample"):
        assert torch.equal(out, target.generate(prompt, **(GREEDY | settings)))
    metrics = draft.metrics
    # Every round had its three tokens, but the last ones that have no room.
    assert metrics.drafted_tokens >= 3 * (metrics.rounds - 3) and metrics.drafted_tokens > 0


def test_a_law_that_leaves_the_draft_nothing_to_say_is_no_error() -> None:
    """All tokens that the draft knows are suppressed: it proposes nothing, and the target goes on."""
    target, draft = tiny_llama(1, vocab=40, layers=2), learning(tiny_llama(2, vocab=32))
    settings: dict[str, Any] = {"suppress_tokens": list(range(32)), "max_new_tokens": 8}
    out = target.generate(prompt_of(5, 40), assistant_model=draft, do_sample=True, **settings)
    assert int(out[0, 5:].min()) >= 32
    plain = target.generate(prompt_of(5, 40), do_sample=False, **settings)
    assert torch.equal(plain, target.generate(prompt_of(5, 40), assistant_model=draft, do_sample=False, **settings))


# The law


@pytest.mark.parametrize(("own", "other"), [(8, 5), (5, 8), (6, 6)])
def test_the_accept_test_keeps_the_law_over_other_supports(own: int, other: int) -> None:
    """100,000 rounds at once: what is kept follows p, whichever ids only one of both knows."""
    n = 100_000
    generator = torch.Generator().manual_seed(own)
    logits = 1.5 * torch.randn(1, 2, own, generator=generator)
    q = (1.5 * torch.randn(1, other, generator=generator)).softmax(-1).expand(n, -1)
    torch.manual_seed(5)
    proposal = Proposal(torch.multinomial(q, 1), q[:, None], ((TokenSource("model", 0, (0,)),),) * n)
    never = StoppingCriteriaList([lambda tokens, scores, **kwargs: torch.zeros(len(tokens), dtype=torch.bool)])
    before = Rows.of(torch.zeros(n, 1, dtype=torch.long))
    verdict = accept(proposal, logits.expand(n, -1, -1), before, LogitsProcessorList(), never, True, None)
    counts = verdict.rows.tokens[:, 1].bincount(minlength=own)
    assert len(counts) == own
    statistic, freedom = chi_square(counts, logits[0, 0].softmax(-1).double())
    assert statistic < quantile(freedom, THOUSAND), f"chi square {statistic:.1f} at {freedom} degrees of freedom"
    kept = sum(verdict.accepted) / n
    common = min(own, other)
    least = torch.minimum(logits[0, 0].softmax(-1)[:common], q[0, :common]).sum().item()
    assert kept == pytest.approx(least, abs=0.01)


@pytest.mark.parametrize(("own", "other"), [(5, 4), (4, 5)])
def test_law_of_generated_sequences_with_vocabularies_of_two_sizes(own: int, other: int) -> None:
    """All pairs of tokens are enumerated; the draft learns, and the prompt has a token that it cannot read."""
    flat = {"initializer_range": 0.2}
    target, model = tiny_llama(1, vocab=own, layers=2, **flat), tiny_llama(2, vocab=other, **flat)
    draft = learning(model, rank=2, alpha=2.0, lookahead=2, lr=3e-3, replay_passes=0, memory_tokens=100)
    prompt = torch.tensor([[1, own - 1]])
    sequences = torch.tensor(list(itertools.product(range(own), repeat=2)))
    with torch.no_grad():
        logits = target(torch.cat([prompt.expand(len(sequences), -1), sequences], dim=-1)).logits[:, 1:3]
    law = logits.double().softmax(-1).gather(-1, sequences[..., None]).squeeze(-1).prod(-1)
    torch.manual_seed(11)
    counts = torch.zeros(own**2, dtype=torch.long)
    for _ in range(80):
        with answered():
            out = target.generate(prompt, assistant_model=draft, do_sample=True, max_new_tokens=2, top_k=0)
        counts[out[0, 2] * own + out[0, 3]] += 1
    statistic, freedom = chi_square(counts, law)
    assert statistic < quantile(freedom, THOUSAND), f"chi square {statistic:.1f} at {freedom} degrees of freedom"
    assert draft.metrics.updates >= 80 and draft.metrics.skipped_updates == 0


def test_a_memory_that_knows_another_target_proposes_what_this_one_can_read() -> None:
    small, large = tiny_llama(1, vocab=32, layers=2), tiny_llama(3, vocab=40, layers=2)
    draft = learning(tiny_llama(2, vocab=32), memory_tokens=500)
    prompt = torch.tensor([[5, 6, 38, 39, 5, 6, 38, 39, 5, 6]])  # the memory has learned that 38 follows
    large.generate(prompt, assistant_model=draft, do_sample=True, max_new_tokens=4)
    for sample in (False, True):
        settings = GREEDY | {"do_sample": sample}
        out = small.generate(torch.tensor([[5, 6]]), assistant_model=draft, **settings)
        assert sample or torch.equal(out, small.generate(torch.tensor([[5, 6]]), **settings))


# Learning


@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"update_when": "idle"}], ids=str)
@pytest.mark.parametrize(("own", "other"), SIZES)
def test_the_draft_learns_the_law_on_the_common_ids(own: int, other: int, settings: dict[str, Any]) -> None:
    """Of one prompt asked again and again, the draft comes to say what the target says, as far as it knows the tokens."""
    target = tiny_llama(1, vocab=own, layers=2)
    draft = learning(tiny_llama(2, vocab=other), **({"lr": 1e-2} | settings))
    prompt = prompt_of(9, min(own, other))
    with torch.no_grad():
        wanted = target(prompt).logits[0, -1, : min(own, other)].softmax(-1)
        before = draft(prompt).logits[0, -1, : min(own, other)].softmax(-1)
        for _ in range(9):
            with answered():
                target.generate(prompt, assistant_model=draft, do_sample=True, max_new_tokens=3, top_k=0)
            assert draft.catch_up(60)
        after = draft(prompt).logits[0, -1, : min(own, other)].softmax(-1)
    assert torch.minimum(wanted, after).sum() > torch.minimum(wanted, before).sum() + 0.1
    assert draft.metrics.skipped_updates == 0 and bool(torch.isfinite(after).all())


class Impossible(nn.Module):
    """A head that rules out all tokens below 32 at every other position."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden).clone()
        logits[hidden[..., 0] > 0, :32] = -torch.inf
        return logits


@pytest.mark.parametrize(
    "settings", [{}, {"loss": "reverse_kl"}, {"loss": "cross_entropy"}, {"loss": "reverse_kl", "top_k": 6}], ids=str
)
def test_positions_without_mass_on_the_common_ids_are_left_out(settings: dict[str, Any]) -> None:
    target = tiny_llama(1, vocab=40, layers=2)
    target.lm_head = Impossible(target.lm_head)
    draft = learning(tiny_llama(2, vocab=32), **settings)
    for seed in range(3):
        prompt = prompt_of(9, 40, seed)
        assert torch.equal(target.generate(prompt, **GREEDY), target.generate(prompt, assistant_model=draft, **GREEDY))
    assert draft.metrics.updates >= 3 and draft.metrics.skipped_updates == 0
    assert bool(torch.isfinite(draft(prompt_of(9, 32)).logits).all())


@pytest.mark.parametrize(("own", "other"), SIZES)
def test_a_warm_start_teaches_the_common_ids(own: int, other: int, tmp_path: Path) -> None:
    from hf_onlinespec.training.warm_start import warm_start

    target, draft = tiny_llama(1, vocab=own, layers=2), learning(tiny_llama(2, vocab=other))
    texts = ["".join(chr(97 + (7 * i + j) % own) for i in range(12)) for j in range(4)]
    quiet = dict(save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True)
    args = TrainingArguments(output_dir=str(tmp_path), num_train_epochs=6, learning_rate=1e-2, **quiet)
    tokens = prompt_of(12, min(own, other))
    wanted, before = (m(tokens).logits[..., : min(own, other)].softmax(-1) for m in (target, draft))

    def letters(text: str) -> Any:
        return type("Encoded", (), {"input_ids": [ord(c) - 97 for c in text]})

    warm_start(draft, target, letters, texts, training_args=args)
    after = draft(tokens).logits[..., : min(own, other)].softmax(-1)
    assert torch.minimum(wanted, after).sum() > torch.minimum(wanted, before).sum()


@pytest.mark.parametrize(("own", "other"), SIZES)
def test_a_draft_stays_aligned_with_a_target_of_another_size(own: int, other: int) -> None:
    from hf_onlinespec.training.alignment import DraftAlignment
    from tests.training.test_alignment import hear

    target, draft = tiny_llama(1, vocab=own, layers=2).train(), learning(tiny_llama(2, vocab=other))
    tokens = prompt_of(12, own)
    found = hear(DraftAlignment(draft), target, input_ids=tokens)
    law = target(tokens).logits[0, :-1, : min(own, other)].log_softmax(-1)
    torch.testing.assert_close(found[0].teacher.log_probs, law.detach())
    assert int(found[0].tokens.max()) < other
    assert torch.equal(found[0].tokens[tokens[0] < other], tokens[0][tokens[0] < other])


# What is refused, and what is not


def refusal(target: PreTrainedModel, draft: PreTrainedModel, **arguments: Any) -> str:
    with pytest.raises(DraftError) as raised:
        target.generate(prompt_of(4, 32), assistant_model=draft, onlinespec=True, max_new_tokens=2, **arguments)
    return str(raised.value)


def test_sizes_far_apart_are_refused_with_both_and_where_they_come_from() -> None:
    words_ = refusal(tiny_llama(1, vocab=1100), tiny_llama(2, vocab=32))
    assert "1100 tokens in its vocabulary (config.vocab_size) and the draft 32 (config.vocab_size)" in words_
    assert "more than 1024 apart" in words_ and "assistant_tokenizer=" in words_
    words_ = refusal(widened_head(tiny_llama(1), 1100), tiny_llama(2))
    assert "1100 tokens in its vocabulary (the rows of its head; config.vocab_size=32)" in words_


def test_given_tokenizers_have_to_agree_on_the_common_ids() -> None:
    large, small = tiny_llama(1, vocab=1100), tiny_llama(2, vocab=32)
    prompt = prompt_of(4, 1100)
    agree = {"tokenizer": words(1100), "assistant_tokenizer": words(30)}
    for target, draft in ((large, small), (small, large)):
        pair = agree if target is large else dict(zip(agree, reversed(agree.values()), strict=True))
        text = prompt % target.config.vocab_size
        out = target.generate(text, assistant_model=draft, onlinespec=True, **GREEDY, **pair)
        assert torch.equal(out, target.generate(text, **GREEDY))
    odd = dict(enumerate(f"v{i}" for i in range(32)))
    words_ = refusal(large, small, tokenizer=words(1100), assistant_tokenizer=words(32, odd))
    assert "no token in common" in words_


def test_tokenizers_of_one_size_may_be_given_too() -> None:
    """transformers asks to leave them out; its pipelines pass them wherever special tokens differ."""
    target, draft = tiny_llama(1, layers=2), tiny_llama(2)
    prompt = prompt_of(4, 32)
    both = {"tokenizer": words(32), "assistant_tokenizer": words(32)}
    out = target.generate(prompt, assistant_model=draft, onlinespec=True, **GREEDY, **both)
    assert torch.equal(out, target.generate(prompt, **GREEDY))
    odd = dict(enumerate(f"v{i}" for i in range(32)))
    words_ = refusal(target, draft, tokenizer=words(32), assistant_tokenizer=words(32, odd))
    assert "no token in common" in words_  # not even where the sizes are the same


@pytest.mark.parametrize("odd", [None, {i: f"v{i}" for i in range(32)}], ids=["agree", "differ"])
def test_tokenizers_beside_the_models_are_compared(odd: dict[int, str] | None, tmp_path: Path) -> None:
    sizes = {"target": 1200, "draft": 32}
    loaded = []
    for seed, (name, size) in enumerate(sizes.items(), 1):
        tiny_llama(seed, vocab=size).save_pretrained(tmp_path / name)
        words(size, odd if name == "draft" else None).save_pretrained(tmp_path / name)
        loaded.append(type(tiny_llama(1)).from_pretrained(tmp_path / name))
    target, draft = loaded
    if odd:
        assert "no token in common" in refusal(target, draft)
    else:
        prompt = prompt_of(6, 1200)
        out = target.generate(prompt, assistant_model=draft, onlinespec=True, **GREEDY)
        assert torch.equal(out, target.generate(prompt, **GREEDY))


def test_the_memory_alone_serves_a_head_wider_than_the_configuration_says() -> None:
    target = widened_head(tiny_llama(1, layers=2), 40)
    prompt, fixed = prompt_of(9, 40), OnlineSpecConfig(lookahead=3)  # whatever the times are
    for _ in range(3):
        with answered():
            target.generate(prompt, onlinespec=fixed, do_sample=True, max_new_tokens=24)
            ours = target.generate(prompt, onlinespec=fixed, **GREEDY)
        assert torch.equal(target.generate(prompt, **GREEDY), ours)
    assert online_memory(target).metrics.accepted_tokens > 0


@pytest.mark.parametrize(("own", "other"), SIZES)
def test_the_callable_for_custom_generate_takes_two_sizes(own: int, other: int) -> None:
    target, draft = tiny_llama(1, vocab=own, layers=2), learning(tiny_llama(2, vocab=other))
    prompt = prompt_of(9, own)
    out = target.generate(prompt, custom_generate=draft.generate_fn(), **GREEDY)
    assert torch.equal(out, target.generate(prompt, **GREEDY)) and draft.metrics.updates > 0


@torch.no_grad()
def test_a_draft_without_a_law_proposes_common_ids_on_any_device(monkeypatch) -> None:
    """Where asking would wait for the device, the uniform law takes the place of none; what is drawn is read on. Here: two rows."""
    from hf_onlinespec.models.vocabulary import Vocabulary

    draft = learning(tiny_llama(2, vocab=32))
    move(draft, lambda part: torch.full_like(part, torch.nan))
    vocabulary = Vocabulary(said=64, read=64, source="test")
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    config = draft.generation_config.__class__(do_sample=True, max_length=64)
    monkeypatch.setattr("hf_onlinespec.commit.next_tokens.is_host", lambda device: False)
    request = Request(draft, Call(config, processors, rows=2, learns=False, vocabulary=vocabulary))
    proposal = request.propose(Rows.of(torch.tensor([[40, 3], [5, 60]])), 8)
    assert proposal.tokens.shape == (2, 4) and int(proposal.tokens.max()) < 32
    assert proposal.q is not None and proposal.q.shape == (2, 4, 64)
    torch.testing.assert_close(proposal.q[..., :32], torch.full((2, 4, 32), 1 / 32))


@pytest.mark.parametrize("kind", ["target", "draft"])
def test_a_recording_of_a_smaller_target_trains_a_larger_draft(kind: str, tmp_path: Path) -> None:
    """The law of the recording is on the target's ids, also behind the file; ids that the draft lacks are refused by name."""
    from hf_onlinespec.measure.recording import Recording, record
    from hf_onlinespec.measure.records import Prompt
    from hf_onlinespec.measure.regret import evaluate

    own, other = (32, 40) if kind == "draft" else (40, 32)
    target = tiny_llama(1, vocab=own, layers=2)

    class Letters:
        pad_token_id = eos_token_id = 0

        def __call__(self, text: str, return_tensors: str) -> BatchEncoding:
            tokens = torch.tensor([[ord(c) - 97 for c in text]])
            return BatchEncoding({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})

    prompts = [Prompt(text, "one", 6) for text in ("abcdef", "fedcba")]
    Recording(list(record(target, Letters(), prompts, 0.8, top_k=5)), 0.8).save(tmp_path / "stream")
    recording = Recording.load(tmp_path / "stream")
    settings = OnlineSpecConfig(rank=4, alpha=4.0)
    if kind == "target":
        with pytest.raises(ConfigError, match="the draft knows 32"):
            evaluate(recording, lambda: tiny_llama(2, vocab=other), settings, epochs=1)
        return
    report = evaluate(recording, lambda: tiny_llama(2, vocab=other), settings, epochs=1)
    model = tiny_llama(2, vocab=other)
    request = recording.requests[0].feedback
    logits = model(request.tokens[None, :-1]).logits[0, -6:, :own].log_softmax(-1)  # of the ids that the target has
    log_q = logits.gather(-1, request.teacher.tokens)
    tail = logits.exp().sum(-1) - log_q.exp().sum(-1)
    log_p = torch.cat([request.teacher.log_probs, request.teacher.log_tail[:, None]], dim=-1)
    loss = (log_p.exp() * (log_p - torch.cat([log_q, tail.log()[:, None]], dim=-1))).sum(-1).mean()
    assert report.frozen.losses[0] == pytest.approx(float(loss.detach()), abs=1e-4)


def test_an_export_of_a_widened_draft_is_the_draft(tmp_path: Path) -> None:
    draft = learning(widened_head(tiny_llama(2), 40))
    draft.merge_and_export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = prompt_of(9, 40)
    assert again.config.vocab_size == 40
    torch.testing.assert_close(again(tokens).logits, draft(tokens).logits)
    model = tiny_llama(2)
    model.lm_head = nn.Linear(16, 40, bias=False)
    with pytest.raises(DraftError, match="40 rows in its head, 32 in its embedding"):
        learning(model).merge_and_export(tmp_path / "none")
