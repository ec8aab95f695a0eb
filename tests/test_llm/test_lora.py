"""Adapters on the LLM: what they adapt, what is trained, how they are kept, and that merging them changes nothing."""

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning_crosslmm.compose import ANY_TARGET, build_model, instantiate, lora_of
from lightning_crosslmm.describe import describe
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.llm import Lora, is_adapter, merged_shapes, plain_name, read_merged
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.optim import OptimSettings
from lightning_crosslmm.weight_files import WeightFiles
from lightning_crosslmm.weights import load_weights
from tests import trials
from tests.arms import BATCH, logits
from tests.ranks import on_ranks
from tests.runs import small_config, write_run
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weights_only"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]
RATES = dict.fromkeys(("encoder", "pooler", "projector", "fusion", "llm"), 1e-2)


def adapted(**settings: Any) -> CrossLMM:
    model = tiny_model()
    Lora(**{"rank": 2, "alpha": 4.0, **settings}).adapt(model.llm)
    return model


def test_a_fresh_adapter_changes_nothing_and_another_does() -> None:
    plain, model = tiny_model(), adapted()
    assert torch.equal(logits(model, BATCH), logits(plain, BATCH))
    torch.nn.init.normal_(model.llm.model.layers[1].mlp.up_proj.lora_B["default"].weight)
    assert not torch.equal(logits(model, BATCH), logits(plain, BATCH))


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"]])
def test_it_adapts_what_it_is_told_and_no_fusion(targets: list[str]) -> None:
    names = {name for name, _ in adapted(targets=targets).named_parameters() if is_adapter(name)}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == set(targets)
    assert len(names) == 2 * 4 * len(targets) and not any("fusion" in name for name in names)


def test_only_adapters_of_the_llm_are_trained_and_fusion_is_trained_whole() -> None:
    model = adapted()
    OptimSettings(RATES).freeze(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, _ in model.named_parameters():
        assert (name in trained) == (model.role_of(name) != "llm" or is_adapter(name)), name
    count = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    assert count == 4 * 2 * sum((32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32))
    row = next(line for line in describe(model, instantiate(small_config().data.sampling, ANY_TARGET)) if "llm" in line)
    assert row.endswith(f" {count:,}")
    with pytest.raises(UserError, match="llm.lora adapts the LLM and optim.lr.llm=null freezes it"):
        OptimSettings({**RATES, "llm": None}).freeze(model)


def test_merged_it_says_the_same(tmp_path: Path) -> None:
    model = write_run(tmp_path, small_config("experiment=lora", "llm.lora.rank=4", "llm.lora.alpha=8"))
    files = WeightFiles(next(tmp_path.rglob("state.ckpt")))
    merged = build_model(small_config(), ANY_TARGET).eval()
    shapes = merged_shapes(files.shapes)
    assert shapes.keys() == merged.state_dict().keys()
    merged.load_state_dict(read_merged(files.read, list(shapes), files.shapes, scale=2.0))
    theirs, ours = logits(merged, _fitting(merged)), logits(model, _fitting(merged))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)  # measured: 3e-6 on logits up to 5
    plain = read_merged(files.read, list(shapes), files.shapes, scale=0.0)
    assert sum(not torch.equal(plain[name], merged.state_dict()[name]) for name in plain) == 4 * 7


def _fitting(model: CrossLMM) -> Any:
    side = model.encoder.image_size
    frames_FCHW = torch.randint(
        0, 256, (len(BATCH.frames_FCHW), 3, side, side), generator=torch.Generator().manual_seed(0)
    )
    return replace(BATCH, frames_FCHW=frames_FCHW.to(torch.uint8))


def test_adapters_may_be_new_and_then_start_from_weights_without(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", small_config())
    model = build_model(small_config("experiment=lora"), ANY_TARGET)
    start = next(tmp_path.rglob("state.ckpt"))
    kept = load_weights(model, start)
    assert all(is_adapter(name) for name in kept["llm"]) and len(kept["llm"]) == 2 * 7 * 4
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    with pytest.raises(UserError, match="missing: 56 of llm"):
        load_weights(model, start, whole=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 must be 1 or more"),
        ({"alpha": 0.0}, "alpha 0.0 above 0"),
        ({"dropout": 1.0}, "dropout 1.0 at least 0 and below 1"),
        ({"targets": ["q_prj"]}, "llm.lora.targets has 'q_prj'; did you mean 'q_proj'?"),
        ({"targets": []}, "llm.lora.targets is empty"),
        ({"rnak": 2}, "llm.lora.rnak: .* takes no 'rnak'; did you mean 'rank'?"),
        ({"rank": "two"}, "llm.lora.rank='two': .* takes int here"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    config = small_config("experiment=lora")
    OmegaConf.update(config, "llm.lora", settings, merge=True, force_add=True)
    with pytest.raises(UserError, match=message):
        lora_of(config)


def test_a_word_in_its_place_is_refused() -> None:
    config = small_config()
    config.llm.lora = "yes"
    with pytest.raises(UserError, match="llm.lora: is yes; write llm.lora={rank: 16}, or null for none"):
        build_model(config, ANY_TARGET)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ImportError("No module named 'peft'")
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"needs peft: pip install 'lightning-crosslmm\[lora\]'"):
        adapted()


SHAPE = {"lora": {"rank": 2, "alpha": 4.0}}
LORA: dict[str, Any] = {**SHAPE, "optim": trials.Momentum, "checkpointing": True}


def two_ranks(folder: Path) -> dict[str, Any]:
    return {
        "sharded": trials.train("fsdp", 2, **LORA),
        "uninterrupted": trials.train("fsdp", 2, save=(folder / "slices", 2), **SHAPE),
        "resumed": trials.train("fsdp", 2, resume=folder / "slices", **SHAPE),
    }


def test_two_ranks_train_adapters_as_one_process_does(tmp_path: Path) -> None:
    alone, ranks = trials.train("one", 1, **LORA), on_ranks(2, two_ranks, tmp_path, folder=tmp_path)
    moved = [name for name in alone["end"] if not torch.equal(alone["start"][name], alone["end"][name])]
    assert any(is_adapter(name) for name in moved) and any(".fusion." in name for name in moved)
    assert not any(name.startswith("llm.") and ".fusion." not in name and not is_adapter(name) for name in moved)
    for rank in ranks:
        for name, tensor in alone["end"].items():  # a step is at most 0.005 long; measured: 5e-8
            torch.testing.assert_close(rank["sharded"]["end"][name], tensor, rtol=0, atol=1e-6)
        layers = [f"llm.model.layers.{number}" for number in range(4)]
        assert set(layers) <= set(rank["sharded"]["units"]) and not any(
            "lora" in unit for unit in rank["sharded"]["units"]
        )
        ends = rank["uninterrupted"]["end"], rank["resumed"]["end"]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
