"""Train, measure, run or describe a video LMM: ``python train.py [mode=fit] [group=arm] [key=value] [-m]``.

Mistakes in settings end in one message and exit code 2; ``HYDRA_FULL_ERROR=1`` shows where they were found. A training
that was asked to stop, by a signal or a time limit, ends with exit code 75 and goes on with ``resume=auto``.
"""

import logging
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from lightning_crosslmm.compose import ANY_TARGET, build_model, check_command_line, instantiate, save_resolved
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import AUTO, choose_checkpoint
from lightning_crosslmm.same_run import (
    is_done,
    is_first_process,
    refuse_other_data,
    words_of_newest,
    words_to_resume,
)
from lightning_crosslmm.short_words import spelled_out
from lightning_crosslmm.stop_signals import RESUME_ME, STOP, Stopped
from lightning_crosslmm.sweep import Ended, attempt, check_sweep, describe_error

CONF_DIR = Path(__file__).resolve().parent / "conf"


def run(cfg: DictConfig) -> bool:
    """Do one run of one mode, with everything it writes in ``cfg.run_dir``; tell whether there was anything to do."""
    checkpoint = choose_checkpoint(cfg.mode, Path(cfg.run_dir), cfg.resume, cfg.init_from, cfg.ckpt)
    if cfg.mode == "describe":
        show(cfg)
        return True
    if cfg.mode == "calibrate":
        calibrate_thresholds(cfg)
        return True
    if cfg.resume == AUTO and is_done(cfg):
        datamodule = instantiate(cfg.data, ANY_TARGET)
        datamodule.prepare_data()
        datamodule.setup(cfg.mode)
        refuse_other_data(Path(cfg.run_dir), getattr(datamodule, "fingerprint", None) or {})
        return False
    if cfg.mode == "fit" and cfg.callbacks.get("preemption"):
        STOP.listen()  # from here on a signal is not lost: the callback looks at it when training starts
    try:
        train_or_measure(cfg, checkpoint)
    except Stopped:
        raise  # and go on listening: other processes may still be on their way to the same end
    except BaseException:
        STOP.forget()
        raise
    STOP.forget()
    return True


def train_or_measure(cfg: DictConfig, checkpoint: Path | None) -> None:
    """Build everything and let the trainer run.

    Args:
        cfg: of a mode that has a trainer.
        checkpoint: ``fit`` goes on with it, the others measure its weights.
    """
    # Here, so that a misspelt setting is told before seconds of imports.
    import lightning
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_crosslmm.cost import refuse_what_cannot_fit
    from lightning_crosslmm.module import CrossLMMModule
    from lightning_crosslmm.strategy import ShardedStrategy
    from lightning_crosslmm.text import load_tokenizer
    from lightning_crosslmm.weights import load_weights

    logging.getLogger("lightning").handlers.clear()  # Hydra's root handlers show each line already
    if cfg.mode == "fit" and cfg.check_memory:
        refuse_what_cannot_fit(cfg, ANY_TARGET)
    lightning.seed_everything(cfg.seed, workers=True)
    callbacks, loggers = (
        [each for each in instantiate(cfg[group], ANY_TARGET).values() if each] for group in ("callbacks", "logger")
    )
    trainer = instantiate(cfg.trainer, ANY_TARGET, callbacks=callbacks, logger=loggers)
    # Where weights are sharded, the first process alone has them, and sends each other one its share.
    has_weights = trainer.is_global_zero or not isinstance(trainer.strategy, ShardedStrategy)
    goes_on = cfg.mode == "fit" and checkpoint is not None
    start = None if goes_on else checkpoint or init_from(cfg)
    with nullcontext() if has_weights else torch.device("meta"):
        model = build_model(cfg, ANY_TARGET)
    if goes_on and checkpoint.is_dir() and not isinstance(trainer.strategy, ShardedStrategy):
        raise UserError(f"resume={checkpoint}: is sharded; go on with trainer=fsdp, or start anew with init_from")
    if start is not None and has_weights:
        load_weights(model, start, whole=checkpoint is not None)
    datamodule, optim, decoding = (instantiate(cfg[part], ANY_TARGET) for part in ("data", "optim", "decoding"))

    # Before Lightning does, because metrics are named after the question types that the data hold.
    datamodule.prepare_data()
    datamodule.setup(cfg.mode)
    datamodule.fit_to(model)
    module = CrossLMMModule(
        model=model,
        tokenizer=load_tokenizer(cfg.llm.tokenizer),
        optim=optim,
        decoding=decoding,
        answer_kinds=datamodule.answer_kinds,
        gradient_checkpointing=cfg.gradient_checkpointing,
    )
    if cfg.mode == "fit":
        rank_zero_only(save_resolved)(cfg, Path(cfg.run_dir))
        if checkpoint is None and cfg.init_from is None and has_weights:
            datamodule.warm_start(model)
    # weights_only: a checkpoint holds tensors and plain values, and may run no code.
    resumed = {"ckpt_path": checkpoint, "weights_only": True} if goes_on else {}
    try:
        getattr(trainer, cfg.mode)(module, datamodule=datamodule, **resumed)
    finally:
        datamodule.teardown(cfg.mode)  # Lightning does not after an error, and workers would stay


def init_from(cfg: DictConfig) -> Any:
    """Find the weights that ``init_from`` names; a LLaVA-OneVision folder must agree with the config, or all stops."""
    import torch

    from lightning_crosslmm.onevision import OnevisionFolder
    from lightning_crosslmm.weights import find_start

    if cfg.init_from is None:
        return None
    start = find_start(cfg.init_from)
    if isinstance(start, OnevisionFolder):
        with torch.device("meta"):
            start.check(build_model(cfg, ANY_TARGET))  # before minutes of drawing weights that it replaces
    return start


def show(cfg: DictConfig) -> None:
    """Print what the config amounts to; built on the meta device: no weights, and seconds at any size."""
    import torch

    from lightning_crosslmm.describe import describe

    with torch.device("meta"):
        model = build_model(cfg, ANY_TARGET)
    instantiate(cfg.optim, ANY_TARGET).freeze(model)
    sys.stdout.write("\n".join(describe(model, instantiate(cfg.data.sampling, ANY_TARGET))) + "\n")


def calibrate_thresholds(cfg: DictConfig) -> None:
    """Measure on training frames when patches shall merge, and write ``calibration.json``."""
    import lightning
    import torch

    from lightning_crosslmm.pooler.calibration import calibrate
    from lightning_crosslmm.weights import load_weights

    lightning.seed_everything(cfg.seed, workers=True)
    trainer = instantiate(cfg.trainer, ANY_TARGET)
    model, datamodule = build_model(cfg, ANY_TARGET), instantiate(cfg.data, ANY_TARGET)
    datamodule.prepare_data()
    datamodule.setup("fit")
    if cfg.init_from is not None:
        load_weights(model, init_from(cfg))
    else:
        datamodule.warm_start(model)
    frames, wanted = [], max(0, cfg.calibrate.num_frames)
    for batch in datamodule.train_dataloader():
        frames.append(batch.frames_FCHW[:wanted])
        wanted -= len(frames[-1])
        if wanted <= 0:
            break
    datamodule.teardown("fit")
    encoder = model.encoder.to(trainer.strategy.root_device).eval()
    with trainer.precision_plugin.forward_context():
        chunks = torch.cat(frames).split(encoder.frames_per_chunk)
        found = calibrate(encoder, chunks, cfg.calibrate.tokens_per_frame)
    path = Path(cfg.run_dir) / "calibration.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found.write(path)
    sys.stdout.write(f"{path}: {found.reached:.2f} tokens per frame on average over {found.num_frames} frames\n")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> Ended | None:
    """Run what Hydra composed, in the folder Hydra chose; in a sweep, tell what came of it."""
    job = HydraConfig.get()
    with open_dict(cfg):
        cfg.run_dir = job.runtime.output_dir  # a job of a sweep, and a process Lightning started, are told it here
    if job.mode == RunMode.MULTIRUN:
        return attempt(cfg, run)
    try:
        run(cfg)
    except UserError as error:
        _give_up(error)
    except Stopped as stop:
        STOP.ignore()
        if is_first_process():
            command = shlex.join([sys.argv[0], *words_to_resume(sys.argv[1:], Path(cfg.run_dir))])
            sys.stderr.write(f"stopped: {stop}; go on with: python {command}\n")
        raise SystemExit(RESUME_ME) from None
    return None


def _give_up(error: UserError) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    sys.stderr.write(f"error: {describe_error(error)}\n")
    raise SystemExit(2) from None


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # a user's own parts, by dotted path from where he stands
    sys.argv[1:] = spelled_out(sys.argv[1:])
    try:
        jobs = check_command_line(CONF_DIR, sys.argv[1:])
        if jobs and all(job.mode == "describe" for job in jobs):  # not by Hydra, which would make a run folder
            for job in jobs:
                run(job)
            raise SystemExit
        if {"-m", "--multirun"} & set(sys.argv):
            check_sweep(jobs)
        elif jobs:
            sys.argv += words_of_newest(jobs[0], sys.argv[1:])
    except UserError as error:
        _give_up(error)
    main()
