import pytest
import torch

from lightning_crosslmm.fusion import Spans, cross_attention
from lightning_crosslmm.fusion.cache import load, store


def test_codes_are_within_half_a_step_of_each_heads_largest():
    tensor = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0])[:, None]
    tensor[3] = 0
    codes, scale = store((tensor,), "int8")
    assert codes.dtype == torch.int8 and scale.shape == (50, 2, 1)
    (found,) = load((codes, scale), "int8", torch.float32)
    assert ((found - tensor).abs() <= tensor.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert not found[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attended_values_move_by_a_percent(dtype):
    noise = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(*shape, 2, 64, generator=noise).to(dtype) for shape in ((20,), (500,), (500,)))
    spans = Spans(torch.tensor([0, 20]), torch.tensor([0]), torch.tensor([500]))
    exact = cross_attention(query, key, value, spans, "reference").float()
    kept = load(store((key, value), "int8"), "int8", dtype)
    assert {tensor.dtype for tensor in kept} == {dtype}
    found = cross_attention(query, *kept, spans, "reference").float()
    error = ((found - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert 0.002 < error < 0.012


def test_what_is_not_coded_stays_what_it_is():
    held = (torch.ones(3, 2, 8), torch.ones(3, 2, 8))
    kept = store(held, "keys_values")
    assert all(one is other for one, other in zip(held, load(kept, "keys_values", torch.float32), strict=True))
