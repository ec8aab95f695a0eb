import pytest
import torch

from lightning_crosslmm.fusion import FusionContext, Queries, Spans

QUERIES = Queries(torch.tensor([0]), Spans(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([4])))


def context(row_spans=((0, 4), None, (4, 9))):
    return FusionContext(torch.zeros(9, 2), QUERIES, QUERIES, row_spans=row_spans, prompt_length=7)


def test_the_prompt_goes_through_as_it_is():
    here = context()
    assert here.at(0, 7) is here


@pytest.mark.parametrize(("num_positions", "positions"), [(1, [0, 2]), (3, [0, 1, 2, 6, 7, 8])])
def test_new_text_reads_all_sources_of_its_row(num_positions, positions):
    after = context().at(7, num_positions)
    assert after.v2v is None
    assert after.t2v.position_Q.tolist() == positions
    spans = after.t2v.spans
    assert spans.query_offsets.tolist() == [0, num_positions, 2 * num_positions]
    assert (spans.key_start.tolist(), spans.key_end.tolist()) == ([0, 4], [4, 9])


def test_rows_without_visuals_ask_nothing():
    assert context(row_spans=(None, None)).at(8, 1).t2v is None


def test_the_same_question_is_worked_out_once():
    here = context()
    assert here.at(7, 1).t2v is here.at(8, 1).t2v
    assert here.at(7, 1).t2v is not here.at(7, 2).t2v


@pytest.mark.parametrize(("cache", "left"), [(None, 9), ("recompute", 9), ("keys_values", 0), ("int8", 0)])
def test_source_tokens_go_once_the_prompt_has_gone_through(cache, left):
    here = FusionContext(torch.ones(9, 2), None, QUERIES, shared={0: {}}, prompt_length=7, t2v_cache=cache)
    assert here.at(0, 7) is here and len(here.source_SE) == 9
    after = here.at(7, 1)
    assert after.source_SE.shape == here.source_SE.shape == (left, 2)
    assert bool(here.shared) == bool(left)


def held():
    return torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(0)), torch.ones(9, 2, 8)


def test_what_is_kept_is_made_once_and_read_by_what_follows():
    here = FusionContext(torch.zeros(9, 2), None, QUERIES, prompt_length=7, t2v_cache="keys_values")
    first = here.keep(4, held)
    again = here.at(7, 1).keep(4, lambda: pytest.fail("made anew"))
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_the_prompt_reads_what_is_exact_in_every_layer_of_a_group():
    here = FusionContext(torch.zeros(9, 2), None, QUERIES, prompt_length=7, t2v_cache="int8")
    for _ in range(2):
        assert torch.equal(here.keep(4, held)[0], held()[0])
    rounded = here.at(7, 1).keep(4, held)[0]
    assert not torch.equal(rounded, held()[0])
    torch.testing.assert_close(rounded, held()[0], rtol=0, atol=float(held()[0].abs().max()) / 254)


@pytest.mark.parametrize(
    ("cache", "num_bytes"),
    [("keys_values", 2 * 9 * 16 * 4), ("int8", 2 * 9 * (16 + 2 * 4)), ("recompute", 9 * 2 * 4), (None, 0)],
)
def test_bytes_that_are_kept(cache, num_bytes):
    here = FusionContext(torch.zeros(9, 2), None, QUERIES, t2v_cache=cache)
    if here.keeps_keys:
        here.keep(0, held)
    assert here.cache_bytes() == num_bytes


@pytest.mark.parametrize(("past", "num_positions"), [(0, 3), (3, 4), (0, 8)])
def test_a_cut_prompt_is_refused(past, num_positions):
    with pytest.raises(ValueError, match=f"positions {past} to {past + num_positions} cut a prompt of 7"):
        context().at(past, num_positions)
