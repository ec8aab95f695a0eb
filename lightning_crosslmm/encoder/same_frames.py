"""Which frames of a batch repeat, so that the tower need not run on them again.

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    V  visuals    X  words of 8 bytes of a frame
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def stand_ins(frames_FCHW: Tensor, visual_offsets: Tensor, tolerance: float) -> Tensor:
    """Name for each frame the one whose patches are taken in its place; itself, if it is not like one before it.

    A frame takes those of the first frame of the batch that is equal to it byte for byte. With a tolerance it takes,
    before that, those of the last frame kept in its own visual, where ``mean |frame - kept| <= tolerance``: slow drift
    adds up until a frame is kept again, and no frame stands in for one of another visual unless they are equal.

    Args:
        frames_FCHW: uint8. One wait for their device.
        visual_offsets: (V+1,) int64 on the CPU.
        tolerance: 0 or more, of 255.

    Returns:
        (F,) int64 on the CPU.
    """
    own_F = torch.arange(len(frames_FCHW), device=frames_FCHW.device)
    first_F = _first_equal(frames_FCHW, own_F)
    if tolerance > 0:
        first_F = first_F[_last_kept(frames_FCHW, own_F, visual_offsets, tolerance)]
    return first_F.cpu()


def _first_equal(frames_FCHW: Tensor, own_F: Tensor) -> Tensor:
    flat = frames_FCHW.flatten(1)
    words_FX = pad(flat, (0, -flat.shape[1] % 8)).contiguous().view(torch.int64)
    # frames of one sum are candidates, and are compared; a chance sum that hides a pair costs work and no more
    sum_F = (words_FX * torch.arange(1, words_FX.shape[1] + 1, device=words_FX.device)).sum(dim=1)
    first_F = torch.where(sum_F[:, None] == sum_F, own_F, len(own_F)).amin(dim=1)
    return torch.where((words_FX == words_FX[first_F]).all(dim=1), first_F, own_F)


def _last_kept(frames_FCHW: Tensor, own_F: Tensor, visual_offsets: Tensor, tolerance: float) -> Tensor:
    most = int(tolerance * frames_FCHW[0].numel())  # sums of bytes are whole numbers, and exact
    begins = set(visual_offsets.tolist())
    kept_CHW, kept, found = frames_FCHW[0], own_F[0], []
    for number, frame_CHW in enumerate(frames_FCHW):
        if number in begins:
            kept_CHW, kept = frame_CHW, own_F[number]
        else:
            apart_CHW = torch.maximum(frame_CHW, kept_CHW) - torch.minimum(frame_CHW, kept_CHW)
            is_like = apart_CHW.sum(dtype=torch.int64) <= most
            kept_CHW, kept = torch.where(is_like, kept_CHW, frame_CHW), torch.where(is_like, kept, own_F[number])
        found.append(kept)
    return torch.stack(found)
