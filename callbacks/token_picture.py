"""What the model saw: ``tokens.png``, which patches became which tokens, and where each fused layer looked."""

from collections.abc import Sequence
from pathlib import Path

from callbacks.look_picture import LookPicture
from lightning_crosslmm.contact_sheet import draw_sheet
from lightning_crosslmm.looks import Look


class TokenPicture(LookPicture):
    """Draw all frames of the first clips, with the tokens that their patches became."""

    def draw(self, looks: Sequence[Look], run_dir: Path) -> None:
        """Write ``tokens.png``."""
        draw_sheet(looks, run_dir / "tokens.png")
