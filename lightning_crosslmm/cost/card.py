"""The cost card: what a configuration costs, and what the plain LLaVA-OneVision of the same geometry would."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_crosslmm.compose import build_model, instantiate
from lightning_crosslmm.cost.hardware import least_time_s
from lightning_crosslmm.cost.memo import Memo
from lightning_crosslmm.cost.meta import compute_dtype, stored_dtype
from lightning_crosslmm.cost.meter import PARTS, Meter
from lightning_crosslmm.cost.phases import read_prompt, train_step
from lightning_crosslmm.cost.sample import Sample
from lightning_crosslmm.cost.standin import StatedPooler, check_stated, try_out
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.model import ROLES, CrossLMM
from lightning_crosslmm.optim import OptimSettings
from lightning_crosslmm.pooler import BilinearPooler, Stage

ADAM_MOMENTS = 2
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Card = dict[str, Any]


@torch.inference_mode(False)
@torch.enable_grad()
def cost_card(
    config: Any,
    allow: Sequence[str],
    sample: Sample,
    *,
    gpu: str | None = None,
    pooled_per_frame: float | None = None,
    trains: bool = True,
) -> Card:
    """Count what a configuration costs, on the meta device: no weights, no data, seconds at any size.

    Source: definitions in `Meter`; the baseline is LLaVA-OneVision, arXiv:2408.03326, whose videos have ceil(side / 2)
        squared tokens per frame after the projector and one newline.
    Differs: nothing is cut off at the LLM's context, neither here nor in the baseline.

    Args:
        config: composed.
        allow: see `compose.instantiate`.
        sample: what is read, answered and trained on.
        gpu: a name of `GPUS`, for times; None gives none.
        pooled_per_frame: tokens per frame of a pooler whose number depends on the data.
        trains: False leaves out what only a training step costs.

    Returns:
        ``tokens``, ``parameters``, ``flops`` (2 per multiply-accumulate) and ``macs``, ``bytes``, ``roofline_s`` with a
        GPU; ``baseline`` with the same, and ``ratio``: this over the baseline.

    Raises:
        UserError: the configuration cannot be built, or the number of tokens is needed and missing.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model, baseline = build_model(config, allow), plain_onevision(config, allow)
    optim: OptimSettings = instantiate(config.optim, allow)
    how: dict[str, Any] = dict(optim=optim, precision=str(config.trainer.precision), gpu=gpu)
    how["checkpointing"] = bool(config.gradient_checkpointing) if trains else None
    newline = Sample(sample.num_frames, sample.text_tokens + 1, sample.answer_tokens)
    card = count(model, sample, pooled_per_frame=pooled_per_frame, **how)
    card["baseline"] = count(baseline, newline, **how)
    card["ratio"] = {key: ratios(card[key], below) for key, below in card["baseline"].items() if key != "macs"}
    return card


def plain_onevision(config: Any, allow: Sequence[str]) -> CrossLMM:
    """Build the plain LLaVA-OneVision of a configuration's geometry: its encoder, projector and LLM, no fusion."""
    encoder, projector, llm = (
        instantiate(node, allow) for node in (config.encoder, config.projector, config.llm.model)
    )
    rows, columns = (math.ceil(side / 2) for side in encoder.grid)
    pooler = BilinearPooler(rows, columns, stage=Stage.AFTER_PROJECTOR)
    return CrossLMM(encoder, pooler, projector, Fusion(v2v=False, t2v=False), llm)


def count(
    model: CrossLMM,
    sample: Sample,
    *,
    optim: OptimSettings,
    checkpointing: bool | None,
    precision: str,
    gpu: str | None = None,
    pooled_per_frame: float | None = None,
) -> Card:
    """Count what one model costs.

    Args:
        model: on the meta device; it is used up.
        sample: see `cost_card`.
        optim: says what is trained.
        checkpointing: whether ``train_step`` recomputes; None leaves it out.
        precision: as in ``trainer.precision``.
        gpu: see `cost_card`.
        pooled_per_frame: see `cost_card`.
    """
    optim.freeze(model)
    parameters, batch = count_parameters(model), sample.batch(model.encoder.image_size)
    context = prepare(model, precision, sample.num_frames, pooled_per_frame)
    memo = Memo()
    prefill, decode, sizes = read_prompt(model, batch, precision, memo)
    flops = {"prefill": _split(prefill.flops), "decode": _split(decode.flops)}
    activations = {}
    if checkpointing is not None:
        step = train_step(model, batch, precision, memo)
        model.gradient_checkpointing_enable()
        checkpointed = train_step(model, batch, precision, memo)
        flops["train_step"] = _split(step.flops + checkpointed.recomputed_flops if checkpointing else step.flops)
        activations = {"activations": step.peak_bytes, "activations_checkpointed": checkpointed.peak_bytes}
    visual = sizes["llm_tokens"] - sample.text_tokens
    card: Card = {
        "tokens": {
            "frames": sample.num_frames,
            "source": sample.num_frames * math.prod(model.encoder.grid),
            "pooled_per_frame": visual / sample.num_frames,
            "text": sample.text_tokens,
            "llm": sizes["llm_tokens"],
            "context": context,
        },
        "parameters": parameters,
        "flops": flops,
        "macs": {phase: {part: number / 2 for part, number in split.items()} for phase, split in flops.items()},
        "bytes": {
            **state_bytes(parameters["total"], precision),
            **activations,
            "prefill": sizes["prefill"],
            "kv_cache": sizes["kv_cache"],
            "t2v_cache": sizes["t2v_cache"],
        },
    }
    if gpu is not None:
        card["roofline_s"] = _roofline(gpu, precision, {"prefill": prefill, "decode": decode})
    return card


def prepare(model: CrossLMM, precision: str, num_frames: int, pooled_per_frame: float | None) -> int:
    """Make a model on the meta device ready to be counted, whatever its pooler asks of the data.

    Args:
        model: on the meta device.
        precision: its weights get the type they would be kept in.
        num_frames: of the clip to come.
        pooled_per_frame: see `cost_card`; not used where the pooler's number is known.

    Returns:
        The LLM's context, which is lifted, because a card is not cut off.

    Raises:
        UserError: the number of tokens is needed and missing.
    """
    model.to(stored_dtype(precision))
    config: Any = model.llm.config
    context, config.max_position_embeddings = config.max_position_embeddings, 2**62
    pooler: Any = model.pooler
    pooler.noise = False  # of VisToG's training: drawn anew, and free
    if not _runs_on_meta(model, min(num_frames, 8)):
        encoder = model.encoder
        known: float | None = model.tokens_per_frame
        if known is None and pooler.stage is not Stage.IN_ENCODER:
            known = try_out(pooler, model.pooled_width, encoder.grid, num_frames)
        if known is None:
            known = check_stated(type(pooler).__name__, pooled_per_frame, math.prod(encoder.grid))
        model.pooler = StatedPooler(pooler, known, encoder.read_block + 1)
        model.virtual_unmerging, model.checks_pooler = "none", False
    return int(context)


def _runs_on_meta(model: CrossLMM, num_frames: int) -> bool:
    batch = Sample(num_frames, text_tokens=2, answer_tokens=1).batch(model.encoder.image_size)
    try:
        read_prompt(model, batch)
    except (NotImplementedError, RuntimeError):  # what torch raises where a value is asked for
        return False
    return True


def count_parameters(model: CrossLMM) -> Card:
    """Count parameters per role and in total, tied ones once: ``total`` and ``trained``."""
    counts = {role: {"total": 0, "trained": 0} for role in (*ROLES, "total")}
    for name, parameter in model.named_parameters():
        for role in (model.role_of(name), "total"):
            counts[role]["total"] += parameter.numel()
            counts[role]["trained"] += parameter.numel() * parameter.requires_grad
    return counts


def state_bytes(total: Mapping[str, int], precision: str) -> dict[str, int]:
    """Count the bytes that stay while a model trains: weights, AdamW's two moments, gradients.

    Args:
        total: parameters, ``total`` and ``trained``.
        precision: as in ``trainer.precision``; mixed keeps all of it in float32.
    """
    size = stored_dtype(precision).itemsize
    return {
        "weights": total["total"] * size,
        "optimizer": total["trained"] * size * ADAM_MOMENTS,
        "gradients": total["trained"] * size,
    }


def _split(flops: Mapping[str, int]) -> dict[str, int]:
    assert set(flops) <= set(PARTS), "every module of a CrossLMM has its part"
    return {**{part: flops.get(part, 0) for part in PARTS}, "total": sum(flops.values())}


def _roofline(gpu: str, precision: str, meters: Mapping[str, Meter]) -> Card:
    computes_in = _FORMATS[compute_dtype(precision)]
    card: Card = {"gpu": gpu, "computes_in": computes_in, "bound": {}}
    for phase, meter in meters.items():
        found = {
            part: least_time_s(meter.causal_flops[part], meter.moved_bytes[part], gpu, computes_in) for part in PARTS
        }
        card[phase] = {part: time_s for part, (time_s, _) in found.items()}
        card[phase]["total"] = sum(card[phase].values())
        card["bound"][phase] = {part: bound for part, (time_s, bound) in found.items() if time_s}
    return card


def ratios(card: Mapping[str, Any], other: Mapping[str, Any]) -> Card:
    """Divide the numbers of one card by those of another; None where there is nothing to divide by."""
    found: Card = {}
    for key, value in card.items():
        below = other.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            found[key] = ratios(value, below)
        elif isinstance(value, int | float) and isinstance(below, int | float):
            found[key] = value / below if below else None
    return found
