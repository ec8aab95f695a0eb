from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.objective import answer_loss
from lightning_crosslmm.pooler import AveragePooler
from tests.arms import ARMS, BATCH, arms, logits
from tests.tiny import tiny_batch, tiny_model


@arms
@pytest.mark.parametrize("after_projector", [False, True])
def test_checkpointing_gives_the_same_gradients(arm, after_projector):
    def gradients(checkpointed):
        pooler = AveragePooler(1, stage="after_projector" if after_projector else "before_projector")
        model = tiny_model(pooler=pooler, **ARMS[arm]).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        output = model(BATCH)
        answer_loss(output.logits_YW, output.target_Y).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(
            recomputed[name], gradient, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@arms
@pytest.mark.parametrize(
    "batch",
    [BATCH, tiny_batch(["a?", "=b"], ["c", "=d"]), tiny_batch(["a?", "=b", 2]), tiny_batch([2, "no answer"])],
    ids=["mixed", "no visuals", "text first", "no answer"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_parameter_gets_a_gradient(arm, batch, checkpointed):
    model = tiny_model(**ARMS[arm]).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    output = model(batch)
    answer_loss(output.logits_YW, output.target_Y).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@arms
def test_a_blank_frame_changes_neither_loss_nor_gradients(arm):
    plain, model = tiny_batch(["a?", "=b"]), tiny_model(**ARMS[arm])
    expected = logits(model.eval(), plain)
    assert torch.equal(logits(model.train(), plain), expected)
    output = model(plain)
    answer_loss(output.logits_YW, output.target_Y).backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.any()) == (model.role_of(name) == "llm"), name


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 0]], ids=["rows", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_precision(rows, attention):
    model = tiny_model(attention=attention, frame_time="sinusoidal").train()
    batch = replace(BATCH, row_of_sample=torch.tensor(rows))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
        loss = answer_loss(output.logits_YW, output.target_Y)
    loss.backward()
    exact = answer_loss(model(batch).logits_YW, output.target_Y)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
