"""Data that are rendered on first use: what the data modules of the probe and of the probe suite share."""

import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.module import VideoDataModule
from data.probe_encoder import EncoderFit, fit_encoder_once
from lightning_crosslmm.model import CrossLMM


class RenderedDataModule(VideoDataModule):
    """Writes its shards on first use, then streams them like any others; ``predict`` answers the test split.

    Args:
        folders: for each folder of shards, what writes it.
        pictures: pixels per side and noise of the clips, for the pictures that the encoder is fitted on.
        encoder_fit: settings of ``data.probe_encoder.EncoderFit``, with which a fresh encoder meets shapes and colours
            before training; None leaves it as it is.
        stream: every other setting of ``VideoDataModule``, splits included.
    """

    def __init__(
        self,
        *,
        folders: Mapping[Path, Callable[[Path], None]],
        pictures: tuple[int, float],
        encoder_fit: Mapping[str, Any] | None,
        **stream: Any,
    ) -> None:
        self._folders, self._pictures = folders, pictures
        self._encoder_fit = EncoderFit(**encoder_fit) if encoder_fit is not None else None
        super().__init__(predict=stream["test"], **stream)

    def warm_start(self, model: CrossLMM) -> None:
        """Fit the encoder on labelled pictures of single things; done once, and kept in the cache's folder."""
        if self._encoder_fit is not None:
            cache_dir = next(iter(self._folders)).parent.parent
            fit_encoder_once(model.encoder, self._encoder_fit, *self._pictures, self.seed, cache_dir)

    def prepare_data(self) -> None:
        """Write the folders that are missing, each aside and renamed: racing processes see the whole or nothing."""
        for done, write in self._folders.items():
            if done.exists():
                continue
            done.parent.mkdir(parents=True, exist_ok=True)
            aside = done.with_name(f"{done.name}.{uuid.uuid4().hex}.partial")
            try:
                write(aside)
                aside.rename(done)
            except OSError:
                if not done.exists():  # otherwise another process was faster, and wrote the same
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
