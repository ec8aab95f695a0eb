"""A small MLP from the encoder's width to the LLM's.

Axis letters:
    S  tokens    E  encoder width    D  LLM width
"""

from torch import Tensor, nn

from lightning_crosslmm.errors import UserError


class MLPProjector(nn.Sequential):
    """Map visual tokens to the LLM's width: ``W_n GELU(... W_1 norm(x))``.

    Source: CrossLMM, arXiv:2505.17020v1, section 3.2: two layers, GELU, "with layer normalization".
    Differs: neither the hidden width nor the norm's place is given. The hidden width is the LLM's, as in LLaVA's
        ``mlp2x_gelu``, which fits the 43 M trainable parameters of Table 3. The norm stands on the input, where
        features of any encoder meet the first layer at one scale; ``norm=false`` is LLaVA's form. The paper's
        "differentiable inverse" and "l2-sphere regularisation" come without formula or weight and are left out.

    Args:
        in_width: E.
        out_width: D.
        depth: linear layers, 1 or more.
        norm: whether a LayerNorm stands on the input.

    Raises:
        UserError: `depth` below 1.
    """

    def __init__(self, in_width: int, out_width: int, depth: int = 2, norm: bool = True) -> None:
        if depth < 1:
            raise UserError(f"projector.depth is {depth}; it must be 1 or more linear layers")
        layers: list[nn.Module] = [nn.LayerNorm(in_width)] if norm else []
        for number in range(depth):
            layers += [nn.GELU()] if number else []
            layers.append(nn.Linear(out_width if number else in_width, out_width))
        super().__init__(*layers)

    def forward(self, tokens_SE: Tensor) -> Tensor:
        """Project (S, E) to (S, D)."""
        return super().forward(tokens_SE)
