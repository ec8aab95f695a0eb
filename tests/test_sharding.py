"""Sharded training is training: the same numbers as one process and as DDP, whatever each rank's batch holds."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.sharding import shard
from tests import trials
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weights_only"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """What one process without sharding makes of the same global batches."""
    settings = {"plain": trials.PLAIN, "checkpointed": trials.CHECKPOINTED, "ragged": trials.RAGGED}
    return {name: trials.train("one", 1, **each) for name, each in {**settings, "mixed": trials.MIXED}.items()}


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What two ranks do."""
    trials.train("one", 1, save=(folder / "whole.ckpt", 2))
    return on_ranks(2, trials.on_two, folder, folder / "whole.ckpt", folder=folder)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two models, buffers included."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one if one[name].numel())


def test_every_rank_starts_with_the_weights_of_an_unsharded_run(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for rank in two:
        for name in ("plain", "checkpointed", "ragged"):
            assert furthest(one[name]["start"], rank[name]["start"]) == 0
    assert torch.equal(two[0]["plain"]["random"], two[1]["plain"]["random"])


def test_buffers_that_no_checkpoint_holds_are_filled_too(two: list[dict[str, Any]]) -> None:
    start = two[1]["plain"]["start"]
    assert start["encoder.std_C11"].flatten().tolist() == [0.5, 0.5, 0.5]
    assert start["llm.model.rotary_emb.inv_freq"][0] == 1


@pytest.mark.parametrize("name", ["plain", "checkpointed", "ragged"])
def test_two_ranks_train_as_one_process_does(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    alone, ranks = one[name], [rank[name] for rank in two]
    torch.testing.assert_close(sum(rank["losses"] for rank in ranks), alone["losses"], rtol=1e-5, atol=1e-5)
    # gradients are clipped to a norm of 0.5, so a step is at most 0.005 long; measured: 6e-8
    assert furthest(alone["start"], alone["end"]) > 1e-3
    for rank in ranks:
        assert furthest(alone["end"], rank["end"]) < 1e-6


def test_ddp_does_the_same(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert furthest(one["plain"]["end"], two[1]["ddp"]["end"]) < 1e-6
    assert furthest(two[0]["plain"]["end"], two[0]["ddp"]["end"]) < 1e-6


def test_each_rank_keeps_half_of_the_weights(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["plain"]["kept"] < 0.51 * rank["ddp"]["kept"]
        assert rank["checkpointed"]["kept"] < 0.51 * rank["ddp"]["kept"]


def test_layers_are_gathered_one_by_one(two: list[dict[str, Any]]) -> None:
    blocks = [f"encoder.tower.blocks.{number}" for number in range(3)]
    layers = [f"llm.model.layers.{number}" for number in range(4)]
    assert set(two[0]["plain"]["units"]) == {"", *blocks, *layers, "llm.model.embed_tokens", "llm.lm_head"}
    assert set(two[0]["checkpointed"]["units"]) == {"", *blocks, *layers}  # tied: one weight cannot be in two units


def test_mixed_precision_keeps_single_precision_weights(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    sums = two[0]["mixed"]["losses"] + two[1]["mixed"]["losses"]
    torch.testing.assert_close(sums, one["mixed"]["losses"], rtol=2e-2, atol=0)
    assert {tensor.dtype for tensor in two[0]["mixed"]["end"].values()} == {torch.float32}
    for name, tensor in two[1]["mixed"]["end"].items():  # frozen ones stay, to the bit
        is_frozen = name.startswith(("encoder.", "llm.")) and ".fusion." not in name
        assert torch.equal(tensor, two[1]["mixed"]["start"][name]) == (is_frozen or "_C11" in name), name


def test_true_bfloat16_is_of_weights_and_not_of_buffers(two: list[dict[str, Any]]) -> None:
    kept = {name: tensor.dtype for name, tensor in two[0]["stored"]["end"].items()}
    buffers = {name for name, dtype in kept.items() if dtype == torch.float32}
    assert {"encoder.mean_C11", "encoder.std_C11", "llm.model.rotary_emb.inv_freq"} <= buffers
    assert all(name.endswith(("_C11", "inv_freq")) for name in buffers)
    assert two[0]["stored"]["losses"].isfinite().all()


def test_ranks_answer_and_look_however_much_each_is_asked(two: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(two):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "RANK", str(number))
            alone = trials.answer("one", 1)
        assert rank["answers"]["said"] == alone["said"] and rank["answers"]["ids"] == alone["ids"]
        torch.testing.assert_close(rank["answers"]["logits"], alone["logits"], rtol=0, atol=1e-5)
        assert [look[0] for look in rank["answers"]["looks"]] == [look[0] for look in alone["looks"]]
        for (_, *maps), (_, *expected) in zip(rank["answers"]["looks"], alone["looks"], strict=True):
            for found, right in zip(maps, expected, strict=True):
                assert (found is None and right is None) or torch.allclose(found, right, atol=1e-6)
    assert len(two[0]["answers"]["ids"][0]) == 0 and len(two[1]["answers"]["ids"][0]) == 9


def test_a_resumed_run_is_the_uninterrupted_one(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert furthest(rank["uninterrupted"]["end"], rank["resumed"]["end"]) == 0
        assert furthest(rank["uninterrupted"]["end"], rank["from gathered"]["end"]) == 0
        assert len(rank["resumed"]["losses"]) == 2


@pytest.mark.parametrize("world", [1, 4])
def test_slices_of_two_ranks_resume_on_others(world: int, folder: Path, two: list[dict[str, Any]]) -> None:
    expected = two[0]["uninterrupted"]["end"]
    for rank in on_ranks(world, trials.resumed, world, folder / "slices", folder=folder):
        assert average(expected, rank["end"]) < 1e-6  # AdamW; one wrong moment moves weights by 1e-2


def test_whole_checkpoints_go_in_and_out(folder: Path, two: list[dict[str, Any]]) -> None:
    unsharded = trials.train("one", 1)["end"]
    assert average(unsharded, two[0]["from whole"]["end"]) < 1e-6
    resumed = trials.train("one", 1, resume=folder / "gathered.ckpt")["end"]
    assert average(two[0]["uninterrupted"]["end"], resumed) < 1e-6


def average(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The mean difference between two models."""
    return sum(float((one[name] - other[name]).abs().mean()) for name in one if one[name].numel()) / len(one)


def test_models_that_differ_are_refused_on_every_rank(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "process 1 built another model than process 0" in rank["unequal"]


def test_precision_that_sharding_does_not_know() -> None:
    model = trials.module("one").model
    with pytest.raises(UserError, match=r"trainer.precision is 16-true; .* 32-true, bf16-mixed, bf16-true"):
        shard(model, None, torch.device("cpu"), "16-true")
