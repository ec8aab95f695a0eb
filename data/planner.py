"""The planner: settings, an epoch and the processes that share it become a plan."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from data.mixture import Mixture
from data.packing import PLAN_VERSION, Rows, SlotEstimate
from data.plan import EvalPlan, TrainPlan
from data.position import Position
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.text import Tokenizer, template_tokens
from lightning_crosslmm.video import FrameSampling


@dataclass(frozen=True)
class Shared:
    """Who shares a global batch.

    Args:
        rank: of this process among those that read different data.
        world: how many there are.
        accumulate: batches of each that make one global batch.
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1


@dataclass(frozen=True)
class Planner:
    """Plans epochs; two planners that are equal plan alike, on every rank.

    Args:
        seed: of the order.
        window_shards: shards that are mixed with one another at a time.
        global_batch: rows per optimizer step over all ranks and accumulated batches.
        pack_tokens: estimated tokens that a row of several samples may have; None puts one sample in a row.
        bytes_per_token: of text, for the estimate.
        sampling: which moments of a video become frames.
        tokenizer: carries a chat template.
        tokens_per_frame: pooled tokens of a frame; None as long as no model told.
    """

    seed: int
    window_shards: int
    global_batch: int
    pack_tokens: int | None
    bytes_per_token: float
    sampling: FrameSampling
    tokenizer: Tokenizer
    tokens_per_frame: int | None = None

    def told(self, tokens_per_frame: int) -> Self:
        """Know how many tokens a frame takes in a row."""
        return replace(self, tokens_per_frame=tokens_per_frame)

    def beginning(self, data: Mixture, epoch: int) -> Position:
        """Stand at the beginning of an epoch."""
        settings: dict[str, Any] = {"window_shards": self.window_shards, "pack_tokens": self.pack_tokens}
        if self.pack_tokens is not None:
            names = ("num_frames", "rate_hz", "max_frames")
            settings |= {f"sampling.{name}": getattr(self.sampling, name) for name in names}
            settings |= {"bytes_per_token": self.bytes_per_token, "tokens_per_frame": self.tokens_per_frame}
            settings["tokenizer_template"] = " ".join(str(template_tokens(self.tokenizer, count)) for count in (1, 2))
        settings["plan_version"] = PLAN_VERSION
        plan = ", ".join(f"{name}={'null' if value is None else value}" for name, value in settings.items())
        return Position(self.seed, epoch, 0, 0, 0, self.global_batch, data.fingerprint, plan)

    def train_plan(self, data: Mixture, start: Position, shared: Shared) -> TrainPlan:
        """Plan one rank's share of an epoch, from a position on.

        Raises:
            UserError: the global batch does not divide by those who share it, or the data fill none.
        """
        self._check_divides(shared)
        if self.pack_tokens is not None and self.tokens_per_frame is None:
            raise ValueError("packing needs to know how many tokens a frame takes: call fit_to(model)")
        estimate = None
        if self.pack_tokens is not None or shared.world * shared.accumulate > 1:
            template = partial(template_tokens, self.tokenizer)
            estimate = SlotEstimate(self.bytes_per_token, template, self.sampling, self.tokens_per_frame or 1)
        order = data.order(self.seed, start.epoch, self.window_shards)
        name = (self.seed, start.epoch, data.fingerprint)
        rows = Rows(order, data, estimate, self.pack_tokens, name, data.prefetch)
        return TrainPlan(
            rows, self.global_batch, shared.rank, shared.world, shared.accumulate, start.place, start.batch
        )

    def eval_plan(self, data: Mixture, shared: Shared) -> EvalPlan:
        """Plan one rank's share of a split that is measured or answered; its batches are as large as in training.

        Raises:
            UserError: as for ``train_plan``.
        """
        self._check_divides(shared)
        order = data.order(self.seed, 0, self.window_shards, shuffle=False)
        return EvalPlan(order, self.global_batch // shared.accumulate, shared.rank, shared.world)

    def _check_divides(self, shared: Shared) -> None:
        if self.global_batch % (shared.world * shared.accumulate):
            raise UserError(
                f"data.global_batch_size: {self.global_batch} does not divide by {shared.world} rank(s) "
                f"(trainer.devices x trainer.num_nodes) x {shared.accumulate} (trainer.accumulate_grad_batches)"
            )
