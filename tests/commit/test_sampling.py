import pytest
import torch

from hf_onlinespec.commit.sampling import draw


def test_drawn_tokens_follow_the_law_whatever_its_sum() -> None:
    torch.manual_seed(0)
    law = torch.tensor([[0.0, 0.3, 0.0, 0.2, 0.5, 0.0]])
    n = 20_000
    for scale in (1.0, 0.01, 7.0):
        tokens = draw(scale * law.expand(n, -1))
        assert tokens.shape == (n, 1)
        # Standard deviation at most 0.0036: five of them.
        torch.testing.assert_close(tokens.flatten().bincount(minlength=6) / n, law[0], atol=0.018, rtol=0)
        assert not (tokens[:, 0, None] == torch.tensor([0, 2, 5])).any(), "a token of weight zero"


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch, u: float) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: torch.full(size, u, dtype=dtype))
    law = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    assert draw(law).item() == (1 if u == 0 else 2)


def test_small_weights_behind_large_ones_are_not_rounded_away(monkeypatch) -> None:
    law = torch.cat([torch.tensor([1.0]), torch.full((1000,), 1e-9)])[None]  # in float32 the sum would stay 1
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: torch.full(size, 1 - 1e-10, dtype=dtype))
    assert draw(law).item() > 500


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_what_is_no_law_fails_as_in_generate(bad: float) -> None:
    with pytest.raises(RuntimeError):
        draw(torch.full((1, 4), bad))
