"""Where the time of a training step goes, part by part, and how much memory the step takes.

    python benchmarks/step.py
    python benchmarks/step.py trainer=gpu data.global_batch_size=32 --steps 50 --arms fusion=none fusion=crosslmm

Takes the settings of `train.py` and trains on its data: real batches, forward, backward and optimizer steps, in one
process on one device. Each arm adds settings of its own; arms take turns step by step, so that a busy machine slows all
alike.
"""

import argparse
import json
import logging
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from gauges import Stopwatch, peak_bytes
from omegaconf import DictConfig, OmegaConf
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

from lightning_crosslmm.batch import VISUAL_MARK, VideoBatch
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides, instantiate
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.module import CrossLMMModule
from lightning_crosslmm.run_folder import replacing
from lightning_crosslmm.text import load_tokenizer

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
PARTS = ("data wait", "encoder", "pooler, projector", "LLM", "fusion", "head, loss", "backward", "optimizer")
REST, TOTAL = "rest", "total"


class Arm:
    """One configuration in training, and what was measured of it.

    Args:
        config: composed, for one process.
        batches: training batches without end.
        answer_kinds: question types of the data.
    """

    def __init__(self, config: DictConfig, batches: Iterator[VideoBatch], answer_kinds: tuple[str, ...]) -> None:
        self.trainer = instantiate(config.trainer, ANY_TARGET, callbacks=[], logger=False)
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError(
                f"trainer.precision: {config.trainer.precision} scales the loss, which is not measured; use bf16-mixed"
            )
        lightning.seed_everything(config.seed, verbose=False)
        optim = instantiate(config.optim, ANY_TARGET)
        module = CrossLMMModule(
            model=build_model(config, ANY_TARGET),
            tokenizer=load_tokenizer(config.llm.tokenizer),
            optim=optim,
            decoding=instantiate(config.decoding, ANY_TARGET),
            answer_kinds=answer_kinds,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.device, self.batches = self.trainer.strategy.root_device, batches
        self.module = self.trainer.precision_plugin.convert_module(module).to(self.device).train()
        self.optimizer = optim.optimizer(module.model)
        self.schedule = optim.scheduler(self.optimizer, self.trainer.max_steps)
        self.watch = self._watched()
        self.steps_ms: list[Counter[str]] = []
        self.counts: Counter[str] = Counter()
        self.peak_bytes = 0

    def _watched(self) -> Stopwatch:
        watch, model = Stopwatch(self.device), self.module.model
        watch.watch("encoder", model.encoder)
        for part in (model.pooler, model.projector, model.frame_time, model.encoder_time):
            if part is not None:
                watch.watch("pooler, projector", part)
        watch.watch("fusion", model.fusion_sources)
        watch.watch("LLM", model.llm.model)
        for number in model.fused_layers:
            watch.watch("fusion", model.llm.model.layers[number].fusion)
        watch.watch("head, loss", model.llm.lm_head, closes=False)
        model.pooler.register_forward_hook(lambda _module, _inputs, pooled: self._note_pooled(pooled.num_tokens))
        return watch

    def _note_pooled(self, num_tokens: int) -> None:
        self.num_pooled = num_tokens

    def train(self, batch: VideoBatch) -> None:
        """Do one optimizer step on a batch, as Lightning would."""
        batch = batch.to(self.device, non_blocking=True)
        self.watch.listening = True
        with self.trainer.precision_plugin.train_step_context():
            loss = self.module.training_step(batch, 0)
        self.watch.listening = False
        self.watch.close()  # head and loss, open since the head began
        self.watch.open("backward")
        loss.backward()
        self.watch.close()
        self.watch.open("optimizer")
        if self.trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.trainer.gradient_clip_val)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.watch.close()

    def time_step(self, *, keep: bool) -> None:
        """Time one step from asking for its batch to the end of its optimizer step."""
        self.watch.open(TOTAL)
        self.watch.open("data wait")
        batch = next(self.batches)
        self.watch.close()
        self.train(batch)
        self.watch.close()
        ms = self.watch.read_ms()
        ms["LLM"] -= ms["fusion"]  # which runs inside it
        ms[REST] = ms[TOTAL] - sum(ms[part] for part in PARTS)
        if ms[REST] < -1e-3 * ms[TOTAL]:
            raise RuntimeError(f"parts overlap: together {-ms[REST]:.3f} ms more than their step's {ms[TOTAL]:.3f} ms")
        if keep:
            self.steps_ms.append(ms)
            num_frames, num_text = len(batch.frames_FCHW), int((batch.ids_L != VISUAL_MARK).sum())
            num_tokens = num_text + (self.num_pooled if num_frames else 0)
            self.counts.update(samples=batch.num_samples, frames=num_frames, tokens=num_tokens)

    def measure_memory(self) -> None:
        """Do one step and note how far memory rises above weights and optimizer states."""
        batch = next(self.batches)
        self.peak_bytes = max(self.peak_bytes, peak_bytes(self.device, lambda: self.train(batch)))
        self.watch.read_ms()

    def summary(self) -> dict[str, Any]:
        """Sum up what was measured; shares and rates are of all steps together."""
        total_ms = sum(ms[TOTAL] for ms in self.steps_ms)
        rows = {}
        for part in (*PARTS, REST, TOTAL):
            each = [ms[part] for ms in self.steps_ms]
            median, p90 = np.percentile(each, (50, 90)).tolist()
            rows[part] = {
                "median_ms": median,
                "p90_ms": p90,
                "mean_ms": sum(each) / len(each),
                "share": sum(each) / total_ms,
            }
        return {
            "parts": rows,
            "steps": len(self.steps_ms),
            "samples_per_step": self.counts["samples"] / len(self.steps_ms),
            "frames_per_s": self.counts["frames"] / total_ms * 1e3,
            "tokens_per_s": self.counts["tokens"] / total_ms * 1e3,
            "peak_bytes": self.peak_bytes,
            "parameters": self.module.model.num_parameters(),
        }


def compose_arm(words: list[str], device: str | None) -> DictConfig:
    """Compose an arm's settings for one process, which has as many samples at a time as training would."""
    config = compose_overrides(CONF_DIR, words)
    config.trainer.update(devices=1, num_nodes=1, strategy="auto")
    if device is not None:
        config.trainer.accelerator = device
    pieces = config.trainer.accumulate_grad_batches
    if config.data.global_batch_size % pieces:
        size = config.data.global_batch_size
        raise UserError(f"data.global_batch_size: {size} does not divide by trainer.accumulate_grad_batches={pieces}")
    config.data.global_batch_size //= pieces
    return config


def endless(datamodule: lightning.LightningDataModule) -> Iterator[VideoBatch]:
    """Give the training batches of one epoch after another."""
    loader = datamodule.train_dataloader()
    while True:
        yield from loader


def measure(configs: dict[str, DictConfig], steps: int, warmup: int) -> dict[str, Arm]:
    """Train the arms in turns; those with the same data settings take their batches from one loader."""
    sources: dict[str, tuple[Any, Iterator[VideoBatch]]] = {}
    arms: dict[str, Arm] = {}
    try:
        for name, config in configs.items():
            settings = OmegaConf.to_yaml(config.data, resolve=True)
            if settings not in sources:
                datamodule = instantiate(config.data, ANY_TARGET)
                datamodule.prepare_data()
                datamodule.setup("fit")
                sources[settings] = datamodule, endless(datamodule)
            datamodule, batches = sources[settings]
            arms[name] = Arm(config, batches, datamodule.answer_kinds)
        for number in range(warmup + steps):
            for arm in arms.values():
                arm.time_step(keep=number >= warmup)
        for _ in range(2):
            for arm in arms.values():
                arm.measure_memory()
    finally:
        for datamodule, _ in sources.values():
            datamodule.teardown("fit")
    return arms


def table(arms: dict[str, dict[str, Any]], memory: str) -> str:
    """Lay the summaries out: a row per part, three columns per arm."""
    width = max(30, *(len(name) + 2 for name in arms))
    lines = [" " * 20 + "".join(f"{name:>{width}}" for name in arms)]
    lines.append(f"{'ms':20}" + f"{'median':>{width - 18}}{'p90':>10}{'share':>8}" * len(arms))
    for part in (*PARTS, REST, TOTAL):
        cells = (arm["parts"][part] for arm in arms.values())
        lines.append(
            f"{part:20}"
            + "".join(f"{c['median_ms']:{width - 18}.2f}{c['p90_ms']:10.2f}{c['share']:8.1%}" for c in cells)
        )
    numbers = {
        "samples/step": lambda arm: f"{arm['samples_per_step']:.0f}",
        "frames/s": lambda arm: f"{arm['frames_per_s']:.1f}",
        "tokens/s": lambda arm: f"{arm['tokens_per_s']:.1f}",
        "step memory, MiB": lambda arm: f"{arm['peak_bytes'] / 2**20:.1f}",
        "parameters": lambda arm: f"{sum(arm['parameters'].values()):,}",
    }
    for row, show in numbers.items():
        lines.append(f"{row:20}" + "".join(f"{show(arm):>{width}}" for arm in arms.values()))
    rests = ", ".join(f"{arm['parts'][REST]['share']:.1%}" for arm in arms.values())
    lines.append(
        f"parts and rest add up to the total; the rest (placement, embeddings, copies to the device) is {rests}"
    )
    lines.append(f"step memory: above weights and optimizer states, {memory}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description="Where the time and memory of a training step go.")
    parser.add_argument("overrides", nargs="*", help="settings of train.py, for every arm; before the options")
    parser.add_argument("--arms", nargs="+", default=[""], help="settings of one arm each, compared side by side")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per arm, 1 or more")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="instead of the trainer's")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    chosen = parser.parse_args()
    if chosen.steps < 1 or chosen.warmup < 0:
        parser.error(f"--steps {chosen.steps} must be 1 or more and --warmup {chosen.warmup} 0 or more")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="You are trying to `self.log")  # no Trainer runs these steps
    try:
        configs = {
            arm or "as configured": compose_arm([*chosen.overrides, *shlex.split(arm)], chosen.device)
            for arm in chosen.arms
        }
        arms = measure(configs, chosen.steps, chosen.warmup)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    first = next(iter(arms.values()))
    on_cuda = first.device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(first.device) if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "precision": first.trainer.precision,
        "memory": "torch.cuda.max_memory_allocated" if on_cuda else "resident memory of the process, sampled",
        "arms": {name: arm.summary() for name, arm in arms.items()},
    }
    where = f"{found['device']}, {found['threads']} threads, {found['precision']}"
    print(f"{where}, {chosen.steps} steps after {chosen.warmup} to warm up")
    print(table(found["arms"], found["memory"]))
    if chosen.json is not None:
        with replacing(chosen.json) as part:
            part.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
