from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.batch import prompts_for
from lightning_crosslmm.looks import attention_maps, sights
from lightning_crosslmm.pooler import (
    AveragePooler,
    PerceiverPooler,
    PrumergePooler,
    StridedPooler,
    TemporalMergePooler,
    TomePooler,
)
from tests.tiny import tiny_batch, tiny_model

BATCH = tiny_batch(["look", 3, "and", 1, "what?", "=cat"], ["nothing?", "=ok"], [2, "?", "=z"])
PROMPTS = prompts_for(BATCH, [0, 1, 2])


def test_the_last_text_tokens_weights_sum_to_one():
    first, without, last = attention_maps(tiny_model(), PROMPTS)
    assert first["t2v"].shape == (4, 4, 4) and without["t2v"].shape == (0, 4, 4) and last["t2v"].shape == (2, 4, 4)
    for maps in (first, last):
        assert maps["t2v"].sum().item() == pytest.approx(1, abs=1e-5)
        assert maps["t2v"].dtype == torch.float32 and (maps["t2v"] > 0).all()


@pytest.mark.parametrize(
    ("settings", "sums"),
    [
        ({}, [[1], [1], [1]]),  # one group of queries per visual
        ({"scope": "frame"}, [[1, 1, 1], [1], [1, 1]]),
    ],
)
def test_pooled_tokens_weights_sum_to_one_per_visual_or_frame(settings, sums):
    first, without, last = attention_maps(tiny_model(**settings), PROMPTS)
    assert without["v2v"].shape == (0, 4, 4)
    per_frame = [*first["v2v"].sum((1, 2)).split([3, 1]), last["v2v"].sum((1, 2))]
    for found_F, expected in zip(per_frame, sums, strict=True):
        found = found_F if len(expected) > 1 else found_F.sum()[None]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)


def test_keys_that_do_not_differ_are_seen_alike():
    model = tiny_model(scope="frame")
    for number in model.fused_layers:
        for keys_values in model.llm.model.layers[number].fusion.keys_values.values():
            keys_values.k_proj.weight.data.zero_()
    first, _, last = attention_maps(model, PROMPTS)
    torch.testing.assert_close(first["v2v"], torch.full((4, 4, 4), 1 / 16))
    torch.testing.assert_close(first["t2v"], torch.full((4, 4, 4), 1 / 64))
    torch.testing.assert_close(last["t2v"], torch.full((2, 4, 4), 1 / 32))


def test_a_map_belongs_to_its_own_sample():
    model = tiny_model()
    together = attention_maps(model, PROMPTS)
    for number, maps in enumerate(together):
        (alone,) = attention_maps(model, prompts_for(BATCH, [number]))
        for name, expected in alone.items():
            torch.testing.assert_close(maps[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("v2v", "t2v", "names"), [(True, False, {"v2v"}), (False, True, {"t2v"}), (False, False, set())]
)
def test_only_the_branches_there_are(v2v, t2v, names):
    assert [set(maps) for maps in attention_maps(tiny_model(v2v=v2v, t2v=t2v), PROMPTS)] == [names] * 3


def test_prompts_without_visuals_show_nothing():
    assert attention_maps(tiny_model(), prompts_for(BATCH, [1])) == [{}]


@pytest.mark.parametrize("training", [True, False])
def test_looking_changes_neither_mode_nor_result(training):
    model = tiny_model().train(training)
    before = model(replace(BATCH)).logits_YW
    attention_maps(model, PROMPTS)
    assert model.training is training
    assert torch.equal(model(BATCH).logits_YW, before)


def test_each_fused_layer_has_maps_of_its_own_and_their_mean_is_the_map():
    model = tiny_model()
    for sight, maps in zip(sights(model, PROMPTS), attention_maps(model, PROMPTS), strict=True):
        assert set(sight.layers) == {(branch, layer) for branch in ("v2v", "t2v") for layer in (0, 2)}
        for branch in ("v2v", "t2v"):
            mean = (sight.layers[branch, 0] + sight.layers[branch, 2]) / 2
            torch.testing.assert_close(maps[branch], mean)
    first = sights(model, PROMPTS)[0]
    assert not torch.allclose(first.layers["t2v", 0], first.layers["t2v", 2])
    assert first.layers["t2v", 2].sum().item() == pytest.approx(1, abs=1e-5)


def test_patches_that_merged_have_the_token_of_their_cell_and_samples_count_from_0():
    first, without, last = (sight.pooling for sight in sights(tiny_model(pooler=AveragePooler(2)), PROMPTS))
    cells = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    for pooling, frames in ((first, 4), (last, 2)):
        assert pooling.pooler == "AveragePooler"
        assert torch.equal(pooling.token_FHW, torch.stack([cells + 4 * frame for frame in range(frames)]))
        assert pooling.tokens_F.tolist() == [4] * frames and pooling.mass_P.tolist() == [4.0] * 4 * frames
        assert pooling.patches_P.tolist() == [4] * 4 * frames
        assert (pooling.strength_FHW == 1).all() and (pooling.holders_FHW == 1).all()
    assert without.token_FHW.shape == (0, 4, 4) and len(without.mass_P) == 0


def test_dropped_patches_have_no_token():
    pooling = sights(tiny_model(pooler=StridedPooler(2)), PROMPTS)[0].pooling
    kept = pooling.token_FHW >= 0
    assert kept.sum().item() == len(pooling.mass_P) and (pooling.token_FHW == -1).sum().item() == 64 - kept.sum().item()
    assert torch.equal(pooling.holders_FHW > 0, kept) and set(pooling.patches_P.tolist()) == {1}


def test_tokens_of_several_frames_stand_at_the_first_and_show_in_all():
    pooler = TemporalMergePooler(frames=3, rows=1)
    pooling = sights(tiny_model(pooler=pooler), PROMPTS)[0].pooling  # a clip of 3 frames and an image
    assert pooling.tokens_F.tolist() == [1, 0, 0, 1] and pooling.patches_P.tolist() == [48, 16]
    assert [pooling.token_FHW[frame].unique().tolist() for frame in range(4)] == [[0], [0], [0], [1]]


def test_a_patch_in_several_tokens_has_the_one_that_took_most_of_it():
    model = tiny_model(pooler=PrumergePooler(saliency="received", ratio=0.25, neighbours=3))
    with torch.no_grad():
        pooled = model.encode(PROMPTS).pooled
    shares, patches = pooled.source_map.weighted(), 64
    part_PN = torch.zeros(shares.num_pooled, shares.num_sources)
    part_PN[shares.pooled_E, shares.source_E] = shares.weight_E
    pooling, num_tokens = sights(model, PROMPTS)[0].pooling, int(pooled.frame_offsets[4])
    part_PN = part_PN[:num_tokens, :patches]
    assert torch.equal(pooling.token_FHW.flatten(), (part_PN * pooled.mass_S[:num_tokens, None]).argmax(dim=0))
    assert torch.equal(pooling.holders_FHW.flatten(), (part_PN > 0).sum(dim=0)) and (pooling.holders_FHW > 1).any()
    assert torch.equal(pooling.patches_P, (part_PN > 0).sum(dim=1))
    strength_PN = part_PN / part_PN.max(dim=1, keepdim=True).values
    own = strength_PN.gather(0, pooling.token_FHW.flatten()[None])[0]
    torch.testing.assert_close(pooling.strength_FHW.flatten(), own)


def test_tokens_that_merged_inside_the_encoder_are_traced_to_patches():
    pooling = sights(tiny_model(pooler=TomePooler(3)), PROMPTS)[0].pooling
    assert torch.equal(torch.bincount(pooling.token_FHW.flatten()).float(), pooling.mass_P)


def test_learned_queries_have_no_map_and_no_model_needs_fusion_to_tell():
    pooler = PerceiverPooler(num_tokens=2, depth=1, heads=2, head_width=4)
    pooling = sights(tiny_model(pooler=pooler), PROMPTS)[2].pooling
    assert pooling.token_FHW is None and pooling.tokens_F.tolist() == [2, 2] and len(pooling.mass_P) == 4
    alone = sights(tiny_model(v2v=False, t2v=False), PROMPTS)[0]
    assert alone.layers == {} and alone.mean("v2v") is None and len(alone.pooling.mass_P) == 4
    assert sights(tiny_model(), prompts_for(BATCH, [1]))[0].pooling is None
