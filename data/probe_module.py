"""The data module of the probe task: what ``conf/data/probe.yaml`` builds."""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.module import VideoDataModule
from data.probe import write_probe
from data.probe_encoder import EncoderFit, fit_encoder
from lightning_crosslmm.model import CrossLMM

log = logging.getLogger(__name__)


class ProbeDataModule(VideoDataModule):
    """The synthetic probe task: renders and writes its shards on first use, then streams them like any others.

    Args:
        cache_dir: folders named after the hash of settings and renderer lie here, one split in each.
        probe: settings of ``data.probe.write_probe``, the same for each split.
        encoder_fit: settings of ``data.probe_encoder.EncoderFit``, with which a fresh encoder meets the probe's shapes
            and colours before training; None leaves it as it is.
        stream: every other setting of ``VideoDataModule``; ``predict`` answers the test split.
    """

    def __init__(
        self,
        *,
        cache_dir: str | Path,
        probe: Mapping[str, Any],
        encoder_fit: Mapping[str, Any] | None = None,
        **stream: Any,
    ) -> None:
        settings = json.dumps(dict(probe), sort_keys=True)
        self._probe = dict(probe)
        self._encoder_fit = EncoderFit(**encoder_fit) if encoder_fit is not None else None
        # the renderer's own code is part of the name: clips of an older one are not taken for its
        drawn_by = b"".join((Path(__file__).parent / name).read_bytes() for name in ("probe.py", "probe_scene.py"))
        self._folder = Path(cache_dir) / f"probe-{hashlib.sha256(settings.encode() + drawn_by).hexdigest()[:16]}"
        splits = {split: self._folder / split for split in ("train", "val", "test")}
        super().__init__(**splits, predict=self._folder / "test", **stream)

    def warm_start(self, model: CrossLMM) -> None:
        """Fit the encoder on labelled pictures of single things."""
        if self._encoder_fit is not None:
            right = fit_encoder(
                model.encoder, self._encoder_fit, self._probe["image_size"], self._probe["noise"], self.seed
            )
            log.info("encoder fitted: names shape, colour and place of %.1f %% of single things", 100 * right)

    def prepare_data(self) -> None:
        """Write the splits that are missing, each aside and renamed: racing processes see the whole or nothing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val", "test"):
            done = self._folder / split
            if done.exists():
                continue
            aside = self._folder / f"{split}.{uuid.uuid4().hex}.partial"
            try:
                write_probe(aside, split, **self._probe)
                aside.rename(done)
            except OSError:
                if not done.exists():  # otherwise another process was faster, and wrote the same
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
