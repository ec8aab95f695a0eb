"""Train, measure, run or describe a video LMM: ``python train.py [mode=fit] [group=arm] [key=value] [-m]``.

Mistakes in settings end in one message and exit code 2; ``HYDRA_FULL_ERROR=1`` shows where they were found.
"""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from lightning_crosslmm.compose import ANY_TARGET, build_model, check_command_line, instantiate, save_resolved
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import choose_checkpoint, find_checkpoint

CONF_DIR = Path(__file__).resolve().parent / "conf"


def run(cfg: DictConfig) -> None:
    """Do one run of one mode, with everything it writes in ``cfg.run_dir``."""
    checkpoint = choose_checkpoint(cfg.mode, Path(cfg.run_dir), cfg.resume, cfg.init_from, cfg.ckpt)
    if cfg.mode == "describe":
        show(cfg)
        return

    # Here, so that a misspelt setting is told before seconds of imports.
    import lightning
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_crosslmm.module import CrossLMMModule
    from lightning_crosslmm.text import load_tokenizer
    from lightning_crosslmm.weights import load_weights

    logging.getLogger("lightning").handlers.clear()  # Hydra's root handlers show each line already

    lightning.seed_everything(cfg.seed, workers=True)
    model = build_model(cfg, ANY_TARGET)
    if cfg.init_from is not None:
        load_weights(model, find_checkpoint(Path(cfg.init_from), "init_from", ("best", "last")))
    datamodule, optim, decoding = (instantiate(cfg[part], ANY_TARGET) for part in ("data", "optim", "decoding"))
    callbacks, loggers = (
        [each for each in instantiate(cfg[group], ANY_TARGET).values() if each] for group in ("callbacks", "logger")
    )
    trainer = instantiate(cfg.trainer, ANY_TARGET, callbacks=callbacks, logger=loggers)

    # Before Lightning does, because metrics are named after the question types that the data hold.
    datamodule.prepare_data()
    datamodule.setup(cfg.mode)
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
        if checkpoint is None and cfg.init_from is None:
            datamodule.warm_start(model)
    # weights_only: a checkpoint holds tensors and plain values, and may run no code.
    getattr(trainer, cfg.mode)(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)


def show(cfg: DictConfig) -> None:
    """Print what the config amounts to; built on the meta device: no weights, and seconds at any size."""
    import torch

    from lightning_crosslmm.describe import describe

    with torch.device("meta"):
        model = build_model(cfg, ANY_TARGET)
    instantiate(cfg.optim, ANY_TARGET).freeze(model)
    sys.stdout.write("\n".join(describe(model, instantiate(cfg.data.sampling, ANY_TARGET))) + "\n")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run what Hydra composed, in the folder Hydra chose."""
    job = HydraConfig.get()
    with open_dict(cfg):
        cfg.run_dir = job.runtime.output_dir  # a job of a sweep, and a process Lightning started, are told it here
    try:
        if job.mode == RunMode.MULTIRUN and cfg.trainer.get("strategy") not in ("auto", None):
            raise UserError("trainer.strategy: -m runs jobs of one process; start each distributed run by itself")
        run(cfg)
    except UserError as error:
        _give_up(error)


def _give_up(error: UserError) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    message = str(error).rpartition("UserError: ")[2].strip()  # a loader's worker puts its traceback before it
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2) from None


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # a user's own parts, by dotted path from where he stands
    try:
        jobs = check_command_line(CONF_DIR, sys.argv[1:])
        if jobs and all(job.mode == "describe" for job in jobs):  # not by Hydra, which would make a run folder
            for job in jobs:
                run(job)
            raise SystemExit
    except UserError as error:
        _give_up(error)
    main()
