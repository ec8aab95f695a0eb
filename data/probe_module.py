"""The data module of the probe task: what ``conf/data/probe.yaml`` builds."""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.probe import write_probe
from data.rendered import RenderedDataModule


class ProbeDataModule(RenderedDataModule):
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
        # the renderer's own code is part of the name: clips of an older one are not taken for its
        drawn_by = b"".join((Path(__file__).parent / name).read_bytes() for name in ("probe.py", "probe_scene.py"))
        folder = Path(cache_dir) / f"probe-{hashlib.sha256(settings.encode() + drawn_by).hexdigest()[:16]}"
        splits = {split: folder / split for split in ("train", "val", "test")}
        super().__init__(
            folders={path: partial(write_probe, split=split, **probe) for split, path in splits.items()},
            pictures=(probe["image_size"], probe["noise"]),
            encoder_fit=encoder_fit,
            **splits,
            **stream,
        )
