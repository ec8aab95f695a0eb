"""Named GPUs: what their vendor prints, and what is the least time that work takes on one."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_crosslmm.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """What a GPU's datasheet promises; dense rates, where a sheet prints those of sparse matrices half of them.

    Args:
        flops_per_s: by what is computed in: ``bf16``, ``fp16``, ``fp32`` (on plain cores, as torch does by default).
        bandwidth: bytes per second from and to its memory.
        memory: bytes.
        source: the vendor's document.
    """

    flops_per_s: Mapping[str, float]
    bandwidth: float
    memory: float
    source: str


def _gpu(bf16: float | None, fp16: float, fp32: float, gb_per_s: float, gb: float, source: str) -> Gpu:
    rates = {"bf16": bf16, "fp16": fp16, "fp32": fp32}
    return Gpu({name: rate * 1e12 for name, rate in rates.items() if rate}, gb_per_s * 1e9, gb * 1e9, source)


# TFLOP/s in bf16, fp16 and fp32, GB/s, GB
GPUS = {
    "a100-40": _gpu(312, 312, 19.5, 1555, 40, "NVIDIA A100 datasheet, 40GB SXM"),
    "a100-80": _gpu(312, 312, 19.5, 2039, 80, "NVIDIA A100 datasheet, 80GB SXM"),
    "h100": _gpu(989.5, 989.5, 67, 3350, 80, "NVIDIA H100 datasheet, SXM; half of its sparse 1,979 TFLOP/s"),
    "h200": _gpu(989.5, 989.5, 67, 4800, 141, "NVIDIA H200 datasheet, SXM; half of its sparse 1,979 TFLOP/s"),
    "b200": _gpu(2250, 2250, 75, 8000, 180, "NVIDIA HGX B200 datasheet, an eighth; half of its sparse 4.5 PFLOP/s"),
    "l40s": _gpu(362, 362, 91.6, 864, 48, "NVIDIA L40S datasheet; half of its sparse 733 TFLOP/s, rounded down there"),
    "rtx4090": _gpu(165.2, 165.2, 82.6, 1008, 24, "NVIDIA Ada architecture whitepaper, sums in fp32"),
    "t4": _gpu(None, 65, 8.1, 320, 16, "NVIDIA T4 datasheet"),
    "v100": _gpu(None, 125, 15.7, 900, 32, "NVIDIA V100 datasheet, 32GB SXM2"),
}


def find_gpu(name: str) -> Gpu:
    """Look up a GPU.

    Raises:
        UserError: it is not in the table; lists those that are.
    """
    if name not in GPUS:
        raise UserError(f"gpu={name}: is not in the table{nearest(name, GPUS)}; it has {', '.join(GPUS)}")
    return GPUS[name]


def peak_flops_per_s(gpu: str, computes_in: str) -> float:
    """Give the dense peak of a GPU for a number format.

    Raises:
        UserError: an unknown GPU, or one whose matrix units do not take the format.
    """
    rates = find_gpu(gpu).flops_per_s
    if computes_in not in rates:
        raise UserError(f"gpu={gpu}: its sheet has no {computes_in}; set trainer.precision=16-mixed or 32-true")
    return rates[computes_in]


def least_time_s(flops: float, num_bytes: float, gpu: str, computes_in: str) -> tuple[float, str]:
    """Say how long work takes at least, and what bounds it.

    ``max(flops / peak, bytes / bandwidth)``

    Source: S. Williams et al., "Roofline", Communications of the ACM 52(4), 2009.

    Args:
        flops: floating-point operations, 2 per multiply-accumulate.
        num_bytes: read and written.
        gpu: a name of `GPUS`.
        computes_in: ``bf16``, ``fp16`` or ``fp32``.

    Returns:
        Seconds, and ``compute`` or ``memory``.

    Raises:
        UserError: see `peak_flops_per_s`.
    """
    computing_s = flops / peak_flops_per_s(gpu, computes_in)
    moving_s = num_bytes / find_gpu(gpu).bandwidth
    return max(computing_s, moving_s), "compute" if computing_s >= moving_s else "memory"
