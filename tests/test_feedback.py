"""The recorder only looks; a teacher's rows mean what they say."""

import pytest
import torch

from hf_onlinespec import FeedbackRecorder
from hf_onlinespec.feedback import Teacher, acceptance, concatenate


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


def test_a_round_is_heard_at_once_and_copied() -> None:
    recorder = FeedbackRecorder()
    logits = torch.randn(1, 4, 8)
    expected = logits.clone()
    recorder.hear(logits)
    logits.zero_()  # a processor writes in place
    assert torch.equal(recorder.take(2), expected[:, :2])
    recorder.hear(expected)
    assert recorder.take(4).shape == (1, 4, 8)  # what was not taken of the last round is gone
