"""The configuration of an exported model: the settings of its parts, and the ids of the marks in a text."""

import importlib
from typing import Any

from transformers import AutoConfig, PretrainedConfig


class CrossLMMConfig(PretrainedConfig):
    """What ``config.json`` of an exported folder holds.

    Args:
        parts: the groups ``encoder``, ``pooler``, ``projector``, ``fusion``, ``llm`` of a run's settings, resolved and
            standing for themselves (see `standalone`), and ``virtual_unmerging``.
        image_token_id: stands in a text where an image is read.
        video_token_id: stands in a text where a video is read.
        **settings: those of every configuration of transformers.
    """

    model_type = "crosslmm"

    def __init__(
        self,
        parts: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        **settings: Any,
    ) -> None:
        self.parts = parts
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        super().__init__(**settings)
        importlib.import_module("lightning_crosslmm.hf.modeling")  # it registers itself; not before someone needs it


AutoConfig.register(CrossLMMConfig.model_type, CrossLMMConfig)
