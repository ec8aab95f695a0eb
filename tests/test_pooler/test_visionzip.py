import numpy
import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import VisionzipPooler
from lightning_crosslmm.tokens import Partition
from tests.poolers import dense
from tests.test_pooler.test_prumerge import CLOSE, GRID, N, given


def plainly(features, a, keys, dominant, contextual, merge):
    """Pick and gather in one frame, loop by loop."""
    units = [key / numpy.linalg.norm(key) for key in keys]
    kept = sorted(sorted(range(len(a)), key=lambda j: -a[j])[:dominant])
    rest = [j for j in range(len(a)) if j not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    groups = {target: [] for target in targets}
    for j in rest:
        if j not in groups:
            groups[max(targets, key=lambda target: float(units[j] @ units[target]))].append(j)
    tokens, shares = [features[i] for i in kept], [{i: 1.0} for i in kept]
    for target, group in groups.items():
        if merge == "average":
            tokens.append(features[[target, *group]].mean(0))
            shares.append({j: 1 / (1 + len(group)) for j in [target, *group]})
        else:
            tokens.append(features[target] + (features[group].mean(0) if group else 0))
            shares.append({target: 0.5 if group else 1.0} | {j: 0.5 / len(group) for j in group})
    sizes = [1] * len(kept) + [1 + len(group) for group in groups.values()]
    return numpy.stack(tokens), shares, sizes


@pytest.mark.parametrize("merge", ["sum", "average"])
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 4), (20, 1), (7, 41), (1, 47)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_does_what_the_formulas_say(merge, dominant, contextual, dtype):
    tokens, taps = given(dtype)
    pooler = VisionzipPooler("class_token", dominant, contextual, merge)
    pooled = pooler(tokens, taps)
    pooled.validate()
    count = dominant + contextual
    assert pooler.tokens_per_frame(GRID) == count and (pooled.frame_offsets.diff() == count).all()
    assert isinstance(pooled.source_map, Partition) is (merge == "average") is pooler.covers
    source_map = dense(pooled.source_map)
    for frame in range(3):
        features = tokens.features_SD[frame * N : (frame + 1) * N]
        arrays = (each.double().numpy() for each in (features, taps.saliency_FN[frame], taps.keys_FNK[frame]))
        expected, shares, sizes = plainly(*arrays, dominant, contextual, merge)
        of_frame = slice(frame * count, (frame + 1) * count)
        found = pooled.features_SD[of_frame]
        torch.testing.assert_close(found, torch.from_numpy(expected).to(dtype), **CLOSE[dtype])
        assert pooled.mass_S[of_frame].round(decimals=4).tolist() == sizes
        for row, share in zip(source_map[of_frame, frame * N : (frame + 1) * N], shares, strict=True):
            assert sorted(share) == row.nonzero().flatten().tolist()
            torch.testing.assert_close(row[sorted(share)], torch.tensor([share[j] for j in sorted(share)]))


def test_the_authors_budget_is_64_of_576():
    assert VisionzipPooler()._counts(576) == (54, 10)
    assert VisionzipPooler(dominant=0.09375, contextual=0.017361)._counts(576) == (54, 10)
    assert VisionzipPooler()._counts(16) == (2, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dominant": 0},
            r"pooler.dominant is 0, the encoder gives 48 tokens per frame; it must be 1 to 48 tokens, or",
        ),
        ({"dominant": 49}, "pooler.dominant is 49, the encoder gives 48"),
        ({"dominant": 1.2}, "pooler.dominant is 1.2"),
        ({"dominant": 1.0}, "pooler.dominant is 1.0, .* or a share of them between 0 and 1"),
        ({"contextual": -1}, "pooler.contextual is -1, .* must be 0 to 48 tokens"),
        ({"dominant": 40, "contextual": 9}, "are 40 and 9 tokens of 48 per frame; together"),
    ],
)
def test_budgets_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        VisionzipPooler(**settings).tokens_per_frame(GRID)


def test_an_unknown_merge_is_refused():
    with pytest.raises(UserError, match="pooler.merge is 'avrage'; right are sum, average; did you mean 'average'"):
        VisionzipPooler(merge="avrage")
