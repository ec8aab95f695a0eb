"""An exported folder says what the run's checkpoint says, and can be asked and trained on."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from lightning_crosslmm.answer import Answerer
from lightning_crosslmm.checkpoint_folder import begin_checkpoint, show_checkpoint
from lightning_crosslmm.cli import main
from lightning_crosslmm.compose import build_model, compose_overrides
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.export import export_run
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.run_folder import find_checkpoint
from lightning_crosslmm.weight_files import WeightFiles
from lightning_crosslmm.weights import load_weights

CONF = Path(__file__).resolve().parent.parent / "conf"


@pytest.fixture(scope="module")
def models() -> dict[int, CrossLMM]:
    config = compose_overrides(CONF, [])
    return {step: (torch.manual_seed(step), build_model(config, ("",)))[1] for step in (1, 2)}


@pytest.fixture(scope="module")
def run_dir(models: dict[int, CrossLMM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, of which the first is the best."""
    folder = tmp_path_factory.mktemp("run")
    config = compose_overrides(CONF, [f"run_dir={folder}"])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    (folder / "provenance.json").write_text('{"commit": "abc", "seed": 3}')
    for step, model in models.items():
        part = begin_checkpoint(folder, step)
        part.mkdir(parents=True)
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state}, part / "state.ckpt")
        about = {"epoch": 0, "monitor": "val/accuracy", "mode": "max", "world_size": 1, "versions": {}}
        show_checkpoint(part, step=step, metric=1 / step, **about)
    return folder


@pytest.mark.parametrize(("checkpoint", "step"), [(None, 1), ("best", 1), ("last", 2), ("{path}", 2)])
def test_it_is_what_was_trained(
    run_dir: Path, models: dict[int, CrossLMM], tmp_path: Path, checkpoint: str | None, step: int
) -> None:
    chosen = checkpoint and checkpoint.format(path=run_dir / "checkpoints" / "step-00000002")
    export_run(run_dir, tmp_path / "out", chosen)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "config.yaml", "model.safetensors", "provenance.json",
    }  # fmt: skip
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = models[step].state_dict()
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert told["commit"] == "abc" and told["exported"]["step"] == step and told["exported"]["metric"] == 1 / step


def test_large_ones_are_cut_into_files(run_dir: Path, models: dict[int, CrossLMM], tmp_path: Path) -> None:
    export_run(run_dir, tmp_path / "out", file_bytes=2**20)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("model-*-of-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 2**20 + 2**14
    start = find_checkpoint(tmp_path / "out", "init_from")
    assert start.name == "model.safetensors.index.json"
    index = json.loads(start.read_text())
    assert index["weight_map"].keys() == models[1].state_dict().keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in models[1].state_dict().values())
    load_weights(models[2], start, whole=True)
    assert all(torch.equal(models[2].state_dict()[name], tensor) for name, tensor in models[1].state_dict().items())


def test_it_can_be_asked(run_dir: Path, models: dict[int, CrossLMM], tmp_path: Path) -> None:
    export_run(run_dir, tmp_path / "out")
    loaded = Answerer.from_run(tmp_path / "out").model.state_dict()
    assert all(torch.equal(loaded[name].cpu(), tensor) for name, tensor in models[1].state_dict().items())


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()  # one that is empty is as good as none
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--checkpoint", "last"]) == 0
    assert "step-00000002/state.ckpt as " in capsys.readouterr().out
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: is there and not empty; give another folder\n"


def test_what_cannot_be_exported_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.yaml; give a folder that train.py wrote"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--checkpoint=nowhere: there is no such file or folder"):
        export_run(run_dir, tmp_path / "out", "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out: cannot be written: "):
        export_run(run_dir, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_more_than_a_files_worth_is_read_at_a_time(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    read = WeightFiles.read
    monkeypatch.setattr(WeightFiles, "read", lambda self, names: (counts.append(len(names)), read(self, names))[1])
    export_run(run_dir, tmp_path / "out", file_bytes=2**20)
    assert len(counts) == len(list((tmp_path / "out").glob("*.safetensors"))) > 2
