"""Two models of one geometry, with random weights: CrossLMM, and LLaVA-OneVision as transformers has it.

Axis letters:
    F  frames    C H W  channels, pixel rows and columns    R T  rows and positions of the LLM batch
"""

import functools
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

import torch
import transformers
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from lightning_crosslmm.batch import VideoBatch
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides
from lightning_crosslmm.cost import GPUS, Sample, find_gpu, plain_onevision
from lightning_crosslmm.cost.meta import compute_dtype, stored_dtype
from lightning_crosslmm.cost.phases import read_prompt
from lightning_crosslmm.model import CrossLMM

CONF = Path(__file__).resolve().parents[1] / "conf"
CONTEXT = "llm.model.config.max_position_embeddings=1048576"  # nothing is cut off, on either side
SEVEN = ("experiment=crosslmm_7b", "encoder.weights=null", "llm.model.weights=null", CONTEXT)
TRUE = (*SEVEN, "trainer.precision=bf16-true")
# An eighth of the widths and 1 / 9 of the patches, so that attention over a clip keeps its share of the LLM, too
SCALED = (
    *SEVEN,
    "encoder.image_size=36",
    "encoder.frames_per_chunk=8",
    "trainer.precision=32-true",
    "encoder.layer=-1",
    "encoder.config.hidden_size=144",
    "encoder.config.intermediate_size=538",
    "encoder.config.num_hidden_layers=8",
    "encoder.config.num_attention_heads=2",
    "encoder.config.patch_size=4",
    "pooler.rows=1",
    "llm.model.config.hidden_size=448",
    "llm.model.config.intermediate_size=2368",
    "llm.model.config.num_hidden_layers=8",
    "llm.model.config.num_attention_heads=7",
    "llm.model.config.num_key_value_heads=1",
    "llm.model.config.vocab_size=19008",
)
# keys and values of all layers from one narrow latent of the encoder's own tokens, kept in 8 bit; {kv}: as wide as one
# layer's keys
CHEAP = "fusion.key_source=encoder fusion.layers_per_kv=all fusion.kv_latent={kv} fusion.t2v_cache=int8"


class Reader(Protocol):
    """A model that reads clips."""

    name: str
    module: Any
    encoder: nn.Module

    def clip(self, num_frames: int, text_tokens: int) -> Any:
        """Make what `read` takes: noise, ready on the device."""
        ...

    def read(self, clip: Any) -> Callable[[], None]:
        """Read a clip and a question, up to the first token of the answer; gives what decodes one more."""
        ...


@dataclass
class Ours:
    """CrossLMM."""

    name: str
    module: CrossLMM

    @property
    def encoder(self) -> nn.Module:
        """What turns frames into patches."""
        return self.module.encoder

    def clip(self, num_frames: int, text_tokens: int) -> VideoBatch:
        """See `Reader.clip`."""
        device = next(self.module.parameters()).device
        batch = Sample(num_frames, text_tokens, 1).batch(self.module.encoder.image_size, device=str(device))
        return replace(batch, frames_FCHW=_noise(batch.frames_FCHW.shape, device))

    def read(self, clip: VideoBatch) -> Callable[[], None]:
        """See `Reader.read`."""
        prompt = self.module.prompt(clip, pad_left=True, keeps_keys=True)
        extra = {} if prompt.context is None else {"fusion": prompt.context}
        said = self.module.llm(inputs_embeds=prompt.embeds_RTD, use_cache=True, logits_to_keep=1, **extra)
        return _follow(self.module.llm, said, extra)


@dataclass
class Theirs:
    """LLaVA-OneVision of transformers, its own code."""

    name: str
    module: Any

    @property
    def encoder(self) -> nn.Module:
        """See `Ours.encoder`."""
        tower: nn.Module = self.module.model.vision_tower
        return tower

    def clip(self, num_frames: int, text_tokens: int) -> dict[str, Tensor]:
        """See `Reader.clip`; pixels are normalised beforehand, which ours does while it reads."""
        config, weight = self.module.config, self.module.lm_head.weight
        side = config.vision_config.image_size
        pixels_FCHW = (_noise((num_frames, 3, side, side), weight.device).to(weight.dtype) / 255 - 0.5) / 0.5
        half = math.ceil(side // config.vision_config.patch_size / 2)
        ids = [config.video_token_id] * (num_frames * half * half + 1) + [0] * text_tokens
        return {
            "input_ids": torch.tensor([ids], device=weight.device),
            "pixel_values_videos": pixels_FCHW[None],
        }

    def read(self, clip: dict[str, Tensor]) -> Callable[[], None]:
        """See `Reader.read`."""
        return _follow(self.module, self.module(**clip, use_cache=True, logits_to_keep=1), {})


def _noise(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.randint(0, 256, tuple(shape), dtype=torch.uint8, device=device)


def _follow(llm: Any, said: Any, extra: dict[str, Any]) -> Callable[[], None]:
    cache, ids_RT = said.past_key_values, said.logits[:, -1:].argmax(-1)

    def decode() -> None:
        nonlocal ids_RT
        more = llm(input_ids=ids_RT, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
        ids_RT = more.logits[:, -1:].argmax(-1)

    return decode


def configure(geometry: Sequence[str], arm: str = "") -> Any:
    """Compose an arm of one geometry."""
    shape = compose_overrides(CONF, geometry).llm.model.config
    width = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    return compose_overrides(CONF, [*geometry, *arm.format(kv=width).split()])


def build_ours(config: Any, name: str, device: str) -> Ours:
    """Build CrossLMM with random weights, in the type of the settings' precision."""
    with torch.device(device):
        return Ours(name, build_model(config, ANY_TARGET).to(stored_dtype(config.trainer.precision)).eval())


def build_theirs(config: Any, device: str) -> Theirs:
    """Build transformers' LLaVA-OneVision with the encoder and LLM of a configuration."""
    tower, llm = dict(config.encoder.config), dict(config.llm.model.config)
    layers = config.encoder.layer % tower["num_hidden_layers"] + 1
    tower.update(image_size=config.encoder.image_size, num_hidden_layers=layers, vision_use_head=False)
    settings = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**{name: each for name, each in tower.items() if name != "model_type"}),
        text_config=Qwen2Config(**{name: each for name, each in llm.items() if name not in _NAMES}, **_plain(llm)),
        image_token_index=llm["vocab_size"] - 2,
        video_token_index=llm["vocab_size"] - 1,
        vision_feature_layer=-1,
    )
    with torch.device(device):
        module = LlavaOnevisionForConditionalGeneration(settings)
    return Theirs("LLaVA-OneVision", module.to(stored_dtype(config.trainer.precision)).eval())


_NAMES = ("model_type", "rope_parameters")


def _plain(llm: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", **llm["rope_parameters"]}}


@dataclass(frozen=True)
class Work:
    """What reading a clip takes, counted on the meta device.

    Args:
        flops: by part, of all pairs of positions, 2 per multiply-accumulate.
        causal_flops: all of them, with causal attention as its kernels run it, half.
        moved_bytes: operands and results of all these operations, each once.
    """

    flops: dict[str, int]
    causal_flops: int
    moved_bytes: int


def count_work(config: Any, num_frames: int, text_tokens: int, *, is_plain: bool) -> Work:
    """Count what reading a clip takes, from the library's own modules.

    Args:
        config: composed.
        num_frames: of the clip.
        text_tokens: of the question.
        is_plain: of the LLaVA-OneVision of this geometry; transformers' runs the same operations.
    """
    precision = str(config.trainer.precision)
    with torch.device("meta"):
        model = plain_onevision(config, ANY_TARGET) if is_plain else build_model(config, ANY_TARGET)
    model.to(stored_dtype(precision))
    sample = Sample(num_frames, text_tokens + is_plain, 1)  # a newline ends a clip there
    meter, _, _ = read_prompt(model, sample.batch(model.encoder.image_size), precision)
    causal, moved = (sum(counts.values()) for counts in (meter.causal_flops, meter.moved_bytes))
    return Work(dict(meter.flops), causal, moved)


@functools.cache
def work_ratios(geometry: tuple[str, ...]) -> dict[str, float]:
    """Say what a scaled geometry has to keep, from the modules themselves, on the meta device."""
    config, frames = configure(geometry), 256
    ours, plain = (count_work(config, frames, 64, is_plain=is_plain) for is_plain in (False, True))
    with torch.device("meta"):
        model = build_model(config, ANY_TARGET)
    source, side = math.prod(model.encoder.grid), model.encoder.grid[0]
    linear, attention = plain.flops["llm_linear"], plain.flops["llm_attention"] / 2
    return {
        "encoder / LLM's matrices, FLOPs per frame": plain.flops["encoder"] / linear,
        "source / pooled tokens, LLaVA-OneVision": source / math.ceil(side / 2) ** 2,
        "source / pooled tokens, ours": source / (model.tokens_per_frame or math.nan),
        f"LLM's causal attention / its matrices, {frames} frames": attention / linear,
        f"encoder's share of FLOPs, ours, {frames} frames": ours.flops["encoder"] / sum(ours.flops.values()),
        f"encoder's share of FLOPs, LLaVA-OneVision, {frames} frames": plain.flops["encoder"]
        / sum(plain.flops.values()),
    }


def peak_rates(device: torch.device, precision: str) -> tuple[float, float]:
    """Give the most that a device does, in FLOPs and bytes per second.

    A GPU's are those of its sheet. A CPU has none: there it is the best of some products of two matrices, in the
    process's own time, and bytes count nothing.

    Raises:
        UserError: a GPU that is not in the cost card's table; lists those that are.
    """
    dtype = compute_dtype(precision)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        gpu = find_gpu(next((key for key in GPUS if key.split("-")[0] in name.replace(" ", "")), name))
        return gpu.flops_per_s[{torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")], gpu.bandwidth
    side, least_s = 1024, math.inf
    one = torch.rand(side, side, dtype=dtype)
    for _ in range(5):
        start_s = time.process_time()
        one @ one
        least_s = min(least_s, (time.process_time() - start_s) / torch.get_num_threads())
    return 2 * side**3 / least_s, math.inf


def heading_words(device: torch.device, what: str, precision: str) -> str:
    """Say in one line where and with what something was measured."""
    on_cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} thread"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{what}, {precision}; {machine}; {versions}"


def title(words: str) -> list[str]:
    """Head a page: what was measured, and by which command."""
    command = shlex.join([f"benchmarks/{Path(sys.argv[0]).stem}.py", *sys.argv[1:]])
    return [f"# {words}, measured", "", f"Written by `python {command}`.", ""]
