"""ToMe: against the formulas, and the counts its users know."""

import pytest
import torch

from lightning_crosslmm.encoder import TransformersEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import TomePooler
from tests.slow_merging import FRAMES, assert_agree, best, in_tower, merge, through_tower, towers
from tests.tiny import tiny_encoder, tiny_model


def slow_tome(encoder, frame_CHW, count, proportional):
    def after(block, tokens, keys, row):
        return merge(tokens, keys, best(count), encoder.num_prefix, not encoder.has_class_token)[0]

    return through_tower(encoder, frame_CHW, after, proportional)


@towers
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])  # masses are float32
def test_it_is_the_formula(tower, proportional, dtype, tolerance):
    torch.manual_seed(0)
    encoder = tiny_encoder(**tower).to(dtype).eval()
    with torch.no_grad():
        pooled, source = in_tower(TomePooler(4, proportional, order="merged"), encoder, FRAMES)
        slow = [slow_tome(encoder, frame_CHW, 4, proportional) for frame_CHW in FRAMES]
    assert pooled is source
    assert_agree(pooled, slow, tolerance)


@pytest.mark.parametrize(("merges", "left"), [(21, 94), (16, 209), (8, 393)])
def test_counts_on_clip_large_with_its_class_token(merges, left):
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 24,
        "num_attention_heads": 2,
        "patch_size": 2,
    }
    encoder = TransformersEncoder(config, image_size=48, layer=-2).eval()
    pooler = TomePooler(merges)
    frame_1CHW = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        pooled, _ = in_tower(pooler, encoder, frame_1CHW)
    assert encoder.grid == (24, 24) and pooled.num_tokens + 1 == left
    assert pooler.tokens_per_frame(encoder.grid) + 1 == left and pooled.mass_S.sum() == 576


def test_no_merges_are_the_plain_tower_to_the_last_bit():
    encoder = tiny_encoder().eval()
    pooled, _ = in_tower(TomePooler(0), encoder, FRAMES)
    assert torch.equal(pooled.features_SD, encoder(FRAMES).flatten(0, 1))
    assert pooled.source_map.pooled_of_source_S.tolist() == list(range(pooled.num_tokens))


def test_every_block_takes_half_at_most():
    pooler = TomePooler(8)
    assert len(in_tower(pooler, tiny_encoder().eval(), FRAMES)[0].features_SD) == 2 * len(FRAMES)  # 16, 8, 4, 2
    assert pooler.tokens_per_frame((4, 4)) == 2


@pytest.mark.parametrize("merges", [-1, 9])
def test_merges_out_of_range_are_refused(merges):
    with pytest.raises(UserError, match=f"pooler.merges_per_block is {merges}; with 16 patches per frame it is 0 to 8"):
        tiny_model(pooler=TomePooler(merges))
