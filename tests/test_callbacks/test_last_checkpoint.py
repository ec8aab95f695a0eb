from pathlib import Path

import pytest
import torch

from callbacks.last_checkpoint import LastCheckpoint
from lightning_crosslmm.errors import UserError


def steps_saved(trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    steps: list[int] = []
    save = trainer.save_checkpoint
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda *path, **how: (steps.append(trainer.global_step), save(*path, **how))
    )
    return steps


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (5, [5]), (50, [5])])
def test_saves_when_due_and_at_the_very_end(
    make_trainer, tiny, batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, expected: list[int]
) -> None:
    trainer = make_trainer(LastCheckpoint(every), max_steps=5, limit_val_batches=0, enable_checkpointing=True)
    steps = steps_saved(trainer, monkeypatch)
    trainer.fit(tiny(), batches(), batches(1))
    assert steps == expected
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_never_amid_accumulation(make_trainer, tiny, batches, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"accumulate_grad_batches": 3, "max_steps": 4, "limit_val_batches": 0, "enable_checkpointing": True}
    trainer = make_trainer(LastCheckpoint(1), **settings)
    steps = steps_saved(trainer, monkeypatch)
    trainer.fit(tiny(), batches(), batches(1))
    assert steps == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")  # the loader has no position
def test_training_goes_on_from_it(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(LastCheckpoint(2), max_steps=5, limit_val_batches=0, enable_checkpointing=True).fit(
        tiny(), batches(), batches(1)
    )
    module = tiny()
    trainer = make_trainer(max_steps=7, limit_val_batches=0)
    trainer.fit(module, batches(), batches(1), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert trainer.global_step == 7
    assert module.weight.item() == pytest.approx(0.8**7)


def test_a_folder_is_replaced_too(make_trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, saving = make_trainer(), LastCheckpoint(1)
    folder = tmp_path / "checkpoints"
    for content in ("first", "second"):

        def save(path: Path, weights_only: bool, content: str = content) -> None:
            path.mkdir(parents=True)
            (path / "shard").write_text(content)

        monkeypatch.setattr(trainer, "save_checkpoint", save)
        saving._save(trainer, folder)
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert (folder / "last.ckpt" / "shard").read_text() == "second"


def test_never_saving_is_no_choice() -> None:
    with pytest.raises(UserError, match="every_n_steps=0: must be at least 1"):
        LastCheckpoint(0)
