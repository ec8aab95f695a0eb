import pytest
import torch
from torch import nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.projector import MLPProjector


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]),
        ({"norm": False}, [nn.Linear, nn.GELU, nn.Linear]),
        ({"depth": 1}, [nn.LayerNorm, nn.Linear]),
        ({"depth": 3, "norm": False}, [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]),
    ],
)
def test_layers(settings, kinds):
    projector = MLPProjector(6, 10, **settings)
    assert [type(layer) for layer in projector] == kinds
    assert projector(torch.randn(7, 6)).shape == (7, 10)


def test_the_hidden_width_is_the_llms():
    widths = [(layer.in_features, layer.out_features) for layer in MLPProjector(6, 10) if isinstance(layer, nn.Linear)]
    assert widths == [(6, 10), (10, 10)]


def test_the_formula():
    projector = MLPProjector(6, 10)
    _, first, _, second = projector
    tokens_SE = 5 + 3 * torch.randn(7, 6)
    normed_SE = (tokens_SE - tokens_SE.mean(-1, keepdim=True)) / tokens_SE.std(-1, keepdim=True, unbiased=False)
    inner_SD = normed_SE @ first.weight.T + first.bias
    inner_SD = inner_SD * (1 + torch.erf(inner_SD / 2**0.5)) / 2
    torch.testing.assert_close(projector(tokens_SE), inner_SD @ second.weight.T + second.bias, rtol=0, atol=1e-5)


def test_no_layer_is_refused():
    with pytest.raises(UserError, match="projector.depth is 0; it must be 1 or more"):
        MLPProjector(6, 10, depth=0)
