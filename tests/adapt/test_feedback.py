"""The recorder only looks; a teacher's rows mean what they say."""

import pytest
import torch
from transformers import LlamaConfig

from hf_onlinespec import FeedbackRecorder, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher, acceptance, concatenate
from hf_onlinespec.adapt.request_feedback import RequestFeedback


def test_recorder_returns_the_very_scores() -> None:
    recorder, scores = FeedbackRecorder(), torch.randn(1, 5)
    assert recorder(torch.zeros(1, 1, dtype=torch.long), scores) is scores


def test_recorder_keeps_what_later_processors_overwrite() -> None:
    recorder, scores = FeedbackRecorder(), torch.randn(1, 5)
    before = scores.clone()
    recorder(torch.zeros(1, 1, dtype=torch.long), scores)
    scores.zero_()
    torch.testing.assert_close(recorder.take(1), before[:, None])


def test_take_drops_rows_off_the_kept_path() -> None:
    recorder = FeedbackRecorder()
    for i in range(4):
        recorder(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 3), float(i)))
    assert recorder.take(2)[0, :, 0].tolist() == [0.0, 1.0]
    assert recorder.rows == []


def test_temperature_softens_the_teacher() -> None:
    logits = torch.randn(4, 9)
    torch.testing.assert_close(Teacher.from_logits(logits, temperature=2.0).log_probs, (logits / 2).log_softmax(-1))


def test_top_k_keeps_the_most_probable_and_the_rest_as_mass() -> None:
    logits = torch.randn(4, 9)
    teacher = Teacher.from_logits(logits, top_k=3)
    assert teacher.log_probs.shape == (4, 3) and teacher.tokens.shape == (4, 3)
    mass = teacher.log_probs.exp().sum(-1) + teacher.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones(4))
    assert torch.equal(teacher.tokens[:, 0], logits.argmax(-1))


def test_top_of_a_top_is_the_smaller_top() -> None:
    logits = torch.randn(4, 30)
    once, twice = Teacher.from_logits(logits, top_k=5), Teacher.from_logits(logits, top_k=12).top(5)
    assert torch.equal(once.tokens, twice.tokens)
    torch.testing.assert_close(once.log_tail, twice.log_tail)


def test_concatenate() -> None:
    logits = torch.randn(6, 9)
    whole = Teacher.from_logits(logits, top_k=4)
    parts = concatenate([Teacher.from_logits(logits[:2], top_k=4), Teacher.from_logits(logits[2:], top_k=4)])
    assert torch.equal(parts.log_probs, whole.log_probs) and torch.equal(parts.log_tail, whole.log_tail)


@pytest.mark.parametrize("recorded", [0.5, 1.0, 2.0])
def test_acceptance_is_that_of_the_call_whatever_the_teacher_was_softened_by(recorded: float) -> None:
    logits, other = 2 * torch.randn(2, 5, 16), 2 * torch.randn(2, 5, 16)
    teachers = [Teacher.from_logits(row, recorded) for row in logits]
    assert acceptance(teachers, logits, 0.7, recorded).mean().item() == pytest.approx(1.0, abs=1e-5)
    expected = torch.minimum((logits / 0.7).softmax(-1), (other / 0.7).softmax(-1)).sum(-1).mean().item()
    assert acceptance(teachers, other, 0.7, recorded).mean().item() == pytest.approx(expected, abs=1e-5)
    agree = (logits.argmax(-1) == other.argmax(-1)).float().mean().item()
    assert acceptance(teachers, other, 0, recorded).mean().item() == pytest.approx(agree)


def test_what_was_not_taken_of_the_last_round_is_gone() -> None:
    recorder = FeedbackRecorder()
    logits = torch.randn(4, 1, 8)
    expected = logits.clone()
    for row in logits:
        recorder(torch.zeros(1, 1), row)
    logits.zero_()  # a processor writes in place
    assert torch.equal(recorder.take(2), expected[:2].transpose(0, 1))
    for row in expected:
        recorder(torch.zeros(1, 1), row)
    assert recorder.take(4).shape == (1, 4, 8)


@pytest.mark.parametrize("temperature", [0.3, 0.5, 0.8, 1.5])
@pytest.mark.parametrize("recorded", [1.0, 0.7])
def test_a_top_k_teacher_knows_its_tail_at_the_temperature_of_the_call(temperature: float, recorded: float) -> None:
    """A flat distribution over 4,096 tokens: most of what it says is not among the 64 that are kept."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(16, 4096, generator=generator)
    other = logits + 0.6 * torch.randn(16, 4096, generator=generator)
    lesson = RequestFeedback(OnlineSpecConfig(temperature=recorded, top_k=64), temperature=temperature)
    lesson.record(logits[None], 16)
    teachers = lesson.teachers()
    assert teachers[0].log_probs.shape == (16, 64)
    expected = torch.minimum((logits / temperature).softmax(-1), (other / temperature).softmax(-1)).sum(-1).mean()
    found = acceptance(teachers, other[None], temperature, recorded).mean()
    itself = acceptance(teachers, logits[None], temperature, recorded).mean()
    assert itself.item() == pytest.approx(1.0, abs=1e-4)
    # Of the tail only the mass is compared: never too little, and not much too much where the tail is not everything.
    assert expected - 1e-4 <= found <= expected + (0.06 if temperature <= 0.5 else 0.5)
    twice = acceptance([teachers[0].top(32)], logits[None], temperature, recorded).mean()
    assert twice.item() == pytest.approx(1.0, abs=1e-4)
    joined = concatenate([teachers[0].rows(slice(0, 5)), teachers[0].rows(slice(5, 16))])
    assert torch.equal(
        acceptance([joined], other[None], temperature, recorded),
        acceptance(teachers, other[None], temperature, recorded),
    )


def test_the_tail_of_another_call_is_taken_to_be_flat() -> None:
    """Of a teacher that was made for no call, or for another one: exact where the tail is flat."""
    logits = torch.cat([torch.linspace(6, 3, 8), torch.zeros(56)]).expand(3, 64)
    teacher = Teacher.from_logits(logits, top_k=8)
    for temperature in (0.5, 0.8, 2.0):
        assert acceptance([teacher], logits[None], temperature).mean().item() == pytest.approx(1.0, abs=1e-5)


def test_large_vocabularies_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_onlinespec.adapt import feedback

    logits, other = 3 * torch.randn(9, 32), 3 * torch.randn(9, 32)
    whole = (
        Teacher.from_logits(logits, 1.0, 5, call_temperature=0.8),
        acceptance([Teacher.from_logits(logits)], other[None], 0.8),
    )
    monkeypatch.setattr(feedback, "MOST_LOGITS", 4 * 32)
    assert feedback.parts(9, 32) == [slice(0, 4), slice(4, 8), slice(8, 9)] and len(feedback.parts(3, 10**9)) == 3
    small = (
        Teacher.from_logits(logits, 1.0, 5, call_temperature=0.8),
        acceptance([Teacher.from_logits(logits)], other[None], 0.8),
    )
    assert torch.equal(whole[1], small[1]) and torch.equal(whole[0].log_tail_power, small[0].log_tail_power)
    assert torch.equal(whole[0].tokens, small[0].tokens) and torch.equal(whole[0].log_tail, small[0].log_tail)


@pytest.mark.parametrize("opens", [True, False])
def test_what_is_kept_of_a_long_prompt_opens_as_it_did(opens: bool) -> None:
    settings, config = OnlineSpecConfig(context_tokens=2), LlamaConfig(bos_token_id=9 if opens else 3)
    lesson = RequestFeedback(settings, config=config)
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5, 6], [0, 0, 9, 3, 4, 5, 6], [0, 0, 0, 9, 4, 5, 6]])
    lesson.record(torch.randn(3, 2, 16), 7)
    lesson.defer_to_replay()
    kept = lesson.feedback(tokens, (tokens != 0).long())
    opening = [9] if opens else []
    assert [feedback.tokens.tolist() for feedback in kept] == [
        [*opening, 3, 4, 5, 6],
        [*opening, 3, 4, 5, 6],
        [9, 4, 5, 6],  # all of it
    ]
    assert all(len(feedback.teacher) == 2 for feedback in kept)
