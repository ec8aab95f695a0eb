"""Who asks and what is read, call by call; what comes of it is in tests/test_unmerging.py."""

import torch

from lightning_crosslmm.llm.virtual import Unmerging

# three tokens after two of padding: text at place 0, one for places 1, 2 and 5, one for 3 and 4
TOKENS_BV = torch.tensor([[2, 3, 3, 4, 4, 3]])


def unmerging(is_exact):
    return Unmerging(TOKENS_BV, torch.tensor([6]), torch.tensor([0]), (1, 5), is_exact)


def test_the_prompt_is_read_in_full_by_both():
    for is_exact in (True, False):
        call = unmerging(is_exact).at(past_length=0, num_positions=5)
        assert torch.equal(call.token_BV, TOKENS_BV) and call.count_X.tolist() == [0, 0, 1, 3, 2]


def test_new_tokens_read_a_copy_of_a_cached_key_at_each_place():
    call = unmerging(True).at(past_length=6, num_positions=2)  # one new token is cached, two more come
    assert call.key_RL.tolist() == [[2, 3, 3, 4, 4, 3, 5, 6, 7]]
    assert call.place_RL.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]] and call.place_RQ.tolist() == [[7, 8]]
    assert call.bias_R1QL[0, 0].tolist() == [[0.0] * 8 + [-torch.inf], [0.0] * 9]


def test_rows_of_other_lengths_hide_what_they_have_not():
    tokens_BV = torch.tensor([[3, 4, 6], [0, 1, 1]])  # the second sample lies in the first row; 6 is nobody
    call = Unmerging(tokens_BV, torch.tensor([2, 3]), torch.tensor([1, 0]), (2, 3), True).at(3, 1)
    assert call.key_RL.tolist() == [[0, 1, 1, 3], [0, 1, 0, 3]]
    assert call.place_RL.tolist() == [[0, 1, 2, 3], [0, 1, 2, 2]] and call.place_RQ.tolist() == [[3], [2]]
    assert call.bias_R1QL[:, 0, 0].tolist() == [[0.0] * 4, [0.0, 0.0, -torch.inf, 0.0]]


def test_unique_keys_are_read_once_at_their_mean_place_with_the_log_of_their_count():
    call = unmerging(False).at(past_length=6, num_positions=2)
    assert call.key_RL is None
    torch.testing.assert_close(call.place_RL[0, 2:], torch.tensor([0, 8 / 3, 3.5, 6, 7, 8]))
    assert call.place_RQ.tolist() == [[7, 8]]
    weights = torch.tensor([[0, 0, 1, 3, 2, 1, 1, 0], [0, 0, 1, 3, 2, 1, 1, 1]])
    torch.testing.assert_close(call.bias_R1QL[0, 0], weights.log())
