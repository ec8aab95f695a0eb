"""LLaVA-OneVision checkpoints of transformers as a start: found, and held against the model that shall take them."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.pretrained_folder import CONFIG, INDEX, WEIGHTS, find_weights, read_config, read_json
from lightning_crosslmm.projector import MLPProjector

MODEL_TYPE = "llava_onevision"

_SETTING = "init_from"
_PREPROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
# entries that change nothing about a forward pass, and those that are compared in another way
_NEUTRAL = {"architectures", "dtype", "transformers_version", "use_cache", "initializer_factor", "initializer_range"}
_NEUTRAL |= {"bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "vision_use_head"}
_NEUTRAL |= {"num_hidden_layers", "layer_types", "image_size", "tie_word_embeddings", "model_type"}
_Difference = tuple[str, Any, Any]


@dataclass(frozen=True)
class OnevisionFolder:
    """A LLaVA-OneVision checkpoint whose settings have been read, and of whose weights none has.

    Args:
        path: a local folder; of a hub name, where its copy lies.
        config: transformers' configuration of the whole model.
        weights: the safetensors file, or the index of several.
    """

    path: Path
    config: Any
    weights: Path

    @classmethod
    def open(cls, name: str) -> "OnevisionFolder":
        """Open a local folder, or the hub's ``organisation/name``, which is fetched if no copy is at hand.

        Raises:
            UserError: it is none, not whole, pickled, wants to run code, or is of another architecture.
        """
        path = Path(name) if Path(name).exists() else _fetched(name)
        found = read_config(path, _SETTING).get("model_type")
        if found != MODEL_TYPE:
            raise UserError(
                f"{_SETTING}={name}: model_type is {found} in its {CONFIG}; right are {MODEL_TYPE} and run folders "
                "(an LLM or a vision tower alone goes to llm.model.weights or encoder.weights)"
            )
        weights = find_weights(path, _SETTING)
        try:
            return cls(path, AutoConfig.from_pretrained(path), weights)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{_SETTING}={name}: its {CONFIG} is damaged: {error}") from error

    def check(self, model: CrossLMM) -> None:
        """Refuse a model that would not compute what the checkpoint's own computes up to the pooler, and in the LLM.

        Args:
            model: may lie on the meta device; the scale of pixels is not compared then.

        Raises:
            UserError: another kind of tower or LLM, something that cannot be had here, or another geometry: both values
                of each setting, and the folder's as words for the command line.
        """
        self._check_kinds(model)
        self._check_support(model)
        wrong = [*self._of_encoder(model), *self._of_projector(model), *self._of_llm(model)]
        if wrong:
            here = ", ".join(f"{path}={_word(ours)}" for path, _, ours in wrong)
            words = " ".join(f"'++{path}={_word(theirs)}'" for path, theirs, _ in wrong)
            raise UserError(f"{_SETTING}={self.path}: was made with other settings than {here}; write {words}")

    def _check_kinds(self, model: CrossLMM) -> None:
        tower = getattr(getattr(model.encoder, "tower", None), "config", None)
        for setting, ours, theirs in (
            ("encoder", getattr(tower, "model_type", type(model.encoder).__name__), self.config.vision_config),
            ("llm", model.llm.config.model_type, self.config.text_config),
        ):
            if ours != theirs.model_type:
                raise UserError(
                    f"{_SETTING}={self.path}: its {setting} is a {theirs.model_type}, this model's a {ours}; choose "
                    "its parts with experiment=llava_onevision_7b or llava_onevision_0_5b"
                )

    def _check_support(self, model: CrossLMM) -> None:
        layer = self.config.vision_feature_layer
        for key, is_right, right in (
            ("projector_hidden_act", self.config.projector_hidden_act == "gelu", "gelu"),
            ("multimodal_projector_bias", self.config.multimodal_projector_bias, "true"),
            (
                "vision_feature_select_strategy",
                (self.config.vision_feature_select_strategy == "default") == model.encoder.has_class_token,
                "full, or default for a tower with a class token",
            ),
            ("vision_feature_layer", isinstance(layer, int) and layer != 0, "a single layer, counted from 1 or -1"),
        ):
            if not is_right:
                raise UserError(
                    f"{_SETTING}={self.path}: {key} is {getattr(self.config, key)} in its {CONFIG}; it must be {right}"
                )

    def _of_encoder(self, model: CrossLMM) -> Iterator[_Difference]:
        encoder, theirs = model.encoder, self.config.vision_config
        tower: Any = encoder.tower
        yield from _unlike("encoder.config", theirs, tower.config)
        if encoder.image_size != theirs.image_size:
            yield "encoder.image_size", theirs.image_size, encoder.image_size
        layer = self.config.vision_feature_layer
        layer = layer if layer < 0 else layer - 1  # 0 are the embeddings there
        if encoder.num_blocks != theirs.num_hidden_layers:
            yield "encoder.config.num_hidden_layers", theirs.num_hidden_layers, encoder.num_blocks
        elif encoder.read_block != layer % encoder.num_blocks:
            yield "encoder.layer", layer, encoder.read_block
        if not isinstance(encoder.final_norm, nn.Identity):
            yield "encoder.final_norm", False, True
        for name, ours_C11 in (("mean", encoder.mean_C11), ("std", encoder.std_C11)):
            found = self._pixels().get(f"image_{name}")
            ours = [] if ours_C11.is_meta else [round(each, 6) for each in ours_C11.flatten().tolist()]
            if found and ours and ours != [round(each, 6) for each in found]:
                yield f"encoder.{name}", found, ours

    def _pixels(self) -> dict[str, Sequence[float]]:
        """What the folder's preprocessor does to frames, where it has one."""
        path = next((self.path / name for name in _PREPROCESSORS if (self.path / name).is_file()), None)
        found = {} if path is None else read_json(path, _SETTING)
        return found.get("video_processor", found)

    def _of_projector(self, model: CrossLMM) -> Iterator[_Difference]:
        for side in filter(None, (model.source_projector, model.projector)):
            layers = [type(layer) for layer in side] if isinstance(side, MLPProjector) else []
            if layers != [nn.Linear, nn.GELU, nn.Linear]:
                has_norm = nn.LayerNorm in layers
                yield "projector.norm", False, has_norm
                yield "projector.depth", 2, layers.count(nn.Linear)
                return

    def _of_llm(self, model: CrossLMM) -> Iterator[_Difference]:
        theirs, ours = self.config.text_config, model.llm.config
        yield from _unlike("llm.model.config", theirs, ours)
        for key, found in (
            ("num_hidden_layers", theirs.num_hidden_layers),
            ("tie_word_embeddings", self.config.tie_word_embeddings),
        ):
            if getattr(ours, key) != found:
                yield f"llm.model.config.{key}", found, getattr(ours, key)


def _unlike(where: str, theirs: Any, ours: Any) -> Iterator[_Difference]:
    here = ours.to_dict()
    for key, value in theirs.to_dict().items():
        if key not in _NEUTRAL and not key.startswith("_") and here.get(key) != value:
            yield f"{where}.{key}", value, here.get(key)


def _word(value: Any) -> str:
    """Say a value as Hydra's command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_word, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _fetched(name: str) -> Path:
    """Find a hub name's files, from the hub or the local cache."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"{_SETTING}={name}: there is no such file or folder; give a checkpoint or a run folder")
    optional = {"_raise_exceptions_for_missing_entries": False}
    try:
        config: Any = cached_file(name, CONFIG)
        for extra in _PREPROCESSORS:
            cached_file(name, extra, **optional)
        index = cached_file(name, INDEX, **optional)
        files = {WEIGHTS} if index is None else set(read_json(Path(index), _SETTING)["weight_map"].values())
        for file in sorted(files):
            cached_file(name, file, **optional)  # what is not there is told with the folder
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{_SETTING}={name}: is no file or folder, and the hub does not give it: {reason}") from error
    return Path(config).parent
