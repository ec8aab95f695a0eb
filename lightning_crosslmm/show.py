"""``crosslmm show``: what a trained run sees in a video or an image, as a contact sheet and as a video."""

from collections.abc import Sequence
from pathlib import Path

from lightning_crosslmm.answer import Answerer
from lightning_crosslmm.contact_sheet import draw_sheet, draw_video
from lightning_crosslmm.errors import UserError

SHEET, VIDEO = "sheet.png", "video.mp4"


def show(
    path: Path,
    run_dir: Path,
    question: str | None = None,
    out_dir: Path | None = None,
    *,
    overwrite: bool = False,
    allow: Sequence[str] = (),
) -> list[Path]:
    """Write ``sheet.png`` and, if there is more than one frame, ``video.mp4``, both with all frames looked at.

    Args:
        path: a video or an image.
        run_dir: a folder that ``train.py`` wrote.
        question: whose answer is told, and what text looked at before it; without one only tokens and V2V are shown.
        out_dir: the folder to write into; None is ``show/NAME`` in `run_dir`, NAME that of the file without its ending.
        overwrite: write into a folder that is not empty.
        allow: as in `Answerer.from_run`.

    Returns:
        The files written.

    Raises:
        UserError: `out_dir` is a file or not empty, there is no such file or run, the file cannot be read, the question
            is empty, or there is none and the pooler wants one.
    """
    folder = run_dir / "show" / path.stem if out_dir is None else out_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise UserError(f"--out {folder}: is not empty; give another folder, or --overwrite")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a video or an image")
    look = Answerer.from_run(run_dir, allow).see(path, question)
    draw_sheet([look], folder / SHEET)
    if len(look.frames_FCHW) == 1:
        return [folder / SHEET]
    draw_video(look, folder / VIDEO)
    return [folder / SHEET, folder / VIDEO]
