"""What holds for every pooler; one joins with a line in `tests.poolers.CASES`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_crosslmm.pooler.checked import check_pooled
from lightning_crosslmm.tokens import Opaque, Partition, compose
from tests.poolers import (
    CASES,
    CLOSE,
    GRID,
    LLM_WIDTH,
    assert_same,
    dense,
    every_case,
    given_for,
    given_of_samples,
    of_samples,
)

PATCHES = GRID[0] * GRID[1]
# frames of each visual of each sample: ragged clips, images, samples without visuals, no sample at all
batches = st.lists(st.lists(st.integers(1, 3), max_size=2), max_size=3)
quick = settings(max_examples=8, deadline=None)
with_whole = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.whole])
merging = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.merges])
in_raster = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_raster])


def pooled_by(name, batch, seed=0):
    pooler = CASES[name].built()
    call = given_for(pooler, batch, seed)
    return pooler, call, CASES[name].pool(pooler, call)


@every_case
@given(batch=batches, seed=st.integers(0, 99))
@quick
def test_the_contract_holds(name, batch, seed):
    pooler, call, pooled = pooled_by(name, batch, seed)
    width = {"after_projector": LLM_WIDTH, "as_projector": LLM_WIDTH}.get(pooler.stage, pooled.features_SD.shape[-1])
    check_pooled(pooler, call.tokens, pooled, width, GRID)


@with_whole
@given(batch=batches)
@quick
def test_a_budget_of_every_patch_changes_nothing(name, batch):
    pooler = CASES[name].built(whole=True)
    call = given_for(pooler, batch)
    assert_same(CASES[name].pool(pooler, call), call.tokens)


@merging
@given(batch=batches, seed=st.integers(0, 99))
@quick
def test_merging_keeps_mass(name, batch, seed):
    _, call, pooled = pooled_by(name, batch, seed)
    bounds = pooled.token_offsets_of_visual.tolist()
    for start, end, frames in zip(bounds[:-1], bounds[1:], call.tokens.visual_offsets.diff().tolist(), strict=True):
        torch.testing.assert_close(pooled.mass_S[start:end].sum().item(), float(frames * PATCHES), **CLOSE)


@every_case
def test_maps_chain_to_what_came_before(name):
    pooler, call, pooled = pooled_by(name, [[2], [1]])
    pairs = Partition(torch.arange(2 * call.tokens.num_tokens) // 2, call.tokens.num_tokens)
    chained = CASES[name].pool(pooler, replace(call, tokens=replace(call.tokens, source_map=pairs))).source_map
    expected = compose(pairs, pooled.source_map)
    if isinstance(expected, Opaque):
        assert chained == expected
    else:
        torch.testing.assert_close(dense(chained), dense(expected), **CLOSE)


@every_case
@given(batch=batches.filter(len), data=st.data())
@quick
def test_a_sample_gets_the_same_alone_and_in_any_company(name, batch, data):
    pooler, call, pooled = pooled_by(name, batch)
    samples = data.draw(st.permutations(range(len(batch))))
    samples = samples[: data.draw(st.integers(1, len(batch)))]
    alone = CASES[name].pool(pooler, given_of_samples(call, samples))
    assert_same(alone, of_samples(pooled, samples, call.tokens))


@every_case
@given(seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_gradients_are_finite_and_reach_every_parameter(name, seed):
    pooler = CASES[name].built().train()
    call = given_for(pooler, [[3], [1, 2]], seed)
    features_SD = call.tokens.features_SD.clone().requires_grad_()
    pooled = CASES[name].pool(pooler, replace(call, tokens=call.tokens.with_features(features_SD)))
    (pooled.features_SD * torch.randn_like(pooled.features_SD)).sum().backward()
    assert features_SD.grad.isfinite().all() and features_SD.grad.any()
    for of, parameter in pooler.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), of


@in_raster
@given(batch=batches, seed=st.integers(0, 99))
@quick
def test_tokens_of_a_frame_stand_in_raster_order(name, batch, seed):
    _, _, pooled = pooled_by(name, batch, seed)
    for start, end in zip(pooled.frame_offsets[:-1], pooled.frame_offsets[1:], strict=True):
        places = pooled.coordinate_S3[start:end, 1:].tolist()
        assert places == sorted(places)
