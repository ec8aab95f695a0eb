"""What a configuration amounts to, without data or weights: parameters per role, tokens per frame and clip."""

from lightning_crosslmm.model import ROLES, CrossLMM
from lightning_crosslmm.video import FrameSampling


def describe(model: CrossLMM, sampling: FrameSampling) -> list[str]:
    """Write the table of a model.

    Args:
        model: on any device, the meta device too; a parameter counts as trained if it asks for a gradient.
        sampling: which moments of a video become frames.

    Returns:
        Lines of text: parameters and trained parameters per role and in total, in millions and exactly, tied ones once;
            then what a
        frame and a clip cost in tokens.
    """
    counts = {role: [0, 0] for role in (*ROLES, "total")}
    for name, parameter in model.named_parameters():
        for role in (model.role_of(name), "total"):
            counts[role][0] += parameter.numel()
            counts[role][1] += parameter.numel() * parameter.requires_grad
    lines = [f"{'role':<12}{'parameters':>26}{'trained':>26}"]
    lines += [f"{role:<12}{_count(total)}{_count(trained)}" for role, (total, trained) in counts.items()]
    return [*lines, "", *(f"{name:<12}{text}" for name, text in _tokens(model, sampling).items())]


def _count(number: int) -> str:
    return f"{number / 1e6:>9,.1f} M{number:>15,}"


def _tokens(model: CrossLMM, sampling: FrameSampling) -> dict[str, str]:
    rows, columns = model.encoder.grid
    source, pooled = rows * columns, model.tokens_per_frame
    frames = sampling.num_frames or sampling.max_frames or 0
    most = "" if sampling.num_frames else "at most "
    side, config = model.encoder.image_size, model.llm.config
    in_prompt = (
        "as many pooled tokens as the pictures ask for"
        if pooled is None
        else f"{most}{frames * pooled:,} pooled tokens"
    )
    per_frame = "a varying number of" if pooled is None else pooled
    fused = ", ".join(map(str, model.fused_layers)) or "none"
    return {
        "frame": f"{side}x{side} pixels, grid {rows}x{columns} = {source:,} source tokens, {per_frame} pooled",
        "clip": f"{most}{frames} frames, {frames * source:,} source tokens",
        "prompt": f"{in_prompt} and the text, in a context of {config.max_position_embeddings:,}",
        "LLM layers": f"{config.num_hidden_layers}, fused: {fused}",
    }
