"""What can be seen of a config: each probe builds or runs what it describes, and returns something to compare.

Paths in a config are relative: `observe` runs each probe in an empty folder, beside a `world` that all of them share.
"""

import contextlib
import copy
import csv
import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

import train
from callbacks import checkpoints
from callbacks.checkpoint_files import Writer
from data.module import VideoDataModule
from data.probe import write_probe
from lightning_crosslmm import store
from lightning_crosslmm.batch import VideoBatch, prompts_for
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides, instantiate
from lightning_crosslmm.cost import fit
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.location import locate
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.shards import read_index
from lightning_crosslmm.stop_signals import STOP, Stopped
from lightning_crosslmm.storage import Version
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
    shutil.copytree(folder / "world" / "llm", folder / "world" / "coded")
    code = json.loads((folder / "world" / "coded" / "config.json").read_text())
    code["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    (folder / "world" / "coded" / "config.json").write_text(json.dumps(code))
    torch.save(timm_tower().state_dict(), folder / "world" / "timm.pt")
    vision_tower().save_pretrained(folder / "world" / "siglip")


def timm_tower() -> nn.Module:
    """The default encoder's tower."""
    return instantiate(small("encoder.layer=-1").encoder, ANY_TARGET).tower


def vision_tower() -> nn.Module:
    """The tower of a small SigLIP, whole."""
    geometry = OmegaConf.to_container(small(*SIGLIP).encoder.config)
    return SiglipVisionModel(SiglipVisionConfig(**geometry, image_size=32))


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
    if "data=suite" in words:
        kept = [word for word in kept if not word.startswith(("data.probe.", "data.sampling."))]
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


def kept(config: DictConfig) -> Any:
    """Bytes that answering keeps of the source tokens."""
    model = _model(config)
    with torch.no_grad():
        prompt = model.prompt(_batch(config), keeps_keys=True)
        model.run(prompt)
    return prompt.context.cache_bytes()


def pooled_in_training(config: DictConfig) -> Any:
    """What the LLM reads of the pictures while the model is trained."""
    model = _model(config).train()
    return digest(model.encode(_batch(config)).pooled.features_SD)


def kept_features(config: DictConfig) -> Any:
    """What a frozen encoder leaves on disk."""
    model = _model(config).requires_grad_(False)
    model.keep_features()
    model.encode(_batch(config))
    return sorted(path.as_posix() for path in Path().rglob("features-*"))


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
    if config.data.pack_tokens is not None:
        data.fit_to(_model(config))
    data.setup("fit")
    loader = data.train_dataloader()
    fetching = loader._start()
    seen = [
        (batch.keys, batch.answer_kinds, batch.row_of_sample.tolist(), batch.ids_L.tolist(), digest(batch.frames_FCHW))
        + (batch.frame_time_s_F.tolist(),)
        for batch in (loader if data._num_workers == 0 else [])
    ]
    context = fetching.multiprocessing_context
    start = context and context.get_start_method()
    return seen, fetching.num_workers, fetching.prefetch_factor, start


def damaged(config: DictConfig) -> Any:
    """A run on shards of which one sample is damaged: what it says, and what it lists."""
    shutil.copytree("../world/train", "train")
    tar = next(Path("train").glob("*.tar"))
    member = read_index(tar).entries[0].members["0.mp4"]
    with tar.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"damage")
    said = refusal(whole_run)(config)
    return said if isinstance(said, str) else Path("run/skipped.json").read_text()


def splits(config: DictConfig) -> Any:
    """Shards of every split and where they lie, or why there are none."""
    data = _data(config)
    seen = [
        refusal(lambda _, stage=stage: data.setup(stage))(config) for stage in ("validate", "fit", "test", "predict")
    ]
    return seen, {split: [(str(path), size) for path, size in _sizes(opened)] for split, opened in data._data.items()}


def fetches(config: DictConfig) -> Any:
    """How a store is asked for what it does not have, and what is kept of what it has."""
    fsspec.filesystem("memory").pipe_file("/probe/there.tar", bytes(1000))
    folder, storage = locate("memory://probe"), instantiate(config.data.storage, ANY_TARGET)
    asked, waits_s, request = [], [], store.request
    with (
        mock.patch.object(store, "request", lambda *wanted: asked.append(wanted) or request(*wanted)),
        mock.patch("lightning_crosslmm.storage._jitter", random.Random(0)),
        mock.patch("time.sleep", waits_s.append),
        contextlib.suppress(UserError),
    ):
        storage.read_ranges(folder / "none.tar", [(0, 1)], list, "none")
    storage.read_ranges(folder / "there.tar", [(10, 5)], list, "there", Version(1000, ""))
    return asked, waits_s, sorted(map(str, Path().rglob("shard-*.tar")))


def _sizes(opened: Any) -> Iterator[tuple[Path, int]]:
    return zip(opened.paths, opened.samples_per_shard, strict=True)


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


def cramped(config: DictConfig) -> str:
    """Start train.py on a machine with a single byte of memory: how it ends."""
    with mock.patch.object(fit, "_main_memory", lambda: 1):
        try:
            train.run(config)
        except UserError as error:
            return str(error)
    return "done"


def whole_run(config: DictConfig) -> Any:
    """Run train.py: how it ends, files it leaves and what they say, and every checkpoint it saves."""
    seen: list[Any] = []

    def read_state(trainer: lightning.Trainer) -> dict[str, Any]:
        model = trainer.lightning_module.model
        seen.append((trainer.global_step, model.llm.model.layers[0].gradient_checkpointing))
        return stock_state(trainer)

    def start(self: Writer, write: Callable[[], None], part: Path, in_background: bool) -> None:
        seen.append((part.name, in_background))
        stock_start(self, write, part, in_background)

    stock_state, stock_start = checkpoints.read_state, Writer.start
    with mock.patch.object(checkpoints, "read_state", read_state), mock.patch.object(Writer, "start", start):
        try:
            train.run(config)
        except Stopped as stop:
            STOP.forget()
            seen.append(str(stop))
    files = [path for path in sorted(Path().rglob("*")) if path.is_file()]
    # the name of TensorBoard's file holds the time
    left = {str(path.parent / path.name.partition(".tfevents.")[0]): _content(path) for path in files}
    return seen, left, torch.initial_seed()


def _content(path: Path) -> Any:
    if path.name == "metrics.csv":
        with path.open(newline="") as lines:
            return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(lines)]
    if path.name == "complete.json":
        return [json.loads(path.read_text())[name] for name in ("step", "monitor", "mode", "metric")]
    if path.name == "provenance.json":
        return json.loads(path.read_text())["seed"]
    if path.name == "metrics.json":
        return json.loads(path.read_text()).get("prefill/samples")
    if path.name in ("calibration.json", "cost.json"):
        return json.loads(path.read_text())
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".png" else None
