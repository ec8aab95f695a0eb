"""What can be seen of a config: each probe builds or runs what it describes, and returns something to compare.

Paths in a config are relative: `observe` runs each probe in an empty folder, beside a `world` that all of them share.
"""

import contextlib
import copy
import csv
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import train
from data.module import VideoDataModule
from data.probe import write_probe
from lightning_crosslmm.batch import VideoBatch, prompts_for
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides, instantiate
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.text import load_tokenizer
from tests.tiny import tiny_batch

Probe = Callable[[DictConfig], Any]
SMALL = (
    "run_dir=run",
    "data.probe.clips={train: 8, val: 4, test: 4}",
    "data.probe.clips_per_shard=2",
    "data.probe.questions_per_clip=2",
    "data.probe.num_frames=2",
    "data.cache_dir=../world/cache",
    "data.encoder_fit.steps=2",
    "data.encoder_fit.batch_size=2",
    "data.sampling.num_frames=2",
    "data.global_batch_size=4",
    "data.num_workers=0",
    "decoding.max_new_tokens=3",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
)
TIMED = ("train/clips_per_s", "train/steps_per_s", "train/wait_share")


def make_world(folder: Path) -> None:
    """Write what settings can name: shards, a tokenizer, and checkpoints of the parts that load some."""
    shape = {"clips": {"train": 4, "val": 3}, "num_frames": 2, "image_size": 32, "noise": 0.1, "seed": 1}
    asked = {"kinds": ["colour_of_shape"], "questions_per_clip": 2, "clips_per_shard": 2}
    for name in ("train", "val"):
        write_probe(folder / "world" / name, name, **shape, **asked)
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = "Hello. " + tokenizer.chat_template
    tokenizer.save_pretrained(folder / "world" / "tokenizer")
    torch.manual_seed(1)
    build_model(small(), ANY_TARGET).llm.save_pretrained(folder / "world" / "llm")
    torch.save(timm_tower().state_dict(), folder / "world" / "timm.pt")
    vision_tower().save_pretrained(folder / "world" / "siglip")


def timm_tower() -> nn.Module:
    """The default encoder's tower."""
    return instantiate(small("encoder.layer=-1").encoder, ANY_TARGET).tower


def vision_tower() -> nn.Module:
    """The tower of a small SigLIP, whole."""
    return instantiate(small(*SIGLIP, "encoder.layer=-1").encoder, ANY_TARGET).tower


SIGLIP = (
    "encoder=siglip2_so400m",
    "encoder.weights=null",
    "encoder.image_size=32",
    "encoder.config.hidden_size=32",
    "encoder.config.intermediate_size=48",
    "encoder.config.num_hidden_layers=3",
    "encoder.config.num_attention_heads=2",
    "encoder.config.patch_size=8",
)


@functools.cache
def small(*words: str) -> DictConfig:
    """Compose the default arms, or others, at a size that is built and run in no time."""
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in SMALL if word.partition("=")[0] not in keys]
    if "data=shards" in words:
        kept = [word for word in kept if not word.startswith(("data.probe.", "data.encoder_fit.", "data.cache_dir"))]
    return compose_overrides(train.CONF_DIR, [*kept, *words])


def changed(config: DictConfig, path: str, value: Any) -> DictConfig:
    """Give a copy with one leaf set."""
    config = copy.deepcopy(config)
    OmegaConf.update(config, path, value, merge=False)
    return config


def observe(probe: Probe, config: DictConfig, folder: Path) -> Any:
    """Run a probe in an empty folder under `folder`, where `make_world` has been; always the same: paths show."""
    here = folder / "here"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    with contextlib.chdir(here):
        return probe(config)


def digest(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """Shape and content of a tensor."""
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return tuple(tensor.shape), hashlib.sha256(content).hexdigest()


@functools.cache
def refusal(probe: Probe) -> Probe:
    """For a value that is refused, or one whose file is missing: the message is what is seen."""

    def run(config: DictConfig) -> Any:
        try:
            return probe(config)
        except UserError as error:
            return str(error)

    return run


def _model(config: DictConfig) -> CrossLMM:
    torch.manual_seed(0)
    return build_model(config, ANY_TARGET).eval()


def _batch(config: DictConfig) -> VideoBatch:
    batch = tiny_batch(["see", 5, "what?", "=cat"], [2, "or?", "=do"])
    side, noise = config.encoder.image_size, torch.Generator().manual_seed(0)
    frames_FCHW = torch.randint(0, 256, (7, 3, side, side), dtype=torch.uint8, generator=noise)
    return replace(batch, frames_FCHW=frames_FCHW)


def forward(config: DictConfig) -> Any:
    """Parameters, logits, calls of the tower and attention backends of the model."""
    model, calls = _model(config), []
    model.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        logits_YW = model(_batch(config)).logits_YW
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    configs = [part.config for part in (model.llm, getattr(model.encoder, "tower", None)) if hasattr(part, "config")]
    return shapes, digest(logits_YW), len(calls), [config._attn_implementation for config in configs]


def optimizer(config: DictConfig) -> Any:
    """Parameter groups, and the schedule over 100 steps. The pooler gets a weight, as one of a user's own may have."""
    model, settings = _model(config), instantiate(config.optim, ANY_TARGET)
    model.pooler.weight = nn.Parameter(torch.ones(2, 2))
    settings.freeze(model)
    groups = [
        (group["name"], group["lr"], group["weight_decay"], group["betas"], len(group["params"]))
        for group in settings.optimizer(model).param_groups
    ]
    return groups, [settings.factor(step, 100) for step in range(100)]


def answers(config: DictConfig) -> list[list[int]]:
    """What the model answers."""
    decoding = instantiate(config.decoding, ANY_TARGET)
    model, prompts = _model(config), prompts_for(_batch(config), [0, 1])
    torch.manual_seed(0)
    return model.generate(prompts, decoding, stop_id=9999, pad_id=0)


def _data(config: DictConfig) -> VideoDataModule:
    data = instantiate(config.data, ANY_TARGET)
    data.prepare_data()
    return data


def batches(config: DictConfig) -> Any:
    """Training batches of one epoch, and how they are fetched."""
    data = _data(config)
    data.setup("fit")
    loader = data.train_dataloader()
    fetching = loader._start()
    seen = [
        (batch.keys, batch.answer_kinds, batch.row_of_sample.tolist(), batch.ids_L.tolist(), digest(batch.frames_FCHW))
        + (batch.frame_time_s_F.tolist(),)
        for batch in (loader if data._num_workers == 0 else [])
    ]
    return seen, fetching.num_workers, fetching.prefetch_factor


def splits(config: DictConfig) -> Any:
    """Shards of every split and where they lie, or why there are none."""
    data = _data(config)
    seen = [
        refusal(lambda _, stage=stage: data.setup(stage))(config) for stage in ("validate", "fit", "test", "predict")
    ]
    return seen, {split: [(str(path), size) for path, size in _sizes(shards)] for split, shards in data._shards.items()}


def _sizes(shards: Any) -> Iterator[tuple[Path, int]]:
    return zip(shards.paths, shards.num_samples, strict=True)


def warm_start(config: DictConfig) -> Any:
    """The encoder after the data side has prepared it."""
    data, model = instantiate(config.data, ANY_TARGET), _model(config)
    data.warm_start(model)
    return [digest(parameter) for parameter in model.encoder.parameters()]


@functools.cache
def trainer(attribute: str) -> Probe:
    """An attribute of the built Trainer; settings of the process that it changes are put back."""

    def build(config: DictConfig) -> Any:
        deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        try:
            with mock.patch.dict("os.environ"):
                built = instantiate(config.trainer, ANY_TARGET, callbacks=[], logger=[])
                built.switches = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
                built.callbacks = [type(callback) for callback in built.callbacks]
                return str(attrgetter(attribute)(built))
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.benchmark = benchmark

    return build


@functools.cache
def attributes(path: str) -> Probe:
    """Plain attributes of a part of Lightning's own, by its path in the config."""

    def build(config: DictConfig) -> Any:
        built = instantiate(OmegaConf.select(config, path), ANY_TARGET)
        return {name: value for name, value in vars(built).items() if isinstance(value, str | int | float | None)}

    return build


def whole_run(config: DictConfig) -> Any:
    """Run train.py: files it leaves and what they say, and every checkpoint it saves."""
    saves = []

    def save(self: lightning.Trainer, path: Path, *args: Any, **options: Any) -> None:
        model = self.lightning_module.model
        saves.append((self.global_step, Path(path).name, model.llm.model.layers[0].gradient_checkpointing))
        stock(self, path, *args, **options)

    stock = lightning.Trainer.save_checkpoint
    with mock.patch.object(lightning.Trainer, "save_checkpoint", save):
        train.run(config)
    files = [path for path in sorted(Path().rglob("*")) if path.is_file()]
    # the name of TensorBoard's file holds the time
    return saves, {str(path.parent / path.name.partition(".tfevents.")[0]): _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.name == "metrics.csv":
        with path.open(newline="") as lines:
            return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(lines)]
    if path.name == "provenance.json":
        return json.loads(path.read_text())["seed"]
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".png" else None
