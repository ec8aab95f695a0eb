"""Will it fit: refused before anything is built, with numbers and what to change."""

import re

import pytest

import train
from lightning_crosslmm.compose import ANY_TARGET, compose_overrides
from lightning_crosslmm.cost import fit, refuse_what_cannot_fit
from lightning_crosslmm.errors import UserError

GPU = ("trainer=gpu", "trainer.precision=32-true")
STAYS = 3_925_264 + 3 * 3_541_008  # weights; gradients and two moments of what the default trains


def refuse(*words, memory):
    refuse_what_cannot_fit(compose_overrides(train.CONF_DIR, words), ANY_TARGET, memory)


def refusal(*words, memory):
    with pytest.raises(UserError) as caught:
        refuse(*words, memory=memory)
    return str(caught.value)


def test_a_run_that_fits_goes_on():
    refuse(*GPU, memory=10**9)
    refuse(memory=STAYS)


def test_the_cpu_counts_only_what_stays():
    message = refusal(memory=STAYS - 1)
    assert "weights 0.0 GB, optimizer 0.0 GB, gradients 0.0 GB), the machine has 0.0 GB" in message
    assert "activations" not in message
    assert message.endswith("check_memory=false starts it all the same")


def test_a_gpu_counts_activations_and_three_changes_are_named_the_cheapest_first():
    message = refusal(*GPU, memory=STAYS)
    assert re.search(r"gradient_checkpointing=true .*trainer.accumulate_grad_batches=8 .*trainer=fsdp", message)
    fewer = compose_overrides(train.CONF_DIR, [*GPU, "trainer.accumulate_grad_batches=8"])
    needed = fit._needs(fewer, ANY_TARGET, fit._plan(fewer, on_gpu=True), on_gpu=True)
    assert needed["activations"] > 0
    refuse(*GPU, "trainer.accumulate_grad_batches=8", memory=sum(needed.values()))
    refusal(*GPU, memory=sum(needed.values()))


def test_what_is_shared_out_counts_once_for_all():
    sharded = ("trainer=fsdp", "trainer.devices=4", "trainer.precision=32-true", "data.global_batch_size=4")
    refuse(*sharded, memory=STAYS)
    refusal("trainer=ddp", "trainer.devices=4", *sharded[2:], memory=STAYS)


def test_train_py_refuses_before_it_builds(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "_main_memory", lambda: 1)
    monkeypatch.setattr(train, "build_model", lambda *_: pytest.fail("built"))
    config = compose_overrides(train.CONF_DIR, [f"run_dir={tmp_path}"])
    with pytest.raises(UserError, match="the machine has 0.0 GB"):
        train.run(config)
