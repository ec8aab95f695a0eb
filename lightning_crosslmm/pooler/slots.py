"""What poolers with learned queries share: every frame, or every clip, is read into a fixed number of slots.

Axis letters:
    S  tokens    F  frames    V  visuals    G  groups: frames or visuals    N  tokens of a group    M  slots of a group
    D  width of the tokens    W  width of the slots    H  heads    K  width of a head
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pooler.base import Pooler, Stage, check_budget, check_positive
from lightning_crosslmm.tokens import Opaque, TokenSet, compose, frame_in_visual

SCOPES = ("frame", "clip")


class SlotPooler(Pooler):
    """Read each group of tokens into slots; subclasses say how (`slots`).

    A slot stands for an equal share of its group's mass and lies at its centre. The slots of a clip are dealt to its
    frames in order, slot i of M to frame ``floor(i F / M)``, so that they carry a time and see their frame.

    Args:
        num_tokens: M, per frame or per clip.
        scope: ``frame`` or ``clip``.
        stage: where it acts.
    """

    stages = (Stage.BEFORE_PROJECTOR, Stage.AS_PROJECTOR)

    def __init__(self, num_tokens: int, scope: str, stage: str) -> None:
        super().__init__(stage)
        check_positive(type(self).__name__, num_tokens=num_tokens)
        if scope not in SCOPES:
            raise UserError(f"pooler.scope is '{scope}'; right are {', '.join(SCOPES)}{nearest(scope, SCOPES)}")
        self.num_tokens, self.scope = num_tokens, scope

    def slots(self, tokens_GND: Tensor, is_token_GN: Tensor | None) -> Tensor:
        """Read groups of tokens into (G, M, W).

        Args:
            tokens_GND: padded where groups differ in size.
            is_token_GN: True where a token is real; None where all are.
        """
        raise NotImplementedError(f"{type(self).__name__} must define slots(tokens, is_token)")

    def tokens_per_frame(self, grid: tuple[int, int]) -> int | None:
        """M, checked against the encoder's patches; of a clip, it depends on its frames."""
        if self.scope == "clip":
            return None
        check_budget(type(self).__name__, self.num_tokens, grid)
        return self.num_tokens

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Read each frame or clip; one without tokens gets no slot."""
        offsets_G = tokens.frame_offsets if self.scope == "frame" else tokens.token_offsets_of_visual
        size_G = offsets_G.diff()
        size_g = size_G[size_G > 0]  # only groups with tokens; the others own no rows of the packed features
        slots_gMW = self.slots(*_padded(tokens.features_SD, size_g))
        frame_P = self._frames(tokens, size_G)
        count_F = torch.bincount(frame_P, minlength=tokens.num_frames)
        group_S = torch.repeat_interleave(torch.arange(len(size_g)), size_g).to(slots_gMW.device)
        mass_g = tokens.mass_S.new_zeros(len(size_g)).index_add(0, group_S, tokens.mass_S)
        place_S3 = tokens.coordinate_S3 * tokens.mass_S[:, None]
        centre_g3 = place_S3.new_zeros(len(size_g), 3).index_add(0, group_S, place_S3) / mass_g[:, None]
        coordinate_P3 = centre_g3.repeat_interleave(self.num_tokens, dim=0)
        coordinate_P3[:, 0] = frame_in_visual(tokens.visual_offsets)[frame_P].to(coordinate_P3)
        num_pooled = len(frame_P)
        return replace(
            tokens,
            features_SD=slots_gMW.flatten(0, 1),
            frame_offsets=torch.cat([count_F.new_zeros(1), count_F.cumsum(0)]),
            coordinate_S3=coordinate_P3,
            mass_S=(mass_g / self.num_tokens).repeat_interleave(self.num_tokens),
            grid=None,
            source_map=compose(tokens.source_map, Opaque(num_pooled, tokens.num_tokens)),
        )

    def _frames(self, tokens: TokenSet, size_G: Tensor) -> Tensor:
        """(P,) int64 on the CPU, the frame each slot stands in."""
        group_g1 = (size_G > 0).nonzero()
        if self.scope == "frame":
            return group_g1.expand(-1, self.num_tokens).flatten()
        frames_V, slot_M = tokens.visual_offsets.diff(), torch.arange(self.num_tokens)
        return (tokens.visual_offsets[group_g1] + slot_M * frames_V[group_g1] // self.num_tokens).flatten()


def _padded(features_SD: Tensor, size_G: Tensor) -> tuple[Tensor, Tensor | None]:
    longest = int(size_G.max()) if len(size_G) else 0
    if (size_G == longest).all():
        return features_SD.view(len(size_G), longest, features_SD.shape[-1]), None
    is_token_GN = (torch.arange(longest) < size_G[:, None]).to(features_SD.device)
    padded_GND = features_SD.new_zeros(len(size_G), longest, features_SD.shape[-1])
    return padded_GND.masked_scatter(is_token_GN[..., None], features_SD), is_token_GN


class Attention(nn.Module):
    """Multi-head attention of some tokens to others: ``W_o softmax(q k^T / sqrt(K)) v``, through torch's SDPA.

    Args:
        query_width: of what asks, and of the result.
        key_width: of what is asked.
        heads: H.
        head_width: K.
        bias: whether the four linear maps have one.
    """

    def __init__(self, query_width: int, key_width: int, heads: int, head_width: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(query_width, heads * head_width, bias=bias)
        self.key_value = nn.Linear(key_width, 2 * heads * head_width, bias=bias)
        self.out = nn.Linear(heads * head_width, query_width, bias=bias)

    def forward(self, query_GMW: Tensor, key_GND: Tensor, is_token_GN: Tensor | None = None) -> Tensor:
        """Attend: (G, M, W).

        Args:
            query_GMW: what asks.
            key_GND: what is asked.
            is_token_GN: True where it is real, one at least in each row; None where all are.
        """
        query_GHMK = self.query(query_GMW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_GHNK, value_GHNK = (
            half.unflatten(-1, (self.heads, -1)).transpose(1, 2) for half in self.key_value(key_GND).chunk(2, dim=-1)
        )
        mask_G11N = None if is_token_GN is None else is_token_GN[:, None, None, :]
        out_GHMK = nn.functional.scaled_dot_product_attention(query_GHMK, key_GHNK, value_GHNK, attn_mask=mask_G11N)
        return self.out(out_GHMK.transpose(1, 2).flatten(2))
