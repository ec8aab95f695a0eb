"""Every pooler inside a small CrossLMM: it trains, answers, saves and loads under every arm around it."""

import pytest
import torch

from lightning_crosslmm.pooler import Stage
from tests.arms import generated
from tests.poolers import CASES, every_case
from tests.tiny import tiny_batch, tiny_encoder, tiny_model

BATCH = tiny_batch(["look", 3, "and", 1, "what?", "=cat", "and?", 2, "=dog"], ["nothing to see", "=ok"], [2, "?", "=z"])
BLANK = tiny_batch(["no picture?", "=no"])
PROMPTS = tiny_batch(["look", 3, "and", 1, "what?"], [2, "?"])
AROUND = {
    "crosslmm": {},
    "crosslmm by frame": {"scope": "frame"},
    "encoder's keys": {"key_source": "encoder", "scope": "frame", "frame_time": "sinusoidal"},
    "none": {"v2v": False, "t2v": False},
}
# the widths that connect() is given differ, so a pooler is made anew for each model
make = {name: case.make for name, case in CASES.items()}


TOWERS = {"class_token": {"class_token": True}, "probe": {"global_pool": "map"}}


def fresh(name, seed=0, **settings):
    torch.manual_seed(seed)
    pooler = make[name]()
    encoder = tiny_encoder(config=TOWERS.get(pooler.asks.saliency, {}))
    return tiny_model(pooler=pooler, encoder=encoder, seed=seed, **settings)


def model_with(name, **settings):
    model = fresh(name, **settings)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        for parameter in model.pooler.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model


def loss(model, batch):
    output = model(batch)
    return torch.nn.functional.cross_entropy(output.logits_YW.float(), output.target_Y)


def gradients(model, batch):
    model.train().zero_grad()
    loss(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("around", list(AROUND))
@every_case
def test_it_trains_and_answers(name, around):
    model = model_with(name, **AROUND[around])
    for of, grad in gradients(model, BATCH).items():
        assert grad is not None and grad.isfinite().all(), of
    pooled = [grad for of, grad in gradients(model, BATCH).items() if model.role_of(of) == "pooler"]
    assert all(grad.any() for grad in pooled)
    rows, logits_RTW = generated(model.eval(), PROMPTS, count=3)
    assert [len(row) for row in rows] == [3, 3] and logits_RTW.isfinite().all()


@every_case
def test_a_batch_without_pictures_reaches_every_parameter(name):
    for of, grad in gradients(model_with(name), BLANK).items():
        assert grad is not None and grad.isfinite().all(), of


@every_case
def test_checkpointing_changes_no_gradient(name):
    plain, checkpointed = model_with(name), model_with(name)
    checkpointed.gradient_checkpointing_enable()
    expected = gradients(plain, BATCH)
    for of, grad in gradients(checkpointed, BATCH).items():
        torch.testing.assert_close(grad, expected[of], rtol=1e-4, atol=1e-5)


@every_case
def test_mixed_precision(name):
    model = model_with(name)
    expected = loss(model, BATCH).item()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(model.train(), BATCH)
    half.backward()
    # 8 bits of mantissa through 3 + 4 layers of a model of random weights; a threshold may fall on the other side
    assert half.item() == pytest.approx(expected, rel=0.1)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_case
def test_weights_are_all_it_needs(name):
    model, other = model_with(name), fresh(name, seed=5)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(BATCH).logits_YW, other(BATCH).logits_YW)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.make().stage == Stage.AS_PROJECTOR])
def test_in_the_projectors_place_nothing_else_projects_what_the_llm_reads(name):
    assert model_with(name, v2v=False, t2v=False).projector is None
