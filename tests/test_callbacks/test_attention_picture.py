from pathlib import Path

import matplotlib.image
import pytest
import torch

from callbacks.attention_picture import AttentionPicture, draw_looks
from lightning_crosslmm.looks import Look


def make_look(num_frames: int = 3, v2v: bool = True, t2v: bool = True) -> Look:
    frames = torch.arange(num_frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    heat = torch.zeros(num_frames, 2, 2)
    heat[-1:, 0, 1] = 4.0
    return Look("clip", "what $now$?", "r\x08\x00红", "blue", frames, heat if v2v else None, heat if t2v else None)


def test_every_validation_draws_its_first_clips(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(AttentionPicture(num_clips=1)).validate(tiny(), batches(2), verbose=False)
    one = matplotlib.image.imread(tmp_path / "attention.png")
    make_trainer(AttentionPicture(num_clips=2)).validate(tiny(), batches(2), verbose=False)
    two = matplotlib.image.imread(tmp_path / "attention.png")
    assert two.shape[0] == 2 * one.shape[0] and one[..., :3].std() > 0.01


@pytest.mark.parametrize(
    ("branches", "strips"),
    [({}, ["clip", "V2V", "T2V"]), ({"t2v": False}, ["clip", "V2V"]), ({"v2v": False, "t2v": False}, ["clip"])],
)
def test_a_strip_for_each_branch_there_is(tmp_path: Path, branches: dict[str, bool], strips: list[str]) -> None:
    figure = draw_looks([make_look(**branches)], tmp_path / "attention.png")
    assert [axes.get_ylabel() for axes in figure.axes] == strips
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_frames_stand_in_order_with_the_heat_over_them(tmp_path: Path) -> None:
    clip, v2v, _ = draw_looks([make_look()], tmp_path / "attention.png").axes
    picture = clip.images[0].get_array()
    assert picture.shape == (8, 24, 3) and picture[0, :, 0].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    heat = v2v.images[1].get_array()
    assert heat.shape == (8, 24) and heat[:, :16].max() == 0
    assert divmod(int(heat.argmax()), 24) == (0, 22)  # rises to the upper right of the last frame
    assert v2v.images[1].get_clim() == (0, 4.0)
    assert clip.get_title(loc="left") == r"asked: what \$now\$? right: blue model: r 红"


def test_of_long_clips_eight_frames_are_shown(tmp_path: Path) -> None:
    clip = draw_looks([make_look(num_frames=16)], tmp_path / "attention.png").axes[0]
    assert clip.images[0].get_array()[0, ::8, 0].tolist() == [1, 3, 5, 7, 9, 11, 13, 15]


def test_samples_without_frames_are_left_out(make_trainer, tiny, batches, tmp_path: Path) -> None:
    module = tiny()
    module.looks = lambda batch, limit: [make_look(num_frames=0)]
    make_trainer(AttentionPicture(num_clips=1)).validate(module, batches(1), verbose=False)
    assert not (tmp_path / "attention.png").exists()
