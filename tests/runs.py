"""Run folders as a training leaves them, of models that were never trained, for tests of what comes after."""

from pathlib import Path

import torch
from omegaconf import DictConfig

import train
from lightning_crosslmm.checkpoint_folder import begin_checkpoint, show_checkpoint
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides, save_resolved
from lightning_crosslmm.model import CrossLMM

SMALL = (
    "data.sampling.num_frames=3",
    "data.max_tokens=200",
    "decoding.max_new_tokens=5",
    "llm.model.config.hidden_size=32",
    "llm.model.config.intermediate_size=48",
    "llm.model.config.initializer_range=0.3",
)


def small_config(*words: str) -> DictConfig:
    """Compose the default arms, or others, at a size that is built and run in no time."""
    return compose_overrides(train.CONF_DIR, [*SMALL, *words])


def write_run(folder: Path, config: DictConfig, seed: int = 0, step: int = 1) -> CrossLMM:
    """Write a run of one checkpoint, gates open and adapters not zero; gives its model, in evaluation mode."""
    torch.manual_seed(seed)
    model = build_model(config, ANY_TARGET).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(config, folder)
    write_checkpoint(folder, model, step)
    return model


def write_checkpoint(folder: Path, model: CrossLMM, step: int) -> None:
    """Add a whole checkpoint to a run folder; the first is the best."""
    part = begin_checkpoint(folder, step)
    part.mkdir(parents=True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, part / "state.ckpt")
    about = {"epoch": 0, "monitor": "val/accuracy", "mode": "max", "world_size": 1, "versions": {}}
    show_checkpoint(part, step=step, metric=1 / step, **about)
