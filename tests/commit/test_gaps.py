"""Padding between the tokens of prompts is shown to drafts on the left, and what the target has read goes with its token."""

from __future__ import annotations

import torch

from hf_onlinespec.commit.gaps import Gaps
from hf_onlinespec.rounds import Rows


def test_padding_on_the_left_alone_needs_nothing() -> None:
    assert Gaps.of(None, 0) is None
    assert Gaps.of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), 2) is None


def test_rows_are_shown_with_all_padding_on_the_left() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 1]])
    gaps = Gaps.of(mask, 3)
    assert gaps is not None
    assert gaps.mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    tokens = torch.tensor([[90, 11, 12, 91, 92, 13, 14, 15], [21, 22, 23, 24, 93, 25, 26, 0]])
    shown = gaps.shown(Rows(tokens, (8, 7)))
    assert shown.row(0).tolist() == [[90, 91, 92, 11, 12, 13, 14, 15]]
    assert shown.row(1).tolist() == [[93, 21, 22, 23, 24, 25, 26]]
    one = gaps.shown(Rows(tokens[1:], (7,), (1,)))  # the other row has ended
    assert torch.equal(one.tokens, shown.tokens[1:]) and one.numbers == (1,)


def test_features_stand_at_the_tokens_as_they_are_shown() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 1]])
    gaps = Gaps.of(mask, 3)
    assert gaps is not None and gaps.first_fed == (5, 4)
    features = torch.tensor(
        [[[3.0], [4.0], [5.0], [6.0]], [[3.0], [4.0], [5.0], [6.0]]]
    )  # of the places 3 to 5 and a candidate
    assert gaps.shown_features(features, (0, 1), 1)[..., 0].tolist() == [[3, 4, 5, 6], [4, 3, 5, 6]]
    later = features[:, :2]  # of the last token and a candidate
    assert gaps.shown_features(later, (0, 1), 1) is later
