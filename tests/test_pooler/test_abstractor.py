import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import CAbstractorPooler, UniformPooler
from tests.tiny import token_set

GRID, WIDTH, LLM_WIDTH = (4, 4), 5, 8


def built(*args, **settings):
    torch.manual_seed(0)
    pooler = CAbstractorPooler(*args, **{"width": 6, "depth": 2, **settings})
    pooler.out_width = pooler.connect(WIDTH, LLM_WIDTH, GRID)
    return pooler.eval()


def silu(x):
    return x / (1 + torch.exp(-x))


def convolved(picture_HWC, layer):
    """A convolution as a loop over places, with zeros around and channels in groups."""
    height, width, _ = picture_HWC.shape
    weight_OIyx, reach = layer.weight, layer.weight.shape[2] // 2
    per_group_out, per_group_in = weight_OIyx.shape[0] // layer.groups, weight_OIyx.shape[1]
    out = torch.zeros(height, width, weight_OIyx.shape[0], dtype=picture_HWC.dtype)
    for row in range(height):
        for column in range(width):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if not (0 <= row + dy < height and 0 <= column + dx < width):
                        continue
                    for channel in range(weight_OIyx.shape[0]):
                        first = channel // per_group_out * per_group_in
                        seen = picture_HWC[row + dy, column + dx, first : first + per_group_in]
                        out[row, column, channel] += weight_OIyx[channel, :, dy + reach, dx + reach] @ seen
    return out if layer.bias is None else out + layer.bias


def normed(picture_HWC, layer):
    mean, variance = picture_HWC.mean(-1, keepdim=True), picture_HWC.var(-1, unbiased=False, keepdim=True)
    return (picture_HWC - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def staged(picture_HWC, stage):
    """RegNet's blocks: 1x1, 3x3 in groups of one channel, squeeze and excite, 1x1, residual."""
    for block in stage.children():
        x = silu(normed(convolved(picture_HWC, block.conv1.conv), block.conv1.bn))
        x = silu(normed(convolved(x, block.conv2.conv), block.conv2.bn))
        squeezed = x.mean(dim=(0, 1))[None, None]
        excited = convolved(silu(convolved(squeezed, block.se.fc1)), block.se.fc2)
        x = normed(convolved(x / (1 + torch.exp(-excited)), block.conv3.conv), block.conv3.bn)
        shortcut = picture_HWC
        if not isinstance(block.downsample, torch.nn.Identity):
            shortcut = normed(convolved(picture_HWC, block.downsample.conv), block.downsample.bn)
        picture_HWC = silu(x + shortcut)
    return picture_HWC


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_it_is_convolutions_around_an_average(dtype, close):
    pooler = built(4).to(dtype)
    tokens = token_set((1, 1), GRID, WIDTH)
    tokens = tokens.with_features(tokens.features_SD.to(dtype))
    expected = []
    with torch.no_grad():
        for picture_HWD in tokens.as_grid():
            wide_HWC = staged(picture_HWD + pooler.position_HWD, pooler.before)
            means = [wide_HWC[y : y + 2, x : x + 2].mean(dim=(0, 1)) for y in (0, 2) for x in (0, 2)]
            small_mmC = staged(torch.stack(means).view(2, 2, -1), pooler.after)
            first, _, second = pooler.readout
            expected += [second(silu(first(token_C))) for token_C in small_mmC.flatten(0, 1)]
        pooled = pooler(tokens)
    pooled.validate()
    torch.testing.assert_close(pooled.features_SD, torch.stack(expected), rtol=0, atol=close)


def test_before_the_projector_it_has_no_readout_of_its_own():
    pooler = built(4, stage="before_projector")
    pooled = pooler(token_set((2,), GRID, WIDTH))
    assert pooled.features_SD.shape == (8, 6) and pooler.out_width == 6
    assert pooled.grid == (2, 2) and pooled.coordinate_S3[0].tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(0), "CAbstractorPooler: pooler.num_tokens is 0"),
        (lambda: built(5), "pooler.num_tokens is 5, no square; .* 4 or 9 for example"),
        (lambda: built(25).tokens_per_frame(GRID), "pooler.num_tokens is 25, .* 4x4 .* must be 1 to 16"),
        (lambda: built(9).tokens_per_frame((2, 8)), "a grid of 3x3; the encoder gives 2x8, so it must be at most 4"),
        (lambda: built(4)(token_set((1,), (2, 8), WIDTH)), r"built for a grid of \(4, 4\), and is given \(2, 8\)"),
        (lambda: built(4)(UniformPooler(3)(token_set((1,), GRID, WIDTH))), "CAbstractorPooler needs a regular grid"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()
