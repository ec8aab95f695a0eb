"""The LightningModule: training, validation, testing and prediction around `CrossLMM`."""

from collections.abc import Iterable, Iterator, Sequence

import lightning
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_crosslmm.batch import VideoBatch, blank_prompt, prompts_for
from lightning_crosslmm.decoding import Decoding
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.looks import Look, sights
from lightning_crosslmm.metrics import AnswerAccuracy, answers_right
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.objective import answer_loss
from lightning_crosslmm.optim import OptimSettings
from lightning_crosslmm.sharding import shard
from lightning_crosslmm.text import Tokenizer, decode_answer, end_of_turn_id


class CrossLMMModule(lightning.LightningModule):
    """Hooks only: what is computed lives in the parts it calls.

    Logs ``train/loss`` and ``train/accuracy`` per step, ``val/...`` and ``test/...`` per epoch: ``loss`` in nats per
    answer token, ``accuracy`` and ``accuracy/TYPE`` as shares of answers that are right to the last token. Where an
    encoder is spared work, ``encoded_share``: frames that its tower ran on over frames seen, since this start.

    Args:
        model: the network.
        tokenizer: of the data.
        optim: learning rates, schedule, what is frozen.
        decoding: how `predict_step` answers.
        answer_kinds: question types of the data.
        gradient_checkpointing: recompute encoder blocks and decoder layers in the backward pass.
    """

    def __init__(
        self,
        model: CrossLMM,
        tokenizer: Tokenizer,
        optim: OptimSettings,
        decoding: Decoding,
        answer_kinds: Iterable[str] = (),
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.optim, self.decoding = model, tokenizer, optim, decoding
        optim.freeze(model)
        model.keep_features()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        kinds = tuple(answer_kinds)
        self.val_accuracy, self.test_accuracy = AnswerAccuracy(kinds), AnswerAccuracy(kinds)
        self._answer_tokens = 0
        # pretrained parts come in evaluation mode, where nothing is checkpointed, and Lightning would keep it
        self.train()

    def setup(self, stage: str) -> None:
        """Refuse a precision that turns batches into half precision, and times with them.

        Raises:
            UserError: names the precisions that are right.
        """
        if isinstance(self.trainer.precision_plugin, HalfPrecision):
            raise UserError(
                f"trainer.precision: {self.trainer.precision} stores weights in half precision, which trainer=fsdp "
                "alone does here (with bf16-true); elsewhere bf16-mixed and 32-true are right"
            )

    def configure_model(self) -> None:
        """Share the model's weights out where the strategy has a mesh of processes for it; called once they run."""
        if self.device_mesh is not None and self.model.most is None:
            device = self.trainer.strategy.root_device
            shard(self.model, self.device_mesh["data_parallel"], device, str(self.trainer.precision))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and a schedule over ``trainer.max_steps``.

        Raises:
            UserError: the trainer has no number of steps; asking Lightning to estimate it would lose the data's
                position on resume.
        """
        optimizer = self.optim.optimizer(self.model)
        total_steps = self.trainer.max_steps
        if total_steps < 1:
            raise UserError(
                f"trainer.max_steps is {total_steps}; the schedule needs a number of optimizer steps, 1 or more"
            )
        schedule = self.optim.scheduler(optimizer, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Begin to count answer tokens; gradients of a step that was not finished are in no checkpoint."""
        self._answer_tokens = 0

    def training_step(self, batch: VideoBatch, batch_index: int) -> Tensor:
        """Give the summed loss of one batch's answer tokens; ``train/loss`` is their mean."""
        output = self.model(batch)
        loss = answer_loss(output.logits_YW, output.target_Y)
        right_Z = answers_right(output.logits_YW.detach(), output.target_Y, output.answer_Y, len(batch.answer_kinds))
        if len(output.target_Y):
            self.log("train/loss", loss.detach(), batch_size=batch.num_samples)
        if len(right_Z):
            self.log("train/accuracy", right_Z.float().mean(), batch_size=len(right_Z))
        if self.model.reuse.is_on:
            self.log("train/encoded_share", self.model.reuse.encoded_share(is_training=True), batch_size=1)
        self._answer_tokens += len(output.target_Y)
        return loss * len(output.target_Y)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient that of the mean loss over all answer tokens of the step, on all ranks and in all batches.

        Lightning divides each batch's sum by the A batches that are accumulated, and the strategy takes the mean over
        ranks, so what stands here is ``sum / (A * ranks)``; times ``A / mean tokens of a rank`` it is the mean over
        tokens. Clipping comes after this hook.
        """
        counted = torch.tensor(float(self._answer_tokens), device=self.device)
        mean_tokens = self.trainer.strategy.reduce(counted, reduce_op="mean")
        scale = self.trainer.accumulate_grad_batches / mean_tokens.clamp(min=1e-6)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self._answer_tokens = 0

    def validation_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Tensor]:
        """Count right answers of one validation batch, and give them as ``right_Z`` to callbacks."""
        return self._measure(batch, "val", self.val_accuracy)

    def test_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Tensor]:
        """Count right answers of one test batch, and give them as ``right_Z`` to callbacks."""
        return self._measure(batch, "test", self.test_accuracy)

    def _measure(self, batch: VideoBatch, stage: str, accuracy: AnswerAccuracy) -> dict[str, Tensor]:
        output = self.model(batch)
        loss = answer_loss(output.logits_YW, output.target_Y)
        right_Z = answers_right(output.logits_YW, output.target_Y, output.answer_Y, len(batch.answer_kinds))
        accuracy.count(right_Z, batch.answer_kinds, batch.answer_facts)
        self.log(f"{stage}/loss", loss, batch_size=len(output.target_Y), on_epoch=True, sync_dist=True)
        return {"right_Z": right_Z}

    def on_validation_epoch_end(self) -> None:
        """Log accuracy over all ranks."""
        self._log_accuracy("val", self.val_accuracy)

    def on_test_epoch_end(self) -> None:
        """Log accuracy over all ranks."""
        self._log_accuracy("test", self.test_accuracy)

    def _log_accuracy(self, stage: str, accuracy: AnswerAccuracy) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in accuracy.seen().items()})
        if self.model.reuse.is_on:
            self.log(f"{stage}/encoded_share", self.model.reuse.encoded_share(is_training=False), sync_dist=True)
        accuracy.reset()

    def predict_step(self, batch: VideoBatch, batch_index: int) -> list[dict[str, str]]:
        """Answer every question of every sample, earlier turns given with their right answers."""
        return [
            {"key": key, "question": question, "answer": answer, "expected": expected}
            for key, question, answer, expected in self._answered(batch, range(len(batch.answer_kinds)))
        ]

    def looks(self, batch: VideoBatch, limit: int) -> list[Look]:
        """Answer the first question of the first samples, and say where the model looked.

        Args:
            batch: samples with answers.
            limit: at most so many.
        """
        sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
        first = {
            int(sample): int(answer)
            for sample, answer in zip(sample_L.flip(0), batch.answer_L.flip(0), strict=True)
            if answer >= 0
        }
        chosen = [first[sample] for sample in sorted(first)][:limit]
        if self._calls(len(chosen), limit) == 0:
            return []
        prompts = prompts_for(batch, chosen) if chosen else blank_prompt(batch)
        seen, said = sights(self.model, prompts), list(self._answered(batch, chosen))
        offsets = prompts.visual_offsets[torch.searchsorted(prompts.sample_of_visual, torch.arange(len(chosen) + 1))]
        frames, times = (each.tensor_split(offsets[1:-1]) for each in (prompts.frames_FCHW, prompts.frame_time_s_F))
        return [
            Look(*answered, frames_FCHW, sight.mean("v2v"), sight.mean("t2v"), time_s_F, sight)
            for answered, frames_FCHW, time_s_F, sight in zip(said, frames, times, seen, strict=bool(chosen))
        ]

    @torch.no_grad()
    def _answered(self, batch: VideoBatch, answers: Sequence[int]) -> Iterator[tuple[str, str, str, str]]:
        # a few at a time: each carries its own copy of the frames
        per_call = max(1, batch.num_samples)
        stop_id, pad_id = end_of_turn_id(self.tokenizer), self.tokenizer.pad_token_id
        for call in range(self._calls(len(answers), per_call)):
            chosen = answers[call * per_call : (call + 1) * per_call]
            prompts = prompts_for(batch, chosen) if chosen else blank_prompt(batch)
            rows = self.model.generate(
                prompts, self.decoding, stop_id=stop_id, pad_id=stop_id if pad_id is None else pad_id
            )
            for number, (answer, row) in enumerate(zip(chosen, rows, strict=bool(chosen))):
                expected = decode_answer(self.tokenizer, batch.labels_L[batch.answer_L == answer].tolist())
                yield prompts.keys[number], batch.questions[answer], decode_answer(self.tokenizer, row), expected

    def _calls(self, count: int, per_call: int) -> int:
        """How often the model is to be called for so many prompts; where its weights are sharded, by all processes."""
        calls = -(-count // per_call)
        return calls if self.model.most is None else self.model.most(calls)
