"""The perceiver resampler: learned latents attend to the tokens of a frame or of a whole clip.

Axis letters:
    S  tokens    G  frames or clips    N  tokens of one    M  latents    D  encoder width
"""

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Stage, check_positive
from lightning_crosslmm.pooler.slots import Attention, SlotPooler
from lightning_crosslmm.tokens import TokenSet


class PerceiverPooler(SlotPooler):
    """Resample tokens to M latents: ``depth`` times ``z = z + Attn(LN z, [LN x; LN z]); z = z + FFN(z)``, then a norm.

    Source: Flamingo, arXiv:2204.14198, section 2.1 and appendix A.1.1; as in OpenFlamingo's code.
    Differs: padding is masked where clips differ in length. Flamingo reads a clip at once (`scope` clip) and its keys
        are projected inside the LLM; here the projector follows, or with `stage` as_projector one linear layer.

    Args:
        num_tokens: M per frame or per clip; Flamingo takes 64.
        depth: layers; Flamingo takes 6.
        heads: of attention; Flamingo takes 8.
        head_width: of one head; Flamingo takes 64.
        scope: ``frame``, or ``clip`` for M latents over all frames of a visual.
        max_frames: how many frame numbers have a learned embedding, added to their tokens; None adds none.
        stage: before the projector, or in its place.
    """

    def __init__(
        self,
        num_tokens: int,
        depth: int = 6,
        heads: int = 8,
        head_width: int = 64,
        scope: str = "frame",
        max_frames: int | None = None,
        stage: str = Stage.BEFORE_PROJECTOR,
    ) -> None:
        super().__init__(num_tokens, scope, stage)
        check_positive(
            type(self).__name__,
            depth=depth,
            heads=heads,
            head_width=head_width,
            max_frames=1 if max_frames is None else max_frames,
        )
        self.depth, self.heads, self.head_width, self.max_frames = depth, heads, head_width, max_frames

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make latents and layers at the encoder's width, and the linear layer to the LLM's where it stands in."""
        self.latents_MD = nn.Parameter(torch.randn(self.num_tokens, in_width))
        self.frames_FD = nn.Parameter(torch.randn(self.max_frames, in_width)) if self.max_frames else None
        self.layers = nn.ModuleList(_Layer(in_width, self.heads, self.head_width) for _ in range(self.depth))
        self.norm = nn.LayerNorm(in_width)
        is_projector = self.stage is Stage.AS_PROJECTOR
        self.project = nn.Linear(in_width, llm_width) if is_projector else nn.Identity()
        return llm_width if is_projector else in_width

    def forward(self, tokens: TokenSet) -> TokenSet:
        """Add what tells the frames apart, then resample."""
        if self.frames_FD is not None:
            longest = int(tokens.visual_offsets.diff().max()) if tokens.num_visuals else 0
            if longest > len(self.frames_FD):
                raise UserError(
                    f"pooler.max_frames is {self.max_frames}, a clip has {longest} frames; it must be {longest} or more"
                )
            frame_SD = self.frames_FD[tokens.coordinate_S3[:, 0].long()]
            tokens = tokens.with_features(tokens.features_SD + frame_SD.to(tokens.features_SD.dtype))
        return super().forward(tokens)

    def slots(self, tokens_GND: Tensor, is_token_GN: Tensor | None) -> Tensor:
        """Resample."""
        latents_GMD = self.latents_MD.expand(len(tokens_GND), -1, -1).to(tokens_GND.dtype)
        if is_token_GN is not None:
            is_latent_GM = is_token_GN.new_ones(latents_GMD.shape[:2])
            is_token_GN = torch.cat([is_token_GN, is_latent_GM], dim=1)
        for layer in self.layers:
            latents_GMD = layer(latents_GMD, tokens_GND, is_token_GN)
        return self.project(self.norm(latents_GMD))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.token_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, width, heads, head_width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, latents_GMD: Tensor, tokens_GND: Tensor, is_key_GN: Tensor | None) -> Tensor:
        """Move the latents on."""
        query_GMD = self.latent_norm(latents_GMD)
        keys_GND = torch.cat([self.token_norm(tokens_GND), query_GMD], dim=1)
        latents_GMD = latents_GMD + self.attention(query_GMD, keys_GND, is_key_GN)
        return latents_GMD + self.feed_forward(latents_GMD)
