"""Every arm of every group composes, names what exists, and builds; every command in a header is one that works."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import train
from data.module import VideoDataModule
from lightning_crosslmm.compose import ANY_TARGET, build_model, check_command_line, compose_overrides, instantiate
from lightning_crosslmm.decoding import Decoding
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.optim import OptimSettings
from lightning_crosslmm.targets import check_node
from tests.probes import forward

FILES = sorted(train.CONF_DIR.rglob("*.yaml"))
ARMS = [f"{file.parent.name}={file.stem}" for file in FILES if file.parent != train.CONF_DIR]
SIZES, STAGES = ("crosslmm_2b", "crosslmm_7b"), ("align", "finetune")
every_arm = pytest.mark.parametrize("arm", ARMS)


def build(config: DictConfig) -> CrossLMM:
    """Build at full size: on the meta device nothing is allocated, and no weights are looked for."""
    with torch.device("meta"):
        return build_model(config, ANY_TARGET)


@every_arm
def test_it_composes_with_nothing_missing_and_names_what_exists(arm: str) -> None:
    config = compose_overrides(train.CONF_DIR, [arm])
    assert not OmegaConf.missing_keys(config)
    pending = list(OmegaConf.to_container(config, resolve=True).items())
    checked = []
    while pending:
        path, node = pending.pop()
        if isinstance(node, dict):
            pending += [(f"{path}.{key}", child) for key, child in node.items()]
            if "_target_" in node:
                check_node(node, path, ANY_TARGET, {})
                checked.append(path)
    parts = {
        "encoder",
        "pooler",
        "projector",
        "fusion",
        "llm.model",
        "decoding",
        "data",
        "data.sampling",
        "optim",
        "trainer",
    }
    assert parts <= set(checked)


@every_arm
def test_it_builds(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose_overrides(train.CONF_DIR, [arm, "run_dir=run"])
    group = arm.partition("=")[0]
    if group in ("data", "callbacks", "logger", "decoding", "trainer"):
        if arm in ("trainer=gpu", "trainer=ddp", "trainer=fsdp"):
            config.trainer.update(accelerator="cpu", devices=1)  # the rest of it holds on the CPU, too
        built = instantiate(config[group], ANY_TARGET)
        kind = {"data": VideoDataModule, "decoding": Decoding}.get(group)
        assert isinstance(built, kind) if kind else built
    else:
        loads = config.encoder.get("weights") or config.encoder.get("pretrained") or config.llm.model.weights
        assert isinstance(build(config), CrossLMM)
        loads = loads or config.llm.tokenizer is None  # they come with init_from
        assert loads or forward(config)
        assert isinstance(instantiate(config.optim, ANY_TARGET), OptimSettings)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_size_and_a_stage_go_together(size: str, stage: str) -> None:
    config = compose_overrides(train.CONF_DIR, [f"experiment=[{size},{stage}]"])
    alone = [compose_overrides(train.CONF_DIR, [f"experiment={name}"]) for name in (size, stage)]
    assert [config[part] for part in ("encoder", "pooler", "llm")] == [
        alone[0][part] for part in ("encoder", "pooler", "llm")
    ]
    assert config.optim == alone[1].optim and config.data.global_batch_size == alone[1].data.global_batch_size
    assert (config.fusion.v2v, config.fusion.t2v) == {"align": (True, False), "finetune": (True, True)}[stage]
    assert (config.fusion.interval, config.fusion.gate_init, config.fusion.frame_time) == (4, 0.0, "none")
    assert config.gradient_checkpointing and config.data.sampling.num_frames == 32


def commands() -> list[str]:
    """Every ``python train.py ...`` in a comment of a YAML file, without the words that say what it is for."""
    found = [line for file in FILES for line in file.read_text().splitlines() if re.match(r"#\s+python train.py", line)]
    return [re.split(r"\s{2,}", line.partition("train.py")[2].strip())[0] for line in found]


@pytest.mark.parametrize("command", commands())
def test_the_command_in_a_header_works(command: str) -> None:
    for config in check_command_line(train.CONF_DIR, shlex.split(command)):
        assert isinstance(build(config), CrossLMM)
        if "data.train=SHARDS" in command:
            assert config.data.train == "SHARDS"


def test_every_experiment_says_its_command() -> None:
    for file in FILES:
        if file.parent.name == "experiment":
            assert re.search(
                rf"^#\s+python train.py .*experiment=\[?({file.stem}|.*,{file.stem})\b", file.read_text(), re.M
            ), file
