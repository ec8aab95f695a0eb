"""PruMerge and PruMerge+: keep the salient patches and let each take in its neighbours.

Axis letters:
    F  frames    N  patches of a frame    M  slots of a frame    n  neighbours    E  entries of a map
    K  width of a key
"""

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pooler.base import Pooler, Stage
from lightning_crosslmm.pooler.ragged import Entries, Picks, merged, on_device, outliers, pick, rank
from lightning_crosslmm.taps import Asks, Taps
from lightning_crosslmm.tokens import TokenSet

CHOICES = {"merge": ("add", "average"), "neighbours_from": ("all", "pruned"), "order": ("saliency", "raster")}


class PrumergePooler(Pooler):
    """Keep a frame's outliers in saliency, add their neighbours to each, and sum up the rest in one token.

    ``keep = {j : a_j > Q3 + 1.5 (Q3 - Q1)}; y_i = x_i + sum_{j in near(i)} a_j x_j; y_rest = sum_{pruned j} a_j x_j``,
    with a the saliency and near(i) the patches whose keys are closest to i's by cosine.

    Source: Shang et al., LLaVA-PruMerge, arXiv:2403.15388, and its authors' code, which the defaults follow.
    Differs: quartiles and ratio are those of each frame, where the code takes those of the whole batch. The saliency is
        the mean over heads of attention at the block that is read; the code multiplies queries and keys of the block
        after it without splitting heads. At least one patch is kept, where the code keeps none and fails. In the text,
        tokens are weighted averages of clusters of pruned patches: ``merge=average neighbours_from=pruned``.

    Args:
        saliency: how much a patch matters: ``class_token`` as in the paper, or a substitute, ``received``, ``probe``.
        ratio: share of a frame's patches that is kept, above 0 up to 1; None lets the outliers say. The authors train
            with 1/8.
        neighbours: how many patches a kept one takes in, 0 or more.
        merge: ``add`` them, weighted by saliency, to the kept patch, or ``average`` it with them by saliency.
        neighbours_from: ``all`` patches of the frame, or the ``pruned``.
        rest_token: sum up the pruned patches, weighted by saliency, in a last token.
        order: of a frame's tokens, by ``saliency`` or in ``raster`` order.
        stage: where it acts.

    Raises:
        UserError: a ratio or number out of range, or an unknown word.
    """

    def __init__(
        self,
        saliency: str = "class_token",
        ratio: float | None = None,
        neighbours: int = 32,
        merge: str = "add",
        neighbours_from: str = "all",
        rest_token: bool = True,
        order: str = "saliency",
        stage: str = Stage.BEFORE_PROJECTOR,
    ) -> None:
        super().__init__(stage)
        for setting, word in (("merge", merge), ("neighbours_from", neighbours_from), ("order", order)):
            if word not in CHOICES[setting]:
                right = ", ".join(CHOICES[setting])
                raise UserError(f"pooler.{setting} is '{word}'; right are {right}{nearest(word, CHOICES[setting])}")
        if neighbours < 0:
            raise UserError(f"pooler.neighbours is {neighbours}; it must be 0 or more patches")
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise UserError(f"pooler.ratio is {ratio}; it must be a share of the patches above 0 up to 1, or null")
        self.asks = Asks(saliency=str(saliency), keys=True)
        self.ratio, self.neighbours, self.merge = ratio, neighbours, merge
        self.neighbours_from, self.rest_token, self.order = neighbours_from, rest_token, order

    def tokens_per_frame(self, grid: tuple[int, int]) -> int | None:
        """What the ratio gives, with the rest; None without a ratio."""
        patches = grid[0] * grid[1]
        kept = self._num_kept(patches)
        return None if kept is None else kept + int(self.rest_token and kept < patches)

    def _num_salient(self, patches: int) -> int | None:
        # rounded down; the small number is for shares like 0.29 of 100
        return None if self.ratio is None else max(1, int(self.ratio * patches + 1e-9))

    def _num_kept(self, patches: int) -> int | None:
        return self._num_salient(patches)

    def forward(self, tokens: TokenSet, taps: Taps) -> TokenSet:
        """Prune and merge each frame."""
        assert taps.saliency_FN is not None and taps.keys_FNK is not None, "asked for"
        # a patch without any attention still has its share of a token
        importance_FN = taps.saliency_FN.clamp(min=torch.finfo(torch.float32).tiny)
        num_frames, patches = importance_FN.shape
        if self._num_kept(patches) == patches and self.neighbours_from == "pruned" and self.order == "raster":
            return tokens
        picks = self._select(importance_FN)
        kept_E, near_E = picks.kept(), self._neighbours(picks, taps.keys_FNK)
        weight_FMN = importance_FN.new_zeros(num_frames, picks.most + int(self.rest_token), patches)
        weight_FMN[kept_E] = 1.0 if self.merge == "add" else importance_FN[kept_E[0], kept_E[2]]
        weight_FMN[near_E] = importance_FN[near_E[0], near_E[2]]
        if self.merge == "average":
            weight_FMN = weight_FMN / weight_FMN.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        parts, count_F = [kept_E, near_E], picks.count_F
        if self.rest_token:
            frame_E, _, patch_E = picks.left()
            (slot_F,) = on_device(frame_E.device, count_F)
            rest_E = (frame_E, slot_F[frame_E], patch_E)
            weight_FMN[rest_E] = importance_FN[frame_E, patch_E]
            parts.append(rest_E)
            count_F = count_F + (count_F < patches)
        return merged(tokens, weight_FMN, count_F, Entries.joined(*parts), is_partition=False)

    def _select(self, importance_FN: Tensor) -> Picks:
        patches = importance_FN.shape[1]
        rank_FN, count = rank(importance_FN), self._num_salient(patches)
        is_top_FN = rank_FN < (_num_outliers(importance_FN) if count is None else count)
        return pick(is_top_FN, rank_FN if self.order == "saliency" else None, count)

    def _neighbours(self, picks: Picks, keys_FNK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give frame, slot and patch of what each kept patch takes in."""
        num_frames, patches = picks.order_FN.shape
        device, most = keys_FNK.device, picks.most
        first_FM = picks.order_FN[:, :most]
        with torch.autocast(device.type, enabled=False):
            key_FNK = torch.nn.functional.normalize(keys_FNK.float(), dim=2)
            kept_FMK = key_FNK.gather(1, first_FM[..., None].expand(-1, -1, key_FNK.shape[2]))
            likeness_FMN = kept_FMK @ key_FNK.transpose(1, 2)
        if self.neighbours_from == "all":
            likeness_FMN.scatter_(2, first_FM[..., None], -torch.inf)  # no patch is its own neighbour
            limit_F = torch.full((num_frames,), min(self.neighbours, patches - 1))
        else:
            frame_J, _, patch_J = picks.kept()
            is_kept_FN = torch.zeros_like(picks.order_FN, dtype=torch.bool)
            is_kept_FN[frame_J, patch_J] = True
            likeness_FMN.masked_fill_(is_kept_FN[:, None], -torch.inf)
            limit_F = (patches - picks.count_F).clamp(max=self.neighbours)
        near_FMn = likeness_FMN.topk(min(self.neighbours, patches), dim=2).indices
        slots, places = torch.arange(most), torch.arange(near_FMn.shape[2])
        is_real_FMn = (slots < picks.count_F[:, None])[..., None] & (places < limit_F[:, None])[:, None]
        frame_E, slot_E, place_E = on_device(device, *is_real_FMn.nonzero(as_tuple=True))
        return frame_E, slot_E, near_FMn[frame_E, slot_E, place_E]


class PrumergePlusPooler(PrumergePooler):
    """PruMerge, and patches at regular strides beside the salient ones, so that no part of the frame goes unseen.

    ``stride = max(1, floor(floor(1 / rho) / 3))`` with rho the share of outliers: patches 0, stride, 2 stride, ...
    below N - 1 that are not kept yet follow the salient ones.

    Source: as `PrumergePooler`; version 6 of the text and the code's default.
    Differs: as `PrumergePooler`. The stride is at least 1: the code fails for rho above 1/3, and for 0. With a ratio,
        as the authors train, as many strided patches as salient ones, out of those not kept yet; the code may pick a
        patch twice.

    Args:
        saliency: as in `PrumergePooler`.
        ratio: share of the patches that is kept for its saliency; as many more are strided.
        neighbours: as in `PrumergePooler`.
        merge: as in `PrumergePooler`.
        neighbours_from: as in `PrumergePooler`.
        rest_token: as in `PrumergePooler`.
        order: ``saliency`` puts the salient patches by saliency and then the strided ones; or ``raster``.
        stage: where it acts.
    """

    def _num_kept(self, patches: int) -> int | None:
        count = self._num_salient(patches)
        return None if count is None else min(2 * count, patches)

    def _select(self, importance_FN: Tensor) -> Picks:
        patches = importance_FN.shape[1]
        rank_FN, count = rank(importance_FN), self._num_salient(patches)
        place_N = torch.arange(patches, device=importance_FN.device)
        if count is None:
            count_F1 = _num_outliers(importance_FN)
            stride_F1 = (patches // count_F1 // 3).clamp(min=1)
            is_top_FN = rank_FN < count_F1
            is_strided_FN = (place_N % stride_F1 == 0) & (place_N < patches - 1)
        else:
            is_top_FN, left = rank_FN < count, patches - count
            strided = min(count, left)
            number_FN = (~is_top_FN).cumsum(dim=1) - 1  # of a patch among those that are left
            # number is floor(i left / strided) for a whole i, asked the other way round
            is_strided_FN = (-number_FN * strided) % max(1, left) < strided
        is_kept_FN = is_top_FN | is_strided_FN
        priority_FN = torch.where(is_top_FN, rank_FN, place_N + patches) if self.order == "saliency" else None
        return pick(is_kept_FN, priority_FN, self._num_kept(patches))


def _num_outliers(importance_FN: Tensor) -> Tensor:
    """Count a frame's outliers, at least one: (F, 1)."""
    return outliers(importance_FN).sum(dim=1, keepdim=True).clamp(min=1)
