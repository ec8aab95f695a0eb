"""Weights read back as they were written, in every format, and nothing run that lies in a file."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.weight_files import WeightFiles

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def weights() -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {
        "encoder.a": torch.randn(4, 3, generator=noise),
        "llm.b": torch.randn(5, generator=noise).bfloat16(),
        "fusion.gate": torch.tensor(0.5),
    }


def write_sharded(folder: Path, weights: dict[str, Tensor]) -> Path:
    state = {f"model.{name}": tensor for name, tensor in weights.items()} | {"val_accuracy.count": torch.ones(2)}
    dcp.save({"state_dict": state, "optimizer_0": {"lr": 0.1}}, checkpoint_id=folder, no_dist=True)
    return folder


def write(path: Path, how: str, weights: dict[str, Tensor]) -> Path:
    if how == "whole":
        state = {f"model.{name}": tensor for name, tensor in weights.items()} | {"val_accuracy.count": torch.ones(2)}
        torch.save({"state_dict": state, "epoch": 3}, path / "state.ckpt")
        return path / "state.ckpt"
    if how == "sharded":
        return write_sharded(path / "sharded", weights)
    names = list(weights)
    if how == "safetensors":
        save_file(weights, path / "model.safetensors")
        return path / "model.safetensors"
    files = {"one.safetensors": names[:1], "two.safetensors": names[1:]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path / "model.safetensors.index.json"


@pytest.mark.parametrize("how", ["whole", "sharded", "safetensors", "index"])
def test_every_format_gives_the_same(tmp_path: Path, weights: dict[str, Tensor], how: str) -> None:
    files = WeightFiles(write(tmp_path, how, weights))
    assert dict(files.shapes) == {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    read = files.read(["llm.b", "fusion.gate"])
    assert read.keys() == {"llm.b", "fusion.gate"}
    assert all(
        torch.equal(tensor, weights[name]) and tensor.dtype == weights[name].dtype for name, tensor in read.items()
    )


def test_groups_keep_the_order_and_the_limit(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    files = WeightFiles(write(tmp_path, "safetensors", weights))
    order = list(files.shapes)
    for max_bytes, expected in ((1, 3), (14, 2), (1000, 1)):  # of 48, 10 and 4 bytes
        groups = files.groups(max_bytes)
        assert [name for group in groups for name in group] == order and len(groups) == expected


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("payload", [Evil(), [os.path.join], {"a": 1}], ids=["call", "function", "no list"])
def test_the_list_of_a_sharded_checkpoint_runs_nothing(
    tmp_path: Path, weights: dict[str, Tensor], payload: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_sharded(tmp_path / "sharded", weights)
    (folder / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match="is no checkpoint of a run: .metadata (names .*, which it may not|holds dict)"):
        WeightFiles(folder)
    assert not (tmp_path / "ran").exists()


def test_an_index_does_not_lead_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="names the file '../secret.safetensors', which is not beside it"):
        WeightFiles(path)


@pytest.mark.parametrize("how", ["sharded", "index"])
def test_a_file_that_is_gone_or_cut_is_told(tmp_path: Path, weights: dict[str, Tensor], how: str) -> None:
    path = write(tmp_path, how, weights)
    files = WeightFiles(path)
    for data in (*tmp_path.rglob("*.distcp"), *tmp_path.rglob("two.safetensors")):
        data.write_bytes(data.read_bytes()[:8])
    with pytest.raises(UserError, match=f"'{path}' is damaged: "):
        files.read(files.shapes)
