"""Thresholds for merging inside an encoder, measured on frames, and the file that keeps them.

Axis letters:
    F  frames    C H W  channels, pixel rows and columns    n  patches that are left    a  patches of A (see `merging`)
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.in_encoder import MergingHook
from lightning_crosslmm.pooler.merging import Left, Move, best_edges, move_along
from lightning_crosslmm.taps import Tower


@dataclass(frozen=True)
class Calibration:
    """What was measured, and on what.

    Args:
        encoder: the tower's `Tower.identity`.
        thresholds: cosine of each block, in double precision.
        tokens_per_frame: the mean that was asked for.
        reached: the mean over the frames of the calibration.
        num_frames: how many there were.
    """

    encoder: dict[str, Any]
    thresholds: tuple[float, ...]
    tokens_per_frame: float
    reached: float
    num_frames: int

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, tower: Tower) -> "Calibration":
        """Read a file of this tower.

        Raises:
            UserError: no such file, another kind of file, or one of another tower; says what differs.
        """
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            thresholds = tuple(float(each) for each in found.thresholds)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"pooler.thresholds '{path}' is no calibration file ({error}); write one with mode=calibrate"
            ) from error
        here = json.loads(json.dumps(tower.identity))
        differing = sorted(key for key in {*here, *found.encoder} if here.get(key) != found.encoder.get(key))
        if differing:
            key = differing[0]
            raise UserError(
                f"pooler.thresholds '{path}' was calibrated on another encoder: its {key} was "
                f"{found.encoder.get(key)}, here it is {here.get(key)}; write one for this encoder with mode=calibrate"
            )
        if len(thresholds) != tower.num_blocks:
            raise UserError(
                f"pooler.thresholds '{path}' holds {len(thresholds)} thresholds; this encoder runs {tower.num_blocks} "
                "blocks, so write one for it with mode=calibrate"
            )
        return cls(found.encoder, thresholds, found.tokens_per_frame, found.reached, found.num_frames)


@torch.no_grad()
def calibrate(encoder: Any, chunks: Sequence[Tensor], tokens_per_frame: float) -> Calibration:
    """Find thresholds that leave a mean number of tokens per frame.

    Block after block, the threshold is the similarity of the first edge that is not to be taken, of all edges of all
    frames sorted by similarity; each block takes ``(N - tokens_per_frame) / blocks`` of them per frame. Ranks may each
    bring frames of their own, equally many chunks, and get the same thresholds.

    Source: Wang et al., arXiv:2504.17040, section 3.1, "Finding redundancy thresholds".
    Differs: one threshold from all frames at once, where the paper averages those of batches, each merged by its own.
        With one batch both are the same; with several, ours does not depend on how frames fall into batches or on their
        order, and nothing drifts in low precision, as the running mean of the authors' code does. It costs one pass
        over the frames per block, so some thousand frames and not 250,000. Only the constant schedule.

    Args:
        encoder: a tower that gives ``blocks``; computes as it stands, so call it in the precision of use.
        chunks: (F, C, H, W) uint8 frames.
        tokens_per_frame: the mean to reach, at least ``N / (blocks + 1)``.

    Raises:
        UserError: a mean out of range, no frames, or an encoder that runs no hooks.
    """
    if "blocks" not in encoder.gives:
        raise UserError(f"mode=calibrate: encoder {type(encoder).__name__} runs no hook between its blocks")
    tower, patches = encoder.facts(), encoder.grid[0] * encoder.grid[1]
    least = patches / (tower.num_blocks + 1)  # a block merges half of its tokens at most
    if not least <= tokens_per_frame < patches:
        raise UserError(
            f"calibrate.tokens_per_frame is {tokens_per_frame}; with {patches} patches and {tower.num_blocks} blocks "
            f"it is {math.ceil(least)} to {patches - 1}"
        )
    num_frames = sum(_of_all_ranks(sum(map(len, chunks))))
    if num_frames == 0:
        raise UserError("mode=calibrate: there are no frames; calibrate.num_frames must be 1 or more")
    wanted = round((patches - tokens_per_frame) / tower.num_blocks * num_frames)
    thresholds: list[float] = []
    taken, device = 0, encoder.mean_C11.device
    for block in range(tower.num_blocks):
        scores = [_scores(encoder, chunk_FCHW.to(device), thresholds, tower) for chunk_FCHW in chunks]
        best = torch.cat(scores).sort(descending=True).values[: wanted + 1].cpu()  # more of a rank are not needed
        best = torch.cat(_of_all_ranks(best)).double().sort(descending=True).values
        best = best[best > -torch.inf]
        thresholds.append(max(0.0, float(best[wanted])) if len(best) > wanted else 0.0)
        taken += int((best[:wanted] > thresholds[block]).sum())
    return Calibration(tower.identity, tuple(thresholds), tokens_per_frame, patches - taken / num_frames, num_frames)


def _scores(encoder: Any, frames_FCHW: Tensor, thresholds: Sequence[float], tower: Tower) -> Tensor:
    hook = _ScoreHook(thresholds, tower.has_class_token)
    encoder(frames_FCHW, hook=hook)
    return hook.scores


class _ScoreHook(MergingHook):
    """Merge by the thresholds that are known, note the edges of the block after them, and leave the rest alone."""

    def __init__(self, thresholds: Sequence[float], has_class_token: bool) -> None:
        super().__init__(proportional=True)
        self.thresholds, self.has_class_token = thresholds, has_class_token
        self.scores = torch.empty(0)

    def decide(self, block: int, keys_FnK: Tensor, class_Fn: Tensor | None, left: Left) -> Move | None:
        """Merge before the block in question, look at it, and stop."""
        if block > len(self.thresholds):
            return None
        edges = best_edges(keys_FnK, left.mass_Fn, self.num_prefix)
        if block == len(self.thresholds):
            self.scores = edges.score_Fa[edges.above(-torch.inf)]
            return None
        taken_Fa = edges.above(self.thresholds[block])
        return move_along(edges, taken_Fa, None, by_similarity=not self.has_class_token) if taken_Fa.any() else None


def _of_all_ranks(value: Any) -> list[Any]:
    if not distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found
