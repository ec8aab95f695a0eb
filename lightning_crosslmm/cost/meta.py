"""Running a model on the meta device as it runs on an accelerator: fused attention, and mixed precision.

There, attention falls apart into products that fused kernels never store, and autocast does not exist.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_IN_HALF = {
    functional.linear, functional.conv2d, functional.scaled_dot_product_attention, torch.matmul, torch.bmm,
    torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.bmm,
    torch.einsum,
}  # fmt: skip
_IN_FULL = {functional.layer_norm, functional.softmax, torch.softmax, torch.Tensor.softmax, functional.cross_entropy}


class _Kernels(TorchFunctionMode):
    """What an accelerator's kernels are called with; `half` is what autocast computes in, None without it."""

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self.half = half
        self._cast_weights: dict[nn.Parameter, Tensor] = {}  # autocast keeps them until it ends

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.half is not None and func in _IN_HALF:
            args, kwargs = self._cast(args, torch.float32, self.half), self._cast(kwargs, torch.float32, self.half)
        elif self.half is not None and func in _IN_FULL:
            args, kwargs = self._cast(args, self.half, torch.float32), self._cast(kwargs, self.half, torch.float32)
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True  # transformers asks whether rows are full and hold one sample: those of `Sample` do
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, node: Any, old: torch.dtype, new: torch.dtype) -> Any:
        if isinstance(node, nn.Parameter) and node.dtype == old and node.requires_grad:
            if node not in self._cast_weights:
                self._cast_weights[node] = node.to(new)
            return self._cast_weights[node]
        if isinstance(node, Tensor):
            return node.to(new) if node.dtype == old else node
        if isinstance(node, dict):
            return {name: self._cast(each, old, new) for name, each in node.items()}
        return tuple(self._cast(each, old, new) for each in node) if isinstance(node, tuple | list) else node


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return found


@contextmanager
def on_meta(precision: str) -> Iterator[None]:
    """Let a model on the meta device do what it would do on an accelerator.

    Args:
        precision: as in ``trainer.precision``; with ``-mixed`` products get half-precision operands as under autocast.
    """
    half = compute_dtype(precision) if precision.endswith("-mixed") else None
    kernels, real = _Kernels(half), torch.autocast

    @contextmanager
    def autocast(
        device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> Iterator[None]:
        if device_type != "meta":
            with real(device_type, dtype, enabled, cache_enabled):
                yield
            return
        before, kernels.half = kernels.half, kernels.half if enabled else None
        try:
            yield
        finally:
            kernels.half = before

    torch.autocast = autocast  # type: ignore[assignment,misc]
    try:
        with kernels:
            yield
    finally:
        torch.autocast = real  # type: ignore[misc]


def compute_dtype(precision: str) -> torch.dtype:
    """Say what products are computed in: ``bf16-mixed`` and ``bf16-true`` in bfloat16, ``16-...`` in float16."""
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0], torch.float32)


def stored_dtype(precision: str) -> torch.dtype:
    """Say what weights, their gradients and the optimizer's moments are kept in."""
    return torch.float32 if precision.endswith("-mixed") else compute_dtype(precision)
