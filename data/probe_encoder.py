"""Give the small encoder what SigLIP brings along: eyes that have seen captioned pictures.

A fresh ViT and a fresh LLM that learn from answers alone wait for each other: the LLM has nothing to read, and the
encoder is told nothing. Users start from SigLIP; the default run stands in for that with a few seconds on single
things, each labelled with shape, colour and quadrant. The labels are what a caption would say (a red disc, top left),
of a single thing; they say nothing of time or of which of several things is meant, and no clip of the probe set is
used.

Axis letters:
    F  pictures    H W C  pixel rows, pixel columns, channels    N  patches    E  encoder width
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from data.probe_scene import COLOURS, PLACES, SHAPES, render
from lightning_crosslmm.encoder import Encoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.run_folder import replacing

log = logging.getLogger(__name__)

_CLASSES = [len(SHAPES), len(COLOURS), len(PLACES)]


@dataclass(frozen=True)
class EncoderFit:
    """How long to look at labelled pictures.

    Args:
        steps: optimizer steps, 1 or more.
        batch_size: pictures per step, 1 or more.
        lr: of AdamW, above 0, with 30 steps of warm-up and linear decay over the second half.
    """

    steps: int
    batch_size: int
    lr: float

    def __post_init__(self) -> None:
        """Refuse settings that train nothing."""
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0:
            raise UserError(
                f"data.encoder_fit.steps {self.steps} and batch_size {self.batch_size} must be 1 or more, "
                f"lr {self.lr} above 0; data.encoder_fit=null leaves the encoder as it is"
            )


def fit_encoder_once(
    encoder: Encoder, fit: EncoderFit, picture_size: int, noise: float, seed: int, folder: Path
) -> None:
    """Fit the encoder as `fit_encoder` does, or take what a fit of the same encoder in the same way came to.

    Args:
        encoder: changed in place.
        fit: see `fit_encoder`, as are the next three.
        picture_size: pixels.
        noise: share.
        seed: any.
        folder: where ``encoder-<hash>.pt`` is kept, named after everything that the fit depends on, fresh weights and
            this code included. Processes that race write the same.
    """
    asked = (asdict(fit), picture_size, noise, seed, getattr(encoder, "identity", None), torch.__version__)
    name = hashlib.sha256(json.dumps(asked, default=str).encode())
    for source in (Path(__file__), Path(__file__).with_name("probe_scene.py")):
        name.update(source.read_bytes())
    for key, value in sorted(encoder.state_dict().items()):
        name.update(key.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    path = folder / f"encoder-{name.hexdigest()[:16]}.pt"
    is_kept = path.is_file()
    if is_kept:
        kept = torch.load(path, weights_only=True)
        encoder.load_state_dict(kept["state_dict"])
    else:
        right = fit_encoder(encoder, fit, picture_size, noise, seed)
        kept = {"state_dict": encoder.state_dict(), "right": right}
        with replacing(path) as part:
            torch.save(kept, part)
    told = "encoder %s: names shape, colour and place of %.1f %% of single things"
    log.info(told, f"taken from {path}" if is_kept else "fitted", 100 * kept["right"])


def fit_encoder(encoder: Encoder, fit: EncoderFit, picture_size: int, noise: float, seed: int) -> float:
    """Train the encoder to name shape, colour and place of a single thing from the mean of its patches.

    ``loss = sum over the three of CE(label | W mean(patches))``; the linear heads are thrown away.

    Args:
        encoder: changed in place.
        fit: steps, batch size, learning rate.
        picture_size: pixels per side of the pictures, as in the probe set; they are resized to the encoder's.
        noise: of the pictures, as in the probe set.
        seed: of pictures and heads.

    Returns:
        Share of pictures of the last 20 steps with all three named right.
    """
    was_trained = [parameter.requires_grad for parameter in encoder.parameters()]
    encoder.requires_grad_(True)  # a training may freeze it; that begins afterwards
    random = np.random.default_rng(seed)
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(encoder.width, sum(_CLASSES)).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=fit.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30, max(0.02, 2 * (1 - step / fit.steps)))
    )
    right: list[float] = []
    for _ in range(fit.steps):
        scenes = render(random, fit.batch_size, picture_size, noise, num_things=1)
        thing_F1 = torch.from_numpy(scenes.shape_FO.argmax(axis=1))[:, None]  # empty quadrants say -1
        shape_F, colour_F = (
            torch.from_numpy(index_FO).gather(1, thing_F1)[:, 0].to(device)
            for index_FO in (scenes.shape_FO, scenes.colour_FO)
        )
        frames_FCHW = _resized(torch.from_numpy(scenes.frames_FHWC).permute(0, 3, 1, 2), encoder.image_size).to(device)
        logits = head(encoder(frames_FCHW).mean(dim=1))
        labels = (shape_F, colour_F, thing_F1[:, 0].to(device))
        named = list(zip(logits.split(_CLASSES, dim=1), labels, strict=True))
        loss = torch.stack([cross_entropy(of_kind, label_F) for of_kind, label_F in named]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hits = torch.stack([of_kind.argmax(dim=-1) == label_F for of_kind, label_F in named])
        right.append(hits.all(dim=0).float().mean().item())
    optimizer.zero_grad()
    for parameter, is_trained in zip(encoder.parameters(), was_trained, strict=True):
        parameter.requires_grad_(is_trained)
    return float(np.mean(right[-20:]))


def _resized(frames_FCHW: Tensor, side: int) -> Tensor:
    if frames_FCHW.shape[-1] == side:
        return frames_FCHW
    smooth_FCHW = interpolate(frames_FCHW.float(), size=(side, side), mode="bicubic", antialias=True)
    return smooth_FCHW.round().clamp(0, 255).to(torch.uint8)
