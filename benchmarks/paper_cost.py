"""The paper's efficiency numbers beside ours: CrossLMM, arXiv:2505.17020v1, Fig. 4 and Table 6.

    python benchmarks/paper_cost.py > docs/paper_cost.md

No weights and no GPU: everything is counted on the meta device (`crosslmm cost`), in a minute or two.
"""

import sys
from pathlib import Path
from typing import Any

from lightning_crosslmm.compose import ANY_TARGET, compose_overrides
from lightning_crosslmm.cost import Sample, cost_card

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
FRAMES = (32, 64, 128, 256)
TEXT_TOKENS = 58  # what the printed lines leave over at no frame at all
GPU = "h100"  # H800 in the paper: the same matrix units, a slower link between GPUs
PRINTED: dict[str, dict[int, tuple[float, float, float]]] = {  # "TFLOPs", MB of memory, ms of prefill
    "2B": {
        32: (10.93, 715.61, 264.06),
        64: (21.77, 825.21, 505.50),
        128: (43.46, 1046.68, 909.77),
        256: (86.82, 1490.25, 1698.12),
    },
    "7B": {32: (13.17, 1753, 335), 64: (25.92, 1864, 578), 128: (51.43, 2087, 1063), 256: (102.42, 2530, 2019)},
    "LLaVA-OneVision 7B": {
        32: (57, 4858, 554.91),
        64: (113.56, 8640, 1129),
        128: (226.67, 16206, 2504),
        256: (316.88, 20208, 3978.83),
    },
}
HEAD = (
    "model", "frames", 'printed "TFLOPs"', "ours, the paper's way (TMAC)", "difference", "ours, full (TFLOP)",
    "V2V + T2V", "LLM attention", "printed MB", "ours, MB", "printed ms", f"least ms on one {GPU}",
)  # fmt: skip
REASONS = """
Why they differ:

- **What the paper calls FLOPs are multiply-accumulates.** Ours are 2 per multiply-accumulate, as torch counts;
  "ours, the paper's way" is halved.
- **What fusion does is not in the printed numbers.** Encoder, projector on all source tokens, LLM matrices and the
  head on every position give them to about 2 %; there is no room for keys and values of the source tokens, nor for
  attention to them, in either branch. "V2V + T2V" is what is missing.
- **Attention inside the LLM is not in them either**: they grow linearly with frames, LLaVA-OneVision's too. "LLM
  attention" counts all pairs of positions; a causal kernel leaves half out.
- **The head on every position** is in the printed numbers. Reading a prompt needs it at one, and our full count has
  it at one.
- **LLaVA-OneVision at 256 frames is cut off** at about 32,768 tokens, the LLM's context, where the clip has 50
  thousand. "The paper's way" cuts as well; the full count does not, so the cut of 67.7 % that the paper prints for
  256 frames compares with a shorter clip.
- **Memory** is printed without weights; its slope, 3.46 MB per frame for both sizes, has no room for projected source
  tokens at the 7B's width, nor for what T2V keeps of them. That of LLaVA-OneVision, 118 MB per frame, is what logits of
  196 positions take in single precision, which reading a prompt does not need. Ours is the most memory alive at once
  while a prompt is read, weights left out (bfloat16), caches included, logits of one position.
- **Time**: ours is the least that the card's peaks allow (roofline), so the printed time is to be larger; how much
  is the share of the peak that is used.
"""


def main() -> None:
    """Print the page."""
    lines = [
        "# The paper's efficiency numbers, recounted",
        "",
        "Written by `python benchmarks/paper_cost.py > docs/paper_cost.md`; no number below is typed by hand but the "
        "printed ones,",
        f"which are those of Fig. 4 and Table 6. {TEXT_TOKENS} text tokens, 9 tokens per frame, bfloat16; 1 T = 10^12.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "| --- |" + " ---: |" * 11,
    ]
    for size in ("2B", "7B"):
        for frames in FRAMES:
            words = [f"experiment=crosslmm_{size.lower()}", "trainer=gpu", "trainer.precision=bf16-true"]
            config = compose_overrides(CONF_DIR, [*words, f"data.sampling.num_frames={frames}"])
            card = cost_card(config, ANY_TARGET, Sample(frames, TEXT_TOKENS, 1), gpu=GPU, trains=False)
            lines.append(row(size, frames, card))
            if size == "7B":
                lines.append(row("LLaVA-OneVision 7B", frames, card["baseline"]))
    head, body = lines[:7], sorted(lines[7:], key=lambda line: list(PRINTED).index(line.split("|")[1].strip()))
    sys.stdout.write("\n".join([*head, *body]) + "\n" + REASONS)


def row(model: str, frames: int, card: dict[str, Any]) -> str:
    """Write one line of the table."""
    printed, printed_mb, printed_ms = PRINTED[model][frames]
    flops, tokens = card["flops"]["prefill"], card["tokens"]
    read = min(tokens["llm"], tokens["context"])
    # every matrix of the LLM works on every token that is read, the head too, and nothing else of it counts
    per_token = flops["llm_linear"] / tokens["llm"] + flops["head"]
    theirs = (flops["encoder"] + flops["projector"] + flops["pooler"] + read * per_token) / 2e12
    fusion = (flops["v2v"] + flops["t2v"]) / 1e12
    cells = [
        model, str(frames), f"{printed:.2f}", f"{theirs:.2f}", f"{theirs / printed - 1:+.1%}",
        f"{flops['total'] / 1e12:,.1f}",
        f"{fusion:.1f}", f"{flops['llm_attention'] / 1e12:,.1f}", f"{printed_mb:,.0f}",
        f"{card['bytes']['prefill'] / 1e6:,.0f}",
        f"{printed_ms:,.0f}", f"{card['roofline_s']['prefill']['total'] * 1e3:,.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
