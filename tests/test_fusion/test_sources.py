import torch

from lightning_crosslmm.fusion.sources import FusionSources
from lightning_crosslmm.llm import host_layer
from tests.tiny import tiny_llm

HOSTS = {0: host_layer(tiny_llm(), 0), 2: host_layer(tiny_llm(), 2)}


def sources():
    return 3 * torch.randn(10, 32, generator=torch.Generator().manual_seed(0))


def test_tokens_get_unit_rms_and_nothing_is_learned_where_nothing_is_shared():
    made = FusionSources({}, ("v2v", "t2v"), 32, None, 1e-6)
    unit_SE, shared = made(sources(), torch.float32)
    torch.testing.assert_close(unit_SE.square().mean(-1), torch.ones(10))
    assert shared == {} and list(made.parameters()) == []


def test_each_group_shares_keys_or_a_latent():
    for latent, shapes in ((None, [(10, 2, 8)] * 2), (6, [(10, 6)])):
        made = FusionSources(HOSTS, ("v2v", "t2v"), 32, latent, 1e-6)
        _, shared = made(sources(), torch.float32)
        assert {number: set(names) for number, names in shared.items()} == {n: {"v2v", "t2v"} for n in HOSTS}
        assert [tuple(tensor.shape) for tensor in shared[2]["t2v"]] == shapes
        assert not torch.equal(shared[0]["t2v"][0], shared[2]["t2v"][0])


def test_tokens_are_as_wide_as_what_reads_them():
    made = FusionSources(HOSTS, ("v2v",), 32, None, 1e-6)
    assert made.bfloat16()(sources(), torch.bfloat16)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert made.float()(sources(), torch.float32)[0].dtype == torch.bfloat16
