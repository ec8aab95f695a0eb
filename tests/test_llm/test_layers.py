from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.llm import host_layer, insert_block
from lightning_crosslmm.llm.layers import packed_mask
from tests.tiny import tiny_batch, tiny_llm, tiny_model

KINDS = ("qwen2", "qwen3", "llama")
BATCH = tiny_batch(["see", 3, "and", 1, "what?", "=cat"], ["none?", "=ok"], ["a much longer text", 2, "?", "=z"])
PACKED = replace(BATCH, row_of_sample=torch.tensor([0, 1, 0]))
placements = pytest.mark.parametrize("placement", ["after_attention", "before_layer"])
kinds = pytest.mark.parametrize("kind", KINDS)


def plain_copy(model, kind, attention):
    """The stock model of transformers, never touched, with the same weights."""
    plain = tiny_llm(kind, attention).eval()
    stock = {name: tensor for name, tensor in model.llm.state_dict().items() if ".fusion." not in name}
    plain.load_state_dict(stock)
    return plain


@kinds
@placements
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [BATCH, PACKED], ids=["rows", "packed"])
def test_closed_gates_leave_the_logits_bit_for_bit(kind, placement, attention, batch):
    model = tiny_model(kind, attention, placement=placement, gate_init=0.0)
    plain = plain_copy(model, kind, attention)
    with torch.no_grad():
        prompt = model.prompt(batch)
        given = {"attention_mask": prompt.attention_mask, "position_ids": prompt.position_RT}
        fused = model.llm(inputs_embeds=prompt.embeds_RTD, fusion=prompt.context, **given).logits
        without = model.llm(inputs_embeds=prompt.embeds_RTD, **given).logits
        stock = plain(inputs_embeds=prompt.embeds_RTD, **given).logits
    assert prompt.context.v2v is not None and prompt.context.t2v is not None
    assert torch.equal(fused, stock) and torch.equal(without, stock)


@placements
def test_open_gates_do_not(placement):
    model = tiny_model(placement=placement)
    with torch.no_grad():
        prompt = model.prompt(BATCH)
        changed = model.run(prompt) != model.run(replace(prompt, context=None))
    texts = prompt.layout.sample_RT == 1
    assert changed[prompt.layout.sample_RT == 0].any() and not changed[texts].any()


@kinds
@placements
def test_the_stock_parameters_keep_their_names(kind, placement):
    names = [name for name, _ in tiny_model(kind, placement=placement).llm.named_parameters()]
    stock = [name for name, _ in tiny_llm(kind).named_parameters()]
    assert [name for name in names if ".fusion." not in name] == stock
    assert {name.split(".fusion.")[0] for name in names if ".fusion." in name} == {"model.layers.0", "model.layers.2"}


@placements
def test_hidden_states_are_recorded(placement):
    model = tiny_model(placement=placement)
    prompt = model.prompt(BATCH)
    states = model.llm.model(
        inputs_embeds=prompt.embeds_RTD,
        attention_mask=prompt.attention_mask,
        fusion=prompt.context,
        output_hidden_states=True,
    ).hidden_states
    assert len(states) == 5  # embeddings and four layers
    assert torch.equal(states[0], prompt.embeds_RTD)
    assert {tuple(state.shape) for state in states} == {tuple(prompt.embeds_RTD.shape)}


@kinds
@placements
def test_checkpointing_reaches_fusion_and_nothing_runs_three_times(kind, placement):
    model = tiny_model(kind, placement=placement).train()
    model.gradient_checkpointing_enable()
    counts = {"fusion": 0, "self_attn": 0}

    def count(name):
        counts[name] += 1

    layer = model.llm.model.layers[2]
    for name in counts:
        getattr(layer, name).register_forward_pre_hook(lambda *_, name=name: count(name))
    model(BATCH).logits_YW.sum().backward()
    assert counts == {"fusion": 2, "self_attn": 2}


def test_without_checkpointing_each_runs_once():
    model, calls = tiny_model().train(), []
    model.llm.model.layers[2].fusion.register_forward_hook(lambda *_: calls.append(1))
    model(BATCH).logits_YW.sum().backward()
    assert len(calls) == 1


@kinds
def test_what_a_host_layer_says_of_itself(kind):
    llm = tiny_llm(kind)
    host = host_layer(llm, 1)
    assert (host.width, host.num_heads, host.num_kv_heads, host.head_width) == (32, 4, 2, 8)
    assert (host.qkv_bias, host.out_bias, host.head_norm) == (kind == "qwen2", False, kind == "qwen3")
    assert host.norm_eps == llm.config.rms_norm_eps
    own = llm.model.layers[1].state_dict()
    assert torch.equal(host.weights["q_proj.weight"], own["self_attn.q_proj.weight"])
    assert torch.equal(host.weights["norm.weight"], own["input_layernorm.weight"])
    assert ("q_proj.bias" in host.weights, "k_norm.weight" in host.weights) == (kind == "qwen2", kind == "qwen3")


def test_the_class_still_answers_to_its_own_name():
    llm = tiny_llm()
    stock = type(llm)
    insert_block(llm, 0, torch.nn.Identity(), before_layer=False)
    insert_block(llm, 3, torch.nn.Identity(), before_layer=False)
    assert isinstance(llm, stock) and type(llm).__name__ == "Qwen2ForCausalLM" and type(llm).__mro__[1] is stock
    assert type(llm.model.layers[3]).__name__ == "FusedQwen2DecoderLayer"
    assert type(tiny_llm()) is stock  # other models of the class are left alone


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_neighbours_are_hidden(implementation):
    sample_RT = torch.tensor([[0, 0, 1, 1, -1], [2, 2, 2, -1, -1]])
    mask = packed_mask(sample_RT, implementation, torch.bfloat16)
    assert mask.shape == (2, 1, 5, 5)
    seen = mask if implementation == "sdpa" else mask == 0
    for row in range(2):
        for query in range(5):
            for key in range(5):
                visible = key <= query and sample_RT[row, key] == sample_RT[row, query]
                assert bool(seen[row, 0, query, key]) == bool(visible)
    if implementation == "eager":
        assert mask.dtype == torch.bfloat16 and torch.isfinite(mask).all()
