"""What answering keeps of the source tokens, what it costs to read it, and what the scopes of V2V cost.

    python benchmarks/fusion_cache.py
    python benchmarks/fusion_cache.py --parts bytes scopes --repeats 5 --json cache.json
    python benchmarks/fusion_cache.py --parts accuracy --seeds 0 1 2

Three tables of fusion's settings that are cheaper than the paper's: bytes kept per frame, at the default geometry and
at the 7B's (the library's own code on the meta device, no weights); time to the first token and per further one; and
V2V's scopes. Times are the process's own CPU time, on one thread: other work on the machine does not count.
`--parts accuracy` trains the default probe instead, each arm and seed by `probe.py`'s runs.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

import probe
import torch
from torch import nn

from lightning_crosslmm.batch import VISUAL_MARK, VideoBatch
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import FusionContext
from lightning_crosslmm.model import CrossLMM, Prompt

CONF = Path(__file__).resolve().parents[1] / "conf"
ARMS = {  # {kv}: as wide as one layer's keys
    "keys and values of each layer": "",
    "int8": "fusion.t2v_cache=int8",
    "keys and values of all layers": "fusion.layers_per_kv=all",
    "keys and values of all layers, int8": "fusion.layers_per_kv=all fusion.t2v_cache=int8",
    "latent of each layer": "fusion.kv_latent={kv}",
    "latent of all layers": "fusion.layers_per_kv=all fusion.kv_latent={kv}",
    "latent of all layers, int8": "fusion.layers_per_kv=all fusion.kv_latent={kv} fusion.t2v_cache=int8",
    "recompute": "fusion.t2v_cache=recompute",
    "recompute, encoder's tokens": "fusion.t2v_cache=recompute fusion.key_source=encoder",
}
DEFAULT, LARGE = (), ("experiment=crosslmm_7b", "llm.model.weights=null", "encoder.weights=null")
# 64 source tokens and 9 pooled ones per frame, as 729 and 9; the tower is nearly nothing, so that fusion shows
SCALED = (
    "encoder.image_size=64",
    "encoder.config.depth=1",
    "pooler.rows=3",
    "pooler.columns=3",
    "llm.model.config.hidden_size=256",
    "llm.model.config.intermediate_size=512",
    "llm.model.config.num_attention_heads=8",
)
SCOPES = {"all": "", "window of 3": "fusion.scope=window fusion.window_frames=1", "frame": "fusion.scope=frame"}


def configure(geometry: Sequence[str], arm: str) -> Any:
    """Compose an arm of one geometry; its latent is as wide as the keys of one layer."""
    shape = compose_overrides(CONF, geometry).llm.model.config
    width = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    return compose_overrides(CONF, [*geometry, *arm.format(kv=width).split()])


def bytes_per_frame(geometry: Sequence[str], arm: str, dtype: torch.dtype) -> int:
    """Let the fused layers keep one frame's tokens, on the meta device, and count what they keep."""
    with torch.device("meta"):
        model = build_model(configure(geometry, arm), ANY_TARGET).to(dtype)
        num_sources = model.encoder.grid[0] * model.encoder.grid[1]
        reads_encoder = model.fusion_settings.key_source == "encoder"
        width = model.encoder.width if reads_encoder else model.llm.config.hidden_size
        unit_SE, shared = model.fusion_sources(torch.empty(num_sources, width, dtype=dtype), dtype)
        kind = model.fusion_settings.t2v_cache
        context = FusionContext(unit_SE, None, None, shared, t2v_cache=kind)
        for number in model.fused_layers:
            model.llm.model.layers[number].fusion(torch.empty(1, 1, model.llm.config.hidden_size, dtype=dtype), context)
    return context.cache_bytes()


def clip(num_frames: int, image_size: int) -> VideoBatch:
    """One clip of noise and a question of 16 tokens."""
    noise = torch.Generator().manual_seed(0)
    ids_L = torch.cat([torch.tensor([VISUAL_MARK]), torch.randint(0, 200, (16,), generator=noise)])
    return VideoBatch(
        frames_FCHW=torch.randint(0, 256, (num_frames, 3, image_size, image_size), dtype=torch.uint8, generator=noise),
        frame_time_s_F=torch.arange(num_frames) / 2,
        visual_offsets=torch.tensor([0, num_frames]),
        sample_of_visual=torch.tensor([0]),
        ids_L=ids_L,
        labels_L=torch.full_like(ids_L, -100),
        answer_L=torch.full_like(ids_L, -1),
        text_offsets=torch.tensor([0, len(ids_L)]),
        row_of_sample=torch.tensor([0]),
        keys=("clip",),
        answer_kinds=(),
        questions=(),
    )


def in_turns(works: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """Do each work `repeats` times, one after the other, so that a busy machine slows all alike; medians by column."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, work in works.items():
            timed = work()
            found[name] += [timed] * (turn > 0)
    columns = next(iter(found.values()))[0]
    return {
        column: {name: statistics.median(each[column] for each in turns) for name, turns in found.items()}
        for column in columns
    }


def time_answer(model: CrossLMM, prompt: Prompt, num_tokens: int) -> dict[str, float]:
    """Time the LLM from a prompt that is ready, so that no frame is encoded: prefill, its fusion, and later tokens."""
    fresh = replace(prompt.context, kept={}, followers={})
    moments_s: list[float] = []
    spent_s = [0.0]
    hooks = [model.llm.lm_head.register_forward_hook(lambda *_: moments_s.append(time.process_time()))]
    for number in model.fused_layers:
        hooks += watch(model.llm.model.layers[number].fusion, lambda s: spent_s.append(s) if not moments_s else None)
    start_s = time.process_time()
    Greedy(1 + num_tokens).generate(
        model.llm, prompt.embeds_RTD, prompt.attention_mask, fresh, stop_id=model.llm.config.vocab_size, pad_id=0
    )
    for hook in hooks:
        hook.remove()
    later_s = [after - before for before, after in zip(moments_s[:-1], moments_s[1:], strict=True)]
    return {
        "prefill, ms": 1e3 * (moments_s[0] - start_s),
        "fusion in prefill, ms": 1e3 * sum(spent_s),
        "per token, ms": 1e3 * statistics.median(later_s),
    }


def watch(block: nn.Module, note: Callable[[float], None]) -> list[Any]:
    """Tell `note` the seconds of each forward pass of a block; gives the hooks."""
    started: list[float] = []
    before = block.register_forward_pre_hook(lambda *_: started.append(time.process_time()))
    return [before, block.register_forward_hook(lambda *_: note(time.process_time() - started.pop()))]


def prepare(arm: str, num_frames: int) -> tuple[CrossLMM, Prompt]:
    """Build an arm of the scaled geometry and encode a clip for it."""
    torch.manual_seed(0)
    model = build_model(configure(SCALED, arm), ANY_TARGET).eval()
    with torch.no_grad():
        return model, model.prompt(clip(num_frames, model.encoder.image_size), pad_left=True, keeps_keys=True)


def time_arms(arms: dict[str, str], num_frames: int, num_tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Time arms of the scaled geometry on one clip."""
    works: dict[str, Callable[[], dict[str, float]]] = {}
    for name, arm in arms.items():
        model, prompt = prepare(arm, num_frames)
        works[name] = functools.partial(time_answer, model, prompt, num_tokens)
    return in_turns(works, repeats)


def measure_accuracy(overrides: Sequence[str], seeds: Sequence[int], arms: Sequence[str], out: Path) -> list[probe.Run]:
    """Train the default probe for each arm and seed, as `probe.py` does, and read what came of it."""
    runs = probe.plan([configured(arm) for arm in arms], seeds, overrides, out)
    out.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.arm}, seed {run.seed}: {run.folder}", flush=True)
        run.train()
    for run in runs:
        run.read()
    return runs


def configured(arm: str) -> str:
    """Settings of an arm at the default geometry, as words of a command line."""
    latent = configure(DEFAULT, arm).fusion.kv_latent
    return f"fusion=crosslmm {arm.format(kv=latent)}".strip()


def table(title: str, columns: dict[str, dict[str, float]], form: str = "{:,.1f}") -> str:
    """Lay columns of figures out by the names of their rows."""
    lines = [f"{title:40}" + "".join(f"{name:>26}" for name in columns)]
    for row in next(iter(columns.values())):
        lines.append(f"{row:40}" + "".join(f"{form.format(column[row]):>26}" for column in columns.values()))
    return "\n".join(lines)


def main() -> None:
    """Measure the parts asked for, print their tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description="What cheaper keys and values of fusion keep, cost and reach.")
    parser.add_argument("overrides", nargs="*", help="settings of train.py, for --parts accuracy; before the options")
    parser.add_argument(
        "--parts", nargs="+", default=["bytes", "time", "scopes"], choices=("bytes", "time", "scopes", "accuracy")
    )
    parser.add_argument("--frames", type=int, default=256, help="of the clip that is timed")
    parser.add_argument("--tokens", type=int, default=16, help="decoded after the first one, 1 or more")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns, after one to warm up")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--arms", nargs="+", default=list(ARMS.values()), help="settings of one arm each, for accuracy")
    parser.add_argument("--out", type=Path, default=Path("runs/fusion_cache"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        if "bytes" in chosen.parts:
            for place, geometry, dtype in (("default", DEFAULT, torch.float32), ("7B", LARGE, torch.bfloat16)):
                kept = {name: bytes_per_frame(geometry, arm, dtype) / 1e3 for name, arm in ARMS.items()}
                naive = next(iter(kept.values()))
                found[f"kB per frame, {place}"] = kept
                found[f"share, {place}"] = {name: each / naive for name, each in kept.items()}
            print(table("kept for answering", found, "{:,.3f}"), "\n")
        with torch.inference_mode():
            if "time" in chosen.parts:
                found["time"] = time_arms(ARMS, chosen.frames, chosen.tokens, chosen.repeats)
                print(table(f"{chosen.frames} frames, scaled geometry", found["time"]), "\n")
            if "scopes" in chosen.parts:
                found["scopes"] = time_arms(SCOPES, chosen.frames, 1, chosen.repeats)
                print(table(f"V2V at {chosen.frames} frames", found["scopes"]), "\n")
        if "accuracy" in chosen.parts:
            runs = measure_accuracy(chosen.overrides, chosen.seeds, chosen.arms, chosen.out)
            found["accuracy"] = [asdict(run) for run in runs]
            print(probe.table(runs))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
