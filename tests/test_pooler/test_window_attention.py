import math

import pytest
import torch
from torch.nn.functional import gelu, interpolate, layer_norm, linear

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import QueccPooler, TokenpackerPooler
from lightning_crosslmm.pooler.window_attention import AUTHORS_LAYERS
from lightning_crosslmm.taps import Asks, Questions, Taps
from tests.tiny import token_set

GRID, WIDTH, LLM_WIDTH = (4, 6), 8, 12
# measured: 4e-16 and 2.4e-7 in single precision
CLOSE = {torch.float64: {"rtol": 0, "atol": 1e-14}, torch.float32: {"rtol": 0, "atol": 2e-6}}


def built(kind, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    pooler = kind(**{"rows": 2, "columns": 3, "layers": (0, 1, -1), "heads": 2, **settings})
    assert pooler.connect(WIDTH, LLM_WIDTH, GRID) == WIDTH
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pooler.to(dtype)


def given(dtype=torch.float64, frames=(2, 1), samples=(0, 2)):
    tokens = token_set(frames, GRID, WIDTH, sample_of_visual=list(samples))
    noise = torch.Generator().manual_seed(1)
    layers_FNAE = torch.randn(sum(frames), 24, 3, WIDTH, generator=noise).to(dtype)
    summary_BD = torch.randn(3, LLM_WIDTH, generator=noise).to(dtype)
    questions = Questions(torch.zeros(5, LLM_WIDTH, dtype=dtype), torch.tensor([0, 2, 2, 5]), summary_BD)
    return tokens.with_features(tokens.features_SD.to(dtype)), Taps(None, layers_FNAE=layers_FNAE), questions


def mlp_norm(part, value):
    first, _, second, norm = part
    value = linear(gelu(linear(value, first.weight, first.bias)), second.weight, second.bias)
    return layer_norm(value, value.shape[-1:], norm.weight, norm.bias, eps=1e-6)


def attend(attention, query, keys, values):
    """One query over one window, head by head."""
    parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    query, keys, values = (linear(each, *part) for each, part in zip((query, keys, values), parts, strict=True))
    heads = []
    for head in range(2):
        own = slice(head * 4, head * 4 + 4)
        weights = torch.softmax(keys[:, own] @ query[own] / math.sqrt(4), dim=0)
        heads.append(weights @ values[:, own])
    return linear(torch.cat(heads), attention.out_proj.weight, attention.out_proj.bias)


def windows(pooler, layers_NAE, queries):
    """Attend window by window: cells of 2x2 patches on a grid of 2x3 windows."""
    keys, values = (mlp_norm(part, layers_NAE.flatten(1)).view(4, 6, -1) for part in (pooler.key, pooler.value))
    out = []
    for row in range(2):
        for column in range(3):
            cell = (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            out.append(
                attend(pooler.attention, queries[row, column], keys[cell].flatten(0, 1), values[cell].flatten(0, 1))
            )
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokenpacker_does_what_the_formulas_say(dtype):
    pooler, (tokens, taps, _) = built(TokenpackerPooler, dtype), given(dtype)
    pooled = pooler(tokens, taps)
    pooled.validate()
    reference, (tokens, taps, _) = built(TokenpackerPooler), given()
    expected = []
    for frame, picture in enumerate(tokens.as_grid()):
        small = interpolate(picture.permute(2, 0, 1)[None], size=(2, 3), mode="bilinear")[0].permute(1, 2, 0)
        project, norm = reference.query
        query = layer_norm(linear(small, project.weight), (WIDTH,), norm.weight, norm.bias, eps=1e-6)
        expected.append(windows(reference, taps.layers_FNAE[frame], query))
    torch.testing.assert_close(pooled.features_SD, torch.cat(expected).to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quecc_does_what_the_formulas_say(dtype):
    pooler, (tokens, taps, questions) = built(QueccPooler, dtype), given(dtype)
    pooled = pooler(tokens, taps, questions)
    pooled.validate()
    reference, (tokens, taps, questions) = built(QueccPooler), given()
    project, norm = reference.question
    expected = []
    for frame, (picture, sample) in enumerate(zip(tokens.as_grid(), (0, 0, 2), strict=True)):
        said = linear(questions.summary_BD[sample], project.weight, project.bias)
        said = layer_norm(said, (WIDTH,), norm.weight, norm.bias, eps=1e-6)
        states = mlp_norm(reference.query, picture + said)
        query = torch.zeros(2, 3, WIDTH, dtype=torch.float64)
        for row in range(2):
            for column in range(3):
                cell = states[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                kernel = reference.reduce.weight[:, 0].permute(1, 2, 0)
                query[row, column] = (cell * kernel).sum((0, 1)) + reference.reduce.bias
        expected.append(windows(reference, taps.layers_FNAE[frame], query))
    torch.testing.assert_close(pooled.features_SD, torch.cat(expected).to(dtype), **CLOSE[dtype])


def test_a_sample_without_a_question_is_pooled_as_it_is():
    pooler, (tokens, taps, questions) = built(QueccPooler), given(samples=(1, 2))
    first = pooler(tokens, taps, questions).features_SD
    other = Questions(questions.features_QD, questions.offsets, -3 * questions.summary_BD)
    second = pooler(tokens, taps, other).features_SD
    assert torch.equal(first[:12], second[:12]) and not torch.equal(first[12:], second[12:])


@pytest.mark.parametrize("kind", [TokenpackerPooler, QueccPooler])
def test_places_and_origin_are_those_of_the_windows(kind):
    pooler, (tokens, taps, questions) = built(kind, torch.float64), given()
    asked = (questions,) if kind is QueccPooler else ()
    pooled = pooler(tokens, taps, *asked)
    assert pooled.grid == (2, 3) and pooler.tokens_per_frame(GRID) == 6 and pooler.covers
    assert pooled.mass_S.tolist() == [4.0] * 18
    assert pooled.coordinate_S3[:4].tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 0.5, 4.5], [0, 2.5, 0.5]]
    assert pooled.source_map.pooled_of_source_S[:12].tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_blocks_are_the_authors_unless_said():
    assert TokenpackerPooler().asks == Asks(layers=AUTHORS_LAYERS)
    assert TokenpackerPooler(layers=[-1]).asks.layers == (-1,)


@pytest.mark.parametrize("kind", [TokenpackerPooler, QueccPooler])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 3}, "asks for 3x3 windows, the encoder gives 4x6 patches; pooler.rows must divide 4"),
        ({"rows": 2, "columns": 5}, "asks for 2x5 windows"),
        ({"rows": 0}, "asks for a grid of 0x0"),
        ({"rows": 5}, "asks for a grid of 5x5"),
        ({"rows": 2, "heads": 3}, "pooler.heads is 3; it must divide the encoder's width, 8"),
        ({"layers": []}, "pooler.layers is empty"),
    ],
)
def test_what_does_not_fit_is_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(**settings).connect(WIDTH, LLM_WIDTH, GRID)
