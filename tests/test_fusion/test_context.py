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


def test_keys_kept_at_the_prompt_are_there_for_what_follows():
    kept = {0: (torch.zeros(1), torch.zeros(1))}
    here = FusionContext(torch.zeros(4, 2), None, None, row_spans=((0, 4),), prompt_length=3, keys_values=kept)
    assert here.at(3, 1).keys_values is kept


@pytest.mark.parametrize(("past", "num_positions"), [(0, 3), (3, 4), (0, 8)])
def test_a_cut_prompt_is_refused(past, num_positions):
    with pytest.raises(ValueError, match=f"positions {past} to {past + num_positions} cut a prompt of 7"):
        context().at(past, num_positions)
