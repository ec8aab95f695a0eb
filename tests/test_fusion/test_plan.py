import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.llm import host_layer
from tests.tiny import tiny_llm


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [0, 4, 8]),
        ({"interval": 1, "first_layer": 8}, [8, 9]),
        ({"interval": 3, "first_layer": 1}, [1, 4, 7]),
        ({"interval": 99}, [0]),
        ({"v2v": False}, [0, 4, 8]),
        ({"v2v": False, "t2v": False}, []),
    ],
)
def test_which_layers_are_fused(settings, layers):
    assert Fusion(**{"v2v": True, "t2v": True} | settings).layers(10) == layers


def test_a_first_layer_past_the_last_is_refused():
    with pytest.raises(UserError, match="fusion.first_layer is 10, but the LLM has layers 0 to 9"):
        Fusion(True, True, first_layer=10).layers(10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "frames"}, "fusion.scope is 'frames'; right are all, frame, window; did you mean 'frame'"),
        ({"key_source": "x"}, "fusion.key_source is 'x'; right are projected, encoder"),
        ({"placement": "before"}, "fusion.placement is 'before'; .* did you mean 'before_layer'"),
        ({"weights": "hosts"}, "fusion.weights is 'hosts'"),
        ({"frame_time": "sine"}, "fusion.frame_time is 'sine'"),
        ({"backend": "flash"}, "fusion.backend is 'flash'"),
        ({"interval": 0}, "fusion.interval 0 must be 1 or more"),
        ({"first_layer": -1}, "fusion.first_layer -1 0 or more"),
        ({"scope": "window"}, "fusion.window_frames None: a window needs 1 frame or more"),
        ({"scope": "window", "window_frames": 0}, "fusion.window_frames 0"),
        ({"window_frames": 2}, "fusion.scope is 'all' and fusion.window_frames 2"),
        ({"weights": "host", "key_source": "encoder"}, "fusion.weights=host copies projections of the LLM's width"),
        ({"share_kv": True, "t2v": False}, "fusion.share_kv=true needs both branches"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Fusion(**{"v2v": True, "t2v": True} | settings)


def test_the_host_layers_weights_are_copied_when_asked():
    llm = tiny_llm()
    stock = llm.model.layers[1].self_attn.v_proj.weight
    host = host_layer(llm, 1)
    same = Fusion(True, True, weights="host").block(host, 1, 32).keys_values["t2v"].v_proj.weight
    other = Fusion(True, True).block(host, 1, 32).keys_values["t2v"].v_proj.weight
    assert torch.equal(same, stock) and not torch.equal(other, stock)
