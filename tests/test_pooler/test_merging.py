"""Moves of tokens; what they come to in a tower is compared with lists and loops in the tests of each pooler."""

import pytest
import torch

from lightning_crosslmm.pooler.merging import Left, best_edges, in_raster_order, move_along

CPU = torch.device("cpu")


def test_raster_order_is_that_of_places():
    left = Left.all_of(2, 9, CPU)
    metric_FnK = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    edges = best_edges(metric_FnK, left.mass_Fn, num_prefix=0)
    move = move_along(edges, edges.above(0.6), None, by_similarity=True)
    merged, features_FnE = left.after(move), move.means(metric_FnK, left.mass_Fn)
    ordered, sorted_FnE = in_raster_order(merged, features_FnE)
    for frame in range(2):
        count = int((ordered.mass_Fn[frame] > 0).sum())
        homes = ordered.home_Fn[frame, :count].tolist()
        assert homes == sorted(set(homes))
        for token, home in enumerate(homes):  # a token holds the patch in whose place it stands
            assert ordered.token_FN[frame, home] == token
            before = int(merged.token_FN[frame, home])
            assert torch.equal(sorted_FnE[frame, token], features_FnE[frame, before])


def test_chained_moves_are_one_move():
    left = Left.all_of(2, 9, CPU)
    metric_FnK = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    edges = best_edges(metric_FnK, left.mass_Fn, num_prefix=1)
    first = move_along(edges, edges.ranks() < 3, 6, by_similarity=False)
    between, means_FnK = left.after(first), first.means(metric_FnK, left.mass_Fn)
    edges = best_edges(means_FnK, between.mass_Fn, num_prefix=1)
    second = move_along(edges, edges.ranks() < 2, 4, by_similarity=True)
    both, one = between.after(second), left.after(first.then(second))
    for name in ("mass_Fn", "home_Fn", "token_FN"):
        assert torch.equal(getattr(both, name), getattr(one, name)), name
    stepwise_FnK = second.means(means_FnK, between.mass_Fn)
    torch.testing.assert_close(first.then(second).means(metric_FnK, left.mass_Fn), stepwise_FnK)


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_lonely_token_has_no_partner(prefix):
    left = Left.all_of(1, 1, CPU)
    edges = best_edges(torch.randn(1, 1, 4), left.mass_Fn, prefix)
    assert not edges.above(-1.0).any()
    move = move_along(edges, edges.above(-1.0), None, by_similarity=True)
    assert left.after(move).mass_Fn.tolist() == [[1.0]]


def test_a_frame_in_which_nothing_moves_keeps_its_order_beside_one_in_which_something_does():
    metric_FnK = torch.stack([torch.eye(6), torch.ones(6, 6)])
    left = Left.all_of(2, 6, CPU)
    edges = best_edges(metric_FnK, left.mass_Fn, 0)
    move = move_along(edges, edges.above(0.5), None, by_similarity=True)
    assert move.num_tokens == 6 and move.to_Fn[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(move.means(metric_FnK, left.mass_Fn)[0], metric_FnK[0])
    assert left.after(move).mass_Fn.tolist() == [[1] * 6, [4, 1, 1, 0, 0, 0]]
