"""VisionZip: the most salient patches as they are, and the rest gathered around a few of themselves.

Axis letters:
    F  frames    N  patches of a frame    M  slots of a frame    R  patches that are not dominant
    C  contextual tokens    E  entries of a map    K  width of a key
"""

import torch
from torch import Tensor

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pooler.base import Pooler, Stage
from lightning_crosslmm.pooler.ragged import Entries, budget, merged, pick, rank, selection
from lightning_crosslmm.taps import Asks, Taps
from lightning_crosslmm.tokens import TokenSet

MERGES = ("sum", "average")


class VisionzipPooler(Pooler):
    """Keep the dominant patches in raster order, then contextual tokens: every step-th patch of the rest with its like.

    ``y_c = x_c + mean_{j nearest to c} x_j``, j over the other patches of the rest, nearest by cosine of keys.

    Source: Yang et al., VisionZip, arXiv:2412.04467, and its authors' code, which the defaults follow.
    Differs: encoders of this toolkit give no class token, so it is not among the dominant tokens, where the code keeps
        and counts it. The code adds the mean to the target, which doubles its norm; the text merges by averaging:
        ``merge=average``.

    Args:
        saliency: how much a patch matters: ``class_token`` as in the paper, or a substitute, ``received``, ``probe``.
        dominant: patches kept as they are; a whole number, or a share of the patches (54 of 576 in the paper).
        contextual: tokens made of the rest; a whole number, or a share of the patches (10 of 576); 0 drops the rest.
        merge: ``sum`` or ``average`` (over the target and those that go to it).
        stage: where it acts.

    Raises:
        UserError: an unknown word.
    """

    def __init__(
        self,
        saliency: str = "class_token",
        dominant: int | float = 54 / 576,
        contextual: int | float = 10 / 576,
        merge: str = "sum",
        stage: str = Stage.BEFORE_PROJECTOR,
    ) -> None:
        super().__init__(stage)
        if merge not in MERGES:
            raise UserError(f"pooler.merge is '{merge}'; right are {', '.join(MERGES)}{nearest(merge, MERGES)}")
        self.asks = Asks(saliency=str(saliency), keys=True)
        self.dominant, self.contextual, self.merge = dominant, contextual, merge
        self.covers = merge == "average" and contextual > 0

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """Dominant and contextual tokens.

        Raises:
            UserError: none of them, or more than the encoder gives.
        """
        return sum(self._counts(grid[0] * grid[1]))

    def _counts(self, patches: int) -> tuple[int, int]:
        dominant = budget("pooler.dominant", self.dominant, patches)
        contextual = budget("pooler.contextual", self.contextual, patches, least=0)
        if dominant + contextual > patches:
            raise UserError(
                f"pooler.dominant and pooler.contextual are {dominant} and {contextual} tokens of {patches} per frame; "
                f"together they may be at most all of them"
            )
        return dominant, contextual

    def forward(self, tokens: TokenSet, taps: Taps) -> TokenSet:
        """Pick and gather in each frame."""
        assert taps.saliency_FN is not None and taps.keys_FNK is not None, "asked for"
        num_frames, patches = taps.saliency_FN.shape
        dominant, contextual = self._counts(patches)
        if dominant == patches:
            return tokens
        picks = pick(rank(taps.saliency_FN) < dominant, count=dominant)
        if contextual == 0:
            return selection(tokens, picks)
        frame_E, _, patch_E = picks.left()
        owner_FR = self._owners(taps.keys_FNK, patch_E.view(num_frames, patches - dominant), contextual)
        slot_E = dominant + owner_FR.flatten()
        weight_FMN = taps.saliency_FN.new_zeros(num_frames, dominant + contextual, patches)
        weight_FMN[picks.kept()] = 1.0
        weight_FMN[frame_E, slot_E, patch_E] = 1.0
        is_target_R = _targets(patches - dominant, contextual).to(owner_FR.device, non_blocking=True)
        size_FM1 = weight_FMN.sum(dim=2, keepdim=True)
        if self.merge == "average":
            weight_FMN = weight_FMN / size_FM1
        else:
            alone_E = is_target_R.repeat(num_frames)
            share_E = 1.0 / (size_FM1[frame_E, slot_E, 0] - 1.0).clamp(min=1.0)
            weight_FMN[frame_E, slot_E, patch_E] = torch.where(alone_E, 1.0, share_E)
        entries = Entries.joined(picks.kept(), (frame_E, slot_E, patch_E))
        count_F = torch.full((num_frames,), dominant + contextual)
        return merged(tokens, weight_FMN, count_F, entries, is_partition=self.merge == "average")

    def _owners(self, keys_FNK: Tensor, rest_FR: Tensor, contextual: int) -> Tensor:
        """Number the contextual token that each patch of the rest goes to; a target goes to its own."""
        is_target_R = _targets(rest_FR.shape[1], contextual).to(rest_FR.device, non_blocking=True)
        with torch.autocast(keys_FNK.device.type, enabled=False):
            key_FNK = torch.nn.functional.normalize(keys_FNK.float(), dim=2)
            key_FRK = key_FNK.gather(1, rest_FR[..., None].expand(-1, -1, key_FNK.shape[2]))
            target_FCK = key_FRK[
                :, _targets(rest_FR.shape[1], contextual).nonzero().flatten().to(key_FRK.device, non_blocking=True)
            ]
            nearest_FR = (key_FRK @ target_FCK.transpose(1, 2)).argmax(dim=2)
        return torch.where(is_target_R, is_target_R.cumsum(0) - 1, nearest_FR)


def _targets(rest: int, contextual: int) -> Tensor:
    """Tell which patches of the rest become contextual tokens: every step-th, on the CPU."""
    step = max(1, rest // contextual)
    place_R = torch.arange(rest)
    return (place_R % step == 0) & (place_R // step < contextual)
