"""Poolers whose queries attend to their own window of the grid: TokenPacker, and QueCC, which knows the question.

Axis letters:
    F  frames    N  patches of a frame    h w  rows and columns of windows    i j  rows and columns inside one
    A  layers    E  encoder width    B  samples    D  LLM width
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Pooler, Stage, check_grid, grid_of
from lightning_crosslmm.pooler.grid import AveragePooler, BilinearPooler
from lightning_crosslmm.taps import Asks, Questions, Taps
from lightning_crosslmm.tokens import TokenSet

# hidden states 12, 16, 22 and 23 of CLIP ViT-L/14, read at 23 of 24, as shares of the depth that is run
AUTHORS_LAYERS = (12 / 23, 16 / 23, 22 / 23, 1.0)


class WindowAttentionPooler(Pooler):
    """Give each window of the grid one query, which attends to the window's patches as several blocks left them.

    ``out[h, w] = MHA(query[h, w], LN(MLP_k(z)), LN(MLP_v(z)))`` over the window, z the asked blocks' outputs side by
    side.
    Subclasses say what the queries are.

    Args:
        rows: windows down; must divide the encoder's rows.
        columns: windows across; None means as many as rows.
        layers: blocks whose outputs are keys and values (see `Asks.layers`); None is `AUTHORS_LAYERS`.
        heads: of the attention; must divide the encoder's width.
    """

    covers = True
    needs = frozenset({"grid"})
    stages = (Stage.BEFORE_PROJECTOR,)

    def __init__(
        self,
        rows: int = 1,
        columns: int | None = None,
        layers: Sequence[int | float] | None = None,
        heads: int = 8,
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, rows if columns is None else columns
        if layers is not None and not len(layers):
            raise UserError("pooler.layers is empty; name one or more of the encoder's blocks, or null")
        self.asks = Asks(layers=AUTHORS_LAYERS if layers is None else tuple(layers))
        self.heads = heads
        # places, masses and source map of the windows
        self.windows = AveragePooler(self.rows, self.columns)

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """One per window."""
        self._window(grid)
        return self.rows * self.columns

    def _window(self, grid: tuple[int, int]) -> tuple[int, int]:
        check_grid(type(self).__name__, self.rows, self.columns, grid)
        if grid[0] % self.rows or grid[1] % self.columns:
            raise UserError(
                f"pooler {type(self).__name__} asks for {self.rows}x{self.columns} windows, the encoder gives "
                f"{grid[0]}x{grid[1]} patches; pooler.rows must divide {grid[0]} and pooler.columns {grid[1]}"
            )
        return grid[0] // self.rows, grid[1] // self.columns

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make the projections, at the encoder's width."""
        self._window(grid)
        if in_width % self.heads:
            raise UserError(f"pooler.heads is {self.heads}; it must divide the encoder's width, {in_width}")
        given = in_width * len(self.asks.layers)
        self.key, self.value = (_mlp_norm(given, in_width) for _ in range(2))
        self.attention = nn.MultiheadAttention(in_width, self.heads, batch_first=True)
        return in_width

    def attend(self, tokens: TokenSet, query_FhwE: Tensor, taps: Taps) -> TokenSet:
        """Let every query read its window."""
        assert taps.layers_FNAE is not None and tokens.grid is not None, "asked for"
        layers_FNz = taps.layers_FNAE.flatten(2)
        key_WiE, value_WiE = (self._by_window(part(layers_FNz), tokens.grid) for part in (self.key, self.value))
        query_W1E = query_FhwE.flatten(0, 2)[:, None]
        if len(query_W1E):
            query_W1E, _ = self.attention(query_W1E.to(key_WiE.dtype), key_WiE, value_WiE, need_weights=False)
        return replace(self.windows(tokens), features_SD=query_W1E[:, 0])

    def _by_window(self, patches_FNE: Tensor, grid: tuple[int, int]) -> Tensor:
        i, j = self._window(grid)
        patches_FhiwjE = patches_FNE.view(len(patches_FNE), self.rows, i, self.columns, j, patches_FNE.shape[-1])
        return patches_FhiwjE.transpose(2, 3).reshape(-1, i * j, patches_FNE.shape[-1])


class TokenpackerPooler(WindowAttentionPooler):
    """Attend from bilinearly interpolated patches to the windows they stand for.

    ``query = LN(W bilinear(x))``, and as in `WindowAttentionPooler`; there is no residual to the query.

    Source: Li et al., TokenPacker, arXiv:2407.02392, and its authors' code.
    Differs: any grid of windows that divides the encoder's, and any encoder: widths 1024 and 4096 are fixed in the
        code, as are the four blocks, which are kept as shares of the depth. Projections start as torch's do. The
        high-resolution variant with its tiles is not built.

    Args:
        rows: windows down (12 of 24 in the paper: 144 tokens).
        columns: windows across; None means as many as rows.
        layers: blocks whose outputs are keys and values; None is the authors' choice.
        heads: of the attention.
    """

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make the projections."""
        width = super().connect(in_width, llm_width, grid)
        self.interpolate = BilinearPooler(self.rows, self.columns)
        self.query = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=1e-6))
        return width

    def forward(self, tokens: TokenSet, taps: Taps) -> TokenSet:
        """Pool each frame; the grid of the result is (rows, columns)."""
        return self.attend(tokens, self.query(grid_of(self, self.interpolate(tokens))), taps)


class QueccPooler(WindowAttentionPooler):
    """Attend to windows from queries that a convolution makes of the patches and the question.

    ``query = DWConv(LN(MLP(x + LN(W t))))``, t the LLM's last hidden state after the question, the depthwise
    convolution's kernel and stride those of a window; then as in `WindowAttentionPooler`.

    Source: Li et al., "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", arXiv:2411.03312,
        and its authors' code.
    Differs: the question is a sample's text before its first answer, whatever the template; the code cuts at a word of
        one template. A sample without a question adds nothing to its patches, where the code asks "image". Widths and
        blocks are those of the encoder at hand, as in `TokenpackerPooler`. Several images, video and batches work: each
        frame is pooled with the question of its sample.

    Args:
        rows: windows down (1 of 24 in the paper's extreme: one token).
        columns: windows across; None means as many as rows.
        layers: blocks whose outputs are keys and values; None is the authors' choice.
        heads: of the attention.
    """

    needs = frozenset({"grid", "question_summary"})

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make the projections."""
        width = super().connect(in_width, llm_width, grid)
        window = self._window(grid)
        self.question = nn.Sequential(nn.Linear(llm_width, width), nn.LayerNorm(width, eps=1e-6))
        self.query = _mlp_norm(width, width)
        self.reduce = nn.Conv2d(width, width, window, stride=window, groups=width)
        return width

    def forward(self, tokens: TokenSet, taps: Taps, questions: Questions) -> TokenSet:
        """Pool each frame; the grid of the result is (rows, columns)."""
        assert questions.summary_BD is not None, "asked for"
        patches_FhwE = grid_of(self, tokens)
        device = patches_FhwE.device
        has_question_B1 = (questions.offsets.diff() > 0)[:, None].to(device, non_blocking=True)
        question_BE = self.question(questions.summary_BD.to(device)) * has_question_B1
        sample_F = sample_of_frame(tokens).to(device, non_blocking=True)
        asked_FhwE = patches_FhwE + question_BE[sample_F][:, None, None]
        query_FEhw = self.reduce(self.query(asked_FhwE).permute(0, 3, 1, 2))
        return self.attend(tokens, query_FEhw.permute(0, 2, 3, 1), taps)


def sample_of_frame(tokens: TokenSet) -> Tensor:
    """Tell which sample each frame belongs to: (F,) int64 on the CPU."""
    return torch.repeat_interleave(tokens.sample_of_visual, tokens.visual_offsets.diff())


def _mlp_norm(in_width: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6))
