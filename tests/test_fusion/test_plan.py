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
        ({"layers_per_kv": 0}, "fusion.layers_per_kv is 0; right are a number of fused layers, 1 or more, or all"),
        ({"layers_per_kv": "each"}, "fusion.layers_per_kv is each"),
        ({"kv_latent": 0}, "fusion.kv_latent is 0; right are a number of channels, 1 or more, or null"),
        ({"kv_latent": 8, "weights": "host"}, "fusion.weights=host .* fusion.kv_latent=8 .* set fusion.kv_latent=null"),
        ({"t2v_cache": "int4"}, "fusion.t2v_cache is 'int4'; right are keys_values, int8, recompute"),
        ({"t2v_cache": "int8", "t2v": False}, "fusion.t2v_cache=int8 is about what text reads; set fusion.t2v=true"),
        ({"t2v_cache": "recompute", "layers_per_kv": "all"}, "fusion.t2v_cache=recompute .* fusion.layers_per_kv=all"),
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


@pytest.mark.parametrize(
    ("count", "groups"),
    [(1, [None] * 5), (2, [0, 0, 4, 4, 8]), (3, [0, 0, 0, 6, 6]), (5, [0] * 5), ("all", [0] * 5)],
)
def test_which_layers_share_keys(count, groups):
    found = Fusion(True, True, interval=2, layers_per_kv=count).groups(10)
    assert found == dict(zip([0, 2, 4, 6, 8], groups, strict=True))


def test_more_layers_than_there_are_share_nothing():
    with pytest.raises(UserError, match="fusion.layers_per_kv is 4, but fusion.interval=4 .* fuse 3 .* 1 to 3, or all"):
        Fusion(True, True, layers_per_kv=4).groups(10)


def test_a_group_starts_from_its_first_host_layer():
    llm = tiny_llm()
    hosts = {1: host_layer(llm, 1)}
    settings = {"weights": "host", "layers_per_kv": 2, "first_layer": 1, "interval": 2}
    made = Fusion(True, True, **settings).sources(hosts, 32, 1e-6)
    for name in ("v2v", "t2v"):
        assert torch.equal(made.groups["1"][name].k_proj.weight, llm.model.layers[1].self_attn.k_proj.weight)
        assert torch.equal(made.groups["1"][name].norm.weight, llm.model.layers[1].input_layernorm.weight)
