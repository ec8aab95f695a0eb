"""Contact sheets and videos of what a model saw."""

from pathlib import Path

import matplotlib.image
import pytest
import torch

from lightning_crosslmm.contact_sheet import draw_sheet, draw_video, summary
from lightning_crosslmm.looks import Look, Pooling, Sight
from lightning_crosslmm.token_pictures import PICTURE_SIDE
from lightning_crosslmm.video import FrameSampling, probe_video, read_clip


def make_pooling(num_frames: int, traced: bool = True) -> Pooling:
    """In each frame two patches in a token, one alone, one dropped."""
    tokens = torch.tensor([[0, 0], [1, -1]])
    token_FHW = torch.stack([torch.where(tokens < 0, -1, tokens + 2 * frame) for frame in range(num_frames)])
    held = (token_FHW >= 0).long()
    patches_P = torch.tensor([2, 1]).repeat(num_frames)
    tokens_F = torch.full((num_frames,), 2)
    mass_P = torch.tensor([3.0, 1.0]).repeat(num_frames)
    return Pooling("TestPooler", token_FHW if traced else None, held.float(), held, patches_P, mass_P, tokens_F)


def make_look(
    num_frames: int = 3, traced: bool = True, layers: tuple[int, ...] = (0, 2), question: str = "$x$?"
) -> Look:
    frames = torch.arange(num_frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8) * 10
    heat = torch.rand(num_frames, 2, 2) * 0.1
    heat[0, 0, 0] = 0.125
    maps = {(branch, layer): heat for branch in ("t2v", "v2v") for layer in layers}
    mean = heat if layers else None
    sight = Sight(maps, make_pooling(num_frames, traced))
    return Look("clip", question, "red", None, frames, mean, mean, torch.arange(num_frames) / 2, sight)


def words_of(figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def below(axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_a_row_of_frames_one_of_tokens_and_one_for_each_layer_and_branch(tmp_path: Path) -> None:
    figure = draw_sheet([make_look()], tmp_path / "sheet.png")
    heats = [f"{word}, layer {layer}\npeak 12.5 %" for word in ("V2V", "T2V") for layer in (0, 2)]
    assert words_of(figure) == ["frames", "tokens", *heats]
    frames, tokens, *_ = figure.axes
    assert below(frames) == ["0.00 s", "0.50 s", "1.00 s"] and below(tokens) == ["2 tokens"] * 3
    picture = frames.images[0].get_array()
    gap = PICTURE_SIDE // 24
    assert picture.shape == (PICTURE_SIDE, 3 * PICTURE_SIDE + 2 * gap, 3)
    middles = [number * (PICTURE_SIDE + gap) + PICTURE_SIDE // 2 for number in range(3)]
    assert picture[0, middles, 0].tolist() == [0, 10, 20] and picture[0, PICTURE_SIDE, 0] == 255
    said = frames.get_title(loc="left").splitlines()
    assert said[:2] == [r"clip: asked: \$x\$?", "model: red"] and said[2].startswith("TestPooler: 12 patches")
    assert [text.get_text() for text in tokens.get_legend().get_texts()] == [
        "one patch: 3",
        "dropped: 3",
        *["mass 3"] * 3,
    ]
    assert matplotlib.image.imread(tmp_path / "sheet.png")[..., :3].std() > 0.01


def test_long_clips_wrap_and_show_every_frame(tmp_path: Path) -> None:
    figure = draw_sheet([make_look(20, layers=())], tmp_path / "sheet.png")
    assert words_of(figure) == ["frames", "tokens"] * 3
    assert [len(below(axes)) for axes in figure.axes[::2]] == [7, 7, 6]
    assert sum((below(axes) for axes in figure.axes[::2]), []) == [f"{frame / 2:.2f} s" for frame in range(20)]
    assert [axes.get_legend() is not None for axes in figure.axes] == [False] * 5 + [True]
    shapes = {axes.images[0].get_array().shape for axes in figure.axes}
    assert len(shapes) == 1  # a shorter row has frames as large as the others


def test_all_of_an_image_stands_in_one_row(tmp_path: Path) -> None:
    (axes,) = draw_sheet([make_look(1)], tmp_path / "sheet.png").axes
    assert [text.split("\n")[0] for text in below(axes)] == [
        "frames", "tokens", "V2V, layer 0", "V2V, layer 2", "T2V, layer 0", "T2V, layer 2",
    ]  # fmt: skip
    (axes,) = draw_sheet([make_look(1, traced=False, layers=())], tmp_path / "sheet.png").axes
    assert below(axes) == ["frames", "tokens: no map"]


def test_several_samples_stand_below_each_other(tmp_path: Path) -> None:
    figure = draw_sheet([make_look(), make_look(2, question="")], tmp_path / "sheet.png")
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes]
    assert titles == [r"clip: asked: \$x\$?", *[""] * 5, "clip", *[""] * 5]


def test_opaque_tokens_are_said_to_have_no_map(tmp_path: Path) -> None:
    figure = draw_sheet([make_look(traced=False)], tmp_path / "sheet.png")
    tokens = figure.axes[1]
    assert "no map" in tokens.texts[0].get_text() and tokens.get_legend() is None
    assert figure.axes[0].get_title(loc="left").endswith("TestPooler: 6 tokens, without a map back to patches")


@pytest.mark.parametrize(
    ("num_frames", "text"),
    [
        (1, "TestPooler: 4 patches to 2 tokens, 1 of one patch and 1 of several; 1 dropped; mass 1 to 3, 4 in all"),
        (3, "TestPooler: 12 patches to 6 tokens, 3 of one patch and 3 of several; 3 dropped; mass 1 to 3, 12 in all"),
    ],
)
def test_totals(num_frames: int, text: str) -> None:
    assert summary(make_pooling(num_frames)) == text


def test_the_video_has_a_second_for_each_frame_with_all_panels(tmp_path: Path) -> None:
    draw_video(make_look(5), tmp_path / "video.mp4")
    info = probe_video(tmp_path / "video.mp4", "video.mp4")
    assert (info.num_frames, info.fps_hz) == (5, 1.0) and info.width > 3 * info.height > 900
    frames = read_clip(tmp_path / "video.mp4", "video.mp4", FrameSampling(num_frames=5)).frames_FCHW
    across = frames[:, :, info.height * 2 // 3, info.width // 8].float()
    assert torch.allclose(across[:, 0], torch.arange(5) * 10.0, atol=4)  # the first panel is the frame
    draw_video(make_look(2, traced=False, layers=()), tmp_path / "video.mp4")
    assert probe_video(tmp_path / "video.mp4", "video.mp4").width < info.width
