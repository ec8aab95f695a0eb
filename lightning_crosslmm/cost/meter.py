"""Counting what a model does while it runs: operations and bytes by part, and the memory that is alive.

It runs on real tensors and, with `meta.on_meta`, on the meta device, where shapes alone decide.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_crosslmm.cost.memo import Memo
from lightning_crosslmm.model import CrossLMM

PARTS = ("encoder", "pooler", "projector", "llm_linear", "llm_attention", "v2v", "t2v", "head")

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)
_PAIRWISE = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)  # in an LLM layer that is attention; its weights are mm


class Meter(TorchDispatchMode):
    """Add up the operations of matrix products, convolutions and attention by part, and follow the memory in use.

    An operation is counted by torch's own formulas (``torch.utils.flop_counter``), 2 per multiply-accumulate, attention
    over all pairs of positions, also where a causal kernel leaves half of them out. A part is known in the forward pass
    by the module that runs, in the backward pass by who saved the tensors that are unpacked.

    Attributes:
        flops: by part.
        causal_flops: by part, with causal attention counted as a causal kernel runs it, half.
        moved_bytes: by part, operands read and results written by those operations, each once; what stands between
            them counts nothing, as if it were fused.
        recomputed_flops: by part, those of modules that ran again in the backward pass.
        peak_bytes: most memory alive at once of what was made since the start, gradients of parameters left out.
    """

    def __init__(self, model: CrossLMM, memo: Memo | None = None) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.causal_flops: Counter[str] = Counter()
        self.moved_bytes: Counter[str] = Counter()
        self.recomputed_flops: Counter[str] = Counter()
        self.live_bytes = self.peak_bytes = 0
        self._model, self._part, self._is_backward = model, "", False
        self._stack: list[str] = []
        self._known: dict[int, weakref.ref[Any]] = {}
        self._memo = memo or Memo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and account for it."""
        kwargs = kwargs or {}
        if func.is_view or func._schema.is_mutable:  # weights and frames are not made here, nor are views of them
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._watch(tensor, counts=False)
        result = self._memo.call(func, args, kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self._count(packet, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return result

    def _count(self, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        part = self._part or "pooler"  # one in the encoder collects what is left outside of all modules
        if part == "llm_linear" and (packet in _PAIRWISE or "attention" in packet.__name__):
            part = "llm_attention"
        flops = flop_registry[packet](*args, **kwargs, out_val=result)
        is_causal = packet in _ATTENTION and (True in args[3:6] or kwargs.get("is_causal", False))
        self.flops[part] += flops
        self.causal_flops[part] += flops // 2 if is_causal else flops
        self.moved_bytes[part] += sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        if self._is_backward and self._stack:
            self.recomputed_flops[part] += flops

    def _watch(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = storage.nbytes() if counts else 0

        def forget(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.live_bytes -= num_bytes

        self._known[key] = weakref.ref(storage, forget)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _leave_out(self, parameter: Tensor) -> None:
        """A gradient is accounted for by itself."""
        assert parameter.grad is not None, "called once it is there"
        storage = parameter.grad.untyped_storage()
        if self._known.pop(storage._cdata, None) is not None:
            self.live_bytes -= storage.nbytes()

    @contextmanager
    def running(self) -> Iterator["Meter"]:
        """Count what the model does inside."""
        hooks = []
        for name, module in self._model.named_modules():
            part = part_of(name, self._model)
            if part is not None:
                hooks += [
                    module.register_forward_pre_hook(self._enter(part)),
                    module.register_forward_hook(self._leave(stays=".fusion." in name), always_call=True),
                ]
        hooks += [
            p.register_post_accumulate_grad_hook(self._leave_out) for p in self._model.parameters() if p.requires_grad
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack), self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of what was counted."""
        self._is_backward = True
        engine: Any = torch.autograd.Variable._execution_engine
        # what Tensor.backward calls; that one is a torch function, and inside it those of `on_meta` are off
        engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        self._is_backward = False

    def _enter(self, part: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(self._part)
            self._part = part

        return hook

    def _leave(self, stays: bool) -> Any:
        # attention of a fusion block runs between its projections: it belongs to the branch that projected last
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            before = self._stack.pop()
            self._part = self._part if stays else before

        return hook

    def _pack(self, tensor: Tensor) -> tuple[str, Tensor]:
        return self._part, tensor

    def _unpack(self, packed: tuple[str, Tensor]) -> Tensor:
        if not self._stack:
            self._part = packed[0]
        return packed[1]


def part_of(name: str, model: CrossLMM) -> str | None:
    """Name the part of a module, by its dotted name in the model; None for the model itself.

    Keys and values that both branches share go to V2V, which makes them first.
    """
    path = name.split(".")
    if path[0] in ("encoder", "pooler"):
        return path[0]
    if path[0] in ("frame_time", "encoder_time"):
        return "projector"  # it stands beside it
    role = model.role_of(f"{name}.")
    if role == "fusion":
        return "t2v" if "t2v" in path or not model.fusion_settings.v2v else "v2v"
    if role == "llm":
        return "head" if "lm_head" in path else "llm_linear"
    return role or None


def tensor_bytes(holder: Any) -> int:
    """Add up the memory of all tensors that an object holds, however deep; shared memory once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def walk(node: Any) -> None:
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
            return
        if id(node) in seen or isinstance(node, str | int | float | type | nn.Module):
            return
        seen.add(id(node))
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
        for child in (*children, *getattr(node, "__dict__", {}).values()):
            walk(child)

    walk(holder)
    return sum(storages.values())
