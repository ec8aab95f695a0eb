"""Sparing the tower work: frames that repeat are encoded once, and what is on disk is not encoded at all.

Axis letters:
    F  frames    U  frames that are encoded    C H W  channels, pixel rows, pixel columns    V  visuals
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lightning_crosslmm.encoder.base import Encoder
from lightning_crosslmm.encoder.feature_cache import FeatureCache, Features
from lightning_crosslmm.encoder.fingerprint import Fingerprint, check_repeatable, digests_of
from lightning_crosslmm.encoder.same_frames import stand_ins
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.taps import Asks

_INDEX = "index_F"


class Reuse:
    """What stands between the frames of a batch and the tower.

    Off, as an encoder has it without settings, it lets everything through. Nothing but the tower's work changes: there
    are features for every frame, and gradients pass to the frame that was encoded.

    Args:
        encoder: says which frames count as the same.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._tolerance, self._fingerprint = encoder.same_frame_tolerance, Fingerprint()
        self._cache: FeatureCache | None = None
        self._counts = {True: [0, 0], False: [0, 0]}

    @property
    def is_on(self) -> bool:
        """Whether there is anything to spare."""
        return self._tolerance is not None or self._cache is not None

    def keep_features(self, encoder: Encoder) -> None:
        """Let the encoder's cache serve from now on, where its settings have one.

        Raises:
            UserError: the encoder is trained, or drops at random.
        """
        cache = encoder.feature_cache
        if cache is not None and cache.folder is not None:
            check_repeatable(encoder, cache.folder)
            self._cache = cache

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Run the tower inside, whatever is on disk, for those who measure it; nothing is counted."""
        cache, counts, self._cache = self._cache, self._counts, None
        self._counts = {True: [0, 0], False: [0, 0]}
        try:
            yield
        finally:
            self._cache, self._counts = cache, counts

    def encoded_share(self, is_training: bool) -> float:
        """Give the frames that the tower ran on over those it was asked for, since the start; 1 if there were none."""
        encoded, asked = self._counts[is_training]
        return encoded / asked if asked else 1.0

    def features(
        self,
        encoder: Encoder,
        asks: Asks,
        frames_FCHW: Tensor,
        visual_offsets: Tensor,
        run: Callable[[Tensor], Features],
    ) -> Features:
        """Give the features of all frames, by running the tower on some.

        Args:
            encoder: that `run` runs.
            asks: what a pooler wants besides patches.
            frames_FCHW: uint8.
            visual_offsets: (V+1,) int64 on the CPU.
            run: features of (U, C, H, W) frames, U from 0 to F; called once, and always, because processes that share
                weights run the tower equally often.
        """
        if not self.is_on or frames_FCHW.is_meta:
            return run(frames_FCHW)
        if self._cache is None:
            return _taken(*self._encode(encoder, frames_FCHW, visual_offsets, run))
        device, cache, lengths_V = frames_FCHW.device, self._cache, visual_offsets.diff().tolist()
        identity = self._fingerprint.of(encoder, asks, device, self._tolerance or 0.0)
        digests_V = digests_of(identity, frames_FCHW.cpu(), visual_offsets)
        found_V = [cache.read(digest) for digest in digests_V]
        missed = [visual for visual, found in enumerate(found_V) if found is None]
        frames_V, missed_lengths = frames_FCHW.split(lengths_V), [lengths_V[visual] for visual in missed]
        missed_FCHW = torch.cat([frames_FCHW[:0], *(frames_V[visual] for visual in missed)])
        rows, row_F = self._encode(encoder, missed_FCHW, torch.tensor([0, *missed_lengths]).cumsum(0), run)
        self._counts[encoder.training][1] += len(frames_FCHW) - len(missed_FCHW)
        row_V = dict(zip(missed, row_F.split(missed_lengths), strict=True))
        for visual, own_F in row_V.items():
            cache.write(digests_V[visual], partial(_packed, rows, own_F))
        if len(missed) == len(found_V):
            return _taken(rows, row_F)
        parts = [
            _taken(rows, row_V[visual]) if found is None else _unpacked(found, device)
            for visual, found in enumerate(found_V)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(
        self, encoder: Encoder, frames_FCHW: Tensor, visual_offsets: Tensor, run: Callable[[Tensor], Features]
    ) -> tuple[Features, Tensor]:
        """Encode frames, those that count as the same once: features of (U,) frames, and (F,) whose are whose."""
        row_F = torch.arange(len(frames_FCHW))
        encoded_UCHW = frames_FCHW
        if self._tolerance is not None and len(frames_FCHW) > 1:
            kept_U, row_F = stand_ins(frames_FCHW, visual_offsets, self._tolerance).unique(return_inverse=True)
            if len(kept_U) < len(frames_FCHW):
                encoded_UCHW = frames_FCHW[kept_U.to(frames_FCHW.device, non_blocking=True)]
        self._counts[encoder.training][0] += len(encoded_UCHW)
        self._counts[encoder.training][1] += len(frames_FCHW)
        return run(encoded_UCHW), row_F


def refuse_reuse(encoder: Encoder, why: str) -> None:
    """Refuse an encoder that spares itself work where each frame has to go through the tower.

    Raises:
        UserError: names the setting, and what stands against it.
    """
    folder = encoder.feature_cache and encoder.feature_cache.folder
    for name, value in (("same_frame_tolerance", encoder.same_frame_tolerance), ("feature_cache.folder", folder)):
        if value is not None:
            raise UserError(
                f"encoder.{name}={value} spares the tower frames, and {why}; set encoder.{name}=null, or choose "
                "another pooler"
            )


def _taken(rows: Features, row_F: Tensor) -> Features:
    """Take features of encoded frames again for all that they stand for."""
    if all(len(each_U) == len(row_F) for each_U in rows.values()) and torch.equal(row_F, torch.arange(len(row_F))):
        return rows
    return {name: each_U[row_F.to(each_U.device, non_blocking=True)] for name, each_U in rows.items()}


def _packed(rows: Features, row_F: Tensor) -> Features:
    """Make what is kept of one visual: each encoded frame once, on the CPU."""
    own_U, place_F = row_F.unique(return_inverse=True)
    return {_INDEX: place_F, **{name: each_U[own_U.to(each_U.device)].detach().cpu() for name, each_U in rows.items()}}


def _unpacked(found: Features, device: torch.device) -> Features:
    rows = {name: each.to(device, non_blocking=True) for name, each in found.items() if name != _INDEX}
    return _taken(rows, found[_INDEX])
