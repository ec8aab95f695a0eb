"""Folders of pretrained weights, looked over before any of them is read: what lies there, whole, and nothing to run."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning_crosslmm.errors import UserError

log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HEADER_BYTES = 8  # what a safetensors file begins with: the length of the header after it


def read_config(folder: Path, setting: str, runs_code: bool = False) -> dict[str, Any]:
    """Read a folder's ``config.json``.

    Args:
        folder: a local one.
        setting: which setting names it, for messages.
        runs_code: the user allows what `setting` loads to run code that lies in the folder.

    Raises:
        UserError: there is none, or it is damaged; or it names code of its own and that is not allowed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{setting}={folder}: has no {CONFIG}; give a folder that transformers' save_pretrained wrote")
    config = read_json(path, setting)
    if config.get("auto_map") and not runs_code:
        raise UserError(
            f"{setting}={folder}: wants to run code of its own (auto_map in {CONFIG}: "
            f"{', '.join(map(str, config['auto_map'].values()))}), and that is not allowed; only llm.model can be "
            f"allowed to, by llm.model.trust_remote_code=true, where you have read the code"
        )
    return config


def find_weights(folder: Path, setting: str) -> Path:
    """Find a folder's safetensors and make sure that all of them are there in full.

    Args:
        folder: a local one.
        setting: which setting names it, for messages.

    Returns:
        The file, or the index of several.

    Raises:
        UserError: there are none, some are missing or cut short, or there are pickled ones only.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if single.is_file():
        read_names(single, setting)
        return single
    if index.is_file():
        _check_shards(index, setting)
        return index
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED):
        raise UserError(
            f"{setting}={folder}: has pickled weights ({pickled[0]}) and no safetensors; to unpickle is to run what "
            f"the file says, so they are not read. Where you trust their author, convert them: load the folder with "
            f"transformers and save_pretrained() it to another"
        )
    raise UserError(f"{setting}={folder}: has a {CONFIG} and no weights; expected {WEIGHTS} or {INDEX}")


def check_loaded(info: Mapping[str, Any], setting: str, folder: str, unused: Collection[str] = ()) -> None:
    """Refuse a part that did not find all its weights in its own shapes, and log what it had no place for.

    Args:
        info: what transformers tells with ``output_loading_info``.
        setting: which setting names the folder.
        folder: or hub name.
        unused: beginnings of names that are taken out anyway and may be missing.

    Raises:
        UserError: lists what is missing or of another shape.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, theirs, ours = mismatched[0]
        raise UserError(
            f"{setting}={folder}: {len(mismatched)} weights have another shape than its {CONFIG} says, such as {name}: "
            f"{tuple(theirs)} and not {tuple(ours)}; mend {CONFIG} or download both again"
        )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(tuple(unused)))
    if missing:
        raise UserError(
            f"{setting}={folder}: lacks {len(missing)} weights, such as {missing[0]}; it is of another architecture "
            f"than its {CONFIG} says, or was not saved whole"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        log.info("%s=%s: left out %d weights, such as %s", setting, folder, len(unexpected), unexpected[0])


def _check_shards(index: Path, setting: str) -> None:
    names = read_json(index, setting).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{setting}={index.parent}: {index.name} lists no weights; download it again")
    files = sorted(set(map(str, names.values())))
    if outside := [name for name in files if Path(name).name != name]:
        raise UserError(f"{setting}={index.parent}: {index.name} names {outside[0]!r}, which is not in the folder")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{setting}={index.parent}: {len(missing)} of {len(files)} files are missing, such as {missing[0]}; "
            f"finish the download"
        )
    for name in files:
        read_names(index.parent / name, setting)


def read_names(path: Path, setting: str) -> set[str]:
    """List the weights of a safetensors file by its header.

    Raises:
        UserError: it is damaged or cut short.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_HEADER_BYTES), "little")
            header = json.loads(file.read(header_bytes)) if _HEADER_BYTES + header_bytes <= size else {}
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{setting}={path.parent}: {path.name} is damaged or no safetensors file ({error})") from error
    whole = _HEADER_BYTES + header_bytes + max(ends.values(), default=0)
    if size < whole:
        raise UserError(
            f"{setting}={path.parent}: {path.name} is cut short, {size} of {whole} bytes or more; download it again"
        )
    return set(ends)


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        UserError: it is damaged, or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{setting}={path.parent}: {path.name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{setting}={path.parent}: {path.name} holds no settings; download it again")
    return content
