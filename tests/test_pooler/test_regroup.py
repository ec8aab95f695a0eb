import torch

from lightning_crosslmm.pooler.regroup import keep, merge
from lightning_crosslmm.tokens import Partition
from tests.tiny import token_set


def test_keeping_drops_the_others_with_their_mass():
    tokens = token_set((1, 1), (2, 2))
    kept = keep(tokens, torch.tensor([3, 1, 6]), torch.tensor([2, 1]))
    kept.validate()
    assert torch.equal(kept.features_SD, tokens.features_SD[[3, 1, 6]]) and kept.mass_S.tolist() == [1, 1, 1]
    assert kept.source_map.pooled_of_source_S.tolist() == [-1, 1, -1, 0, -1, -1, 2, -1]


def test_merging_counts_each_token_for_its_mass():
    tokens = token_set((1,), (2, 2))
    once = merge(tokens, torch.tensor([0, 0, 0, 1]), torch.tensor([2]))
    twice = merge(once, torch.tensor([0, 0]), torch.tensor([1]))
    twice.validate()
    torch.testing.assert_close(twice.features_SD[0], tokens.features_SD.mean(dim=0))
    assert twice.mass_S.tolist() == [4] and twice.coordinate_S3.tolist() == [[0, 0.5, 0.5]]
    assert isinstance(twice.source_map, Partition) and twice.source_map.pooled_of_source_S.tolist() == [0] * 4


def test_merging_may_drop_and_keeps_the_dtype():
    tokens = token_set((2,), (1, 2))
    half = tokens.with_features(tokens.features_SD.bfloat16())
    merged = merge(half, torch.tensor([0, 0, -1, 1]), torch.tensor([1, 1]), (1, 1))
    merged.validate()
    assert merged.features_SD.dtype == torch.bfloat16 and merged.mass_S.tolist() == [2, 1] and merged.grid == (1, 1)


def test_a_mean_of_half_precision_is_not_one_of_rounded_sums():
    tokens = token_set((1,), (1, 1000), width=1)
    ones = tokens.with_features(torch.ones(1000, 1, dtype=torch.bfloat16))
    assert merge(ones, torch.zeros(1000, dtype=torch.int64), torch.tensor([1])).features_SD.item() == 1.0
