"""What a run has learnt, as files for others: safetensors, settings, where they come from, and a model card."""

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_crosslmm.checkpoint_folder import WHOLE, read_checkpoint
from lightning_crosslmm.compose import PART_TARGETS, build_model, load_run, lora_of, save_resolved
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.llm import merged_shapes, read_merged
from lightning_crosslmm.model_card import model_card
from lightning_crosslmm.run_folder import EXPORTED, find_checkpoint
from lightning_crosslmm.standalone import leans_on_files, standalone
from lightning_crosslmm.weight_files import WeightFiles, group_names

FILE_BYTES = 5 * 10**9
FORMS = ("safetensors", "hf")


def export_run(
    run_dir: Path,
    out_dir: Path,
    checkpoint: str | None = None,
    file_bytes: int = FILE_BYTES,
    form: str = "safetensors",
    allow: Sequence[str] = (),
) -> Path:
    """Write a checkpoint's weights as safetensors, with settings, provenance and a model card beside them.

    Weights are read as they are written, a file's worth at a time, so that no second model is held in memory. Those
    that share memory in the model (a head tied to the embeddings) are written under both names; adapters are merged.
    The settings name no pretrained checkpoint any more, so that the folder is all there is to it.

    Args:
        run_dir: a folder that ``train.py`` wrote.
        out_dir: the folder to make; it appears when it is whole.
        checkpoint: ``best``, ``last``, or the path of one; None for the best one or else the last.
        file_bytes: largest size of a file; one weight may be larger.
        form: ``safetensors``, or ``hf`` for a folder that the Auto classes of transformers load, too.
        allow: prefixes of further classes that the run's config may name.

    Returns:
        The checkpoint that was taken.

    Raises:
        UserError: no run or checkpoint there, a class that is not allowed, a folder that is not empty, or one that
            cannot be written.
    """
    config = load_run(run_dir)
    names = ("best", "last") if checkpoint is None else (checkpoint,)
    is_name = names[0] in ("best", "last")
    taken = find_checkpoint(run_dir if is_name else Path(names[0]), "--checkpoint", names if is_name else ("last",))
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir}: is there and not empty; give another folder")
    weights = _Merged.of(WeightFiles(taken), config)
    alone, write_settings = _settle(config, form, (*PART_TARGETS, *allow))
    part = out_dir.with_name(f".{out_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_weights(weights, part, file_bytes, "model." if form == "hf" else "")
        for file in part.glob("*.safetensors"):
            shutil.copymode(run_dir / "config.yaml", file)  # safetensors lets nobody else read them
        save_resolved(alone, part)
        write_settings(part)
        _write_papers(run_dir, part, config, taken, form)
        part.rename(out_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out_dir}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return taken


def _settle(config: DictConfig, form: str, trusted: Sequence[str]) -> tuple[DictConfig, Callable[[Path], None]]:
    """Give settings that stand for themselves, and what writes those that transformers reads."""
    alone = copy.deepcopy(config)
    image_size = 0
    if form == "hf" or leans_on_files(config):
        with torch.device("meta"):
            model = build_model(config, trusted)
        alone, image_size = standalone(config, model), model.encoder.image_size
    if alone.llm.get("lora") is not None:
        alone.llm.lora = None
    if alone.encoder.get("feature_cache") is not None:
        alone.encoder.feature_cache.folder = None  # of this machine
    if form != "hf":
        return alone, lambda folder: None
    from lightning_crosslmm.hf.folder import write_settings  # here, as the other form does without

    return alone, lambda folder: write_settings(alone, image_size, folder)


@dataclass(frozen=True)
class _Merged:
    """A checkpoint's weights with adapters merged, under the names of a model without them."""

    files: WeightFiles
    shapes: dict[str, Any]
    scale: float

    @classmethod
    def of(cls, files: WeightFiles, config: DictConfig) -> "_Merged":
        """Take a checkpoint of a run with these settings."""
        adapters = lora_of(config)
        return cls(files, merged_shapes(files.shapes), 0.0 if adapters is None else adapters.alpha / adapters.rank)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some weights by the names of `shapes`."""
        return read_merged(self.files.read, list(names), self.files.shapes, self.scale)


def _write_weights(weights: _Merged, folder: Path, file_bytes: int, prefix: str) -> None:
    groups = group_names(weights.shapes, file_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        name = EXPORTED[0] if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file_of |= {prefix + each: name for each in names}
        # save_file takes neither views nor memory that is shared
        tensors = {prefix + each: tensor.contiguous().clone() for each, tensor in weights.read(names).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(groups) > 1:
        num_bytes = sum(shape.numel() * dtype.itemsize for shape, dtype in weights.shapes.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
        (folder / EXPORTED[1]).write_text(json.dumps(index, indent=2) + "\n")


def _write_papers(run_dir: Path, folder: Path, config: DictConfig, taken: Path, form: str) -> None:
    provenance = _provenance(run_dir, taken)
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    has_cost = (run_dir / "cost.json").is_file()
    if has_cost:
        shutil.copyfile(run_dir / "cost.json", folder / "cost.json")
    card = model_card(run_dir.resolve().name, form, config, provenance, _read(run_dir / "metrics.json"), has_cost)
    (folder / "README.md").write_text(card)


def _provenance(run_dir: Path, taken: Path) -> dict[str, Any]:
    folder = taken.parent if taken.name == WHOLE else taken
    exported: dict[str, Any] = {"checkpoint": folder.name}
    if folder.is_dir():
        marker = read_checkpoint(folder).marker
        exported |= {name: getattr(marker, name) for name in ("step", "epoch", "monitor", "metric", "saved")}
    return {**_read(run_dir / "provenance.json"), "exported": exported}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
