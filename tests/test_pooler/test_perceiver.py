import math
from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import PerceiverPooler, UniformPooler
from tests.tiny import token_set

SMALL = {"depth": 2, "heads": 2, "head_width": 3}
GRID, WIDTH, LLM_WIDTH = (3, 4), 5, 8


def built(*args, **settings):
    torch.manual_seed(0)
    pooler = PerceiverPooler(*args, **{**SMALL, **settings})
    pooler.out_width = pooler.connect(WIDTH, LLM_WIDTH, GRID)
    return pooler.eval()


def norm(x, layer):
    mean, variance = x.mean(), x.var(unbiased=False)
    return (x - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def resampled(pooler, tokens_ND):
    """One frame or clip, latent by latent and head by head, straight from the formulas."""
    latents = list(pooler.latents_MD)
    for layer in pooler.layers:
        asking = [norm(z, layer.latent_norm) for z in latents]
        asked = [norm(x, layer.token_norm) for x in tokens_ND] + asking
        heads, width = pooler.heads, pooler.head_width
        key_value = [layer.attention.key_value.weight @ x for x in asked]
        moved = []
        for latent, query in zip(latents, asking, strict=True):
            parts = []
            for head in range(heads):
                cut = slice(head * width, (head + 1) * width)
                q = (layer.attention.query.weight @ query)[cut]
                scores = torch.stack([q @ kv[: heads * width][cut] / math.sqrt(width) for kv in key_value])
                values = torch.stack([kv[heads * width :][cut] for kv in key_value])
                share = torch.exp(scores) / torch.exp(scores).sum()
                parts.append(share @ values)
            latent = latent + layer.attention.out.weight @ torch.cat(parts)
            first_norm, grow, _, shrink = layer.feed_forward
            hidden = grow.weight @ norm(latent, first_norm)
            moved.append(latent + shrink.weight @ (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))))
        latents = moved
    out = torch.stack([norm(z, pooler.norm) for z in latents])
    return out if isinstance(pooler.project, torch.nn.Identity) else pooler.project(out)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize("stage", ["before_projector", "as_projector"])
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_it_is_attention_latent_by_latent(dtype, close, stage, scope):
    pooler = built(3, stage=stage, scope=scope).to(dtype)
    tokens = token_set((3, 1, 2), GRID, WIDTH)
    tokens = tokens.with_features(tokens.features_SD.to(dtype))
    pooled = pooler(tokens)
    pooled.validate()
    offsets = tokens.frame_offsets if scope == "frame" else tokens.token_offsets_of_visual
    groups = tokens.features_SD.split(offsets.diff().tolist())
    expected = torch.cat([resampled(pooler, group) for group in groups])
    torch.testing.assert_close(pooled.features_SD, expected, rtol=0, atol=close)
    assert pooled.features_SD.shape[1] == pooler.out_width == (LLM_WIDTH if stage == "as_projector" else WIDTH)


def test_latents_of_a_clip_are_dealt_to_its_frames_in_order():
    pooled = built(4, scope="clip")(token_set((3, 1, 6), GRID, WIDTH))
    assert pooled.frame_offsets.diff().tolist() == [2, 1, 1, 4, 1, 1, 0, 1, 1, 0]
    assert pooled.coordinate_S3[:4].tolist() == [[0, 1, 1.5], [0, 1, 1.5], [1, 1, 1.5], [2, 1, 1.5]]
    assert pooled.mass_S.tolist() == [9.0] * 4 + [3.0] * 4 + [18.0] * 4


def test_frames_that_lost_all_tokens_get_no_latent():
    tokens = token_set((2, 1), GRID, WIDTH)
    from_few = UniformPooler(5)(tokens)
    gone = from_few.frame_offsets.clone()
    gone[1] = 0  # the tokens of frame 0 belong to frame 1
    pooled = built(3)(replace(from_few, frame_offsets=gone))
    pooled.validate()
    assert pooled.frame_offsets.diff().tolist() == [0, 3, 3] and pooled.features_SD.isfinite().all()


def test_only_frame_embeddings_tell_the_order_of_frames():
    tokens = token_set((3,), GRID, WIDTH)
    turned = tokens.with_features(tokens.as_grid().flip(0).flatten(0, 2))
    blind, aware = built(2, scope="clip"), built(2, scope="clip", max_frames=3)
    torch.testing.assert_close(blind(turned).features_SD, blind(tokens).features_SD, rtol=0, atol=1e-5)
    assert (aware(turned).features_SD - aware(tokens).features_SD).abs().max() > 0.01
    with pytest.raises(UserError, match="pooler.max_frames is 3, a clip has 4 frames; it must be 4 or more"):
        aware(token_set((2, 4), GRID, WIDTH))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(0), "PerceiverPooler: pooler.num_tokens is 0"),
        (lambda: built(13).tokens_per_frame(GRID), "pooler.num_tokens is 13, .* 3x4 .* must be 1 to 12"),
        (lambda: built(2, depth=0), "pooler.depth is 0; it must be 1 or more"),
        (lambda: built(2, max_frames=-1), "pooler.max_frames is -1"),
        (lambda: built(2, scope="video"), "pooler.scope is 'video'; right are frame, clip"),
        (lambda: built(2, stage="after_projector"), "right for PerceiverPooler are before_projector, as_projector"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_how_many_a_clip_gets_depends_on_its_frames():
    assert built(50, scope="clip").tokens_per_frame(GRID) is None
    assert built(12).tokens_per_frame(GRID) == 12
