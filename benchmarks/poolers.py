"""What each pooler costs beside the encoder: time and memory of its own, at 27x27 patches of width 1152 and 64 frames.

    python benchmarks/poolers.py
    python benchmarks/poolers.py --frames 8 --blocks 2 --arms average tome
    python benchmarks/poolers.py --device cuda --dtype bfloat16 --tower-frames 64

The tower is SigLIP so400m's, from random weights. A pooler's own time is that of its forward pass, plus, where it asks
for saliency or keys, what the last block takes longer when they are noted, plus, where it acts between the blocks, the
time spent in its hook. Towers run frame by frame, so their time is measured on `--tower-frames` and scaled to all. On a
CPU all is the process's own time on one thread: other work on the machine does not count.

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    N  patches per frame    E  encoder width    D  LLM width
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gauges import Stopwatch, peak_bytes
from omegaconf import DictConfig
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

from lightning_crosslmm.compose import ANY_TARGET, compose_overrides, instantiate
from lightning_crosslmm.encoder import Encoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import Pooler, Stage
from lightning_crosslmm.taps import Asks, BlockHook, Questions, Taps
from lightning_crosslmm.tokens import TokenSet

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
LLM_WIDTH = 3584
QUESTION_TOKENS = 16
# Budgets of a published size where the arm's default is the tiny probe's, of 16 patches a frame.
BUDGETS = {
    "c_abstractor": ["pooler.num_tokens=9", "pooler.width=1024", "pooler.depth=3"],
    "dymu": ["pooler.thresholds=1.0"],  # nothing merges, which is its most work: of random weights patches look alike
    "folder": ["pooler.num_tokens=64"],
    "perceiver": ["pooler.num_tokens=64", "pooler.depth=6", "pooler.heads=8", "pooler.head_width=64"],
    "qformer": ["pooler.num_tokens=32", "pooler.width=768", "pooler.depth=12", "pooler.heads=12"],
    "quecc": ["pooler.rows=3"],
    "random": ["pooler.num_tokens=64"],
    "strided": ["pooler.stride=9"],
    "tokenpacker": ["pooler.rows=3"],
    "tome": ["pooler.merges_per_block=23"],
    "uniform": ["pooler.num_tokens=64"],
    "vistog": ["pooler.num_tokens=64"],
}
LARGEST_SHARE = 0.05


@dataclass(frozen=True)
class Cost:
    """What one arm costs over all frames.

    Args:
        arm: its name.
        tokens_per_frame: that it leaves, on average.
        own_ms: its forward pass, what it makes the tower note, and its hook.
        tower_ms: the tower with it, the plain tower's where it leaves the tower alone.
        own_bytes: memory above its input during its forward pass, or between the blocks.
        is_free: it has nothing to train.
    """

    arm: str
    tokens_per_frame: float
    own_ms: float
    tower_ms: float
    own_bytes: int
    is_free: bool


class TimedHook(BlockHook):
    """Call a pooler's hook, and time it.

    Args:
        hook: the pooler's.
        watch: opened and closed around each call.
    """

    def __init__(self, hook: BlockHook, watch: Stopwatch) -> None:
        self.hook, self.watch = hook, watch
        self.num_isolated, self.wants_class_row = hook.num_isolated, hook.wants_class_row

    def begin(self, tokens_FnE: Tensor, num_prefix: int) -> Tensor:
        """Before the first block."""
        return self._timed(self.hook.begin, tokens_FnE, num_prefix)

    def key_bias(self, block: int) -> Tensor | None:
        """Before a block's attention."""
        return self._timed(self.hook.key_bias, block)

    def after_attention(self, block: int, tokens_FnE: Tensor, keys_FnK: Tensor, class_Fn: Tensor | None) -> Tensor:
        """Between a block's attention and its MLP."""
        return self._timed(self.hook.after_attention, block, tokens_FnE, keys_FnK, class_Fn)

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self.watch.open("hook")
        try:
            return call(*arguments)
        finally:
            self.watch.close()


class Bench:
    """Towers, their output, and a stopwatch.

    Args:
        chosen: the command line.
        config: composed, for the tower.
    """

    def __init__(self, chosen: argparse.Namespace, config: DictConfig) -> None:
        self.device, self.dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
        self.frames, self.turns = chosen.frames, chosen.turns
        self.tower_frames = min(chosen.tower_frames, chosen.frames)
        self.config, self.blocks = config, chosen.blocks
        self.watch, self.scale = Stopwatch(self.device, time.process_time), self.frames / self.tower_frames
        self.tower, side = self.encoder(chosen.blocks), config.encoder.image_size
        self.pixels_FCHW = torch.randint(0, 256, (self.tower_frames, 3, side, side), dtype=torch.uint8).to(self.device)
        self.tower_ms = self.time_ms(lambda: self.tower(self.pixels_FCHW)) * self.scale
        last_FNE = self.tower(self.pixels_FCHW)
        self.patches_FNE = last_FNE.repeat(-(-self.frames // self.tower_frames), 1, 1)[: self.frames]

    def encoder(self, blocks: int) -> Encoder:
        """Build a tower of so many blocks, all of which are read."""
        self.config.encoder.config.num_hidden_layers = blocks
        self.config.encoder.layer = -1
        return instantiate(self.config.encoder, ANY_TARGET).to(self.device, self.dtype).eval()

    def time_ms(self, work: Callable[[], Any]) -> float:
        """Take the median over the turns, after one that is not counted where turns are cheap."""
        spent = []
        for turn in range(self.turns + (self.device.type == "cuda")):
            self.watch.open("work")
            work()
            self.watch.close()
            spent.append((turn, self.watch.read_ms()["work"]))
        return statistics.median(ms for turn, ms in spent if turn or self.device.type != "cuda")

    def tapped_ms(self, asks: Asks) -> tuple[Taps, float]:
        """Tell what noting costs: the last block with and without, in turns, over the frames of the tower."""
        tower = self.encoder(1)
        if asks.layers:  # only outputs are kept, which takes no time; which blocks they are of makes no difference
            return self._random_taps(asks), 0.0
        tower.prepare(asks)
        taps, longer = Taps(asks), []
        for _ in range(3):
            taps = Taps(asks)
            with_ms = self.time_ms(lambda taps=taps: tower(self.pixels_FCHW, taps=taps))
            longer.append(with_ms - self.time_ms(lambda: tower(self.pixels_FCHW)))
        copies = -(-self.frames // self.tower_frames)
        joined = Taps(asks, **{name: torch.cat([getattr(taps, name)] * copies) for name in asks.fields})
        for name in ("saliency_FN", "keys_FNK"):
            if (noted := getattr(joined, name)) is not None:
                setattr(joined, name, noted[: self.frames])
        return joined, max(0.0, statistics.median(longer)) * self.scale

    def _random_taps(self, asks: Asks) -> Taps:
        num_frames, num_patches, width = self.patches_FNE.shape
        layers_FNAE = self.patches_FNE.new_empty(num_frames, num_patches, len(asks.layers), width).normal_()
        return Taps(asks, layers_FNAE=layers_FNAE)

    def set_of(self, patches_FNE: Tensor) -> TokenSet:
        """One clip of all frames."""
        frames = len(patches_FNE)
        times_s = torch.arange(frames, dtype=torch.float32)
        return TokenSet.from_grid(patches_FNE, self.tower.grid, torch.tensor([0, frames]), torch.tensor([0]), times_s)

    def cost(self, arm: str, pooler: Pooler) -> Cost:
        """Measure one arm."""
        if pooler.stage is Stage.IN_ENCODER:
            return self._cost_inside(arm, pooler)
        width = LLM_WIDTH if pooler.stage is Stage.AFTER_PROJECTOR else self.tower.width
        pooler.connect(width, LLM_WIDTH, self.tower.grid)
        pooler.to(self.device, self.dtype).eval()
        given: dict[str, Any] = {}
        taps_ms = 0.0
        if pooler.asks.needs:
            given["taps"], taps_ms = self.tapped_ms(pooler.asks)
        if pooler.needs & {"question", "question_summary"}:
            question_QD = self.patches_FNE.new_empty(QUESTION_TOKENS, LLM_WIDTH).normal_()
            given["questions"] = Questions(question_QD, torch.tensor([0, QUESTION_TOKENS]), question_QD[-1:])
        patches_FNE = self.patches_FNE
        if width != self.tower.width:  # the projector's work is not the pooler's
            patches_FNE = patches_FNE.new_empty(*patches_FNE.shape[:2], width).normal_()
        tokens, results = self.set_of(patches_FNE), []

        def pool() -> None:
            results[:] = [pooler(tokens, **given)]

        own_ms, own_bytes = self.time_ms(pool), peak_bytes(self.device, pool)
        pooled = results[0][0] if isinstance(results[0], tuple) else results[0]
        is_free = not any(True for _ in pooler.parameters())
        left = pooled.num_tokens / self.frames
        return Cost(arm, left, own_ms + taps_ms, self.tower_ms + taps_ms, own_bytes, is_free)

    def _cost_inside(self, arm: str, pooler: Pooler) -> Cost:
        pooler.enter(self.tower.facts())
        pooler.connect(self.tower.width, LLM_WIDTH, self.tower.grid)
        pooler.to(self.device, self.dtype).eval()
        watch, spent_ms, left = Stopwatch(self.device, time.process_time), [], 0.0
        nothing = self.set_of(self.patches_FNE[: self.tower_frames, :, :0])

        def run() -> None:
            nonlocal left
            hook = pooler.hook()
            watch.open("tower")
            output_FnE = self.tower(self.pixels_FCHW, hook=TimedHook(hook, watch))
            watch.close()
            watch.open("hook")
            pooled, _ = pooler.collect([hook], [output_FnE], nothing)
            watch.close()
            left = pooled.num_tokens / self.tower_frames
            spent_ms.append(watch.read_ms())

        for _ in range(self.turns):
            run()
        own_ms, tower_ms = (statistics.median(spent[part] for spent in spent_ms) for part in ("hook", "tower"))
        own_bytes = max(0, peak_bytes(self.device, run) - peak_bytes(self.device, lambda: self.tower(self.pixels_FCHW)))
        is_free = not any(True for _ in pooler.parameters())
        return Cost(arm, left, own_ms * self.scale, tower_ms * self.scale, own_bytes, is_free)


def table(bench: Bench, costs: Sequence[Cost]) -> str:
    """Write one row per arm."""
    rows, columns = bench.tower.grid
    lines = [
        f"{bench.frames} frames of {rows}x{columns}x{bench.tower.width} on {bench.device}, {bench.dtype}, "
        f"{torch.get_num_threads()} threads; plain tower of {bench.blocks} blocks: {bench.tower_ms:,.0f} ms "
        f"(measured on {bench.tower_frames} frames)",
        "",
        "| arm | trained | tokens per frame | own ms | of the tower | own MiB | tower with it ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cost in costs:
        trained, share = "no" if cost.is_free else "yes", cost.own_ms / bench.tower_ms
        lines.append(
            f"| {cost.arm} | {trained} | {cost.tokens_per_frame:.1f} | {cost.own_ms:,.1f} | {share:.2%} | "
            f"{cost.own_bytes / 2**20:,.0f} | {cost.tower_ms:,.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the table; with ``--check`` exit code 1 if an arm without weights takes 5 % of the tower's time or more."""
    arms = sorted(path.stem for path in (CONF_DIR / "pooler").glob("*.yaml"))
    parser = argparse.ArgumentParser(description="Measure every pooler beside the encoder.")
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms, metavar="ARM")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--tower-frames", type=int, default=4, help="frames that the tower itself is measured on")
    parser.add_argument("--blocks", type=int, default=26)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--check", action="store_true", help="hold the project's bar against it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    try:
        config = compose_overrides(CONF_DIR, ["encoder=siglip2_so400m", "encoder.weights=null"])
        with torch.inference_mode():
            bench, costs = Bench(chosen, config), []
            for arm in chosen.arms:
                words = [f"pooler={arm}", *BUDGETS.get(arm, [])]
                costs.append(bench.cost(arm, instantiate(compose_overrides(CONF_DIR, words).pooler, ANY_TARGET)))
                print(table(bench, costs[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(bench, costs))
    slow = [cost.arm for cost in costs if cost.is_free and cost.own_ms >= LARGEST_SHARE * bench.tower_ms]
    if slow:
        print(f"\nat or above {LARGEST_SHARE:.0%} of the tower: {', '.join(slow)}")
    return int(chosen.check and bool(slow))


if __name__ == "__main__":
    raise SystemExit(main())
