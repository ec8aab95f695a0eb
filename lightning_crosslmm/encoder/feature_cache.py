"""Features of frozen encoders on disk: one safetensors file per visual, named after all that it depends on."""

import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_crosslmm.bounded_folder import BoundedFolder
from lightning_crosslmm.errors import UserError

log = logging.getLogger(__name__)
_CHECKSUM = "checksum"

Features = dict[str, Tensor]
"""What an encoder gave for some frames, by name; the first axis of each is the frames'."""


class FeatureCache:
    """A folder of features that the processes of a machine, and several runs at once, share.

    What it cannot read it does not have: a file that is damaged or not ours is removed, and a folder that cannot be
    used is told once, then done without. Nothing is unpickled. A visual is found again if its frames are the same to
    the byte: frames that shift from epoch to epoch (``data.sampling.jitter``) rarely are.

    Args:
        folder: made if need be, on a local disk (see `BoundedFolder`); None keeps nothing.
        max_bytes: the folder never takes more; what was not used for longest makes room.

    Raises:
        UserError: no byte is allowed.
    """

    def __init__(self, folder: str | None = None, max_bytes: int = 100_000_000_000) -> None:
        if max_bytes < 1:
            raise UserError(f"encoder.feature_cache.max_bytes is {max_bytes}; it must be 1 byte or more")
        self.folder, self.max_bytes, self._has_failed = folder, max_bytes, False
        self._files = BoundedFolder(Path(folder or ""), max_bytes, "features", "safetensors")

    def read(self, digest: str) -> Features | None:
        """Give what was written under a digest, on the CPU, or None."""
        try:
            if (file := self._files.find(digest)) is None:
                return None
            with file:
                content = file.read()
        except OSError as error:
            self._tell(error)
            return None
        try:
            found = load(content)
            if int(found.pop(_CHECKSUM)) == _checksum(digest, found):
                return found
        except (SafetensorError, KeyError, ValueError, RuntimeError):  # the last: tensors that contradict their header
            pass
        Path(file.name).unlink(missing_ok=True)
        return None

    def write(self, digest: str, make: Callable[[], Features]) -> None:
        """Keep what `make` gives, if there is room; it is not asked where the file is there already.

        Args:
            digest: 32 hexadecimal digits.
            make: gives tensors on the CPU.
        """
        if self._has_failed:
            return
        try:
            if (file := self._files.find(digest)) is not None:
                file.close()
                return
            features = make()
            checksum = torch.tensor(_checksum(digest, features))
            content = save({**features, _CHECKSUM: checksum})
            self._files.fetch_ahead(digest, len(content), lambda start, end: content[start:end])
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.warning(
                "encoder.feature_cache.folder: %s cannot be used (%s); the encoder runs on what is not in it",
                self.folder,
                error.strerror or error,
            )


def _checksum(digest: str, features: Features) -> int:
    """Of names, shapes, types and content, and of the digest: a file under another's name is no hit."""
    found = zlib.crc32(digest.encode())
    for name, tensor in sorted(features.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(bytes_of(tensor), found)
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """Look at a tensor's bytes; it lies on the CPU."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
