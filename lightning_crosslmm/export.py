"""What a run has learnt, as files for others: safetensors, the configuration, and where they come from."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from lightning_crosslmm.checkpoint_folder import WHOLE, read_checkpoint
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import EXPORTED, find_checkpoint
from lightning_crosslmm.weight_files import WeightFiles

FILE_BYTES = 5 * 10**9


def export_run(run_dir: Path, out_dir: Path, checkpoint: str | None = None, file_bytes: int = FILE_BYTES) -> Path:
    """Write a checkpoint's weights as safetensors, with the run's ``config.yaml`` and its provenance beside them.

    Weights are read as they are written, a file's worth at a time, so that no second model is held in memory. Those
    that share memory in the model (a head tied to the embeddings) are written under both names.

    Args:
        run_dir: a folder that ``train.py`` wrote.
        out_dir: the folder to make; it appears when it is whole.
        checkpoint: ``best``, ``last``, or the path of one; None for the best one or else the last.
        file_bytes: largest size of a file; one weight may be larger.

    Returns:
        The checkpoint that was taken.

    Raises:
        UserError: no run or checkpoint there, a folder that is not empty, or one that cannot be written.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run_dir}: has no config.yaml; give a folder that train.py wrote")
    names = ("best", "last") if checkpoint is None else (checkpoint,)
    is_name = names[0] in ("best", "last")
    taken = find_checkpoint(run_dir if is_name else Path(names[0]), "--checkpoint", names if is_name else ("last",))
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir}: is there and not empty; give another folder")
    weights = WeightFiles(taken)
    part = out_dir.with_name(f".{out_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_weights(weights, part, file_bytes)
        for file in part.glob("*.safetensors"):
            shutil.copymode(config, file)  # safetensors lets nobody else read them
        shutil.copyfile(config, part / "config.yaml")
        (part / "provenance.json").write_text(json.dumps(_provenance(run_dir, taken), indent=2) + "\n")
        part.rename(out_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{out_dir}: cannot be written: {error}") from error
    return taken


def _write_weights(weights: WeightFiles, folder: Path, file_bytes: int) -> None:
    groups = weights.groups(file_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        name = EXPORTED[0] if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file_of |= dict.fromkeys(names, name)
        # save_file takes neither views nor memory that is shared
        tensors = {each: tensor.contiguous().clone() for each, tensor in weights.read(names).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(groups) > 1:
        num_bytes = sum(shape.numel() * dtype.itemsize for shape, dtype in weights.shapes.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
        (folder / EXPORTED[1]).write_text(json.dumps(index, indent=2) + "\n")


def _provenance(run_dir: Path, taken: Path) -> dict[str, Any]:
    path = run_dir / "provenance.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    folder = taken.parent if taken.name == WHOLE else taken
    exported: dict[str, Any] = {"checkpoint": folder.name}
    if folder.is_dir():
        marker = read_checkpoint(folder).marker
        exported |= {name: getattr(marker, name) for name in ("step", "epoch", "monitor", "metric", "saved")}
    return {**record, "exported": exported}
