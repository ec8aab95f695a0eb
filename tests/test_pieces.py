import pytest
import torch

from lightning_crosslmm.pieces import in_pieces, pieces_of


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def work(piece: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return piece[:, :2] * 2, piece.sum(-1).half()


@pytest.mark.parametrize("count", [0, 5, 512, 2000, 40_000])
def test_pieces_give_what_the_whole_gives(count: int) -> None:
    with torch.no_grad():
        pieces = pieces_of(rows(count))
        assert len(pieces) == {2000: 4, 40_000: 32}.get(count, 1)
        for found, right in zip(in_pieces(work, pieces), work(rows(count)), strict=True):
            assert found.dtype == right.dtype and torch.equal(found, right)


def test_with_gradients_pieces_are_joined_and_nothing_is_split() -> None:
    whole = rows(2000).requires_grad_()
    assert pieces_of(whole)[0] is whole
    scaled, _ = in_pieces(work, whole.split(700))
    scaled.sum().backward()
    assert torch.equal(whole.grad, torch.tensor([2.0, 2.0, 0.0]).expand(2000, 3))
