"""Counted on the meta device against what torch's own counter and the memory in use say of the real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_crosslmm.cost import Meter, Sample
from lightning_crosslmm.cost.memo import Memo
from lightning_crosslmm.cost.meter import PARTS
from lightning_crosslmm.cost.phases import read_prompt, train_step
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.objective import answer_loss
from lightning_crosslmm.pooler import (
    BilinearPooler,
    NoPooler,
    QFormerPooler,
    TokenpackerPooler,
    TomePooler,
    VisionzipPooler,
)
from tests.arms import ARMS, NEVER
from tests.tiny import IMAGE_SIZE, tiny_encoder, tiny_model

SAMPLE = Sample(num_frames=6, text_tokens=12, answer_tokens=3)
MEMO = Memo()  # shapes repeat from test to test
FLOPS = {"rel": 0.02}
MEMORY = {"rel": 0.10}
POOLERS = {
    "bilinear after the projector": lambda: BilinearPooler(2, stage="after_projector"),
    "none": NoPooler,
    "qformer": lambda: QFormerPooler(num_tokens=2, width=16, depth=2, heads=2),
    "tokenpacker": lambda: TokenpackerPooler(rows=1, layers=[0, -1], heads=2),
    "tome": lambda: TomePooler(merges_per_block=3),
    "visionzip": lambda: VisionzipPooler(dominant=3, contextual=2, saliency="received"),
}


def meta_twin(make=None, **settings):
    with torch.device("meta"):
        return tiny_model(pooler=make and make(), **settings)


def prompt_of(device):
    return SAMPLE.batch(IMAGE_SIZE, device=device)


def counted(model, run):
    with FlopCounterMode(display=False) as counter:
        run(model)
    return counter.get_total_flops()


def generate(count):
    return lambda model: model.generate(prompt_of("cpu"), Greedy(count), stop_id=NEVER, pad_id=0)


def backward(model):
    output = model.train()(prompt_of("cpu"))
    answer_loss(output.logits_YW, output.target_Y).backward()


def check_flops(real, meta):
    prefill, decode, _ = read_prompt(meta, prompt_of("meta"), memo=MEMO)
    one, two = (counted(real, generate(count)) for count in (1, 2))
    assert prefill.flops.total() == pytest.approx(one, **FLOPS)
    assert decode.flops.total() == pytest.approx(two - one, **FLOPS)
    assert train_step(meta, prompt_of("meta"), memo=MEMO).flops.total() == pytest.approx(
        counted(real, backward), **FLOPS
    )


@pytest.mark.parametrize(
    "arm", ["crosslmm", "window", "encoder's tokens", "keys of all layers", "latent", "recompute", "v2v", "none"]
)
def test_operations_of_every_arm_of_fusion(arm):
    check_flops(tiny_model(**ARMS[arm]), meta_twin(**ARMS[arm]))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_operations_of_every_layout(kind):
    check_flops(tiny_model(kind=kind), meta_twin(kind=kind))


@pytest.mark.parametrize("name", POOLERS)
def test_operations_of_poolers(name):
    check_flops(tiny_model(pooler=POOLERS[name]()), meta_twin(make=POOLERS[name]))


def test_what_is_frozen_costs_no_gradient_of_weights_and_none_of_inputs_below():
    def frozen(model, *roles):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.role_of(name) not in roles)
        return model

    for roles in (["encoder"], ["encoder", "llm"], ["llm"]):
        step = train_step(frozen(meta_twin(), *roles), prompt_of("meta"))
        assert step.flops.total() == pytest.approx(counted(frozen(tiny_model(), *roles), backward), **FLOPS)
        forward = read_prompt(meta_twin(), prompt_of("meta"))[0].flops["encoder"]
        assert (step.flops["encoder"] == forward) == ("encoder" in roles)


def test_what_checkpointing_runs_again_is_counted_and_takes_less_memory():
    plain, meta, real = meta_twin(), meta_twin(), tiny_model()
    for model in (meta, real):
        model.gradient_checkpointing_enable()
    once, again = train_step(plain, prompt_of("meta")), train_step(meta, prompt_of("meta"))
    assert again.flops.total() == pytest.approx(counted(real, backward), **FLOPS)
    assert once.flops.total() + again.recomputed_flops.total() == pytest.approx(again.flops.total(), **FLOPS)
    assert again.recomputed_flops["llm_linear"] > 0
    assert again.peak_bytes < once.peak_bytes


@pytest.mark.parametrize("arm", ["crosslmm", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_real_run_has_alive(arm, checkpointing):
    meta, real = meta_twin(**ARMS[arm]), tiny_model(**ARMS[arm])
    batches = [SAMPLE.batch(IMAGE_SIZE, num_samples=4, device=device) for device in ("meta", "cpu")]
    if checkpointing:
        meta.gradient_checkpointing_enable()
        real.gradient_checkpointing_enable()
    expected, measured = train_step(meta, batches[0]), train_step(real, batches[1])
    assert expected.peak_bytes == pytest.approx(measured.peak_bytes, **MEMORY)
    (_, _, sizes), (_, _, seen) = read_prompt(meta, batches[0]), read_prompt(real, batches[1])
    assert sizes["prefill"] == pytest.approx(seen["prefill"], **MEMORY)
    assert (sizes["kv_cache"], sizes["t2v_cache"]) == (seen["kv_cache"], seen["t2v_cache"])


def test_views_of_weights_are_not_counted_as_made():
    model, given = meta_twin(), torch.empty(1, 32, device="meta")
    meter = Meter(model)
    with torch.no_grad(), meter.running():
        model.llm.lm_head(given)
    assert meter.peak_bytes == 261 * 4


def test_caches_are_as_large_as_their_shapes_say():
    model = meta_twin()
    config, tokens = model.llm.config, SAMPLE.text_tokens + SAMPLE.num_frames
    _, _, sizes = read_prompt(model, prompt_of("meta"))
    per_token = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    assert sizes["kv_cache"] == tokens * config.num_hidden_layers * per_token
    assert sizes["t2v_cache"] == SAMPLE.num_frames * 16 * len(model.fused_layers) * per_token


def test_parts_follow_from_shapes():
    model = meta_twin()
    prefill, decode, _ = read_prompt(model, prompt_of("meta"))
    layers, frames, tokens = model.llm.model.layers, SAMPLE.num_frames, SAMPLE.text_tokens + SAMPLE.num_frames
    weights = sum(
        part.weight.numel()
        for name, part in layers.named_modules()
        if isinstance(part, torch.nn.Linear) and ".fusion." not in name
    )
    width, vocabulary = model.llm.config.hidden_size, model.llm.config.vocab_size
    assert prefill.flops["llm_linear"] == 2 * tokens * weights
    assert prefill.flops["llm_attention"] == pytest.approx(4 * tokens**2 * width * len(layers), rel=1e-2)
    assert prefill.flops["head"] == decode.flops["head"] == 2 * width * vocabulary
    source, width_kv = frames * 16, width // 2
    v2v = 4 * source * width * width_kv + 4 * frames * width * width + 4 * frames * source * width
    t2v = 4 * source * width * width_kv + 4 * SAMPLE.text_tokens * width * (width + source)
    assert prefill.flops["v2v"] == v2v * len(model.fused_layers)
    assert prefill.flops["t2v"] == t2v * len(model.fused_layers)
    assert decode.flops["t2v"] == 4 * width * (width + source) * len(model.fused_layers)
    assert set(decode.flops) == {"llm_linear", "llm_attention", "t2v", "head"} < set(PARTS)


def test_mixed_precision_computes_in_half_and_keeps_weights_whole():
    sizes = {
        precision: read_prompt(meta_twin(), prompt_of("meta"), precision)[2] for precision in ("32-true", "bf16-mixed")
    }
    assert sizes["bf16-mixed"]["t2v_cache"] == sizes["32-true"]["t2v_cache"] / 2
    full, mixed = (train_step(meta_twin(), prompt_of("meta"), precision) for precision in sizes)
    assert mixed.flops == full.flops
    assert mixed.moved_bytes["llm_linear"] == pytest.approx(full.moved_bytes["llm_linear"] / 2, rel=0.05)


def test_a_meter_leaves_the_model_and_its_answers_as_they_were():
    model = tiny_model(encoder=tiny_encoder())
    before = generate(3)(model)
    read_prompt(model, prompt_of("cpu"))
    train_step(model, prompt_of("cpu"))
    assert generate(3)(model.eval()) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert Meter(model).flops.total() == 0
