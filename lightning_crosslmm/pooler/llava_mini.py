"""LLaVA-Mini: few tokens per frame, and a question that has read all patches before the LLM does.

Axis letters:
    F  frames    N  patches of a frame    c  compressed tokens of a frame    E  encoder width    D  LLM width
    T  positions: patches, compressed tokens, question    Q  question tokens of the batch    q  of one sample, padded
    X  question tokens of all frames that saw them    H  heads    K  width of a head
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler.base import Pooler, Stage, grid_of
from lightning_crosslmm.pooler.ragged import on_device
from lightning_crosslmm.pooler.window_attention import sample_of_frame
from lightning_crosslmm.taps import Questions
from lightning_crosslmm.tokens import Opaque, TokenSet, compose, frame_in_visual, grid_coordinates

MOST_ROWS = 8192  # of the layers at a time, where no gradient keeps what lies between


class LlavaMiniPooler(Pooler):
    """Compress each frame by learned queries, and fuse all of its patches into the question before the LLM.

    ``c = MHA(LN(g) + p, LN(x) + p', LN(x));  [., c', t'] = layers([P(x); P(c); t])``, causal, P the projector, t the
    question's embeddings, p and p' fixed two-dimensional sine waves. The LLM reads c' and the mean of t' over frames.

    Source: Zhang et al., LLaVA-Mini, arXiv:2501.03895, and its authors' code.
    Differs: the question is the text before the first answer; the code also rewrites questions of later turns, which
        follow answers. Visuals marked after the first answer do not touch the question: they are not there yet when it
        is answered. A sample without visuals keeps its question. The layers are our own of the Llama layout, for any
        LLM, and start from random weights; the question's embeddings learn through them. High-resolution tiles are not
        built.

    Args:
        side: compressed tokens per frame are side x side (1 in the paper); 1 or more, at most the encoder's.
        heads: of the compressor; must divide the encoder's width.
        fusion_layers: layers before the LLM, 0 or more; 0 leaves the question as it is.
        fusion_heads: of these; must divide the LLM's width into even heads.
    """

    needs = frozenset({"grid", "question"})
    stages = (Stage.AS_PROJECTOR,)
    position_cE: Tensor
    position_NE: Tensor

    def __init__(self, side: int = 1, heads: int = 8, fusion_layers: int = 4, fusion_heads: int = 8) -> None:
        super().__init__(Stage.AS_PROJECTOR)
        if fusion_layers < 0:
            raise UserError(f"pooler.fusion_layers is {fusion_layers}; it must be 0 or more")
        self.side, self.heads, self.fusion_layers, self.fusion_heads = side, heads, fusion_layers, fusion_heads

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        """Side x side."""
        if not 1 <= self.side <= min(grid):
            raise UserError(
                f"pooler.side is {self.side}, the encoder gives {grid[0]}x{grid[1]} tokens per frame; it must be 1 to "
                f"{min(grid)}"
            )
        return self.side**2

    def connect(self, in_width: int, llm_width: int, grid: tuple[int, int]) -> int:
        """Make compressor, projector and fusion layers."""
        self.tokens_per_frame(grid)
        if in_width % self.heads or in_width % 4:
            raise UserError(
                f"pooler.heads is {self.heads}; it must divide the encoder's width, {in_width}, and 4 must, too"
            )
        if llm_width % (2 * self.fusion_heads):
            raise UserError(
                f"pooler.fusion_heads is {self.fusion_heads}; twice that must divide the LLM's width, {llm_width}"
            )
        position_cE = sine_waves(self.side, in_width)
        wave_1Ess = position_cE.T.reshape(1, in_width, self.side, self.side)
        resized_1Ehw = nn.functional.interpolate(wave_1Ess, size=grid, mode="bicubic", align_corners=False)
        self.register_buffer("position_cE", position_cE, persistent=False)
        self.register_buffer("position_NE", resized_1Ehw[0].flatten(1).T, persistent=False)
        self.query_cE = nn.Parameter(torch.empty(self.side**2, in_width).normal_(std=0.02))
        self.query_norm, self.patch_norm = nn.LayerNorm(in_width), nn.LayerNorm(in_width)
        self.attention = nn.MultiheadAttention(in_width, self.heads, batch_first=True)
        self.project = nn.Sequential(nn.Linear(in_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))
        self.layers = nn.ModuleList(CausalLayer(llm_width, self.fusion_heads) for _ in range(self.fusion_layers))
        return llm_width

    def forward(self, tokens: TokenSet, questions: Questions) -> tuple[TokenSet, Tensor]:
        """Compress each frame and rewrite the question."""
        patches_FNE = grid_of(self, tokens).flatten(1, 2)
        projected_FND, compressed_FcD = self.project(patches_FNE), self.project(self._compress(patches_FNE))
        frame_X, place_X, token_X = self._asked(tokens, questions)
        longest = int(place_X.max()) + 1 if len(place_X) else 0
        device = patches_FNE.device
        count_Q = torch.bincount(token_X, minlength=len(questions.features_QD))
        frame_X, place_X, token_X, count_Q = on_device(device, frame_X, place_X, token_X, count_Q)
        text_FqD = questions.features_QD.new_zeros(len(patches_FNE), longest, questions.features_QD.shape[1])
        text_FqD = text_FqD.index_put((frame_X, place_X), questions.features_QD[token_X])
        # padding stands last, where a causal layer lets nothing see it
        hidden_FTD = torch.cat([projected_FND, compressed_FcD, text_FqD], dim=1)
        count = self.side**2
        left_FtD = self._fused(hidden_FTD, patches_FNE.shape[1])
        question_QD = _mean_by(questions.features_QD, token_X, left_FtD[frame_X, count + place_X], count_Q)
        return self._set(tokens, left_FtD[:, :count]), question_QD

    def _fused(self, hidden_FTD: Tensor, patches: int) -> Tensor:
        """Run the layers, and leave what follows the patches."""
        if not torch.is_grad_enabled():  # frames do not see one another, and a few at a time need less memory
            pieces = hidden_FTD.split(max(1, MOST_ROWS // hidden_FTD.shape[1]))
        else:
            pieces = (hidden_FTD,)
        left = []
        for piece_FTD in pieces:
            for layer in self.layers:
                piece_FTD = layer(piece_FTD)
            left.append(piece_FTD[:, patches:].clone())
        return torch.cat(left)

    def _compress(self, patches_FNE: Tensor) -> Tensor:
        value_FNE = self.patch_norm(patches_FNE)
        key_FNE = value_FNE + self.position_NE.to(value_FNE.dtype)
        query_cE = self.query_norm(self.query_cE).to(value_FNE.dtype) + self.position_cE.to(value_FNE.dtype)
        query_FcE = query_cE.expand(len(patches_FNE), -1, -1)
        if not len(patches_FNE):
            return query_FcE
        return self.attention(query_FcE, key_FNE, value_FNE, need_weights=False)[0]

    @staticmethod
    def _asked(tokens: TokenSet, questions: Questions) -> tuple[Tensor, Tensor, Tensor]:
        """List frame, place in the question, and question token of all that a frame may rewrite, on the CPU."""
        sample_F, count_B = sample_of_frame(tokens), questions.offsets.diff()
        count_F = count_B[sample_F]
        if questions.is_asked_V is not None:
            count_F = count_F * questions.is_asked_V.repeat_interleave(tokens.visual_offsets.diff())
        frame_X = torch.repeat_interleave(torch.arange(len(count_F)), count_F)
        place_X = torch.arange(len(frame_X)) - (count_F.cumsum(0) - count_F)[frame_X]
        return frame_X, place_X, questions.offsets[:-1][sample_F][frame_X] + place_X

    def _set(self, tokens: TokenSet, compressed_FcD: Tensor) -> TokenSet:
        assert tokens.grid is not None, "asked for"
        count, patches = self.side**2, tokens.grid[0] * tokens.grid[1]
        scale = (tokens.grid[0] / self.side, tokens.grid[1] / self.side)
        place_S3 = grid_coordinates(frame_in_visual(tokens.visual_offsets), (self.side, self.side), scale)
        mass_FN = tokens.mass_S.view(-1, patches)
        total = tokens.num_frames * count
        return replace(
            tokens,
            features_SD=compressed_FcD.flatten(0, 1),
            frame_offsets=torch.arange(tokens.num_frames + 1) * count,
            coordinate_S3=place_S3.to(mass_FN.device, non_blocking=True),
            mass_S=(mass_FN.sum(dim=1) / count).repeat_interleave(count),
            grid=None,
            source_map=compose(tokens.source_map, Opaque(total, tokens.num_tokens)),
        )


def _mean_by(features_QD: Tensor, token_X: Tensor, seen_XD: Tensor, count_Q: Tensor) -> Tensor:
    """Replace each question token by the mean of what frames made of it; those that no frame saw stay."""
    count_Q1 = count_Q[:, None]
    sum_QD = features_QD.new_zeros(features_QD.shape, dtype=torch.float32).index_add(0, token_X, seen_XD.float())
    return torch.where(count_Q1 > 0, (sum_QD / count_Q1.clamp(min=1)).to(features_QD.dtype), features_QD)


class CausalLayer(nn.Module):
    """A decoder layer of the Llama layout: RMS norms, rotary causal attention, a SwiGLU MLP.

    Args:
        width: D.
        heads: H; D / H is even.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 32 * math.ceil(8 * width / 3 / 32)
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        for part in (self.qkv, self.out, self.gate_up, self.down):
            nn.init.normal_(part.weight, std=0.02)

    def forward(self, hidden_FTD: Tensor) -> Tensor:
        """Run on (F, T, D); position t sees positions 0 to t."""
        qkv_FTHK = self.qkv(self.attention_norm(hidden_FTD)).unflatten(-1, (3 * self.heads, -1))
        query_FHTK, key_FHTK, value_FHTK = qkv_FTHK.transpose(1, 2).chunk(3, dim=1)
        query_FHTK, key_FHTK = rotate(query_FHTK), rotate(key_FHTK)
        attended_FHTK = nn.functional.scaled_dot_product_attention(query_FHTK, key_FHTK, value_FHTK, is_causal=True)
        hidden_FTD = hidden_FTD + self.out(attended_FHTK.transpose(1, 2).flatten(2))
        gate_FTh, up_FTh = self.gate_up(self.mlp_norm(hidden_FTD)).chunk(2, dim=-1)
        return hidden_FTD + self.down(nn.functional.silu(gate_FTh) * up_FTh)


def rotate(heads_FHTK: Tensor) -> Tensor:
    """Turn each pair (k, k + K/2) by ``t 10000^(-2k/K)``, t the position."""
    positions, width = heads_FHTK.shape[-2:]
    device = heads_FHTK.device
    rate_k = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle_Tk = torch.arange(positions, device=device)[:, None] * rate_k
    cosine_Tk, sine_Tk = angle_Tk.cos().to(heads_FHTK.dtype), angle_Tk.sin().to(heads_FHTK.dtype)
    left, right = heads_FHTK.chunk(2, dim=-1)
    return torch.cat([left * cosine_Tk - right * sine_Tk, right * cosine_Tk + left * sine_Tk], dim=-1)


def sine_waves(side: int, width: int) -> Tensor:
    """Make two-dimensional positions: (side x side, width), a quarter of it for each of sin x, cos x, sin y, cos y."""
    rate_e = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angle_se = torch.arange(side)[:, None] * rate_e
    wave_sE = torch.cat([angle_se.sin(), angle_se.cos()], dim=1)
    across_ccE, down_ccE = wave_sE.expand(side, -1, -1), wave_sE[:, None].expand(-1, side, -1)
    return torch.cat([across_ccE, down_ccE], dim=2).flatten(0, 1)
