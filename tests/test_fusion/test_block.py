import math
from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import FusionBlock, FusionContext, Queries, Spans
from lightning_crosslmm.fusion.block import Branch, Gate
from lightning_crosslmm.fusion.keys import KeysValues, unit_rms
from lightning_crosslmm.fusion.plan import copy_host
from lightning_crosslmm.llm import host_layer
from tests.tiny import tiny_llm

WIDTH, SOURCES = 32, 10


def block(kind="qwen2", source_width=WIDTH, **settings):
    torch.manual_seed(0)
    settings = {"v2v": True, "t2v": True, "gate": "scalar", "gate_init": 0.5, "share_kv": False} | settings
    return FusionBlock(host_layer(tiny_llm(kind), 0), 0, source_width, backend="sdpa", **settings)


def context(source_width=WIDTH, **changes):
    """Two rows of six positions: 1 and 2 are pooled and read sources 0 to 5, as 3 and 4 do; 11 reads the others."""
    source_SE = unit_rms(torch.randn(SOURCES, source_width, generator=torch.Generator().manual_seed(1)), 1e-6)
    v2v = Queries(torch.tensor([1, 2]), Spans(torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([6])))
    t2v = Queries(torch.tensor([3, 4, 11]), Spans(torch.tensor([0, 2, 3]), torch.tensor([0, 6]), torch.tensor([6, 10])))
    return replace(FusionContext(source_SE, v2v, t2v), **changes)


def hidden():
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(2))


def moved(before_RTD, after_RTD):
    return (before_RTD != after_RTD).any(-1).flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("init", [-0.9, 0.0, 0.5])
@pytest.mark.parametrize(("kind", "count"), [("scalar", 1), ("channel", 6)])
def test_the_gates_start_is_its_factor(kind, count, init):
    gate = Gate(kind, init, 6)
    update_QD = torch.randn(3, 6)
    assert gate.raw.numel() == count
    torch.testing.assert_close(gate(update_QD), init * update_QD, rtol=0, atol=1e-6)


def test_a_scalar_moves_all_channels_and_a_channel_gate_each_its_own():
    gate = Gate("channel", 0.0, 3)
    gate.raw.data = torch.tensor([0.0, 1.0, -20.0])
    torch.testing.assert_close(gate(torch.ones(1, 3)), torch.tensor([[0, math.tanh(1), -1.0]]))


def test_no_gate_passes_everything():
    gate = Gate("none", 0.0, 6)
    assert list(gate.parameters()) == [] and torch.equal(gate(torch.ones(1, 6)), torch.ones(1, 6))


@pytest.mark.parametrize("init", [1.0, -1.0, 7.0])
def test_a_factor_that_tanh_cannot_reach_is_refused(init):
    with pytest.raises(UserError, match=f"fusion.gate_init is {init}; .* between -1 and 1"):
        Gate("scalar", init, 6)


def test_an_unknown_gate_is_refused():
    with pytest.raises(UserError, match="fusion.gate is 'vector'; right are scalar, channel, none"):
        Gate("vector", 0.0, 6)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_the_block_has_the_hosts_shape(kind):
    made = block(kind)
    host = host_layer(tiny_llm(kind), 0)
    for branch in (made.v2v, made.t2v):
        assert (branch.q_proj.bias is not None) == (kind == "qwen2")
        assert branch.o_proj.bias is None
        assert isinstance(branch.q_norm, torch.nn.RMSNorm) == (kind == "qwen3")
    assert made.keys_values["v2v"].k_proj.weight.shape == (host.num_kv_heads * host.head_width, WIDTH)
    assert moved(hidden(), made(hidden(), context())) == [1, 2, 3, 4, 11]


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_a_closed_gate_changes_nothing(gate):
    assert torch.equal(block(gate=gate, gate_init=0.0)(hidden(), context()), hidden())


def test_both_branches_read_the_same_hidden_states():
    made, here = block(), context()
    # a position that asks in both branches gets both updates, each computed from what came in
    here = replace(here, t2v=Queries(torch.tensor([1, 2, 11]), here.t2v.spans))
    alone_v2v = made(hidden(), replace(here, t2v=None)) - hidden()
    alone_t2v = made(hidden(), replace(here, v2v=None)) - hidden()
    torch.testing.assert_close(made(hidden(), here), hidden() + alone_v2v + alone_t2v, rtol=0, atol=1e-6)


def test_the_formula():
    made, here = block(gate_init=0.25), context(t2v=None)
    branch, keys_values = made.v2v, made.keys_values["v2v"]

    def normed(rows_XD, norm):
        return rows_XD / (rows_XD.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    asking_QD = hidden().flatten(0, 1)[[1, 2]]
    query = branch.q_proj(normed(asking_QD, branch.norm)).view(2, 4, 8)
    keys_values.norm.weight.data = torch.rand(WIDTH)
    source_SE = normed(here.source_SE[:6], keys_values.norm)
    key, value = (part(source_SE).view(6, 2, 8) for part in (keys_values.k_proj, keys_values.v_proj))
    heads = [torch.softmax(query[:, h] @ key[:, h // 2].T / 8**0.5, dim=-1) @ value[:, h // 2] for h in range(4)]
    update_QD = 0.25 * branch.o_proj(torch.cat(heads, dim=-1))
    found = made(hidden(), here).flatten(0, 1)[[1, 2]]
    torch.testing.assert_close(found, asking_QD + update_QD, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("v2v", "t2v", "positions"), [(True, False, [1, 2]), (False, True, [3, 4, 11])])
def test_one_branch_alone(v2v, t2v, positions):
    made = block(v2v=v2v, t2v=t2v)
    assert moved(hidden(), made(hidden(), context())) == positions
    assert list(made.keys_values) == (["v2v"] if v2v else ["t2v"])


def test_nobody_asks():
    here = hidden()
    assert block()(here, context(v2v=None, t2v=None)) is here


def test_shared_keys_are_computed_once():
    made = block(share_kv=True)
    calls = []
    made.keys_values["shared"].register_forward_hook(lambda *_: calls.append(1))
    made(hidden(), context())
    assert list(made.keys_values) == ["shared"] and len(calls) == 1
    apart = block()
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in made.parameters()) == sum(
        p.numel() for p in made.keys_values.parameters()
    )


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("latent", [None, 6])
@pytest.mark.parametrize("cache", ["keys_values", "recompute"])
def test_text_that_follows_reads_what_the_prompt_read(kind, share_kv, latent, cache):
    made = block(kind, share_kv=share_kv, kv_latent=latent)
    for part in made.modules():
        if getattr(part, "bias", None) is not None:
            torch.nn.init.normal_(part.bias)
    here = context(t2v_cache=cache, row_spans=((0, 6), (6, 10)), prompt_length=6)
    first = made(hidden(), here)
    assert set(here.kept) == ({0} if cache == "keys_values" else set())
    later = here.at(6, 1)
    assert len(here.source_SE) == (0 if cache == "keys_values" else SOURCES)
    again = made(torch.stack([hidden()[0, 3:4], hidden()[1, 5:6]]), later)
    torch.testing.assert_close(again[:, 0], torch.stack([first[0, 3], first[1, 5]]), rtol=0, atol=2e-6)


def test_following_text_makes_no_keys_but_where_keys_are_normed():
    def calls(kind, **settings):
        made, found = block(kind, **settings), []
        here = context(t2v_cache="recompute", row_spans=((0, 6), (6, 10)), prompt_length=6)
        made(hidden(), here)
        for part in made.modules():
            if isinstance(part, KeysValues):
                part.register_forward_hook(lambda *_: found.append(1))
        made(hidden()[:, :1], here.at(6, 1))
        return len(found)

    assert [calls("qwen2"), calls("qwen2", kv_latent=6), calls("qwen3")] == [0, 0, 1]


def test_text_reads_what_it_follows_even_if_the_prompts_text_saw_nothing():
    made = block(v2v=False)
    here = context(t2v=None, t2v_cache="keys_values", row_spans=((0, 6), None), prompt_length=6)
    assert torch.equal(made(hidden(), here), hidden())
    assert moved(hidden()[:, :1], made(hidden()[:, :1], here.at(6, 1))) == [0]


def test_a_group_reads_what_its_first_layer_would():
    whole = block()
    shared = {name: part(context().source_SE) for name, part in whole.keys_values.items()}
    member = block(group=0)
    assert not list(member.keys_values) and not list(member.latents)
    member.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("keys_values.")})
    found = member(hidden(), context(shared={0: shared}))
    assert torch.equal(found, whole(hidden(), context()))


def test_a_group_with_a_latent_makes_its_own_keys():
    member = block(group=0, kv_latent=6)
    assert list(member.keys_values) == ["v2v", "t2v"] and not list(member.latents)
    assert member.keys_values["v2v"].k_proj.in_features == 6


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_weights_of_the_host(kind):
    llm = tiny_llm(kind)
    made = block(kind)
    copy_host(made, host_layer(llm, 0).weights)
    attention, norm = llm.model.layers[0].self_attn, llm.model.layers[0].input_layernorm
    for part in made.modules():
        if isinstance(part, Branch | KeysValues):
            for name, child in part.named_children():
                stock = norm if name == "norm" else getattr(attention, name, None)
                for key, tensor in child.state_dict().items():
                    if name != "gate":
                        assert torch.equal(tensor, getattr(stock, key).data), (name, key)
    assert made.v2v.gate.raw.tanh().item() == pytest.approx(0.5)
    assert made.v2v.q_proj.weight.data_ptr() != attention.q_proj.weight.data_ptr()


def test_sources_of_another_width():
    made = block(source_width=12)
    assert moved(hidden(), made(hidden(), context(source_width=12))) == [1, 2, 3, 4, 11]


def test_a_weight_of_zero_keeps_the_graph_and_adds_nothing():
    made = block()
    here = context(t2v=None)
    here = replace(here, v2v=replace(here.v2v, weight=0.0))
    out = made(hidden(), here)
    assert torch.equal(out, hidden())
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.v2v.parameters())


def test_looks_are_collected_per_branch():
    here = context(looks=[])
    block()(hidden(), here)
    assert [(layer, name, [tuple(w.shape) for w in weights]) for layer, name, weights in here.looks] == [
        (0, "v2v", [(2, 6)]),
        (0, "t2v", [(2, 6), (1, 4)]),
    ]


def test_half_precision_hidden_states_stay_half():
    made = block().bfloat16()
    here = context()
    here.source_SE = here.source_SE.bfloat16()
    assert made(hidden().bfloat16(), here).dtype == torch.bfloat16
