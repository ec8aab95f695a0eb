"""Small trainings that one, two or four processes can do with the same global batches; see tests/test_sharding.py."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from lightning_crosslmm.batch import VideoBatch, prompts_for
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.llm import Lora
from lightning_crosslmm.model import ROLES, CrossLMM
from lightning_crosslmm.module import CrossLMMModule
from lightning_crosslmm.optim import OptimSettings
from lightning_crosslmm.pooler import AveragePooler, Pooler
from lightning_crosslmm.projector import MLPProjector
from lightning_crosslmm.strategy import ShardedStrategy
from lightning_crosslmm.taps import Asks
from lightning_crosslmm.tokens import Partition, TokenSet, compose
from tests.tiny import TOKENIZER, tiny_batch, tiny_encoder, tiny_llm

# by turns a rank has no video, fewer calls of the tower, longer answers, nothing to learn
STEPS = (
    ([5, "what?", "=cat"], ["see", 1, "?", "=elephant"], ["no video", "=owl"], ["none here", "=elk"]),
    ([1, "a?", "=cow"], [2, "b?", "=fox"], [7, "long", "=bee"], ["and", 2, 3, "=a"]),
    (["alone", "=yak"], ["so am I", "=gnu"], ["me too"], ["and I"]),
    ([3, "x?", "=rat"], ["y?", "=cat"], [2, "z?", "=hen"], [1, "w?", "=pig"]),
)


class Brightest(Pooler):
    """Keep the patches whose first channel is above the mean of their frame, scaled by a learned weight."""

    asks = Asks(layers=(0,))

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        self.scale = nn.Linear(in_width, in_width)
        return in_width

    def tokens_per_frame(self, grid: tuple[int, int]) -> None:
        return None

    def forward(self, tokens: TokenSet, taps: Any) -> TokenSet:
        early_SE = taps.layers_FNAE[:, :, 0].flatten(0, 1)
        value_FN = early_SE[:, 0].detach().view(len(tokens.frame_offsets) - 1, -1)
        keep_S = (value_FN > value_FN.mean(dim=1, keepdim=True)).flatten()
        kept = keep_S.nonzero().flatten()
        slot = torch.full((tokens.num_tokens,), -1).scatter(0, kept, torch.arange(len(kept)))
        counts = keep_S.view_as(value_FN).sum(dim=1)
        return replace(
            tokens,
            features_SD=self.scale(tokens.features_SD + early_SE)[kept],
            coordinate_S3=tokens.coordinate_S3[kept],
            mass_S=tokens.mass_S[kept],
            frame_offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            grid=None,
            source_map=compose(tokens.source_map, Partition(slot, len(kept))),
        )


class Momentum(OptimSettings):
    """Plain steps along the gradient: AdamW turns the last digit of a gradient near 0 into a step of full length."""

    def optimizer(self, model: CrossLMM) -> Optimizer:
        return SGD(super().optimizer(model).param_groups, momentum=0.9)


class Stream:
    """Batches from the step that the trainer stands at."""

    def __init__(self, own: Sequence[VideoBatch], run: lightning.Trainer) -> None:
        self.own, self.run = own, run

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[VideoBatch]:
        yield from self.own[self.run.global_step * self.run.accumulate_grad_batches :]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def joined(parts: Sequence[VideoBatch]) -> VideoBatch:
    """Put batches of one sample together."""

    def shifted(name: str, counts: list[int], chosen: slice = slice(None)) -> Tensor:
        starts = torch.tensor([0, *counts]).cumsum(0)
        return torch.cat([getattr(part, name)[chosen] + start for part, start in zip(parts, starts, strict=False)])

    def laid(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return torch.cat(values) if isinstance(values[0], Tensor) else sum(values, ())

    together = ("frames_FCHW", "frame_time_s_F", "ids_L", "labels_L", "keys", "answer_kinds", "questions")
    answers, tokens = [len(part.questions) for part in parts], [len(part.ids_L) for part in parts]
    frames = [len(part.frames_FCHW) for part in parts]
    answer_L = torch.where(laid("answer_L") < 0, -1, shifted("answer_L", answers))
    first = torch.tensor([0])
    return replace(
        parts[0],
        **{name: laid(name) for name in together},
        visual_offsets=torch.cat([first, shifted("visual_offsets", frames, slice(1, None))]),
        sample_of_visual=shifted("sample_of_visual", [1] * len(parts)),
        answer_L=answer_L,
        text_offsets=torch.cat([first, shifted("text_offsets", tokens, slice(1, None))]),
        row_of_sample=torch.arange(len(parts)),
    )


def batches(rank: int, world: int, accumulate: int, steps: int) -> list[VideoBatch]:
    """This rank's share of each global batch, piece after piece."""
    samples = [
        [tiny_batch(sample, seed=10 * step + n) for n, sample in enumerate(STEPS[step % 4])] for step in range(steps)
    ]
    size = 4 // (world * accumulate)
    pieces = [[step[i * size : (i + 1) * size] for i in range(rank, world * accumulate, world)] for step in samples]
    return [joined(piece) for step in pieces for piece in step]


def module(
    kind: str,
    frozen: Sequence[str] = (),
    pooler: str = "average",
    checkpointing: bool = False,
    tied: bool = False,
    optim: type[OptimSettings] = OptimSettings,
    fusion: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
) -> CrossLMMModule:
    """A tiny model in a module, the same at every call; its shape alone where another process has the weights."""
    lightning.seed_everything(3, verbose=False)
    with torch.device("meta") if kind == "fsdp" and rank() else nullcontext():
        model = CrossLMM(
            tiny_encoder(frames_per_chunk=2),
            Brightest() if pooler == "brightest" else AveragePooler(1),
            MLPProjector,
            Fusion(
                **{"v2v": True, "t2v": True, "interval": 2, "gate_init": 0.5, "frame_time": "sinusoidal"}
                | (fusion or {})
            ),
            tiny_llm(tie_word_embeddings=tied),
        )
        if lora is not None:
            Lora(**lora).adapt(model.llm)
    lr = {role: None if role in frozen else 1e-2 for role in ROLES}
    return CrossLMMModule(model, TOKENIZER, optim(lr, weight_decay=0.1), Greedy(6), (), checkpointing)


def rank() -> int:
    """Number of this process."""
    return int(os.environ.get("RANK", 0))


def trainer(kind: str, world: int, **settings: Any) -> lightning.Trainer:
    strategy = (
        ShardedStrategy(world, settings.pop("folders", True)) if kind == "fsdp" else {"one": "auto"}.get(kind, kind)
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    plain: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 0.5, "max_steps": 4}
    plain |= {"use_distributed_sampler": False, "num_sanity_val_steps": 0, "devices": world, "strategy": strategy}
    return lightning.Trainer(**quiet | plain | settings)


class Watch(lightning.Callback):
    """Notes losses, and saves where it is told to."""

    def __init__(self, save: Path | None = None, save_at: int = 0) -> None:
        self.losses: list[Tensor] = []
        self.save, self.save_at = save, save_at
        self.start: dict[str, Tensor] = {}
        self.random: Tensor | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start, self.random = content(pl_module.model), torch.get_rng_state()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].detach())
        if self.save is not None and trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.save)


def content(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, whole."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in named}


def train(
    kind: str,
    world: int,
    *,
    accumulate: int = 1,
    resume: Path | None = None,
    save: tuple[Path, int] | None = None,
    asked: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train, and tell the sums that were learned from, the weights before and after, and how they are kept."""
    watch = Watch(*save) if save else Watch()
    run = trainer(kind, world, callbacks=[watch], accumulate_grad_batches=accumulate, **(asked or {}))
    pl_module = module(kind, **settings)
    own = batches(rank() if world > 1 else 0, world, accumulate, run.max_steps)
    run.fit(pl_module, Stream(own, run), ckpt_path=resume)
    model = pl_module.model
    return {
        "losses": torch.stack(watch.losses).view(-1, accumulate).sum(1) * accumulate,
        "start": watch.start,
        "end": content(model),
        "random": watch.random,
        "kept": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters()),
        "units": [name for name, part in model.named_modules() if isinstance(part, FSDPModule)],
    }


# rank 0 asks three times in two calls and its first question is about a video; rank 1 has no video, then no question
ASKED = (
    (([5, "what?", "=cat", "more?", "=dog"], ["and", 1, "this?", "=owl"]), (["no video?", "=elk"],)),
    (([2, "now?", "=cow"],), (["said and done"],)),
)


def answer(kind: str, world: int, **settings: Any) -> dict[str, Any]:
    """Compute, answer and look with what each rank has, which is not the same."""
    run, pl_module = trainer(kind, world), module(kind, **settings)
    own = [tiny_batch(*ranks[rank()], seed=number) for number, ranks in enumerate(ASKED)]
    said = run.predict(pl_module, DataLoader(own, batch_size=None))
    model = pl_module.model.eval()
    with torch.no_grad():
        logits = [model(batch).logits_YW for batch in (*own, tiny_batch(["none has a video", "=so"]))]
    prompts = prompts_for(own[0], [0])
    # rank 0 stops at the first token, rank 1 never
    stop_id = -1 if rank() else model.generate(prompts, Greedy(1), stop_id=-1, pad_id=0)[0][0]
    if rank():
        model.generate(prompts, Greedy(1), stop_id=-1, pad_id=0)
    ids = model.generate(prompts, Greedy(9), stop_id=stop_id, pad_id=0)
    looks = [(look.answer, look.v2v_FHW, look.t2v_FHW) for batch in own for look in pl_module.looks(batch, 2)]
    return {"said": said, "logits": logits, "ids": ids, "looks": looks}


PLAIN: dict[str, Any] = {"optim": Momentum}
CHECKPOINTED: dict[str, Any] = {"optim": Momentum, "checkpointing": True, "tied": True, "accumulate": 2}
RAGGED: dict[str, Any] = {"optim": Momentum, "pooler": "brightest", "checkpointing": True}
MIXED: dict[str, Any] = {"frozen": ("encoder", "llm"), "asked": {"precision": "bf16-mixed"}}


def on_two(folder: Path, whole: Path) -> dict[str, Any]:
    """Everything that two ranks do, one after the other."""
    return {
        "ddp": train("ddp", 2, **PLAIN),
        "plain": train("fsdp", 2, **PLAIN),
        "checkpointed": train("fsdp", 2, **CHECKPOINTED),
        "ragged": train("fsdp", 2, **RAGGED),
        "mixed": train("fsdp", 2, **MIXED),
        "stored": train("fsdp", 2, asked={"precision": "bf16-true", "max_steps": 1}),
        "uninterrupted": train("fsdp", 2, save=(folder / "slices", 2)),
        "gathered": train("fsdp", 2, save=(folder / "gathered.ckpt", 2), asked={"folders": False}),
        "resumed": train("fsdp", 2, resume=folder / "slices"),
        "from gathered": train("fsdp", 2, resume=folder / "gathered.ckpt"),
        "from whole": train("fsdp", 2, resume=whole),
        "answers": answer("fsdp", 2),
        "unequal": refusal(lambda: trainer("fsdp", 2).fit(module("fsdp", tied=bool(rank())), [])),
    }


def resumed(world: int, slices: Path) -> dict[str, Any]:
    """Go on from slices, on however many ranks."""
    return train("fsdp", world, resume=slices)


def refusal(attempt: Callable[[], Any]) -> str:
    """What a user is told."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return "nothing"
