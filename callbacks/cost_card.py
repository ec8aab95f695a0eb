"""What a run's configuration costs, beside what came of it: ``cost.json`` and ``cost.md``."""

import json
import logging
from pathlib import Path

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK, VideoBatch
from lightning_crosslmm.compose import ANY_TARGET, load_run
from lightning_crosslmm.cost import Sample, cost_card, cost_page
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.run_folder import replacing
from lightning_crosslmm.visuals import questions_of

log = logging.getLogger(__name__)


class CostCard(lightning.Callback):
    """Write the cost card of a training, for the mean sample of its first validation batch.

    Where the pooler's number of tokens depends on the data, it is measured on that batch, with the weights at its
    time: mean, least and most per frame. Written once, when the first validation begins or training ends without one
    (then nothing is written, as there is no sample). The card is counted on a copy of the model on the meta device;
    weights, gradients and random numbers stay as they are.

    Args:
        gpu: a name of `lightning_crosslmm.cost.GPUS` for least times; None leaves them out.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu, self._is_written = gpu, False

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the card before the first batch."""
        if self._is_written or trainer.sanity_checking or trainer.state.fn != "fit" or not len(batch.frames_FCHW):
            return
        self._is_written = True
        # where weights are shared out, the encoder runs only within the model's own calls, and alike on all processes
        counts_F = None
        if pl_module.model.most is None:
            with trainer.precision_plugin.forward_context():
                counts_F = pooled_per_frame(pl_module.model, batch)
        self._write(Path(trainer.default_root_dir), batch, counts_F)

    @rank_zero_only
    def _write(self, run_dir: Path, batch: VideoBatch, counts_F: torch.Tensor | None) -> None:
        mean = None if counts_F is None else float(counts_F.float().mean())
        try:
            card = cost_card(load_run(run_dir), ANY_TARGET, mean_sample(batch), gpu=self.gpu, pooled_per_frame=mean)
        except (UserError, RuntimeError) as error:  # a card is no reason to end a training
            log.warning("no cost card: %s", error)
            return
        if counts_F is not None:
            card["tokens"] |= {
                "pooled_per_frame": mean,
                "pooled_per_frame_min": int(counts_F.min()),
                "pooled_per_frame_max": int(counts_F.max()),
            }
        for name, text in (("cost.json", json.dumps(card, indent=1) + "\n"), ("cost.md", cost_page(card))):
            with replacing(run_dir / name) as part:
                part.write_text(text)


def mean_sample(batch: VideoBatch) -> Sample:
    """Describe the mean sample of a batch: frames, text tokens, answer tokens of each."""
    samples = batch.num_samples
    text = round(int((batch.ids_L != VISUAL_MARK).sum()) / samples)
    answer = round(int((batch.labels_L != IGNORED).sum()) / samples)
    return Sample(max(1, round(len(batch.frames_FCHW) / samples)), max(2, text), min(max(1, answer), max(2, text) - 1))


@torch.no_grad()
def pooled_per_frame(model: CrossLMM, batch: VideoBatch) -> torch.Tensor | None:
    """Measure how many tokens each frame of a batch becomes: (F,) int64; None where it is known before.

    Args:
        model: as it stands.
        batch: samples, on the model's device.
    """
    if model.tokens_per_frame is not None:
        return None
    questions = questions_of(batch, model.llm, model.pooler.needs)
    return model.encode(batch, questions).pooled.frame_offsets.diff()
