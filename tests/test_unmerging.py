"""Virtual unmerging: the LLM answers as if every patch stood in the prompt."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, prompts_for
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.pooler import BilinearPooler, DymuPooler, FolderPooler, TomePooler, VistogPooler
from lightning_crosslmm.projector import MLPProjector
from tests.tiny import tiny_batch, tiny_encoder, tiny_llm

KINDS = ("qwen2", "qwen3", "llama")
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("mode", ["expanded", "unique"])
ARMS = {
    "crosslmm": {},
    "frame": {"scope": "frame"},
    "before": {"placement": "before_layer"},
    "none": {"v2v": False, "t2v": False},
}
arms = pytest.mark.parametrize("arm", list(ARMS))
SAMPLES = (["look", 3, "and", 1, "what?", "=cat", "and?", 2, "=dog"], ["nothing", "=ok"], [2, "?", "=z"])
BATCH = tiny_batch(*SAMPLES)
PACKED = replace(BATCH, row_of_sample=torch.tensor([0, 0, 1]))
ASKED = [0, 2, 3]
PROMPTS = prompts_for(BATCH, ASKED)
CLOSE = {"rtol": 0, "atol": 2e-5}  # logits of order 1 to 10 in single precision, summed in another order


def built(pooler=None, mode="expanded", arm="none", kind="qwen2", attention="sdpa", **shape):
    torch.manual_seed(0)
    fusion = Fusion(**{"v2v": True, "t2v": True, "interval": 2, "gate_init": 0.5, **ARMS[arm]})
    llm = tiny_llm(kind, attention, **shape)
    return CrossLMM(tiny_encoder(), pooler or DymuPooler(0.4), MLPProjector, fusion, llm, mode).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits_YW


def generated(model, prompts=PROMPTS, count=5):
    return model.generate(prompts, Greedy(count), stop_id=9999, pad_id=0)


@kinds
@modes
@arms
def test_where_nothing_merged_the_logits_are_the_baselines_to_the_last_bit(kind, mode, arm):
    plain, model = (built(DymuPooler(1.0), each, arm, kind) for each in ("none", mode))
    assert torch.equal(logits(model, BATCH), logits(plain, BATCH))
    torch.testing.assert_close(logits(model, PACKED), logits(plain, PACKED), **CLOSE)
    assert generated(model) == generated(plain)


def slow_hidden(model, kind, prompts):
    """Copy every token to its places, run the stock attention over all of them, average back; one sample."""
    prompt, pooled = model.prompt(prompts), model.encode(prompts).pooled
    stock = tiny_llm(kind).eval()
    stock.load_state_dict(model.llm.state_dict())
    patches = iter(prompt.layout.pooled_position_P[pooled.source_map.pooled_of_source_S].tolist())
    sizes = iter((16 * prompts.visual_offsets.diff()).tolist())
    texts = iter(prompt.layout.text_position.tolist())
    order = []
    for token in prompts.ids_L.tolist():
        order += [next(patches) for _ in range(next(sizes))] if token == VISUAL_MARK else [next(texts)]
    index, h_TD = torch.tensor(order), prompt.embeds_RTD[0]
    for layer in stock.model.layers:
        x_1VD = layer.input_layernorm(h_TD)[index][None]
        turn = stock.model.rotary_emb(x_1VD, torch.arange(len(index))[None])
        out_VD = layer.self_attn(hidden_states=x_1VD, position_embeddings=turn, attention_mask=None)[0][0]
        sum_TD = torch.zeros_like(h_TD).index_add(0, index, out_VD)
        h_TD = h_TD + sum_TD / torch.bincount(index)[:, None]
        h_TD = h_TD + layer.mlp(layer.post_attention_layernorm(h_TD))
    return stock.model.norm(h_TD)


@kinds
@pytest.mark.parametrize("pooler", [DymuPooler(0.3), TomePooler(4), FolderPooler(2)], ids=lambda p: type(p).__name__)
def test_it_is_expand_attend_and_average(kind, pooler):
    model = built(pooler, kind=kind)
    prompts = prompts_for(BATCH, [1])  # two visuals, three turns, no later one
    with torch.no_grad():
        expected_TD = slow_hidden(model, kind, prompts)
        torch.testing.assert_close(model.run(model.prompt(prompts))[0], expected_TD, **CLOSE)
        plain = built(pooler, "none", kind=kind)
        assert not torch.allclose(plain.run(plain.prompt(prompts))[0], expected_TD, atol=1e-2)


@arms
def test_the_order_of_merged_tokens_does_not_matter(arm):
    raster, merged = (built(TomePooler(4, order=order), arm=arm) for order in ("raster", "merged"))
    torch.testing.assert_close(logits(raster, BATCH), logits(merged, BATCH), **CLOSE)


@modes
@arms
def test_a_sample_is_read_and_answered_the_same_alone_packed_and_in_any_company(mode, arm):
    model = built(mode=mode, arm=arm)
    torch.testing.assert_close(logits(model, PACKED), logits(model, BATCH), **CLOSE)
    assert generated(model) == [generated(model, prompts_for(BATCH, [answer]))[0] for answer in ASKED]


def following(model, prompts, ids_RG):
    """Logits of given new tokens, one call for each, as `generate` makes them."""
    prompt = model.prompt(prompts, pad_left=True, keeps_keys=True)
    cache, mask, found = DynamicCache(config=model.llm.config), prompt.attention_mask, []
    given = {"unmerging": prompt.unmerging, "past_key_values": cache, "use_cache": True}
    given |= {} if prompt.context is None else {"fusion": prompt.context}
    model.llm(inputs_embeds=prompt.embeds_RTD, attention_mask=mask, **given)
    for ids_R in ids_RG.T:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        found.append(model.llm(input_ids=ids_R[:, None], attention_mask=mask, **given).logits[:, -1])
    return torch.stack(found, dim=1), cache


def forced(prompts, ids_RG):
    """The prompts with these tokens as answers."""
    ids, labels, answers, lengths = [], [], [], [0]
    for row, (start, end) in enumerate(zip(prompts.text_offsets[:-1], prompts.text_offsets[1:], strict=True)):
        own = prompts.ids_L[start:end]
        ids += [own, ids_RG[row]]
        labels += [torch.full_like(own, IGNORED), ids_RG[row]]
        answers += [torch.full_like(own, -1), torch.full_like(ids_RG[row], row)]
        lengths.append(len(own) + ids_RG.shape[1])
    return replace(
        prompts,
        ids_L=torch.cat(ids),
        labels_L=torch.cat(labels),
        answer_L=torch.cat(answers),
        text_offsets=torch.tensor(lengths).cumsum(0),
        answer_kinds=("",) * len(ids_RG),
        questions=("",) * len(ids_RG),
    )


@kinds
@arms
def test_new_tokens_read_what_teacher_forcing_reads(kind, arm):
    model = built(arm=arm, kind=kind)
    ids_RG = torch.randint(0, 256, (3, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found_RGW, cache = following(model, PROMPTS, ids_RG)
        wanted_RGW = model(forced(PROMPTS, ids_RG)).logits_YW.unflatten(0, (3, 4))
    torch.testing.assert_close(found_RGW[:, :-1], wanted_RGW[:, 1:], **CLOSE)
    unique = model.prompt(PROMPTS).layout.num_positions
    assert cache.get_seq_length() == unique + 4 < int(model.prompt(PROMPTS).unmerging.length_B.max())


@arms
def test_generating_is_the_argmax_of_teacher_forcing(arm):
    model = built(arm=arm)
    rows = generated(model)
    model_says = logits(model, forced(PROMPTS, torch.tensor(rows))).argmax(dim=-1)
    assert model_says.view(3, -1).tolist() == rows


@modes
@arms
def test_gradients_with_and_without_checkpointing(mode, arm):
    def gradients(checkpointed):
        model = built(mode=mode, arm=arm).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(PACKED).logits_YW.square().mean().backward()
        return dict((name, parameter.grad) for name, parameter in model.named_parameters())

    plain, again = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, again[name], rtol=0, atol=0)


def test_batches_without_visuals_and_blank_ones_go_through_the_plain_attention():
    text = tiny_batch(["nothing", "=ok"])
    plain, model = built(mode="none"), built()
    assert torch.equal(logits(model, text), logits(plain, text))
    model.train()(text).logits_YW.sum().backward()


def test_half_precision():
    model = built()
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model, BATCH).isfinite().all()
        assert len(generated(model)) == 3
    assert logits(model.bfloat16(), BATCH).isfinite().all()


def test_groups_without_patches_stand_nowhere():
    model = built(VistogPooler(16))
    pooled = model.encode(BATCH).pooled
    assert (pooled.mass_S == 0).any() and logits(model, BATCH).isfinite().all()


@pytest.mark.parametrize("pooler", [BilinearPooler(2), VistogPooler(2, "soft")], ids=lambda p: type(p).__name__)
def test_poolers_without_a_full_map_are_refused_with_both_names(pooler):
    name = type(pooler).__name__
    with pytest.raises(UserError, match=f"virtual_unmerging=unique puts every patch back .* {name} keeps no such"):
        built(pooler, "unique")


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="virtual_unmerging is 'expand'; right are none, .*; did you mean 'expanded'"):
        built(mode="expand")
    with pytest.raises(UserError, match="virtual_unmerging needs llm.model.attention=sdpa, .*; it is eager"):
        built(attention="eager")
    with pytest.raises(UserError, match="full attention in every layer; this one has sliding_attention"):
        built(use_sliding_window=True, sliding_window=8, max_window_layers=2)


def test_what_does_not_fit_into_the_context_is_refused():
    model = built(max_position_embeddings=110)
    with pytest.raises(UserError, match="sample 's0' has 1.. virtual tokens, the LLM's context is 110; use"):
        model(BATCH)
    prompts = prompts_for(BATCH, [0])
    most = int(built().prompt(prompts).unmerging.length_B.max())
    model = built(max_position_embeddings=most + 3)
    with pytest.raises(UserError, match=f"a prompt of {most} virtual tokens leaves room for 3 .*max_new_tokens is 4"):
        generated(model, prompts, count=4)
