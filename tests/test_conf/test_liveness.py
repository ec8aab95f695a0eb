"""Every setting changes something one can see: each leaf of every arm, with a new value and the probe that notices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import train
from lightning_crosslmm.compose import compose_overrides
from tests.probes import (
    SIGLIP,
    Probe,
    answers,
    attributes,
    batches,
    changed,
    cramped,
    damaged,
    fetches,
    forward,
    kept,
    kept_features,
    make_world,
    observe,
    optimizer,
    pooled_in_training,
    refusal,
    small,
    splits,
    trainer,
    warm_start,
    whole_run,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # a test has few
]

# They say what takes the other leaves: test_compose_all.py builds it. Hydra's own settings are not composed.
EXEMPT = {"_target_", "_partial_"}
STREAM = {
    "sampling.mode": ("rate", refusal(batches)),  # then rate_hz is missing
    "sampling.num_frames": (3, batches),
    "image_size": (48, batches),
    "tokenizer": ("../world/tokenizer", batches),
    "max_tokens": (10, refusal(batches)),
    "global_batch_size": (1, batches),
    "num_workers": (1, batches),
    "seed": (7, batches),
    "window_shards": (1, batches),
    "turns": ("one", batches),
    "pack_tokens": (200, batches),
    "sample_timeout_s": (1e-9, refusal(batches)),
}
RATE = {"sampling.rate_hz": (2.0, batches), "sampling.max_frames": (1, batches)}
AT_A_RATE = (
    "data.sampling.mode=rate",
    "data.sampling.num_frames=null",
    "data.sampling.rate_hz=4",
    "data.sampling.max_frames=9",
)
SHARDS = (
    "data=shards",
    "data.train=../world/train",
    "data.val=../world/val",
    "data.global_batch_size=2",
    "data.window_shards=2",
)
SUITE = (
    "data=suite",
    "data.suite.clips={train: 1, val: 1, test: 1}",
    "data.suite.frames={train: [6], val: [6], test: [6]}",
)
DAMAGED = (*SHARDS[:1], "data.train=train", "data.val=null", *SHARDS[3:], "trainer.limit_val_batches=0")
TURNING = (
    "llm=qwen2_0_5b",
    "llm.model.weights=null",
    "llm.model.config.hidden_size=32",
    "llm.model.config.intermediate_size=32",
    "llm.model.config.num_hidden_layers=1",
    "llm.model.config.num_attention_heads=2",
)
AXES = ("rows", "columns")
GRID = {"rows": (2, forward), "columns": (2, forward), "stage": ("after_projector", forward)}
SALIENT = {"saliency": ("probe", forward), "stage": GRID["stage"]}
NEIGHBOURS = {
    "ratio": (0.5, forward),
    "neighbours": (2, forward),
    "merge": ("average", forward),
    "neighbours_from": ("pruned", forward),
    "rest_token": (False, forward),
    "order": ("raster", forward),
}
WINDOWS = {"rows": (2, forward), "columns": (2, forward), "layers": ([-1], forward), "heads": (2, forward)}


def under(prefix: str, leaves: dict[str, tuple[Any, Probe]]) -> dict[str, tuple[Any, Probe]]:
    return {f"{prefix}.{path}": entry for path, entry in leaves.items()}


TABLE: dict[tuple[str, ...], dict[str, tuple[Any, Probe]]] = {
    (): {
        "mode": ("describe", whole_run),
        "run_dir": ("elsewhere", whole_run),
        "resume": ("nowhere", refusal(whole_run)),
        "init_from": ("nowhere", refusal(whole_run)),
        "gradient_checkpointing": (True, whole_run),
        "check_memory": (False, cramped),
        "encoder.name": ("deit3_small_patch16_224", forward),
        "encoder.stem": ("patch", forward),
        "encoder.image_size": (64, forward),
        "encoder.layer": (0, forward),
        "encoder.final_norm": (False, forward),
        "encoder.frames_per_chunk": (2, forward),
        "encoder.same_frame_tolerance": (255, forward),
        "encoder.feature_cache.folder": ("features", kept_features),
        "encoder.config.patch_size": (16, forward),
        "encoder.config.embed_dim": (32, forward),
        "encoder.config.depth": (1, forward),
        "encoder.config.num_heads": (2, forward),
        "encoder.config.mlp_ratio": (3, forward),
        "encoder.config.class_token": (True, forward),
        "encoder.config.global_pool": ("avg", forward),
        **under("pooler", GRID),
        "projector.depth": (1, forward),
        "projector.norm": (False, forward),
        "fusion.v2v": (False, forward),
        "fusion.t2v": (False, forward),
        "fusion.interval": (3, forward),
        "fusion.first_layer": (1, forward),
        "fusion.scope": ("frame", forward),
        "fusion.key_source": ("encoder", forward),
        "fusion.placement": ("before_layer", forward),
        "fusion.gate": ("channel", forward),
        "fusion.gate_init": (0.25, forward),
        "fusion.weights": ("host", forward),
        "fusion.share_kv": (True, forward),
        "fusion.layers_per_kv": ("all", forward),
        "fusion.kv_latent": (8, forward),
        "fusion.t2v_cache": ("int8", kept),
        "fusion.frame_time": ("none", forward),
        "fusion.backend": ("varlen", refusal(forward)),  # needs CUDA, and says so
        "llm.tokenizer": ("../world/tokenizer", batches),
        "llm.fusion.interval": (3, forward),
        "llm.fusion.gate_init": (0.25, forward),
        "llm.fusion.frame_time": ("none", forward),
        "llm.lora": ({"rank": 2}, optimizer),
        "llm.model.weights": ("../world/llm", forward),
        "llm.model.attention": ("eager", forward),
        "llm.model.config.model_type": ("llama", forward),
        "llm.model.config.vocab_size": (300, forward),
        "llm.model.config.hidden_size": (64, forward),
        "llm.model.config.intermediate_size": (64, forward),
        "llm.model.config.num_hidden_layers": (3, forward),
        "llm.model.config.num_attention_heads": (2, forward),
        "llm.model.config.num_key_value_heads": (1, forward),
        "llm.model.config.max_position_embeddings": (8, refusal(forward)),
        "llm.model.config.initializer_range": (0.01, forward),
        "llm.model.config.tie_word_embeddings": (False, forward),
        "decoding.max_new_tokens": (2, answers),
        **under("data", STREAM),
        "data.cache_dir": ("cache", splits),
        "data.probe.clips.train": (6, splits),
        "data.probe.clips.val": (3, splits),
        "data.probe.clips.test": (3, splits),
        "data.probe.clips_per_shard": (4, splits),
        "data.probe.num_frames": (3, batches),
        "data.probe.image_size": (32, batches),
        "data.probe.noise": (0.5, batches),
        "data.probe.kinds": (["colour_at_place"], batches),
        "data.probe.questions_per_clip": (1, batches),
        "data.probe.seed": (1, batches),
        "data.encoder_fit.steps": (3, warm_start),
        "data.encoder_fit.batch_size": (3, warm_start),
        "data.encoder_fit.lr": (1e-2, warm_start),
        **{f"optim.lr.{role}": (0.5, optimizer) for role in ("encoder", "pooler", "projector", "fusion", "llm")},
        "optim.weight_decay": (0.5, optimizer),
        "optim.betas": ([0.5, 0.5], optimizer),
        "optim.warmup_steps": (7, optimizer),
        "optim.constant_share": (0.1, optimizer),
        "optim.end_factor": (0.5, optimizer),
        "trainer.accelerator": ("gpu", refusal(trainer("accelerator.__class__"))),
        "trainer.devices": (2, trainer("num_devices")),
        "trainer.num_nodes": (2, trainer("num_nodes")),
        "trainer.strategy": ("ddp", trainer("strategy.__class__")),
        "trainer.precision": ("bf16-true", trainer("precision")),
        "trainer.max_steps": (5, trainer("max_steps")),
        "trainer.gradient_clip_val": (0.5, trainer("gradient_clip_val")),
        "trainer.accumulate_grad_batches": (2, trainer("accumulate_grad_batches")),
        "trainer.val_check_interval": (3, trainer("val_check_interval")),
        "trainer.check_val_every_n_epoch": (1, trainer("check_val_every_n_epoch")),
        "trainer.limit_val_batches": (0.5, trainer("limit_val_batches")),
        "trainer.num_sanity_val_steps": (1, trainer("num_sanity_val_steps")),
        "trainer.log_every_n_steps": (2, trainer("log_every_n_steps")),
        "trainer.use_distributed_sampler": (True, trainer("_accelerator_connector.use_distributed_sampler")),
        "trainer.benchmark": (True, trainer("switches")),
        "trainer.deterministic": (True, trainer("switches")),
        "trainer.enable_model_summary": (True, trainer("callbacks")),
        "trainer.default_root_dir": ("elsewhere", trainer("default_root_dir")),
        "callbacks.learning_rate.logging_interval": ("epoch", attributes("callbacks.learning_rate")),
        "callbacks.run_record.seed": (5, whole_run),
        "callbacks.curves.train_window": (1, whole_run),
        "callbacks.attention_picture.num_clips": (1, whole_run),
        "callbacks.token_picture.num_clips": (1, attributes("callbacks.token_picture")),
        "callbacks.needle_map.depth_bins": (2, attributes("callbacks.needle_map")),
        "callbacks.prefill_cost.num_samples": (1, whole_run),
        "callbacks.random_state.seed": (5, whole_run),
        "callbacks.cost_card.gpu": ("h200", whole_run),
        "callbacks.preemption.time_limit_s": (1e-6, whole_run),
        "callbacks.checkpoints.every_n_steps": (1, whole_run),
        "callbacks.checkpoints.keep_best": (0, whole_run),
        "callbacks.checkpoints.monitor": ("val/loss", whole_run),
        "callbacks.checkpoints.mode": ("min", whole_run),
        "callbacks.checkpoints.background": (True, whole_run),
        "logger.csv.save_dir": ("elsewhere", attributes("logger.csv")),
        "logger.csv.name": ("table", attributes("logger.csv")),
        "logger.tensorboard.save_dir": ("elsewhere", attributes("logger.tensorboard")),
        "logger.tensorboard.name": ("board", attributes("logger.tensorboard")),
    },
    ("callbacks.checkpoints.every_n_steps=1",): {"callbacks.checkpoints.keep_last": (3, whole_run)},
    ("data.seed=0", "callbacks.run_record.seed=0", "callbacks.random_state.seed=0"): {
        "seed": (1, whole_run)  # what draws the weights
    },
    ("mode=test",): {"ckpt": ("nowhere", refusal(whole_run))},
    ("encoder.feature_cache.folder=features",): {"encoder.feature_cache.max_bytes": (999, kept_features)},
    ("fusion.scope=window", "fusion.window_frames=1"): {"fusion.window_frames": (2, forward)},
    ("data.num_workers=1",): {"data.prefetch_batches": (3, batches), "data.worker_start": ("spawn", batches)},
    ("data.pack_tokens=200",): {"data.bytes_per_token": (4.0, batches)},
    ("data.sampling.num_frames=1",): {"data.sampling.jitter": (True, batches)},  # of two, so that another one shows
    ("data.worker_start=fork",): {"data.max_bad_fraction": (2.0, refusal(splits))},
    AT_A_RATE: under("data", RATE),
    SHARDS: under("data", STREAM)
    | {f"data.{split}": (place, splits) for split, place in {"train": "../world/val", "val": None}.items()}
    | {f"data.{split}": ("../world/train", splits) for split in ("test", "predict")},
    ("data=shards",): {
        "data.storage.cache_dir": ("cache", fetches),
        "data.storage.retries": (2, fetches),
        "data.storage.backoff_s": (2.0, fetches),
        "data.storage.timeout_s": (5.0, fetches),
    },
    ("data=shards", "data.storage.cache_dir=cache"): {"data.storage.cache_bytes": (999, fetches)},
    (*SHARDS, *AT_A_RATE): under("data", RATE),
    SUITE: under("data", {path: entry for path, entry in STREAM.items() if not path.startswith("sampling.")})
    | under("data.suite", {f"clips.{split}": (2, splits) for split in ("train", "val", "test")})
    | under("data.suite", {f"frames.{split}": ([7], splits) for split in ("train", "val", "test")})
    | under("data.suite", {"image_size": (32, batches), "noise": (0.5, batches), "seed": (1, batches)})
    | under("data.difficulty.needle", {"needles": (2, batches), "others": (2, batches)})
    | under("data.difficulty.patch", {"size": (0.25, batches), "edits": (2, batches), "things": (1, batches)})
    | under("data.difficulty.order", {"events": (2, batches), "places": (1, batches)})
    | under("data.difficulty.count", {"most": (2, batches), "asked": (1, batches), "things": (4, batches)})
    | under("data.difficulty.motion", {"movers": (1, batches), "speed": (0.25, batches)})
    | under("data.difficulty.select", {"things": (3, batches)})
    | under("data.difficulty.recall", {"keys": (2, batches), "pairs": (1, batches)})
    | {
        f"data.encoder_fit.{name}": (value, warm_start)
        for name, value in (("steps", 3), ("batch_size", 3), ("lr", 1e-2))
    }
    | {
        "data.tasks": (["motion", "needle", "count", "select"], batches),
        "data.cache_dir": ("cache", splits),
        "data.suite.form": ("choice", batches),
        "data.max_bad_fraction": (2.0, refusal(splits)),
    },
    (*SUITE[:1], "data.suite.clips={train: 2, val: 1, test: 1}", "data.tasks=[needle]"): {
        "data.suite.clips_per_shard": (1, splits)
    },
    (*SUITE, "data.num_workers=1"): {"data.prefetch_batches": (3, batches), "data.worker_start": ("fork", batches)},
    (*SUITE, "data.pack_tokens=200"): {"data.bytes_per_token": (4.0, batches)},
    (*SHARDS, "data.num_workers=1"): {"data.prefetch_batches": (3, batches), "data.worker_start": ("fork", batches)},
    (*SHARDS, "data.pack_tokens=100"): {"data.bytes_per_token": (4.0, batches)},
    (*SHARDS, "data.sampling.num_frames=1"): {"data.sampling.jitter": (True, batches)},
    (*DAMAGED, "trainer.max_steps=2"): {"data.max_bad_fraction": (0.0, damaged)},
    ("+encoder.config.pretrained_cfg_overlay.file=../world/timm.pt",): {"encoder.pretrained": (True, forward)},
    SIGLIP: {
        "encoder.weights": ("../world/siglip", forward),
        "encoder.image_size": (64, forward),
        "encoder.mean": ([0.1, 0.5, 0.5], forward),
        "encoder.std": ([0.1, 0.5, 0.5], forward),
        "encoder.layer": (-1, forward),
        "encoder.final_norm": (True, forward),
        "encoder.frames_per_chunk": (2, forward),
        "encoder.attention": ("eager", forward),
        "encoder.same_frame_tolerance": (255, forward),
        "encoder.config.model_type": ("clip_vision_model", forward),
        "encoder.config.hidden_size": (16, forward),
        "encoder.config.intermediate_size": (32, forward),
        "encoder.config.num_hidden_layers": (2, forward),
        "encoder.config.num_attention_heads": (4, forward),
        "encoder.config.patch_size": (16, forward),
    },
    ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"): {
        "trainer.strategy.data_parallel_size": (3, refusal(trainer("strategy._data_parallel_size"))),
        "trainer.strategy.save_distributed_checkpoint": (False, trainer("strategy._save_distributed_checkpoint")),
    },
    ("pooler=bilinear",): under("pooler", GRID | {"antialias": (True, forward)}),
    ("pooler=max",): under("pooler", GRID),
    ("pooler=strided",): under("pooler", {"stride": (2, forward), "offset": (1, forward)}),
    ("pooler=uniform",): under("pooler", {"num_tokens": (2, forward)}),
    ("pooler=random",): under("pooler", {"num_tokens": (2, forward), "seed": (1, forward)}),
    ("pooler=pixel_shuffle", "pooler.ratio=3"): under("pooler", {"ratio": (2, forward), "odd": ("crop", forward)}),
    ("pooler=perceiver",): under(
        "pooler",
        {name: (3, forward) for name in ("num_tokens", "depth", "heads", "head_width")}
        | {"scope": ("clip", forward), "max_frames": (8, forward), "stage": ("as_projector", forward)},
    ),
    ("pooler=qformer",): under(
        "pooler",
        {"num_tokens": (2, forward), "width": (32, forward), "depth": (1, forward), "heads": (2, forward)}
        | {"cross_every": (1, forward), "stage": ("before_projector", forward)},
    ),
    ("pooler=c_abstractor",): under(
        "pooler",
        {"num_tokens": (4, forward), "width": (32, forward), "depth": (2, forward), "mlp_depth": (1, forward)}
        | {"stage": ("before_projector", forward)},
    ),
    ("pooler=slowfast",): under(
        "pooler",
        GRID
        | {
            "rows": (3, forward),
            "columns": (1, forward),
            "every": (2, forward),
            **{f"fast_{n}": (2, forward) for n in AXES},
        },
    ),
    ("pooler=temporal_merge",): under(
        "pooler",
        GRID | {"rows": (3, forward), "columns": (1, forward), "frames": (3, forward)} | {"threshold": (0.99, forward)},
    ),
    **{
        (f"pooler={arm}", "encoder.config.global_pool=map", "pooler.ratio=0.2", "pooler.neighbours=4"): under(
            "pooler", SALIENT | NEIGHBOURS
        )
        for arm in ("prumerge", "prumerge_plus")
    },
    ("pooler=visionzip", "encoder.config.global_pool=map"): under(
        "pooler", SALIENT | {"dominant": (3, forward), "contextual": (2, forward), "merge": ("average", forward)}
    ),
    ("pooler=sms", "encoder.config.global_pool=map"): under(
        "pooler",
        {"saliency": SALIENT["saliency"]}
        | {"knee": ("iqr", forward), "scope": ("clip", forward)}
        | {"min_tokens": (12, forward), "max_tokens": (1, forward)},
    ),
    ("pooler=tokenpacker",): under("pooler", WINDOWS),
    ("pooler=quecc",): under("pooler", WINDOWS),
    ("pooler=llava_onevision",): {"pooler.max_tiles": (0, refusal(forward))},  # what it does to tiles: test_pooler
    ("llm.model.weights=../world/coded",): {
        "llm.model.trust_remote_code": (True, refusal(forward))
    },  # which is not there
    TURNING: {"llm.model.config.rope_parameters.rope_theta": (100.0, forward)},
    ("pooler=llava_mini",): under(
        "pooler", {name: (2, forward) for name in ("side", "heads", "fusion_layers", "fusion_heads")}
    ),
    ("pooler=tome",): under(
        "pooler", {"merges_per_block": (3, forward), "proportional": (False, forward), "order": ("merged", forward)}
    ),
    ("pooler=dymu", "pooler.thresholds=0.5"): {
        **under("pooler", {"thresholds": (0.6, forward), "proportional": (False, forward)}),
        "pooler.order": ("merged", forward),
        "virtual_unmerging": ("expanded", forward),
    },
    ("pooler=folder", "pooler.num_tokens=7"): under(
        "pooler",
        {"num_tokens": (3, forward), "stage": ("in_encoder", forward), "class_weight": (5.0, refusal(forward))}
        | {"scale_by_size": (False, forward), "order": ("merged", forward)},
    ),
    ("pooler=vistog",): under(
        "pooler",
        {"num_tokens": (3, forward), "assignment": ("soft", forward)}
        | {name: (value, pooled_in_training) for name, value in (("noise", False), ("epsilon", 0.5), ("seed", 1))},
    ),
    ("pooler=vistog", "pooler.assignment=soft"): {"pooler.temperature": (0.5, forward)},
    ("mode=calibrate", "data.encoder_fit.steps=1"): {
        "calibrate.tokens_per_frame": (7, whole_run),
        "calibrate.num_frames": (3, whole_run),
    },
    ("pooler=none", "pooler._target_=tests.poolers.Heavy"): {"check_pooler": (True, refusal(forward))},
    ("llm=qwen3_tiny",): {"llm.model.config.head_dim": (16, forward)},
    ("experiment=lora",): {
        "llm.lora.rank": (4, whole_run),
        "llm.lora.alpha": (64, whole_run),
        "llm.lora.dropout": (0.5, whole_run),
        "llm.lora.targets": (["q_proj"], optimizer),
    },
    ("decoding=sampling",): {
        "decoding.max_new_tokens": (2, answers),
        "decoding.temperature": (9.0, answers),
        "decoding.top_p": (0.01, answers),
        "decoding.top_k": (1, answers),
    },
}
CASES = [(words, path) for words, leaves in TABLE.items() for path in leaves]
PROBES = list(dict.fromkeys((words, TABLE[words][path][1]) for words, path in CASES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("liveness")
    make_world(path)
    return path


@pytest.fixture(scope="module")
def seen() -> dict[Any, Any]:
    """What the probes see of configs as they are."""
    return {}


@pytest.mark.parametrize(("words", "path"), CASES, ids=[" ".join((path, *words[:1])) for words, path in CASES])
def test_it_changes_what_is_seen(words: tuple[str, ...], path: str, folder: Path, seen: dict[Any, Any]) -> None:
    value, probe = TABLE[words][path]
    config = small(*words)
    assert OmegaConf.select(config, path, throw_on_missing=True) != value
    if (words, probe) not in seen:
        seen[words, probe] = observe(probe, config, folder)
    assert observe(probe, changed(config, path, value), folder) != seen[words, probe]


@pytest.mark.parametrize(("words", "probe"), PROBES)
def test_without_a_change_a_probe_sees_the_same(
    words: tuple[str, ...], probe: Probe, folder: Path, seen: dict[Any, Any]
) -> None:
    if (words, probe) not in seen:
        seen[words, probe] = observe(probe, small(*words), folder)
    assert observe(probe, small(*words), folder) == seen[words, probe]


def leaves(node: Any, path: str = "", target: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf as (class that takes it, path in the config)."""
    if not isinstance(node, dict):
        yield target, path
        return
    target = node.get("_target_", target)
    for key, child in node.items():
        if key not in EXEMPT:
            yield from leaves(child, f"{path}.{key}" if path else key, target)


def leaves_of(words: tuple[str, ...]) -> set[tuple[str, str]]:
    return set(leaves(OmegaConf.to_container(compose_overrides(train.CONF_DIR, words))))


def test_every_leaf_of_every_arm_is_in_the_table() -> None:
    arms = [file for file in train.CONF_DIR.glob("*/*.yaml")]
    there = set().union(*(leaves_of((f"{file.parent.name}={file.stem}",)) for file in arms))
    target_of = {
        words: {path: target for target, path in leaves(OmegaConf.to_container(small(*words)))} for words in TABLE
    }
    told = {(target_of[words].get(path, "nobody"), path) for words, path in CASES}
    assert sorted(there - told) == [] and sorted(told - there) == []
