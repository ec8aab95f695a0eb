import math

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import ROLES
from lightning_crosslmm.optim import OptimSettings
from tests.tiny import tiny_model

RATES = {"encoder": None, "pooler": 1e-3, "projector": 2e-3, "fusion": 3e-3, "llm": 4e-3}


def settings(**changes):
    return OptimSettings(**{"lr": RATES, "weight_decay": 0.1} | changes)


@pytest.fixture(scope="module")
def model():
    return tiny_model(frame_time="sinusoidal")


@pytest.mark.parametrize("frozen", ROLES)
def test_null_freezes_a_role_and_a_rate_frees_it(model, frozen):
    settings(lr=dict.fromkeys(ROLES, 1e-3) | {frozen: None}).freeze(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (model.role_of(name) != frozen), name


def groups_of(model, **changes):
    chosen = settings(**changes)
    chosen.freeze(model)
    return {group["name"]: group for group in chosen.optimizer(model).param_groups}


def test_each_role_has_its_rate_and_vectors_do_not_decay(model):
    groups = groups_of(model)
    assert set(groups) == {"projector", "projector/no_decay", "fusion", "fusion/no_decay", "llm", "llm/no_decay"}
    for name, group in groups.items():
        assert group["lr"] == RATES[name.split("/")[0]]
        assert group["weight_decay"] == (0.0 if "/" in name else 0.1)


def test_every_trained_parameter_is_in_one_group_and_no_other_is(model):
    groups = groups_of(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group for group, content in groups.items() for parameter in content["params"]}
    assert sum(len(content["params"]) for content in groups.values()) == len(found)
    assert set(found) == {name for name in names.values() if model.role_of(name) != "encoder"}
    assert found["llm.model.embed_tokens.weight"] == "llm/no_decay"
    assert found["llm.model.layers.0.fusion.v2v.gate.raw"] == "fusion/no_decay"
    assert found["llm.model.layers.0.fusion.v2v.q_proj.weight"] == "fusion"
    assert found["frame_time.out.weight"] == "fusion"
    assert found["llm.model.layers.0.input_layernorm.weight"] == "llm/no_decay"
    assert found["projector.1.bias"] == "projector/no_decay"


def test_betas_reach_the_optimizer(model):
    assert {group["betas"] for group in groups_of(model, betas=[0.8, 0.9]).values()} == {(0.8, 0.9)}


def test_the_schedule_by_hand():
    chosen = settings(warmup_steps=4, constant_share=0.5, end_factor=0.2)
    factors = [chosen.factor(step, 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:13] == [1.0] * 9  # half of the 16 steps after warm-up, and the first of the decay
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert factors[12:] == pytest.approx(cosine)
    assert chosen.factor(1000, 20) == pytest.approx(0.2)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_a_run_shorter_than_its_warm_up(total_steps):
    assert settings(warmup_steps=3).factor(total_steps - 1, total_steps) == total_steps / 3


def test_constant_to_the_end():
    assert [settings(constant_share=1.0).factor(step, 5) for step in range(5)] == [1.0] * 5


def test_the_scheduler_scales_every_group(model):
    chosen = settings(warmup_steps=2)
    chosen.freeze(model)
    optimizer = chosen.optimizer(model)
    scheduler = chosen.scheduler(optimizer, 6)
    seen = []
    for _ in range(6):
        seen.append([group["lr"] / RATES[group["name"].split("/")[0]] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    for step, ratios in enumerate(seen):
        assert ratios == pytest.approx([chosen.factor(step, 6)] * 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": RATES | {"fushion": 1e-3}}, "optim.lr has no role 'fushion'; .* did you mean 'fusion'"),
        ({"lr": {"llm": 1e-3}}, "optim.lr.encoder is missing; give a learning rate, or null to freeze"),
        ({"lr": dict.fromkeys(ROLES)}, "optim.lr freezes every role"),
        ({"warmup_steps": -1}, "optim.warmup_steps -1 must be 0 or more"),
        ({"constant_share": 1.5}, "optim.constant_share 1.5"),
        ({"end_factor": -0.1}, "optim.end_factor -0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_a_role_without_parameters_makes_no_group():
    plain = tiny_model(v2v=False, t2v=False)
    assert {name.split("/")[0] for name in groups_of(plain)} == {"projector", "llm"}
    assert torch.optim.AdamW is type(settings().optimizer(plain))
