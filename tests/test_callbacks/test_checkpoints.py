import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from callbacks.checkpoint_files import copy_to_cpu
from callbacks.checkpoints import Checkpoints
from callbacks.curves import read_curves
from callbacks.random_state import RandomState
from lightning_crosslmm.checkpoint_folder import begin_checkpoint, list_checkpoints
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import choose_checkpoint, find_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),  # the loader has no position
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]


def steps(run_dir: Path) -> list[int]:
    return [each.marker.step for each in list_checkpoints(run_dir)[0]]


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture
def train(make_trainer, tiny, batches, tmp_path: Path) -> Callable[..., object]:
    """Train with checkpoints, from the start or from one of them; gives the module."""

    def run(*callbacks: object, module: object = None, ckpt_path: Path | None = None, **settings: object) -> object:
        module = module or tiny([0.5] * 99)
        trainer = make_trainer(*callbacks, enable_checkpointing=True, **settings)
        trainer.fit(module, batches(), batches(2), ckpt_path=ckpt_path, weights_only=True)
        return module

    return run


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("every", "keep_last", "expected"), [(2, 1, [5]), (2, 9, [2, 4, 5]), (5, 9, [5]), (50, 9, [5]), (1, 2, [4, 5])]
)
def test_saves_when_due_and_at_the_very_end(
    train, tmp_path: Path, every: int, keep_last: int, expected: list[int], background: bool, keeping
) -> None:
    train(keeping(every, keep_last=keep_last, background=background), max_steps=5, limit_val_batches=0)
    assert steps(tmp_path) == expected
    names = [f"step-{step:08d}" for step in expected]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    for step, name in zip(expected, names, strict=True):
        saved = weights(tmp_path / "checkpoints" / name / "state.ckpt")
        assert saved["weight"].item() == pytest.approx(0.8**step)  # of its step, though training went on


def test_the_marker_says_what_is_there(train, tmp_path: Path, keeping) -> None:
    train(keeping(keep_best=1), max_steps=6)
    folder = find_checkpoint(tmp_path, "run_dir", ("best",)).parent
    marker = json.loads((folder / "complete.json").read_text())
    assert marker["step"] == 3 and marker["metric"] == 0.5 and marker["monitor"] == "val/accuracy"
    assert marker["world_size"] == 1 and marker["versions"].keys() == {"python", "torch", "lightning"}
    assert marker["files"] == {"state.ckpt": (folder / "state.ckpt").stat().st_size}


@pytest.mark.parametrize(
    ("mode", "accuracies", "expected"),
    [
        ("max", [0.1, 0.9, 0.3, 0.9], [2, 4]),  # of equal ones the earlier
        ("min", [0.1, 0.9, 0.3, 0.9], [1, 4]),
        ("max", [float("nan"), 0.2, 0.1, 0.0], [2, 4]),
    ],
)
def test_the_best_is_kept_beside_the_last(
    train, tiny, tmp_path: Path, mode: str, accuracies: list[float], expected: list[int], keeping
) -> None:
    saving = keeping(99, keep_best=1, mode=mode)
    train(saving, module=tiny(accuracies), max_steps=4, val_check_interval=1)
    assert steps(tmp_path) == expected
    best = find_checkpoint(tmp_path, "ckpt", ("best", "last"))
    assert best.parent.name == f"step-{expected[0]:08d}"
    assert find_checkpoint(tmp_path, "resume").parent.name == "step-00000004"


def test_a_step_with_a_validation_is_saved_after_it(train, tiny, tmp_path: Path, keeping) -> None:
    train(keeping(3, keep_last=9), module=tiny([0.25, 0.75]), max_steps=6, val_check_interval=3)
    assert [each.marker.metric for each in list_checkpoints(tmp_path)[0]] == [0.25, 0.75]


def test_a_misspelt_metric_is_told(train, keeping) -> None:
    with pytest.raises(UserError, match=r"monitor=val/acuracy: .*did you mean 'val/accuracy'\?; it logged train/acc"):
        train(keeping(keep_best=1, monitor="val/acuracy"))


def test_never_amid_accumulation(train, tmp_path: Path, keeping) -> None:
    train(keeping(1, keep_last=9), accumulate_grad_batches=3, max_steps=4, limit_val_batches=0)
    assert steps(tmp_path) == [1, 2, 3, 4]
    loops = [torch.load(each.loadable, weights_only=True)["loops"] for each in list_checkpoints(tmp_path)[0]]
    assert [loop["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] for loop in loops] == [3, 6, 9, 12]
    with pytest.raises(UserError, match="trainer.val_check_interval=4: must be a multiple of .*batches=3"):
        train(keeping(), accumulate_grad_batches=3, val_check_interval=4)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("starts", [[1], [2], [3], [4], [5], [6], [7], [8], range(1, 9)])
def test_going_on_from_any_step_is_the_run_itself(
    make_trainer, noisy, epoch_of, tmp_path: Path, starts: Sequence[int], background: bool, keeping
) -> None:
    """Weights, optimizer and every logged number, with epochs of 3 batches and a validation after every second one."""

    def run(folder: Path, max_steps: int) -> tuple[dict, dict]:
        torch.manual_seed(max_steps)
        saving = keeping(1, keep_last=99, background=background)
        trainer = make_trainer(
            RandomState(seed=3), saving, enable_checkpointing=True, max_steps=max_steps, val_check_interval=2,
            log_every_n_steps=1, folder=folder,
        )  # fmt: skip
        start = choose_checkpoint("fit", folder, "auto", None, None)
        trainer.fit(noisy(), epoch_of(3), epoch_of(2), ckpt_path=start, weights_only=True)
        state = torch.load(find_checkpoint(folder, "run_dir"), weights_only=True)
        return state, read_curves(folder / "csv")

    whole, curves = run(tmp_path / "whole", 9)
    for max_steps in [*starts, 9]:
        resumed, its_curves = run(tmp_path / "cut", max_steps)
    for name in ("state_dict", "optimizer_states", "loops"):
        assert equal(whole[name], resumed[name]), name
    assert curves == its_curves and len(curves["train/loss"]) == 9 and len(curves["val/loss"]) == 4


def equal(left: object, right: object) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def test_a_run_that_dies_after_saving_has_lost_no_number(make_trainer, noisy, epoch_of, tmp_path: Path) -> None:
    """Loggers hear of a step after the callbacks, so the step that was just saved is not in the killed run's table."""

    class Dies(Checkpoints):
        def save(self, trainer, *rest) -> None:
            super().save(trainer, *rest)
            if trainer.global_step == 4 and ckpt_path is None:
                raise MemoryError

    usual = {"keep_last": 1, "keep_best": 0, "monitor": "val/accuracy", "mode": "max", "background": False}
    for ckpt_path in (None, tmp_path):
        trainer = make_trainer(
            Dies(every_n_steps=1, **usual), enable_checkpointing=True, max_steps=6, limit_val_batches=0,
            log_every_n_steps=1,
        )  # fmt: skip
        start = ckpt_path and find_checkpoint(ckpt_path, "resume")
        try:
            trainer.fit(noisy(), epoch_of(3), epoch_of(1), ckpt_path=start, weights_only=True)
        except MemoryError:
            assert [step for step, _ in read_curves(tmp_path / "csv")["train/loss"]] == [0, 1, 2]
    assert [step for step, _ in read_curves(tmp_path / "csv")["train/loss"]] == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def small_disk() -> Iterator[Callable[[int | None], None]]:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda num_bytes: resource.setrlimit(
        resource.RLIMIT_FSIZE, before if num_bytes is None else (num_bytes, before[1])
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(
    train, tiny, tmp_path: Path, small_disk: Callable[[int | None], None], background: bool, keeping
) -> None:
    class Heavy(tiny):
        def __init__(self) -> None:
            super().__init__()
            self.ballast = nn.Parameter(torch.zeros(2**16))

    module, saving = Heavy(), keeping(2, background=background)

    def fill_the_disk() -> None:
        if module.trainer.global_step == 3:
            while not (tmp_path / "checkpoints" / "step-00000002").exists():
                time.sleep(0.01)
            small_disk(2**16)

    module.on_step = fill_the_disk
    try:
        with pytest.raises(
            UserError, match=r"checkpoints: .* could not be written: .*; earlier checkpoints are as"
        ) as told:
            train(saving, module=module, max_steps=8, limit_val_batches=0)
    finally:
        small_disk(None)  # at once: what pytest reports goes to a file, too
    assert "\n" not in str(told.value) and ("File too large" in str(told.value) or "unexpected pos" in str(told.value))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert weights(find_checkpoint(tmp_path, "resume"))["weight"].item() == pytest.approx(0.8**2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_to_is_told_before_training(train, tmp_path: Path, keeping) -> None:
    (tmp_path / "checkpoints").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written to: .*Permission denied"):
        train(keeping())


def test_a_file_in_the_folders_place_is_told_before_training(train, tiny, tmp_path: Path, keeping) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints: cannot be written to: .*exists"):
        train(keeping(), module=tiny(on_step=pytest.fail))


def test_what_a_killed_run_left_half_written_goes_away(train, tmp_path: Path, keeping) -> None:
    begin_checkpoint(tmp_path, 7).mkdir(parents=True)
    train(keeping(), max_steps=2, limit_val_batches=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_copy_shares_what_was_shared_and_nothing_with_the_original() -> None:
    whole = torch.arange(6.0)
    state = {"a": whole[2:4], "b": [whole.view(2, 3).T, 7], "c": torch.ones((), dtype=torch.bfloat16)}
    copied = copy_to_cpu(state)
    whole.zero_()
    assert copied["a"].tolist() == [2, 3] and copied["b"][0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["b"][1] == 7 and copied["c"].dtype == torch.bfloat16
    assert copied["a"].untyped_storage().data_ptr() == copied["b"][0].untyped_storage().data_ptr()


@pytest.mark.parametrize("setting", [{"every": 0}, {"keep_last": 0}, {"keep_best": -1}])
def test_numbers_that_make_no_sense(setting: dict[str, int], keeping) -> None:
    with pytest.raises(UserError, match=r"(every_n_steps|keep_last)=0: must be at least 1|keep_best=-1: .* 0"):
        keeping(**setting)


def test_a_strategy_that_saves_by_itself_is_refused(make_trainer, tiny, batches, keeping) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Own(SingleDeviceStrategy):
        def save_checkpoint(self, *arguments) -> None: ...

    trainer = make_trainer(keeping(), enable_checkpointing=True, strategy=Own(device="cpu"))
    with pytest.raises(UserError, match="trainer.strategy: Own saves checkpoints in a way of its own"):
        trainer.fit(tiny(), batches(), batches(1))
