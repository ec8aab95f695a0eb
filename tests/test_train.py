"""The entry point as users meet it: exit codes and messages by process, runs of every mode within this one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import train
from callbacks.curves import read_curves
from lightning_crosslmm.checkpoint_folder import list_checkpoints
from lightning_crosslmm.compose import compose_overrides, load_run
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import find_checkpoint
from lightning_crosslmm.stop_signals import RESUME_ME

SMALL = (
    "data.probe.clips={train: 8, val: 4, test: 4}",
    "data.probe.clips_per_shard=8",
    "data.probe.questions_per_clip=2",
    "data.probe.num_frames=2",
    "data.sampling.num_frames=2",
    "data.encoder_fit=null",
    "data.global_batch_size=4",
    "data.num_workers=0",
    "decoding.max_new_tokens=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # a test has few
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),  # it does where training goes on
]


def small_run(folder: Path, *words: str) -> Path:
    """Run train.py's work in this process, which has paid for the imports already."""
    config = compose_overrides(train.CONF_DIR, [*SMALL, f"data.cache_dir={folder / 'cache'}", *words])
    train.run(config)
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("train")
    return small_run(folder, f"run_dir={folder / 'run'}", "trainer.max_steps=4")


def test_fit_leaves_one_whole_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "attention.png", "checkpoints", "config.yaml", "cost.json", "cost.md", "csv", "data.json", "learning_curve.png",
        "metrics.json", "provenance.json", "tensorboard", "tokens.png",
    }  # fmt: skip
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"train/loss", "train/seconds", "train/wait_share", "val/loss", "val/accuracy"} <= metrics.keys()
    kinds = load_run(trained).data.probe.kinds
    assert {f"val/accuracy/{kind}" for kind in kinds} & metrics.keys()
    fingerprint = json.loads((trained / "provenance.json").read_text())["data_fingerprint"]
    assert len(fingerprint["train"]) == 64


def test_resume_goes_on_and_a_second_start_is_refused(trained: Path) -> None:
    small_run(trained.parent, f"resume={trained}", f"run_dir={trained}", "trainer.max_steps=6")
    assert torch.load(find_checkpoint(trained, "run_dir"), weights_only=True)["global_step"] == 6
    losses = read_curves(trained / "csv")["train/loss"]
    assert [step for step, _ in losses] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="holds a training; go on with resume="):
        small_run(trained.parent, f"run_dir={trained}")


def test_auto_starts_goes_on_and_knows_when_it_is_done(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("resume=auto", f"run_dir={trained.parent / 'auto'}", "trainer.max_steps=3")
    run = small_run(trained.parent, *words)
    assert torch.load(find_checkpoint(run, "run_dir"), weights_only=True)["global_step"] == 3
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_or_measure", None)  # nothing is built for what is done
        small_run(trained.parent, *words)

    # killed after its last checkpoint: nothing is left to train, and all that a run leaves is written
    curves, metrics = read_curves(run / "csv"), json.loads((run / "metrics.json").read_text())
    record = json.loads((run / "provenance.json").read_text()) | {"ended": None}
    (run / "provenance.json").write_text(json.dumps(record))
    for name in ("metrics.json", "learning_curve.png"):
        (run / name).unlink()
    table = run / "csv" / "version_0" / "metrics.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(keepends=True) if ",2," not in line))
    small_run(trained.parent, *words)
    assert (run / "learning_curve.png").exists() and read_curves(run / "csv")["train/loss"] == curves["train/loss"]
    again = json.loads((run / "metrics.json").read_text())
    measured = {name for name in metrics if name.startswith("prefill/")}  # of a validation that does not come again
    assert measured and again.keys() == metrics.keys() - measured
    assert all(again[name] == metrics[name] for name in ("train/loss", "val/loss", "val/accuracy"))
    with pytest.raises(UserError, match="another configuration .trainer.max_steps is 3 there and 4 here"):
        small_run(trained.parent, *words[:2], "trainer.max_steps=4")


def test_a_stopped_command_is_gone_on_with_by_the_same_command(tmp_path: Path) -> None:
    """Two processes with workers; the signal comes to all of them, as from a scheduler."""
    small = [word for word in SMALL if not word.startswith(("data.num_workers", "trainer.val_check_interval"))]
    words = [*small, "resume=auto", "data.num_workers=1", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    words += [
        "trainer.precision=32-true",
        "trainer.max_steps=20",
        "trainer.limit_val_batches=0",
        "callbacks.curves=null",
    ]
    command = [sys.executable, str(train.CONF_DIR.parent / "train.py"), *words, "callbacks.checkpoints.every_n_steps=1"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as first:
        while not list(tmp_path.glob("runs/*/checkpoints/step-*")):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        group = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        os.killpg(first.pid, signal.SIGTERM)
        told = first.stderr.read()
    assert first.returncode == RESUME_ME and told.count("stopped: SIGTERM after step ") == 1, told[-2000:]
    assert len(group) > 4 and not psutil.wait_procs(group, timeout=10)[1]
    (run,) = tmp_path.glob("runs/*")
    (saved,) = list_checkpoints(run)[0]
    assert f"resume={run} run_dir={run}" in told and 0 < saved.marker.step < 20

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and list(tmp_path.glob("runs/*")) == [run], done.stderr[-2000:]
    assert list_checkpoints(run)[0][-1].marker.step == 20
    record = json.loads((run / "provenance.json").read_text())
    (stopped,) = record["earlier_sessions"]
    assert record["error"] is None and stopped["error"].startswith("Stopped: SIGTERM after step ")


def test_weights_of_a_run_start_a_new_training(trained: Path) -> None:
    words = (f"init_from={trained}", "optim.lr.projector=null", "trainer.max_steps=1", "trainer.limit_val_batches=0")
    new = small_run(trained.parent, f"run_dir={trained.parent / 'second'}", *words)
    states = [
        torch.load(path, weights_only=True)["state_dict"]
        for path in (find_checkpoint(trained, "init_from", ("best",)), find_checkpoint(new, "run_dir"))
    ]
    names = [name for name in states[0] if "projector" in name]
    assert names and all(torch.equal(states[0][name], states[1][name]) for name in names)


def test_measuring_and_answering_take_the_runs_own_checkpoint(trained: Path) -> None:
    before = (trained / "config.yaml").read_bytes()
    small_run(trained.parent, f"run_dir={trained}", "mode=test")
    assert 0 <= json.loads((trained / "metrics_test.json").read_text())["test/accuracy"] <= 1
    small_run(trained.parent, f"run_dir={trained}", "mode=predict")
    lines = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 2 and lines[0].keys() == {"key", "question", "answer", "expected"}
    assert (trained / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp"])
def test_every_trainer_sets_what_resuming_needs(trainer: str) -> None:
    config = compose_overrides(train.CONF_DIR, [f"trainer={trainer}"]).trainer
    assert config.max_steps > 0 and config.use_distributed_sampler is False


def call(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(train.CONF_DIR.parent / "train.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pooler=averge"], "pooler=averge: pooler has no arm 'averge'; did you mean 'average'?"),
        (
            ["optim.lr.fuson=1"],
            "optim.lr.fuson=1: there is no setting 'optim.lr.fuson'; did you mean 'optim.lr.fusion'?",
        ),
        (["-m", "seed=1,2", "poler=max"], "poler=max: there is no setting 'poler'; did you mean 'pooler'?"),
        (["mode=fti"], "mode=fti: must be one of fit, validate, test, predict, calibrate, describe; did you mean 'f"),
        (["mode=test", "run_dir=nowhere"], "run_dir=nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message.split("run_dir=")[0] in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_a_part_of_the_users_own_is_found_where_he_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Pooler:\n    def __init__(self, window: int) -> None: ...\n")
    done = call("pooler._target_=mine.Pooler", cwd=tmp_path)
    assert done.returncode == 2
    assert "mine.Pooler takes no '" in done.stderr.splitlines()[-1] and not (tmp_path / ".cache").exists()


def test_full_errors_show_where(tmp_path: Path) -> None:
    environment = {"HYDRA_FULL_ERROR": "1", "PATH": ""}
    command = [sys.executable, str(train.CONF_DIR.parent / "train.py"), "poler=max"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" in done.stderr and "did you mean 'pooler'?" in done.stderr
