"""VisToG: learned tokens go through the tower beside the patches and then group them.

Axis letters:
    F  frames    N  patches of a frame    G  groups    E  encoder width    S  patches of all frames    P  groups of all
    n  tokens that the tower gives
"""

from dataclasses import replace

import torch
from torch import Tensor, distributed, nn

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pooler.base import Pooler, Stage, check_budget
from lightning_crosslmm.pooler.regroup import regroup
from lightning_crosslmm.taps import BlockHook
from lightning_crosslmm.tokens import TokenSet, Weighted, compose

ASSIGNMENTS = ("hard", "soft")


class VistogPooler(Pooler):
    """Group the patches of a frame around learned tokens that have seen the frame through the tower's own blocks.

    The tokens g read patches and each other; patches read patches alone, and stay what they were to the last bit. Then,
    over the groups, ``a = softmax(((W_q g) . (W_k x) / sqrt(E) + noise) / temperature)``; with hard assignment ``a`` is
    the one-hot of its largest entry, the softmax's gradient passing through; and ``z = g + W_o (sum_x a W_v x) /
    (sum_x a + epsilon)``.

    Source: Huang et al., "Efficient multi-modal large language models via visual token grouping", arXiv:2411.17773; the
        grouping layer is that of Xu et al., "GroupViT", arXiv:2202.11094, section 3.1, which it takes over.
    Differs: no code is public, and what of the grouping layer is kept is not said; its choices are settings here, and
        its attention before the assignment and the MLP after it are left out. Noise is drawn from (seed, training step,
        rank), so that a resumed run draws what the whole one would have. Fusion reads the patches.

    Args:
        num_tokens: G, 1 to the patches of a frame; 64 is the fewest the paper reports on.
        assignment: ``hard`` or ``soft``, each patch to one group or to all.
        noise: add Gumbel noise while training.
        temperature: of the softmax, above 0.
        epsilon: in the denominator, 0 or more; GroupViT's is 1. A group without patches gives g alone.
        seed: of the noise.

    Raises:
        UserError: a setting out of range.
    """

    stages = (Stage.IN_ENCODER,)
    needs = frozenset({"blocks"})

    def __init__(
        self,
        num_tokens: int,
        assignment: str = "hard",
        noise: bool = True,
        temperature: float = 1.0,
        epsilon: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(Stage.IN_ENCODER)
        if assignment not in ASSIGNMENTS:
            raise UserError(
                f"pooler.assignment is '{assignment}'; right are {', '.join(ASSIGNMENTS)}"
                f"{nearest(assignment, ASSIGNMENTS)}"
            )
        if temperature <= 0 or epsilon < 0:
            raise UserError(f"pooler.temperature {temperature} must be above 0, pooler.epsilon {epsilon} 0 or more")
        self.num_tokens, self.assignment, self.noise = num_tokens, assignment, noise
        self.temperature, self.epsilon, self.seed = temperature, epsilon, seed
        self.draws: Tensor
        self.covers = assignment == "hard"
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._draws: int | None = None  # the same, known without asking the accelerator
        self.register_load_state_dict_post_hook(_forget)

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make the groups' tokens and the grouping layer."""
        self.group_GE = nn.Parameter(torch.empty(self.num_tokens, in_width))
        nn.init.trunc_normal_(self.group_GE, std=0.02)
        self.group_norm, self.patch_norm = nn.LayerNorm(in_width), nn.LayerNorm(in_width)
        self.query, self.key = nn.Linear(in_width, in_width), nn.Linear(in_width, in_width)
        self.value, self.out = nn.Linear(in_width, in_width), nn.Linear(in_width, in_width)
        return in_width

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """One for each group."""
        check_budget(type(self).__name__, self.num_tokens, grid)
        return self.num_tokens

    def hook(self) -> BlockHook:
        """Append the groups' tokens, isolated."""
        return _GroupHook(self.group_GE)

    def collect(self, hooks: list[BlockHook], outputs: list[Tensor], patches: TokenSet) -> tuple[TokenSet, TokenSet]:
        """Group the patches; fusion reads them ungrouped."""
        patch_FNE, group_FGE = torch.cat(outputs).tensor_split([outputs[0].shape[1] - self.num_tokens], dim=1)
        source = patches.with_features(patch_FNE.flatten(0, 1))
        share_FGN = self._assigned(group_FGE, patch_FNE)
        value_FNE = self.value(self.patch_norm(patch_FNE))
        weight_FG1 = (share_FGN.sum(dim=2, keepdim=True) + self.epsilon).clamp(min=1e-6)
        mean_FGE = share_FGN.to(value_FNE.dtype) @ value_FNE / weight_FG1.to(value_FNE.dtype)
        features_PE = (group_FGE + self.out(mean_FGE)).flatten(0, 1)
        return self._annotated(source, features_PE, share_FGN.detach().float()), source

    def _assigned(self, group_FGE: Tensor, patch_FNE: Tensor) -> Tensor:
        query_FGE, key_FNE = self.query(self.group_norm(group_FGE)), self.key(self.patch_norm(patch_FNE))
        logits_FGN = query_FGE @ key_FNE.transpose(1, 2) * group_FGE.shape[-1] ** -0.5
        logits_FGN = logits_FGN.to(torch.promote_types(logits_FGN.dtype, torch.float32))
        if self.training and self.noise:
            logits_FGN = logits_FGN + self._gumbel(logits_FGN)
        soft_FGN = (logits_FGN / self.temperature).softmax(dim=1)
        if self.assignment == "soft":
            return soft_FGN
        hard_FGN = torch.zeros_like(soft_FGN).scatter(1, soft_FGN.argmax(dim=1, keepdim=True), 1.0)
        return hard_FGN + (soft_FGN - soft_FGN.detach())

    def _gumbel(self, like: Tensor) -> Tensor:
        if self._draws is None:
            self._draws = int(self.draws)
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        number = (self.seed * 1_000_003 + self._draws) * 65_537 + rank
        drawing = torch.Generator(like.device).manual_seed(number % 2**63)
        self._draws += 1
        self.draws.add_(1)
        return -torch.empty_like(like).exponential_(generator=drawing).clamp(min=1e-20).log()

    def _annotated(self, source: TokenSet, features_PE: Tensor, share_FGN: Tensor) -> TokenSet:
        num_frames, groups, patches = share_FGN.shape
        counts_F = torch.full((num_frames,), groups)
        frame_F1 = torch.arange(num_frames, device=share_FGN.device)[:, None]
        if self.assignment == "hard":
            table_S = (share_FGN.argmax(dim=1) + frame_F1 * groups).flatten()
            pooled = regroup(source, features_PE, table_S, counts_F)
            # a group without patches has no place of its own: the middle of the frame
            middle_P3 = source.coordinate_S3.view(num_frames, patches, 3).mean(dim=1).repeat_interleave(groups, dim=0)
            place_P3 = torch.where(pooled.mass_S[:, None] > 0, pooled.coordinate_S3, middle_P3)
            return replace(pooled, coordinate_S3=place_P3)
        mass_FG = share_FGN.sum(dim=2)
        weight_FGN = share_FGN / mass_FG[..., None]
        place_FG3 = weight_FGN @ source.coordinate_S3.view(num_frames, patches, 3)
        pooled_FGN = (frame_F1 * groups + torch.arange(groups, device=frame_F1.device))[..., None].expand_as(share_FGN)
        source_FGN = (frame_F1 * patches + torch.arange(patches, device=frame_F1.device))[:, None].expand_as(share_FGN)
        entries = (pooled_FGN.flatten(), source_FGN.flatten(), weight_FGN.flatten())
        return replace(
            source,
            features_SD=features_PE,
            frame_offsets=torch.arange(num_frames + 1) * groups,
            coordinate_S3=place_FG3.flatten(0, 1),
            mass_S=mass_FG.flatten(),
            grid=None,
            source_map=compose(source.source_map, Weighted(*entries, len(features_PE), source.num_tokens)),
        )


class _GroupHook(BlockHook):
    def __init__(self, group_GE: Tensor) -> None:
        self.group_GE, self.num_isolated = group_GE, len(group_GE)

    def begin(self, tokens_FnE: Tensor, num_prefix: int) -> Tensor:
        """Append the groups."""
        group_FGE = self.group_GE.to(tokens_FnE.dtype).expand(len(tokens_FnE), -1, -1)
        return torch.cat([tokens_FnE, group_FGE], dim=1)


def _forget(pooler: VistogPooler, keys: object) -> None:
    pooler._draws = None
