from dataclasses import replace
from pathlib import Path

import matplotlib.image
import torch

from callbacks.token_picture import TokenPicture
from lightning_crosslmm.looks import Pooling, Sight


def seen(module, num_frames: int = 2):
    """Let a module tell of tokens, too: all four patches of each frame in one."""
    token_FHW = torch.arange(num_frames)[:, None, None].expand(-1, 2, 2)
    four_P, ones = torch.full((num_frames,), 4), torch.ones(num_frames, 2, 2)
    pooling = Pooling("TestPooler", token_FHW, ones, ones.long(), four_P, four_P.float(), torch.ones(num_frames).long())
    looks = module.looks
    module.looks = lambda batch, limit: [
        replace(look, frames_FCHW=look.frames_FCHW[:num_frames], sight=Sight({}, pooling))
        for look in looks(batch, limit)
    ]
    return module


def test_every_validation_draws_its_first_clips(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(TokenPicture(num_clips=1)).validate(seen(tiny()), batches(2), verbose=False)
    one = matplotlib.image.imread(tmp_path / "tokens.png")
    make_trainer(TokenPicture(num_clips=2)).validate(seen(tiny()), batches(2), verbose=False)
    two = matplotlib.image.imread(tmp_path / "tokens.png")
    assert two.shape[0] > 1.5 * one.shape[0] and one[..., :3].std() > 0.01


def test_samples_without_frames_are_left_out(make_trainer, tiny, batches, tmp_path: Path) -> None:
    make_trainer(TokenPicture(num_clips=1)).validate(seen(tiny(), num_frames=0), batches(1), verbose=False)
    assert not (tmp_path / "tokens.png").exists()
