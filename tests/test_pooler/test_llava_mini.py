import math

import pytest
import torch
from torch.nn.functional import gelu, interpolate, layer_norm, linear, silu

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import LlavaMiniPooler
from lightning_crosslmm.pooler.llava_mini import sine_waves
from lightning_crosslmm.taps import Questions
from lightning_crosslmm.tokens import Opaque
from tests.tiny import token_set

GRID, N, WIDTH, LLM_WIDTH = (3, 4), 12, 8, 16
# measured: 1.1e-7, as positions are kept in single precision, and 2.4e-7
CLOSE = {torch.float64: {"rtol": 0, "atol": 5e-7}, torch.float32: {"rtol": 0, "atol": 2e-6}}


def built(dtype=torch.float64, side=2, **settings):
    torch.manual_seed(0)
    pooler = LlavaMiniPooler(side, **{"heads": 2, "fusion_layers": 2, "fusion_heads": 2, **settings})
    assert pooler.connect(WIDTH, LLM_WIDTH, GRID) == LLM_WIDTH
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pooler.to(dtype)


def given(dtype=torch.float64, asked=None):
    """Three samples: two visuals and a question of 2 tokens, none and 1, one and 3."""
    tokens = token_set((2, 1, 1), GRID, WIDTH, sample_of_visual=[0, 0, 2])
    text_QD = torch.randn(6, LLM_WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    questions = Questions(text_QD, torch.tensor([0, 2, 3, 6]), is_asked_V=asked)
    return tokens.with_features(tokens.features_SD.to(dtype)), questions


def attend(queries, keys, values, heads, causal=False):
    out, width = [], queries.shape[-1] // heads
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        logits = queries[:, own] @ keys[:, own].T / math.sqrt(width)
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        out.append(logits.softmax(-1) @ values[:, own])
    return torch.cat(out, dim=-1)


def turned(states, heads):
    """Rotary positions, as complex numbers."""
    width = states.shape[-1] // heads
    out = states.clone()
    for head in range(heads):
        for k in range(width // 2):
            real, imaginary = head * width + k, head * width + k + width // 2
            angle = torch.arange(len(states)) * 10000.0 ** (-2 * k / width)
            spun = torch.complex(states[:, real], states[:, imaginary]) * torch.polar(torch.ones(1), angle)
            out[:, real], out[:, imaginary] = spun.real, spun.imag
    return out


def rms(states, norm):
    return states / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def plain_frame(pooler, patches_NE, text_qD):
    """One frame with its question: compressed tokens and what becomes of the question."""
    position_cE = sine_waves(pooler.side, WIDTH).double()
    picture = position_cE.T.reshape(1, WIDTH, pooler.side, pooler.side)
    key_position = interpolate(picture, size=GRID, mode="bicubic", align_corners=False)[0].flatten(1).T
    normed = layer_norm(patches_NE, (WIDTH,), pooler.patch_norm.weight, pooler.patch_norm.bias)
    query = layer_norm(pooler.query_cE, (WIDTH,), pooler.query_norm.weight, pooler.query_norm.bias) + position_cE
    given = (query, normed + key_position, normed)
    parts = zip(pooler.attention.in_proj_weight.chunk(3), pooler.attention.in_proj_bias.chunk(3), strict=True)
    mixed = attend(*(linear(each, *part) for each, part in zip(given, parts, strict=True)), 2)
    compressed = linear(mixed, pooler.attention.out_proj.weight, pooler.attention.out_proj.bias)
    first, _, second = pooler.project

    def project(states):
        return linear(gelu(linear(states, first.weight, first.bias)), second.weight, second.bias)

    states = torch.cat([project(patches_NE), project(compressed), text_qD])
    for layer in pooler.layers:
        query, keys, values = linear(rms(states, layer.attention_norm), layer.qkv.weight).chunk(3, dim=-1)
        states = states + linear(attend(turned(query, 2), turned(keys, 2), values, 2, causal=True), layer.out.weight)
        gate, up = linear(rms(states, layer.mlp_norm), layer.gate_up.weight).chunk(2, dim=-1)
        states = states + linear(silu(gate) * up, layer.down.weight)
    count = len(compressed)
    return states[N : N + count], states[N + count :]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("side", [1, 2])
def test_it_does_what_the_formulas_say(dtype, side):
    pooled, question_QD = built(dtype, side)(*given(dtype))
    pooled.validate()
    reference, (tokens, questions) = built(side=side), given()
    frames, text_QD = tokens.features_SD.view(4, N, WIDTH), questions.features_QD
    results = [plain_frame(reference, frames[f], text_QD[q]) for f, q in enumerate([slice(0, 2)] * 3 + [slice(3, 6)])]
    expected_SD = torch.cat([compressed for compressed, _ in results])
    said = [result for _, result in results]
    expected_QD = torch.cat([torch.stack(said[:3]).mean(0), text_QD[2:3], said[3]])
    torch.testing.assert_close(pooled.features_SD, expected_SD.to(dtype), **CLOSE[dtype])
    torch.testing.assert_close(question_QD, expected_QD.to(dtype), **CLOSE[dtype])
    assert torch.equal(question_QD[2], given(dtype)[1].features_QD[2]), "no visual, no change"


@torch.no_grad()
def test_frames_may_run_a_few_at_a_time(monkeypatch):
    pooler, (tokens, questions) = built(), given()
    whole, question_QD = pooler(tokens, questions=questions)
    for most in (1, 40):  # a frame has 12 patches, 4 compressed tokens and 3 of text
        monkeypatch.setattr("lightning_crosslmm.pooler.llava_mini.MOST_ROWS", most)
        pieces, again_QD = pooler(tokens, questions=questions)
        torch.testing.assert_close(pieces.features_SD, whole.features_SD, rtol=0, atol=1e-12)
        torch.testing.assert_close(again_QD, question_QD, rtol=0, atol=1e-12)


def test_a_visual_marked_after_the_answer_does_not_reach_the_question():
    pooler = built()
    tokens, questions = given(asked=torch.tensor([True, False, False]))
    pooled, question_QD = pooler(tokens, questions)
    features_SD = tokens.features_SD.clone()
    features_SD[2 * N :] += 1
    moved, again_QD = pooler(tokens.with_features(features_SD), questions)
    assert torch.equal(question_QD, again_QD) and torch.equal(question_QD[3:], questions.features_QD[3:])
    assert not torch.equal(moved.features_SD[8:], pooled.features_SD[8:])


def test_compressed_tokens_know_no_question():
    pooler, (tokens, questions) = built(), given()
    other = Questions(questions.features_QD + 1, questions.offsets)
    assert torch.equal(pooler(tokens, questions)[0].features_SD, pooler(tokens, other)[0].features_SD)


def test_without_fusion_layers_the_question_stays():
    tokens, questions = given()
    pooled, question_QD = built(fusion_layers=0)(tokens, questions)
    torch.testing.assert_close(question_QD, questions.features_QD, rtol=0, atol=1e-6)
    assert pooled.num_tokens == 16


def test_places_and_masses():
    pooled, _ = built()(*given())
    assert pooled.frame_offsets.diff().tolist() == [4] * 4 and pooled.mass_S.tolist() == [3.0] * 16
    assert pooled.coordinate_S3[:4].tolist() == [[0, 0.25, 0.5], [0, 0.25, 2.5], [0, 1.75, 0.5], [0, 1.75, 2.5]]
    assert isinstance(pooled.source_map, Opaque) and LlavaMiniPooler(2).tokens_per_frame(GRID) == 4


def test_no_question_at_all():
    tokens, _ = given()
    questions = Questions(torch.zeros(0, LLM_WIDTH, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))
    pooled, question_QD = built()(tokens, questions)
    pooled.validate()
    assert question_QD.shape == (0, LLM_WIDTH)


def test_sine_waves_tell_places_apart():
    wave = sine_waves(3, 8)
    assert torch.cdist(wave, wave).add(torch.eye(9)).min() > 0.1
    assert wave[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 0}, "pooler.side is 0, the encoder gives 3x4 tokens per frame; it must be 1 to 3"),
        ({"side": 4}, "pooler.side is 4"),
        ({"heads": 3}, "pooler.heads is 3; it must divide the encoder's width, 8"),
        ({"fusion_heads": 16}, "pooler.fusion_heads is 16; twice that must divide the LLM's width, 16"),
        ({"fusion_layers": -1}, "pooler.fusion_layers is -1; it must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LlavaMiniPooler(**{"heads": 2, "fusion_heads": 2, **settings}).connect(WIDTH, LLM_WIDTH, GRID)
