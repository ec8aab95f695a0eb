"""The Q-Former: learned queries that talk among themselves and look at the tokens of a frame every few layers.

Axis letters:
    G  frames    N  tokens of a frame    M  queries    D  encoder width    W  width of the queries
"""

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Stage, check_positive
from lightning_crosslmm.pooler.slots import Attention, SlotPooler

INIT_STD = 0.02  # BERT's
NORM_EPS = 1e-12  # BERT's


class QFormerPooler(SlotPooler):
    """Read each frame into M queries, by layers.

    ``q = LN(q + Attn(q, q)); [q = LN(q + Attn(q, x));] q = LN(q + FFN(q))``

    Source: BLIP-2, arXiv:2301.12597, section 3.1; BERT's layers, norms after the residual.
    Differs: no text branch, no dropout, and weights start fresh instead of from BERT. BLIP-2 ends in one linear layer
        to the LLM's width, which is `stage` as_projector; before_projector hands the queries to the projector.

    Args:
        num_tokens: M; BLIP-2 takes 32.
        width: W; BLIP-2 takes 768.
        depth: layers; BLIP-2 takes 12.
        heads: of attention, dividing `width`; BLIP-2 takes 12.
        cross_every: the first of so many layers looks at the tokens; BLIP-2 takes 2.
        stage: in the projector's place, or before it.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        stage: str = Stage.AS_PROJECTOR,
    ) -> None:
        super().__init__(num_tokens, "frame", stage)
        check_positive(type(self).__name__, width=width, depth=depth, heads=heads, cross_every=cross_every)
        if width % heads:
            raise UserError(f"pooler.width is {width} and pooler.heads {heads}; the heads must divide the width")
        self.width, self.depth, self.heads, self.cross_every = width, depth, heads, cross_every

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make queries and layers, and the linear layer to the LLM's width where it stands in."""
        self.queries_MW = nn.Parameter(INIT_STD * torch.randn(self.num_tokens, self.width))
        self.norm = nn.LayerNorm(self.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            _Layer(self.width, in_width if number % self.cross_every == 0 else None, self.heads)
            for number in range(self.depth)
        )
        is_projector = self.stage is Stage.AS_PROJECTOR
        self.project = nn.Linear(self.width, llm_width) if is_projector else nn.Identity()
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        return llm_width if is_projector else self.width

    def slots(self, tokens_GND: Tensor, is_token_GN: Tensor | None) -> Tensor:
        """Ask."""
        queries_GMW = self.norm(self.queries_MW).to(tokens_GND.dtype).expand(len(tokens_GND), -1, -1)
        for layer in self.layers:
            queries_GMW = layer(queries_GMW, tokens_GND, is_token_GN)
        return self.project(queries_GMW)


class _Layer(nn.Module):
    def __init__(self, width: int, token_width: int | None, heads: int) -> None:
        super().__init__()
        self.among = Attention(width, width, heads, width // heads, bias=True)
        self.among_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross = None
        if token_width is not None:
            self.cross = Attention(width, token_width, heads, width // heads, bias=True)
            self.cross_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.feed_forward_norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, queries_GMW: Tensor, tokens_GND: Tensor, is_token_GN: Tensor | None) -> Tensor:
        """Move the queries on."""
        queries_GMW = self.among_norm(queries_GMW + self.among(queries_GMW, queries_GMW))
        if self.cross is not None:
            queries_GMW = self.cross_norm(queries_GMW + self.cross(queries_GMW, tokens_GND, is_token_GN))
        return self.feed_forward_norm(queries_GMW + self.feed_forward(queries_GMW))
