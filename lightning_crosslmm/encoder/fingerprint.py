"""Names for what an encoder gives: digests of all that its features depend on, so that no other features match."""

import functools
import hashlib
import importlib.metadata
import json
from typing import Any

import torch
from torch import Tensor, nn

from lightning_crosslmm.encoder.base import Encoder
from lightning_crosslmm.encoder.feature_cache import bytes_of
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.taps import Asks


class Fingerprint:
    """The digest of an encoder, as it stands: class and settings, weights, what is asked of it, how it computes.

    Weights are read again only when one of them was changed. Where they are shared out over processes, all of them take
    part in reading them.
    """

    def __init__(self) -> None:
        self._weights = b""
        self._seen: list[tuple[Any, ...]] | None = None

    def of(self, encoder: Encoder, asks: Asks, device: torch.device, tolerance: float) -> bytes:
        """Give 32 bytes.

        Args:
            encoder: as it stands.
            asks: what else it gives.
            device: that it runs on; another kind of it rounds differently.
            tolerance: of frames that stand in for others, 0 for exact ones.
        """
        is_cast = torch.is_autocast_enabled(device.type)
        facts = {
            "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
            "settings": encoder.built_from,
            "asks": repr(asks),
            "tolerance": float(tolerance),
            "computes_in": str(torch.get_autocast_dtype(device.type)) if is_cast else None,
            "float32": torch.get_float32_matmul_precision(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "packages": _packages(),
        }
        told = json.dumps(facts, sort_keys=True, default=repr).encode()
        return hashlib.sha256(told + self._digest_of_weights(encoder)).digest()

    @torch.no_grad()
    def _digest_of_weights(self, encoder: Encoder) -> bytes:
        tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
        is_shared_out = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
        seen = [_state(tensor, is_shared_out) for tensor in tensors.values()]
        if seen != self._seen:
            digest = hashlib.sha256()
            for name, tensor in tensors.items():
                whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
                # a copy: what numpy has looked at cannot be resized, as sharding does with its own
                digest.update(bytes_of(whole.to("cpu", copy=True)))
            self._weights, self._seen = digest.digest(), seen
        return self._weights


def _state(tensor: Tensor, is_shared_out: bool) -> tuple[Any, ...]:
    """What differs once a tensor was replaced, or changed in place, which its version counts.

    Where weights are shared out, all processes must find the same, and sharding makes tensors as it goes.
    """
    version = 0 if tensor.is_inference() else tensor._version  # inference tensors have none
    return tensor.dtype, version, 0 if is_shared_out else id(tensor)


@functools.cache
def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers")}


def digests_of(identity: bytes, frames_FCHW: Tensor, visual_offsets: Tensor) -> list[str]:
    """Name the features of each visual: 32 hexadecimal digits of the encoder's identity and the frames' bytes.

    Args:
        identity: of `Fingerprint`.
        frames_FCHW: uint8 on the CPU.
        visual_offsets: (V+1,) int64.
    """
    offsets = visual_offsets.tolist()
    return [
        hashlib.sha256(identity + hashlib.sha256(bytes_of(frames_FCHW[start:end])).digest()).hexdigest()[:32]
        for start, end in zip(offsets, offsets[1:], strict=False)
    ]


def check_repeatable(encoder: Encoder, folder: str) -> None:
    """Refuse to keep what will not be the same again.

    Raises:
        UserError: a weight that is trained, or dropout.
    """
    where = f"encoder.feature_cache.folder={folder} keeps what a frozen encoder gives"
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            f"{where}, and optim.lr.encoder trains it; set optim.lr.encoder=null or encoder.feature_cache.folder=null"
        )
    if name := next((name for name, part in encoder.named_modules() if _drops(part)), None):
        raise UserError(
            f"{where}, and {type(encoder).__name__} drops at random in {name or 'itself'} while it trains; set its "
            "dropout in encoder.config to 0, or encoder.feature_cache.folder=null"
        )


def _drops(part: nn.Module) -> bool:
    rates: list[Any] = [getattr(part, name, 0) for name in ("p", "prob", "drop_prob", "dropout")]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
