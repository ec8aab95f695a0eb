"""What poolers share that keep another number of tokens in every frame: budgets, picks and merges.

Counts are born on the accelerator and needed on the CPU: `pick` is the one place that waits for them. All that follows
is indexed with what the CPU knows.

Axis letters:
    F  frames    N  patches of a frame    M  slots of a frame, as many as the fullest frame has    J  picked tokens
    C X  curves and their points
    P  pooled tokens    S  source tokens    E  entries of a map    D  width
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.regroup import keep
from lightning_crosslmm.tokens import Partition, SourceMap, TokenSet, Weighted, compose


def budget(setting: str, value: int | float, patches: int, least: int = 1) -> int:
    """Read a budget of tokens per frame.

    Args:
        setting: its name, for the message.
        value: a whole number counts tokens; a fraction between 0 and 1 is a share of the patches, one token at least.
        patches: N.
        least: the smallest number that is right, 0 or 1.

    Raises:
        UserError: fewer than `least`, or more than the encoder gives.
    """
    if isinstance(value, float) and 0.0 < value < 1.0:
        return max(1, round(value * patches))
    if isinstance(value, float) or not least <= value <= patches:
        raise UserError(
            f"{setting} is {value}, the encoder gives {patches} tokens per frame; it must be {least} to {patches} "
            f"tokens, or a share of them between 0 and 1"
        )
    return value


@dataclass(frozen=True)
class Picks:
    """Which patches stay, frame by frame.

    Args:
        order_FN: patches of each frame, those that stay first.
        count_F: (F,) int64 on the CPU, how many stay.
    """

    order_FN: Tensor
    count_F: Tensor

    @property
    def most(self) -> int:
        """M: slots of the fullest frame."""
        return int(self.count_F.max()) if len(self.count_F) else 0

    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give frame, slot and patch of all that stays: three (J,) on the device."""
        return self._places(torch.arange(self.order_FN.shape[1]) < self.count_F[:, None])

    def left(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give frame, place in the order, and patch of all that goes."""
        return self._places(torch.arange(self.order_FN.shape[1]) >= self.count_F[:, None])

    def _places(self, chosen_FN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        frame_J, slot_J = on_device(self.order_FN.device, *chosen_FN.nonzero(as_tuple=True))
        return frame_J, slot_J, self.order_FN[frame_J, slot_J]


def pick(is_kept_FN: Tensor, priority_FN: Tensor | None = None, count: int | None = None) -> Picks:
    """Order the patches that stay.

    Args:
        is_kept_FN: bool.
        priority_FN: int64, 0 to 2 N - 1: the lowest come first; None is raster order.
        count: how many stay in every frame, where that is known; else the accelerator is asked.
    """
    num_frames, patches = is_kept_FN.shape
    place_N = torch.arange(patches, device=is_kept_FN.device)
    priority_FN = place_N.expand(num_frames, -1) if priority_FN is None else priority_FN
    order_FN = torch.where(is_kept_FN, priority_FN, place_N + 2 * patches).argsort(dim=1)
    count_F = is_kept_FN.sum(dim=1).cpu() if count is None else torch.full((num_frames,), count)
    return Picks(order_FN, count_F)


def on_device(device: torch.device, *indices: Tensor) -> list[Tensor]:
    """Move indices that the CPU made, without waiting for what the accelerator still does."""
    return [index.to(device, non_blocking=True) for index in indices]


def rank(importance_FN: Tensor) -> Tensor:
    """Number the patches of a frame by importance, 0 for the greatest; of equal ones the earlier comes first."""
    order_FN = importance_FN.argsort(dim=1, descending=True, stable=True)
    place_N = torch.arange(importance_FN.shape[1], device=importance_FN.device)
    return torch.empty_like(order_FN).scatter(1, order_FN, place_N.expand_as(order_FN))


def outliers(values_CX: Tensor) -> Tensor:
    """Tell which values of each row lie above ``Q3 + 1.5 (Q3 - Q1)``, quartiles interpolated linearly: (C, X) bool."""
    sorted_CX, last = values_CX.sort(dim=1).values, values_CX.shape[1] - 1
    low_C1, high_C1 = (
        sorted_CX[:, int(last * share)].lerp(sorted_CX[:, -int(-last * share // 1)], last * share % 1)[:, None]
        for share in (0.25, 0.75)
    )
    return values_CX > high_C1 + 1.5 * (high_C1 - low_C1)


def selection(tokens: TokenSet, picks: Picks) -> TokenSet:
    """Keep the picked tokens as they are and drop the others."""
    frame_J, _, patch_J = picks.kept()
    return keep(tokens, frame_J * picks.order_FN.shape[1] + patch_J, picks.count_F)


@dataclass(frozen=True)
class Entries:
    """Which patches the slots of all frames hold: frame, slot and patch of each entry."""

    frame_E: Tensor
    slot_E: Tensor
    patch_E: Tensor

    @classmethod
    def joined(cls, *parts: tuple[Tensor, Tensor, Tensor]) -> "Entries":
        """Put entries one after the other."""
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))


def merged(tokens: TokenSet, weight_FMN: Tensor, count_F: Tensor, entries: Entries, is_partition: bool) -> TokenSet:
    """Make each pooled token a weighted sum of the patches of its frame.

    Places and the source map take the weights as shares of the token. Mass takes them as shares of the patch: it is
    split among the tokens that hold it, so that no mass is lost while every patch is held.

    Args:
        tokens: N per frame.
        weight_FMN: float32, zero outside `entries`.
        count_F: (F,) int64 on the CPU, how many slots of each frame are tokens.
        entries: where weights may be.
        is_partition: each patch is held once, and a token is the mean of what it holds.
    """
    num_frames, slots, patches = weight_FMN.shape
    device = weight_FMN.device
    offsets = _offsets(count_F)
    flat_P = (torch.arange(slots) < count_F[:, None]).flatten().nonzero().flatten()
    flat_P, start_F = on_device(device, flat_P, offsets[:-1])
    tiny = torch.finfo(weight_FMN.dtype).tiny
    with torch.autocast(device.type, enabled=False):
        share_FMN = weight_FMN / weight_FMN.sum(dim=2, keepdim=True).clamp(min=tiny)
        split_FMN = weight_FMN / weight_FMN.sum(dim=1, keepdim=True).clamp(min=tiny)
        place_FM3 = share_FMN.float() @ tokens.coordinate_S3.view(num_frames, patches, 3)
        mass_FM1 = split_FMN.float() @ tokens.mass_S.view(num_frames, patches, 1)
        features_FND = tokens.features_SD.view(num_frames, patches, tokens.features_SD.shape[1])
        pooled_FMD = weight_FMN.to(features_FND.dtype) @ features_FND
    pooled_E = start_F[entries.frame_E] + entries.slot_E
    source_E = entries.frame_E * patches + entries.patch_E
    total = int(offsets[-1])
    then: SourceMap
    if is_partition:
        table_S = source_E.new_full((tokens.num_tokens,), -1).scatter(0, source_E, pooled_E)
        then = Partition(table_S, total)
    else:
        weight_E = share_FMN[entries.frame_E, entries.slot_E, entries.patch_E].float()
        then = Weighted(pooled_E, source_E, weight_E, total, tokens.num_tokens)
    return replace(
        tokens,
        features_SD=pooled_FMD.flatten(0, 1)[flat_P],
        frame_offsets=offsets,
        coordinate_S3=place_FM3.flatten(0, 1)[flat_P],
        mass_S=mass_FM1.flatten()[flat_P],
        grid=None,
        source_map=compose(tokens.source_map, then),
    )


def _offsets(count_F: Tensor) -> Tensor:
    return torch.cat([count_F.new_zeros(1), count_F.cumsum(0)])
