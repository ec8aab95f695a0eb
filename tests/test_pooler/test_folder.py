"""FOLDER: both forms against the formulas, and the passes it folds into."""

import math

import pytest
import torch

from lightning_crosslmm.encoder import TimmEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import FolderPooler
from lightning_crosslmm.pooler.folder import passes
from tests.slow_merging import CLASS, FRAMES, REGISTERS, Token, assert_agree, best, in_tower, merge, through_tower
from tests.tiny import tiny_encoder, tiny_model, token_set


def slow_fold(tokens, keys, wanted, prefix, by_similarity, penalty=None):
    while len(tokens) - prefix > wanted:
        count = len(tokens) - prefix - wanted
        tokens, keys, penalty = merge(tokens, keys, best(count), prefix, by_similarity, penalty)
    return tokens


@pytest.mark.parametrize(
    ("tower", "class_weight"), [({}, 0.0), (CLASS, 0.0), (CLASS, 5.0), (REGISTERS, 5.0)], ids=["no", "0", "5", "reg"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])  # masses are float32
def test_the_full_form_is_the_formula(tower, class_weight, dtype, tolerance):
    torch.manual_seed(0)
    encoder = tiny_encoder(**tower).to(dtype).eval()

    def after(block, tokens, keys, row):
        penalty = [100 * class_weight * weight for weight in row] if class_weight else None
        last = block == encoder.read_block
        return slow_fold(tokens, keys, 3, encoder.num_prefix, not encoder.has_class_token, penalty) if last else tokens

    pooler = FolderPooler(3, "in_encoder", class_weight, scale_by_size=False, order="merged")
    with torch.no_grad():
        pooled, _ = in_tower(pooler, encoder, FRAMES)
        slow = [through_tower(encoder, frame_CHW, after, proportional=False) for frame_CHW in FRAMES]
    assert_agree(pooled, slow, tolerance)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("wanted", [1, 3, 9])
def test_the_simplified_form_is_the_formula(scale, grid, wanted):
    tokens = token_set((2, 1), grid)
    tokens = tokens.with_features(tokens.features_SD.double())
    pooled = FolderPooler(wanted, scale_by_size=scale, order="merged")(tokens)
    slow = []
    for frame_nD in tokens.as_grid().flatten(1, 2):
        start = [Token(x_D, [patch]) for patch, x_D in enumerate(frame_nD)]
        keys = [token.x_E for token in start]
        frame = slow_fold(start, keys, wanted, 0, by_similarity=False)
        slow.append([Token(t.x_E * (1 + math.log(t.mass) if scale else 1), t.patches) for t in frame])
    assert_agree(pooled, slow, 1e-6)


@pytest.mark.parametrize(
    ("patches", "wanted", "taken"),
    [(576, 192, [288, 96]), (576, 144, [288, 144]), (576, 96, [288, 144, 48]), (9, 9, []), (3, 1, [1, 1])],
)
def test_passes(patches, wanted, taken):
    assert passes(patches, wanted) == taken


@pytest.mark.parametrize(("wanted", "left"), [(192, 193), (144, 145)])
def test_counts_on_clip_large_with_its_class_token(wanted, left):
    shape = {"patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1}
    config = {**shape, "class_token": True, "global_pool": "token"}
    encoder = TimmEncoder("vit_tiny_patch16_224", 48, layer=-1, config=config).eval()
    frame_1CHW = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        pooled, _ = in_tower(FolderPooler(wanted, "in_encoder", 5.0), encoder, frame_1CHW)
    assert pooled.num_tokens + 1 == left and pooled.mass_S.sum() == 576


def test_the_class_token_protects_what_it_attends_to():
    torch.manual_seed(0)
    encoder = tiny_encoder(**CLASS).eval()

    def tables(weight):
        pooler = FolderPooler(9, "in_encoder", weight)
        return in_tower(pooler, encoder, FRAMES)[0].source_map.pooled_of_source_S.tolist()

    assert tables(5.0) != tables(0.0)


def test_all_tokens_are_the_tokens_themselves():
    tokens = token_set(grid=(4, 4))
    assert FolderPooler(16)(tokens) is tokens


def test_raster_order_is_that_of_the_places_tokens_stand_in():
    tokens = token_set((1,), (1, 6))
    pooled = FolderPooler(3, scale_by_size=False)(tokens)
    # three of A = {0, 2, 4} moved, so those that stay are 1, 3 and 5
    table = pooled.source_map.pooled_of_source_S.tolist()
    assert [table[1], table[3], table[5]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "encoder", "message"),
    [
        ({"num_tokens": 0}, {}, "pooler.num_tokens is 0, the encoder gives 4x4 patches per frame; it must be 1 to 16"),
        ({"num_tokens": 17}, {}, "pooler.num_tokens is 17"),
        ({"num_tokens": 4, "stage": "as_projector"}, {}, "pooler.stage is 'as_projector'"),
        ({"num_tokens": 4, "class_weight": 5.0}, {}, "class_weight is 5.0 with pooler.stage before_projector"),
        ({"num_tokens": 4, "class_weight": 5.0, "stage": "in_encoder"}, {}, "encoder has no class token; set .*=0"),
        ({"num_tokens": 4, "order": "rater"}, {}, "pooler.order is 'rater'; right are raster, merged; did .*'raster'"),
    ],
)
def test_what_cannot_be_is_refused(settings, encoder, message):
    with pytest.raises(UserError, match=message):
        tiny_model(pooler=FolderPooler(**settings), encoder=tiny_encoder(**encoder))
