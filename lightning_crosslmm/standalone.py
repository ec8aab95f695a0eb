"""Settings that say all by themselves what a trained model is: no pretrained checkpoint and no file beside them."""

import copy
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import CrossLMM

_PASSING = ("_name_or_path", "architectures", "dtype", "transformers_version", "num_hidden_layers")
"""Where weights came from, how they were stored, and what an encoder cuts off."""


def leans_on_files(config: DictConfig) -> bool:
    """Tell whether settings name pretrained checkpoints, or files, that the model began with."""
    paths = ("llm.model.weights", "encoder.weights", "encoder.pretrained")
    return any(OmegaConf.select(config, path) for path in paths) or isinstance(
        OmegaConf.select(config, "pooler.thresholds"), str
    )


def standalone(config: DictConfig, model: CrossLMM) -> DictConfig:
    """Write into the settings of a run what its parts took from elsewhere.

    A pretrained checkpoint decides more than a config claims of it, the base of rotary positions for one. With all
    of it written down, a trained model is built anew from its own weights alone.

    Args:
        config: of a run, resolved.
        model: built from it, on any device, the meta device too.

    Returns:
        A copy that loads nothing pretrained.

    Raises:
        UserError: the geometry of the pretrained LLM is not at hand, or it runs code of its own.
    """
    if config.llm.model.get("trust_remote_code") and config.llm.model.weights:
        raise UserError(
            f"llm.model.trust_remote_code=true: the LLM is code that lies beside '{config.llm.model.weights}', and no "
            "settings hold it; only training and measuring run it"
        )
    config = copy.deepcopy(config)
    tower = getattr(getattr(model.encoder, "tower", None), "config", None)
    for path, found in (("llm.model", model.llm.config), ("encoder", tower)):
        node = OmegaConf.select(config, path)
        if not node.get("weights"):
            continue
        if path == "llm.model" and not getattr(found, "_name_or_path", ""):
            raise UserError(
                f"{path}.weights='{node.weights}': no copy of its config.json is at hand, which says what config.yaml "
                "does not; do it where the run was trained, or fetch that file first"
            )
        depth = model.encoder.num_blocks if path == "encoder" else model.llm.config.num_hidden_layers
        node.config = {**_beyond_defaults(found), "num_hidden_layers": depth, **node.config}
        node.weights = None
    if config.encoder.get("pretrained"):
        config.encoder.pretrained = False
    config.pooler.update(model.pooler.settled())
    return config


def _beyond_defaults(found: Any) -> dict[str, Any]:
    usual = type(found)().to_dict()
    return {key: value for key, value in found.to_dict().items() if key not in _PASSING and usual.get(key) != value}


def parts_of(config: DictConfig) -> dict[str, Any]:
    """Cut settings down to what a model is built from, as plain values.

    Args:
        config: as `standalone` gives it.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    llm = {"model": plain["llm"]["model"]}
    return {
        **{name: plain[name] for name in ("encoder", "pooler", "projector", "fusion")},
        "llm": llm,
        "virtual_unmerging": plain.get("virtual_unmerging", "none"),
    }


def config_of(parts: Any, where: str) -> DictConfig:
    """Take such settings back, of whomever they are; nothing in them is executed, not even an interpolation.

    Args:
        parts: what `parts_of` gave.
        where: what holds them, for the message.

    Raises:
        UserError: they are no settings of a model.
    """
    if not isinstance(parts, dict) or "${" in json.dumps(parts):
        raise UserError(f"{where}: 'parts' must be the resolved settings of a model, as crosslmm export writes them")
    config = OmegaConf.create(parts)
    if leans_on_files(config):
        raise UserError(f"{where}: 'parts' name files or checkpoints beside the folder; crosslmm export writes none")
    return config
