"""Sharding: every process keeps a slice of each weight, and gathers a layer when it runs (FSDP2; the door to it).

A unit is what is gathered by one collective: each block of the tower, each decoder layer with its fusion block inside,
embeddings and head where they are not tied, and the root with all the rest (projector, pooler, norms, tied embeddings),
which stays gathered from the forward to the end of the backward pass. What may or may not run, as the data want it
(fusion, a learned pooler), is never a unit of its own: processes that gather unequally often wait for each other for
ever. For the same reason they agree on how often the tower and the decoding run (`VisualSide.most`).
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import CrossLMM

_BF16 = torch.bfloat16
_PRECISIONS = {"32-true": (None, None), "bf16-mixed": (_BF16, None), "bf16-true": (_BF16, _BF16)}
"""What layers compute with and what weights are stored as; None leaves float32. Gradients are summed in float32."""


def shard(model: CrossLMM, mesh: DeviceMesh, device: torch.device, precision: str) -> None:
    """Share the weights of a model out over the processes of a mesh, those of its first process.

    Unit by unit, every parameter and buffer is sent from process 0 and sliced, so that no device holds more than one
    unit whole and no host but the first one the model. Frozen parameters stay frozen, tied ones tied, names the same.

    Args:
        model: with weights on process 0, on the meta device on the others.
        mesh: one dimension over all processes.
        device: of this process.
        precision: as in ``trainer.precision``: ``32-true``, ``bf16-mixed`` or ``bf16-true``.

    Raises:
        UserError: another precision, or a model that is not built alike on all processes.
    """
    if precision not in _PRECISIONS:
        raise UserError(f"trainer.precision is {precision}; with trainer=fsdp right are {', '.join(_PRECISIONS)}")
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    _refuse_unequal(model, group)
    computed, stored = _PRECISIONS[precision]
    # inputs are not cast: times are float32 for a reason, and casting would copy the cache inside FusionContext
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32, cast_forward_inputs=False)
    filled: set[nn.Module] = set()
    for unit, reshards in _units(model):
        _fill(unit, filled, device, stored)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
    for name in ("generate", "look"):
        register_fsdp_forward_method(model, name)
    # generate asks for this before it lets a process that is done take part until all are
    model.llm._is_fsdp_managed_module = True  # type: ignore[assignment]
    model.most = lambda count: _most(count, group)


def _units(model: CrossLMM) -> Iterator[tuple[nn.Module, bool]]:
    """Units, inner ones first, and whether they are freed after the forward pass."""
    yield from ((block, True) for block in model.encoder.blocks)
    yield from ((layer, True) for layer in model.llm.model.layers)
    embed, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    if embed.weight is not head.weight:
        yield embed, True
        yield head, False  # the backward pass begins with it
    yield model, False


def _fill(unit: nn.Module, filled: set[nn.Module], device: torch.device, stored: torch.dtype | None) -> None:
    """Give all processes what the first one holds in a unit: parameters, buffers, and tensors that are neither."""
    made: dict[Tensor, Tensor] = {}
    for module in unit.modules():
        if module in filled:
            continue
        filled.add(module)
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for place in places:
            for name, old in place.items():
                if not isinstance(old, Tensor):
                    continue
                if old not in made:
                    made[old] = _from_first(old, device, stored)
                place[name] = made[old]


def _from_first(old: Tensor, device: torch.device, stored: torch.dtype | None) -> Tensor:
    is_parameter = isinstance(old, nn.Parameter)
    dtype = stored if is_parameter and stored is not None else old.dtype
    if old.is_meta:
        new = torch.empty(old.shape, dtype=dtype, device=device)
    else:
        new = old.detach().to(device, dtype).contiguous()
    dist.broadcast(new, src=0)
    return nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new


def _refuse_unequal(model: CrossLMM, group: Any) -> None:
    """A model built from a geometry that is not the checkpoint's would train on, differently on each process."""
    named = (*model.named_parameters(), *model.named_buffers())
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    parts: list[Any] = [part for part in model.modules() if hasattr(getattr(part, "config", None), "to_dict")]
    # where weights came from and how they were stored is not what the model is
    passing = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures")
    told = [
        {key: value for key, value in config.to_dict().items() if key not in passing}
        for config in {id(part.config): part.config for part in parts}.values()
    ]
    mine = hashlib.sha256(json.dumps([shapes, told], sort_keys=True, default=str).encode()).hexdigest()
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for number, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"llm.model.weights, encoder.weights: process {number} built another model than process 0, because it "
                "found no copy of the checkpoint's config.json; give a local folder, or download before training"
            )


def _most(count: int, group: Any) -> int:
    most = torch.tensor(count)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most)
