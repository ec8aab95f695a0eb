import math

import numpy
import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import PrumergePlusPooler, PrumergePooler
from lightning_crosslmm.pooler.ragged import outliers
from lightning_crosslmm.taps import Taps
from tests.poolers import dense
from tests.tiny import token_set

GRID = (6, 8)
N = 48
# sums of some 40 products of order 1 in another order; measured: 4e-16 and 7e-7, here and in test_visionzip.py
CLOSE = {torch.float64: {"rtol": 0, "atol": 1e-14}, torch.float32: {"rtol": 0, "atol": 2e-6}}


def given(dtype=torch.float64, frames=(2, 1), grid=GRID, width=5, sharpness=2.0, seed=0):
    tokens = token_set(frames, grid, width, seed)
    noise = torch.Generator().manual_seed(seed)
    shape = (sum(frames), grid[0] * grid[1])
    saliency_FN = (sharpness * torch.randn(shape, generator=noise)).softmax(dim=1).to(dtype)
    keys_FNK = torch.randn(*shape, 7, generator=noise).to(dtype)
    return tokens.with_features(tokens.features_SD.to(dtype)), Taps(None, saliency_FN, keys_FNK)


def chosen(a, ratio, plus):
    """What a frame keeps, salient ones first, straight from the text."""
    patches = len(a)
    falling = sorted(range(patches), key=lambda j: -a[j])
    if ratio is not None:
        count = math.floor(ratio * patches)
        top = falling[:count]
        left = [j for j in range(patches) if j not in top]
        strided = min(count, len(left))
        return top + ([left[i * len(left) // strided] for i in range(strided)] if plus else [])
    low, high = numpy.percentile(a, 25), numpy.percentile(a, 75)
    count = max(1, sum(value > high + 1.5 * (high - low) for value in a))
    top = falling[:count]
    if not plus:
        return top
    rho = count / patches
    stride = max(1, math.floor(math.floor(1 / rho) / 3))
    return top + [j for j in range(0, patches - 1, stride) if j not in top]


def plainly(
    features, a, keys, *, plus, ratio=None, neighbours=32, merge="add", source="all", rest=True, order="saliency"
):
    """Prune and merge one frame, loop by loop: features, patches' shares, and what is kept."""
    patches, kept = len(a), chosen(a, ratio, plus)
    kept = sorted(kept) if order == "raster" else kept
    units = [key / numpy.linalg.norm(key) for key in keys]
    rows = []
    for i in kept:
        others = [j for j in range(patches) if j != i and (source == "all" or j not in kept)]
        near = sorted(others, key=lambda j: -float(units[i] @ units[j]))[:neighbours]
        row = numpy.zeros(patches)
        row[i] = 1.0 if merge == "add" else a[i]
        for j in near:
            row[j] = a[j]
        rows.append(row if merge == "add" else row / row.sum())
    pruned = [j for j in range(patches) if j not in kept]
    if rest and pruned:
        row = numpy.zeros(patches)
        row[pruned] = a[pruned]
        rows.append(row)
    weights = numpy.stack(rows)
    return weights @ features, weights, kept


OPTIONS = {
    "as the code": {},
    "as the text": {"merge": "average", "source": "pruned"},
    "few pruned": {"source": "pruned", "neighbours": 40, "ratio": 0.6},
    "ratio": {"ratio": 1 / 8, "neighbours": 3, "order": "raster"},
    "no rest": {"rest": False, "neighbours": 0},
    "half": {"ratio": 0.5, "neighbours": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge+"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_does_what_the_formulas_say(options, plus, dtype):
    tokens, taps = given(dtype)
    names = {"source": "neighbours_from", "rest": "rest_token"}
    settings = {names.get(name, name): value for name, value in options.items()}
    pooler = (PrumergePlusPooler if plus else PrumergePooler)(**settings)
    pooled = pooler(tokens, taps)
    pooled.validate()
    promised = pooler.tokens_per_frame(GRID)
    source_map = dense(pooled.source_map)
    for frame in range(3):
        features = tokens.features_SD[frame * N : (frame + 1) * N]
        arrays = (each.double().numpy() for each in (features, taps.saliency_FN[frame], taps.keys_FNK[frame]))
        expected, weights, _ = plainly(*arrays, plus=plus, **options)
        start, end = pooled.frame_offsets[frame : frame + 2].tolist()
        found = pooled.features_SD[start:end]
        torch.testing.assert_close(found, torch.from_numpy(expected).to(dtype), **CLOSE[dtype])
        shares = torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()
        torch.testing.assert_close(source_map[start:end, frame * N : (frame + 1) * N], shares, rtol=0, atol=1e-6)
        assert promised in (None, end - start)


@pytest.mark.parametrize("count", [0, 1, 20, 48])
def test_quartiles_are_those_of_numpy(count):
    values_CX = torch.rand(3, 48, generator=torch.Generator().manual_seed(count))
    values_CX[:, :count] *= 40
    low, high = numpy.percentile(values_CX.numpy(), [25, 75], axis=1, keepdims=True)
    assert torch.equal(outliers(values_CX), values_CX > torch.from_numpy(high + 1.5 * (high - low)))


@pytest.mark.parametrize(("salient", "documented"), [(32, 123), (36, 145), (46, 180), (72, 325), (115, 576)])
def test_prumerge_plus_keeps_as_many_as_documented(salient, documented):
    """Counts at keep ratios of 0.055, 0.0625, 0.08, 0.125 and 0.2 of 576 patches, the rest token included."""
    noise = torch.Generator().manual_seed(salient)
    saliency_FN = 1 + 0.01 * torch.rand(40, 576, generator=noise)
    for frame in range(40):
        saliency_FN[frame, torch.randperm(576, generator=noise)[:salient]] += 5
    tokens, taps = given(torch.float32, frames=(40,), grid=(24, 24), width=2)
    taps.saliency_FN = saliency_FN / saliency_FN.sum(1, keepdim=True)
    kept_F = PrumergePlusPooler()(tokens, taps).frame_offsets.diff()
    assert abs(float(kept_F.float().mean()) - documented) < 1.5
    assert (PrumergePooler()(tokens, taps).frame_offsets.diff() == salient + 1).all()


@pytest.mark.parametrize("ratio", [0.34, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("kind", [PrumergePooler, PrumergePlusPooler])
def test_ratios_at_which_the_original_fails(ratio, kind):
    tokens, taps = given(torch.float32)
    pooled = kind(ratio=ratio, neighbours=4)(tokens, taps)
    pooled.validate()
    assert (pooled.frame_offsets.diff() == kind(ratio=ratio).tokens_per_frame(GRID)).all()
    torch.testing.assert_close(pooled.mass_S.sum().item(), 3.0 * N, rtol=1e-6, atol=0)


def test_training_ratio_keeps_the_authors_144_and_the_rest():
    assert PrumergePlusPooler(ratio=1 / 8).tokens_per_frame((24, 24)) == 145
    assert PrumergePlusPooler(ratio=1 / 8, rest_token=False).tokens_per_frame((24, 24)) == 144
    assert PrumergePooler(ratio=0.29, rest_token=False).tokens_per_frame((10, 10)) == 29


@pytest.mark.parametrize("kind", [PrumergePooler, PrumergePlusPooler])
def test_a_frame_where_nothing_stands_out_keeps_something(kind):
    tokens, taps = given(torch.float32)
    taps.saliency_FN = torch.zeros(3, N)  # not even the sum of 1 that attention has
    pooled = kind()(tokens, taps)
    pooled.validate()
    assert (pooled.frame_offsets.diff() >= 2).all()


def test_a_frame_does_not_depend_on_the_others_of_its_batch():
    tokens, taps = given(torch.float32, frames=(3,))
    pooled = PrumergePooler()(tokens, taps)
    busy = Taps(None, taps.saliency_FN.clone(), taps.keys_FNK)
    busy.saliency_FN[1:] = (20 * torch.randn(2, N)).softmax(1)
    end = pooled.frame_offsets[1]
    again = PrumergePooler()(tokens, busy)
    assert torch.equal(again.features_SD[:end], pooled.features_SD[:end])
    assert again.frame_offsets.tolist() != pooled.frame_offsets.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "pooler.ratio is 0.0; it must be a share of the patches above 0 up to 1, or null"),
        ({"ratio": 1.5}, "pooler.ratio is 1.5"),
        ({"neighbours": -1}, "pooler.neighbours is -1; it must be 0 or more"),
        ({"merge": "averag"}, "pooler.merge is 'averag'; right are add, average; did you mean 'average'"),
        ({"neighbours_from": "prune"}, "pooler.neighbours_from is 'prune'; .* did you mean 'pruned'"),
        ({"order": "rastar"}, "pooler.order is 'rastar'; .* did you mean 'raster'"),
        ({"saliency": "class_tokn"}, "pooler.saliency is 'class_tokn'; .* did you mean 'class_token'"),
        ({"saliency": None}, "pooler.saliency is 'None'; right are class_token, received, probe"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PrumergePooler(**settings)
