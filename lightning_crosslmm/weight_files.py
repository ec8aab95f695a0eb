"""Weights in files, however they were written: whole, sharded or safetensors. Nothing in them is run."""

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lightning_crosslmm.errors import UserError

_DAMAGED = (OSError, EOFError, KeyError, IndexError, TypeError, ValueError, RuntimeError)
_RECORDS = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_METADATA = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("torch.distributed.checkpoint.metadata", name) for name in _RECORDS),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}
"""What the list of a sharded checkpoint's tensors is made of."""


class WeightFiles:
    """The weights of a checkpoint, read when they are asked for.

    Args:
        path: a whole checkpoint's file, a sharded checkpoint's folder, a ``.safetensors`` file or the index of several.
        prefix: what the names of weights begin with in a checkpoint; others are left out, and it is cut off.

    Raises:
        UserError: it is none of them, or damaged.
    """

    def __init__(self, path: Path, prefix: str = "model.") -> None:
        self._path = path
        try:
            self.shapes: Mapping[str, tuple[Size, torch.dtype]]
            self.shapes, self._read = _open(path, prefix)
        except (*_DAMAGED, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(f"'{path}' is no checkpoint of a run: {error}") from error

    def groups(self, max_bytes: int) -> list[list[str]]:
        """Cut the names into runs whose weights take so many bytes at most, or are a single one."""
        return group_names(self.shapes, max_bytes)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some weights, on the CPU, by their names in the model.

        Raises:
            UserError: the files are damaged.
        """
        try:
            return self._read(list(names))
        except (*_DAMAGED, SafetensorError, dcp.api.CheckpointException) as error:
            raise UserError(f"'{self._path}' is damaged: {error}") from error


def group_names(shapes: Mapping[str, tuple[Size, torch.dtype]], max_bytes: int) -> list[list[str]]:
    """Cut names into runs whose weights take so many bytes at most, or are a single one."""
    groups: list[list[str]] = []
    room = 0
    for name, (shape, dtype) in shapes.items():
        num_bytes = shape.numel() * dtype.itemsize
        if not groups or num_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= num_bytes
    return groups


_Opened = tuple[Mapping[str, tuple[Size, torch.dtype]], Callable[[list[str]], dict[str, Tensor]]]


def _open(path: Path, prefix: str) -> _Opened:
    if path.is_dir():
        return _open_sharded(path, prefix)
    if path.suffix in (".safetensors", ".json"):
        return _open_safetensors(path, prefix)
    return _open_whole(path, prefix)


def _open_whole(path: Path, prefix: str) -> _Opened:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
    return shapes, lambda names: {name: found[name] for name in names}


def _open_sharded(folder: Path, prefix: str) -> _Opened:
    reader = _Reader(folder)
    within = f"state_dict.{prefix}"
    shapes = {
        name.removeprefix(within): (entry.size, entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(within) and isinstance(entry, TensorStorageMetadata)
    }

    def read(names: list[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(shapes[name][0], dtype=shapes[name][1]) for name in names}
        state = {"state_dict": {prefix + name: tensor for name, tensor in tensors.items()}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as meant
            dcp.load(state, storage_reader=_Reader(folder), no_dist=True)
        return tensors

    return shapes, read


def _open_safetensors(path: Path, prefix: str) -> _Opened:
    file_of: dict[str, Path] = {}
    shapes: dict[str, tuple[Size, torch.dtype]] = {}
    for file in _files(path):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                size = Size(part.get_shape())
                dtype = (part[:0] if size else opened.get_tensor(name)).dtype  # without reading more than that takes
                shapes[name], file_of[name] = (size, dtype), file
    # an export for transformers has the prefix, ours has none
    cut = prefix if all(name.startswith(prefix) for name in shapes) else ""

    def read(names: list[str]) -> dict[str, Tensor]:
        with ExitStack() as stack:
            files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(file_of.values())}
            return {name: files[file_of[cut + name]].get_tensor(cut + name) for name in names}

    return {name.removeprefix(cut): shape for name, shape in shapes.items()}, read


def _files(path: Path) -> Iterator[Path]:
    if path.suffix == ".safetensors":
        yield path
        return
    names = set(json.loads(path.read_text())["weight_map"].values())
    for name in sorted(names):
        if Path(name).name != name:
            raise ValueError(f"names the file {name!r}, which is not beside it")
        yield path.parent / name


class _Reader(dcp.FileSystemReader):
    """Reads tensors; the list of them is a pickle, so only what such a list is made of may be named in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the list."""
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f".metadata holds {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Give a class that may be named."""
        if (module, name) in _METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which it may not")
