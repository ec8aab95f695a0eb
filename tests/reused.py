"""Small trainings whose encoder is spared work, in one process or on two; see tests/test_encoder/test_reuse.py."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
from torch import Tensor

from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.encoder import FeatureCache, fingerprint
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.model import ROLES, CrossLMM
from lightning_crosslmm.module import CrossLMMModule
from lightning_crosslmm.optim import OptimSettings
from lightning_crosslmm.pooler import AveragePooler
from lightning_crosslmm.projector import MLPProjector
from tests.tiny import TOKENIZER, tiny_encoder, tiny_llm
from tests.trials import Stream, Watch, batches, content, rank, trainer

EPOCH, STEPS = 2, 4


def module(kind: str, folder: Path | None, tolerance: float | None, trains_encoder: bool) -> CrossLMMModule:
    """A tiny model in a module, the same at every call; its shape alone where another process has the weights."""
    lightning.seed_everything(3, verbose=False)
    cache = FeatureCache(None if folder is None else str(folder))
    with torch.device("meta") if kind == "fsdp" and rank() else nullcontext():
        model = CrossLMM(
            tiny_encoder(frames_per_chunk=2, same_frame_tolerance=tolerance, feature_cache=cache),
            AveragePooler(1),
            MLPProjector,
            Fusion(v2v=True, t2v=True, interval=2, gate_init=0.5),
            tiny_llm(),
        )
    lr = {role: 1e-2 if role != "encoder" or trains_encoder else None for role in ROLES}
    return CrossLMMModule(model, TOKENIZER, OptimSettings(lr), Greedy(6))


def train(
    kind: str,
    world: int,
    folder: Path | None = None,
    tolerance: float | None = None,
    trains_encoder: bool = False,
    is_still: bool = False,
    resume: Path | None = None,
    save: tuple[Path, int] | None = None,
) -> dict[str, Any]:
    """Train for two epochs of two steps, and tell what was learned and what the tower did at each step.

    Where it `is_still`, the first rank's videos are one picture all along.
    """
    watch = Watch(*save) if save else Watch()
    calls, read = _Calls(), []
    run = trainer(kind, world, callbacks=[watch, calls])
    pl_module = module(kind, folder, tolerance, trains_encoder)
    own = batches(rank() if world > 1 else 0, world, 1, EPOCH) * (STEPS // EPOCH)

    if is_still and rank() == 0:
        for batch in own:
            batch.frames_FCHW[:] = batch.frames_FCHW[:1].clone()

    def note(tensor: Tensor) -> memoryview:
        read.append(tensor.is_floating_point())
        return stock(tensor)

    stock = fingerprint.bytes_of
    with mock.patch.object(fingerprint, "bytes_of", note):
        run.fit(pl_module, Stream(own, run), ckpt_path=resume)
    return {
        "losses": torch.stack(watch.losses),
        "end": content(pl_module.model),
        "calls": calls.at_step,
        "weights read": sum(read),
        "share": run.callback_metrics.get("train/encoded_share"),
    }


class _Calls(lightning.Callback):
    """Counts calls of the tower's first block, step by step."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.at_step: list[int] = []
        pl_module.model.encoder.tower.blocks[0].register_forward_pre_hook(self._count)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.at_step.append(0)

    def _count(self, *_: Any) -> None:
        self.at_step[-1] += 1


def on_two(folder: Path) -> dict[str, Any]:
    """What two ranks do: without a cache, with one that fills, and with one that only the first rank has filled."""
    own = folder / f"rank{rank()}"
    (folder / "file").touch()
    return {
        "off": train("fsdp", 2),
        "cold": train("fsdp", 2, own),
        "one is warm": train("fsdp", 2, folder / "rank0" if rank() == 0 else folder / "fresh", 0),
        "one has none": train("fsdp", 2, own if rank() == 0 else folder / "file" / "folder"),
        "trained": train("fsdp", 2, tolerance=0, trains_encoder=True, is_still=True),
        "trained, off": train("fsdp", 2, trains_encoder=True, is_still=True),
        "ddp": train("ddp", 2, folder / "ddp", 0),
    }
