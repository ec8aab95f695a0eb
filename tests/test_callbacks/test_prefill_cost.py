import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.prefill_cost import LiveStorages, PrefillCost, first_answers, prefill_cost
from lightning_crosslmm.batch import VideoBatch, prompts_for
from lightning_crosslmm.pooler import AveragePooler
from tests import trials
from tests.ranks import on_ranks
from tests.tiny import tiny_batch, tiny_model

SAMPLES = ([3, "what?", "=cat", "more?", "=dog"], ["no answer"], ["see", 1, 2, "?", "=elk"])


class Norm(AveragePooler):
    """A pooler with state that training mode would change, and that draws random numbers in any mode."""

    def __init__(self) -> None:
        super().__init__(1)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, tokens: Any) -> Any:
        torch.randn(())
        return super().forward(tokens.with_features(self.norm(tokens.features_SD)))


def loader(*batches: VideoBatch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None, generator=torch.Generator())


def state(module: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[Any]]:
    """Weights and buffers, modes, and the next random number of each generator; draws none."""
    numbers = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return {name: t.clone() for name, t in module.state_dict().items()}, [m.training for m in module.modules()], numbers


def prompts(*samples: Sequence[Any]) -> VideoBatch:
    batch = tiny_batch(*samples)
    return prompts_for(batch, first_answers(batch, 8))


def test_the_first_answer_of_each_sample_is_asked_for() -> None:
    batch = tiny_batch(*SAMPLES)
    assert first_answers(batch, 8) == [0, 2] and first_answers(batch, 1) == [0]
    assert first_answers(tiny_batch(["none"]), 8) == []


def test_what_is_measured() -> None:
    asked = prompts(*SAMPLES)
    found = prefill_cost(tiny_model(), asked, torch.device("cpu"))
    # frames: 3 and 1 + 2, a token each; text without marks: "what?" and "see", "?"
    assert found.pop("prefill/samples") == 2
    assert found.pop("prefill/pooled_per_frame") == 1
    assert found.pop("prefill/llm_tokens") == ((3 + 5) + (3 + 3 + 1)) / 2
    weights = sum(p.numel() * p.element_size() for p in tiny_model().parameters())
    assert 10_000 < found.pop("prefill/peak_bytes") < weights
    assert 0 < found.pop("prefill/time_s") < 1 and not found


def test_more_patches_need_more_memory_and_a_prompt_without_frames_has_no_pooled_tokens() -> None:
    one, many = (
        prefill_cost(tiny_model(), prompts([frames, "?", "=a"]), torch.device("cpu"))["prefill/peak_bytes"]
        for frames in (1, 8)
    )
    assert many > 3 * one
    assert "prefill/pooled_per_frame" not in prefill_cost(tiny_model(), prompts(["?", "=a"]), torch.device("cpu"))


def test_the_model_and_all_random_numbers_stay_as_they_were() -> None:
    model = tiny_model(pooler=Norm())
    model.train()
    model.encoder.eval()  # as a frozen part may be
    before = state(model)
    prefill_cost(model, prompts(*SAMPLES), torch.device("cpu"))
    weights, modes, numbers = state(model)
    assert all(torch.equal(weights[name], before[0][name]) for name in before[0]) and weights.keys() == before[0].keys()
    assert (modes, numbers) == before[1:]


def fit(*callbacks: lightning.Callback, batches: Sequence[VideoBatch] = ()) -> tuple[Any, Any]:
    module = trials.module("one")
    run = trials.trainer("one", 1, callbacks=list(callbacks), max_steps=2, limit_val_batches=2, log_every_n_steps=1)
    own = trials.batches(0, 1, 1, 2)
    run.fit(module, trials.Stream(own, run), loader(*(batches or [tiny_batch(*SAMPLES), tiny_batch(["?", "=b"])])))
    return state(module), run


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_training_is_the_same_with_it() -> None:
    measured = PrefillCost(8)
    with_it, _ = fit(measured)
    without, _ = fit()
    assert all(torch.equal(with_it[0][name], without[0][name]) for name in without[0])
    assert with_it[1:] == without[1:]
    assert measured.measured["prefill/llm_tokens"] == 7.5  # of the first batch


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_batch_without_answers_is_not_measured() -> None:
    nothing = PrefillCost(8)
    fit(nothing, batches=[tiny_batch([1, "no answer"])])
    assert nothing.measured == {}


@pytest.mark.parametrize("mode", ["validate", "test"])
def test_validate_and_test_measure_too(mode: str) -> None:
    measured = PrefillCost(1)
    run = trials.trainer("one", 1, callbacks=[measured])
    getattr(run, mode)(trials.module("one"), loader(tiny_batch(*SAMPLES), tiny_batch(["?", "=b"])), verbose=False)
    assert measured.measured["prefill/samples"] == 1 and measured.measured["prefill/llm_tokens"] == 8


def ranks_measure() -> dict[str, dict[str, float]]:
    """The second rank has nothing to ask, and computes along where weights are sharded."""
    own = tiny_batch(["said and done"]) if trials.rank() else tiny_batch(*SAMPLES)
    found = {}
    for kind in ("fsdp", "ddp"):
        measured = PrefillCost(8)
        run = trials.trainer(kind, 2, callbacks=[measured], precision="bf16-mixed")
        run.validate(trials.module(kind), loader(own), verbose=False)
        found[kind] = measured.measured
    return found


def test_ranks_measure_together(tmp_path: Path) -> None:
    first, second = on_ranks(2, ranks_measure, folder=tmp_path)
    for kind in ("fsdp", "ddp"):
        assert first[kind]["prefill/llm_tokens"] == 7.5 and first[kind]["prefill/peak_bytes"] > 0
    assert (second["fsdp"]["prefill/llm_tokens"], second["ddp"]) == (1, {})


def test_live_storages_by_hand() -> None:
    given = torch.zeros(1000)
    with LiveStorages() as live:
        view, _ = given[:500], given.add_(1)
        assert live.peak_bytes == 0  # nothing of its own
        one = view + 1
        two = one.view(5, 100)[:, 0]
        assert live.peak_bytes == 2000
        del one, two
        three = given.double()
        assert live.peak_bytes == 8000
        four = three + 1
    assert live.peak_bytes == 16000 and len(four) == 1000
