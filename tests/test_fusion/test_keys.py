import pytest
import torch

from lightning_crosslmm.fusion import Spans, cross_attention
from lightning_crosslmm.fusion.keys import KeysValues, Latent, draw, unit_rms
from lightning_crosslmm.llm import host_layer
from tests.tiny import tiny_llm

WIDTH = 32


def keys_values(kind="qwen2", **settings):
    torch.manual_seed(0)
    made = KeysValues(host_layer(tiny_llm(kind), 0), WIDTH, **settings)
    draw(made, 0.2)
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def sources(num_tokens=10):
    return 3 * torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def test_half_a_norm_before_and_its_weight_behind_are_the_norm():
    made = keys_values()
    key_SAK, value_SAK = made(unit_rms(sources(), made.norm.eps))
    normed_SE = made.norm(sources())
    torch.testing.assert_close(key_SAK.flatten(1), made.k_proj(normed_SE), rtol=0, atol=1e-5)
    torch.testing.assert_close(value_SAK.flatten(1), made.v_proj(normed_SE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_attending_without_keys_is_attending_with_them(kind, has_norm):
    made = keys_values(kind, has_norm=has_norm)
    unit_SE = unit_rms(sources(), 1e-6)
    query_QHK = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2))
    spans = Spans(torch.tensor([0, 2, 3]), torch.tensor([0, 4]), torch.tensor([6, 10]))
    expected = cross_attention(query_QHK, *made(unit_SE), spans, "reference")
    torch.testing.assert_close(made.attend(query_QHK, unit_SE, spans), expected, rtol=0, atol=1e-5)


def test_keys_that_are_normed_are_not_linear():
    assert [keys_values(kind).is_linear for kind in ("qwen2", "llama", "qwen3")] == [True, True, False]


def test_a_latent_leaves_keys_their_variance():
    wide = Latent(host_layer(tiny_llm(), 0), 512, 64)
    narrow = KeysValues(host_layer(tiny_llm(), 0), 64, has_norm=False)
    straight = KeysValues(host_layer(tiny_llm(), 0), 512)
    for part in (wide, narrow, straight):
        draw(part, 0.1)
    unit_SE = unit_rms(torch.randn(200, 512), 1e-6)
    (latent_SE,) = wide(unit_SE)
    assert latent_SE.shape == (200, 64)
    for found, expected in zip(narrow(latent_SE), straight(unit_SE), strict=True):
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.25)
