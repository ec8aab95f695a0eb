"""Several processes: the same samples in each step as in one, the same gradient, the same list of what is damaged."""

import json
from pathlib import Path

import pytest
import torch

from callbacks.same_position import SamePosition
from callbacks.skipped import SkippedSamples
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.module import CrossLMMModule
from lightning_crosslmm.optim import OptimSettings
from tests.test_data.ranks import on_ranks
from tests.test_data.test_module import Recorder, SaveAt, data_of, trainer_of
from tests.test_data.test_stream import damage
from tests.tiny import TOKENIZER, tiny_model

NUM_STEPS = 15
SWITCHES = [(1, 3, 4), (2, 1, 5), (4, 0, 6)]  # ranks, workers, steps that they train


def ranks_of(world, *callbacks, **options):
    strategy = {"strategy": "ddp", "devices": world} if world > 1 else {}
    fixed = {"max_epochs": -1, "use_distributed_sampler": False, "limit_val_batches": 0}
    return trainer_of(*callbacks, **fixed | strategy | options)


def _train(rank, world, num_workers, num_steps, folder, out, ckpt_path):
    data = data_of(folder, pack_tokens=80, num_workers=num_workers, worker_start="fork", val=None, max_bad_fraction=0.5)
    module, skipped = Recorder(), SkippedSamples()
    saving = SaveAt("on_train_batch_end", num_steps, out / "saved.ckpt")
    trainer = ranks_of(world, skipped, SamePosition(), saving, max_steps=NUM_STEPS, default_root_dir=out)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    assert len({str(told) for told in skipped._agreement.gather(skipped.state_dict())}) == 1
    (out / f"rank-{rank}.json").write_text(json.dumps(module.keys[:num_steps]))


def _steps(out: Path) -> list[list[str]]:
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
    return [sorted(key for keys in step for key in keys if key) for step in zip(*ranks, strict=True)]


def test_ranks_and_workers_may_change_at_any_step(text_folder, tmp_path):
    folder = damage(text_folder, tmp_path / "damaged", member="json")
    _train(0, 1, 0, NUM_STEPS, folder, tmp_path, None)
    whole = _steps(tmp_path)
    seen = sum(whole, [])
    assert "s09" not in seen and seen.count("s08") >= 2 and len(seen) / len(whole) > 4, "rows hold several"
    ckpt_path, pieces = None, []
    for world, num_workers, num_steps in SWITCHES:
        out = tmp_path / f"world-{world}"
        out.mkdir()
        arguments = (world, num_workers, num_steps, folder, out, ckpt_path)
        on_ranks(world, _train, *arguments) if world > 1 else _train(0, *arguments)
        ckpt_path = out / "saved.ckpt"
        pieces += _steps(out)
    assert pieces == whole
    last, alone = (torch.load(path, weights_only=True) for path in (ckpt_path, tmp_path / "saved.ckpt"))
    assert last["VideoDataModule"] == alone["VideoDataModule"]
    counted = last["callbacks"]["SkippedSamples"]
    assert counted == alone["callbacks"]["SkippedSamples"]
    assert counted["listed"][0][1] == "s09" and counted["counts"]["train"][0] > len(seen)


class Gradients(CrossLMMModule):
    """Keeps the gradient that the first step would clip."""

    def configure_gradient_clipping(self, *_, **__):
        self.kept = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}


def _gradients(rank, world, accumulate, pack_tokens, folder, out):
    rates = dict.fromkeys(("encoder", "pooler", "projector", "fusion", "llm"), 1e-3)
    model = tiny_model(fusion=Fusion(v2v=True, t2v=True, interval=2, gate_init=0.5))
    module = Gradients(model, TOKENIZER, OptimSettings(lr=rates), Greedy(max_new_tokens=1))
    data = data_of(folder, pack_tokens=pack_tokens, val=None, global_batch_size=8, max_bad_fraction=0.5)
    data.fit_to(model)
    trainer = ranks_of(world, SkippedSamples(), max_steps=1, accumulate_grad_batches=accumulate, default_root_dir=out)
    trainer.fit(module, datamodule=data)
    if rank == 0:
        torch.save(module.kept, out / f"{world}-{accumulate}-{pack_tokens}.pt")


@pytest.mark.filterwarnings("ignore:The .* does not have many workers", "ignore:.*stateful dataloader")
def test_the_gradient_is_that_of_the_mean_over_all_answer_tokens(shard_folder, tmp_path):
    folder = damage(shard_folder, tmp_path / "damaged")
    _gradients(0, 1, 1, None, folder, tmp_path)
    _gradients(0, 1, 4, None, folder, tmp_path)
    on_ranks(2, _gradients, 2, 2, None, folder, tmp_path)
    _gradients(0, 1, 1, 4000, folder, tmp_path)
    whole, *others = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1-1-None.pt", "1-4-None.pt", "2-2-None.pt")
    )
    largest = max(gradient.abs().max() for gradient in whole.values())
    for other in others:
        worst = max((other[name] - gradient).abs().max() for name, gradient in whole.items())
        assert worst < 3e-6 * largest
    packed = torch.load(tmp_path / "1-1-4000.pt", weights_only=True)
    assert any(not torch.equal(packed[name], gradient) for name, gradient in whole.items()), (
        "the test sees a difference"
    )


def _elsewhere(rank, folder, out):
    data = data_of(folder, val=None, seed=5 + rank)
    trainer = ranks_of(2, SamePosition(), max_steps=1)
    with pytest.raises(UserError, match=r"data: ranks \[1\] stand at another place than rank 0"):
        trainer.fit(Recorder(), datamodule=data)


def test_ranks_that_would_read_other_data_stop(text_folder, tmp_path):
    on_ranks(2, _elsewhere, text_folder, tmp_path)
