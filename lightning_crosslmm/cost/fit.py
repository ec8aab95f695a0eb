"""Will it fit: refuse, before any weight is loaded, a training that no step of can be taken."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_crosslmm.compose import build_model, instantiate
from lightning_crosslmm.cost.card import count_parameters, prepare, state_bytes
from lightning_crosslmm.cost.phases import train_step
from lightning_crosslmm.cost.sample import Sample
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.strategy import ShardedStrategy

_SHARDED = f"{ShardedStrategy.__module__}.{ShardedStrategy.__name__}"
_LEAST_TEXT = 2  # tokens; what texts there will be, nobody knows yet, so that what is refused cannot fit for sure


@dataclass(frozen=True)
class Plan:
    """What decides how much memory a training takes.

    Args:
        precision: as in ``trainer.precision``.
        checkpointing: ``gradient_checkpointing``.
        num_samples: of a process in one batch.
        num_frames: of each.
        shards: processes that share weights, gradients and optimizer out.
        freezes_llm: whether the LLM is frozen.
    """

    precision: str
    checkpointing: bool
    num_samples: int
    num_frames: int
    shards: int
    freezes_llm: bool = False


def refuse_what_cannot_fit(config: Any, allow: Sequence[str], memory: int | None = None) -> None:
    """Refuse a training whose first step takes more memory than there is.

    On a GPU that is weights, gradients, optimizer and activations, counted as for a cost card; on the CPU, where memory
    is shared and swapped, only what stays: weights, gradients and optimizer.

    Args:
        config: composed, of ``mode=fit``.
        allow: see `compose.instantiate`.
        memory: bytes of the device; None asks the machine.

    Raises:
        UserError: it cannot fit; says what it needs, what there is, and what is cheapest to change.
    """
    on_gpu = config.trainer.accelerator in ("gpu", "cuda", "auto") and (torch.cuda.is_available() or memory is not None)
    if not on_gpu and config.trainer.accelerator not in ("cpu", "auto"):
        return  # Lightning says that there is no such device
    if memory is None:
        memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else _main_memory()
    plan = _plan(config, on_gpu)
    needs = _needs(config, allow, plan, on_gpu)
    if sum(needs.values()) <= memory:
        return
    remedies = []
    for words, changed in _cheaper(config, plan, on_gpu):
        total = sum(_needs(config, allow, changed, on_gpu).values())
        remedies.append(f"{words} ({_gb(total)})")
        if len(remedies) == 3:
            break
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in needs.items())
    raise UserError(
        f"trainer: a step of this training needs {_gb(sum(needs.values()))} at least ({parts}), the "
        f"{'GPU' if on_gpu else 'machine'} has {_gb(memory)}; cheapest to change, and what it needs then: "
        f"{', '.join(remedies)}; check_memory=false starts it all the same"
    )


def _plan(config: Any, on_gpu: bool) -> Plan:
    trainer, devices = config.trainer, config.trainer.devices
    if not isinstance(devices, int):
        devices = torch.cuda.device_count() if on_gpu and devices in ("auto", -1, "-1") else 1
    world = max(1, devices) * trainer.num_nodes
    strategy = trainer.strategy
    is_sharded = not isinstance(strategy, str) and strategy is not None and strategy.get("_target_") == _SHARDED
    samples = -(-config.data.global_batch_size // (world * trainer.accumulate_grad_batches))
    frames = config.data.sampling.num_frames or 1  # at a rate, clips may be as short as they like
    return Plan(
        str(trainer.precision), bool(config.gradient_checkpointing), samples, frames, world if is_sharded else 1
    )


def _needs(config: Any, allow: Sequence[str], plan: Plan, on_gpu: bool) -> dict[str, int]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config, allow)
    instantiate(config.optim, allow).freeze(model)
    if plan.freezes_llm:
        model.llm.requires_grad_(False)
    stays = state_bytes(count_parameters(model)["total"], plan.precision)
    needs = {name: size // plan.shards for name, size in stays.items()}
    if not on_gpu:
        return needs
    prepare(model, plan.precision, plan.num_frames, pooled_per_frame=1.0)
    if plan.checkpointing:
        model.gradient_checkpointing_enable()
    batch = Sample(plan.num_frames, _LEAST_TEXT, 1).batch(model.encoder.image_size, plan.num_samples)
    return {**needs, "activations": train_step(model, batch, plan.precision).peak_bytes}


def _cheaper(config: Any, plan: Plan, on_gpu: bool) -> list[tuple[str, Plan]]:
    """What to change, the cheapest first: what costs time only, then precision, then what the model learns from."""
    found = []
    if on_gpu and not plan.checkpointing:
        found.append(("gradient_checkpointing=true", replace(plan, checkpointing=True)))
    if on_gpu and plan.num_samples > 1:
        steps = config.trainer.accumulate_grad_batches * plan.num_samples
        found.append((f"trainer.accumulate_grad_batches={steps}", replace(plan, num_samples=1)))
    if on_gpu and plan.shards == 1:
        found.append(("trainer=fsdp trainer.devices=8", replace(plan, shards=8)))
    if plan.precision != "bf16-true":
        found.append(("trainer.precision=bf16-true", replace(plan, precision="bf16-true")))
    if config.optim.lr.llm is not None:
        found.append(("optim.lr.llm=null", replace(plan, freezes_llm=True)))
    if on_gpu and plan.num_frames > 1:
        half = plan.num_frames // 2
        found.append((f"data.num_frames={half}", replace(plan, num_frames=half)))
    return found


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
