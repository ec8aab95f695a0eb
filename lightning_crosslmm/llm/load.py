"""Load or build a decoder-only LLM of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pretrained_folder import check_loaded, find_weights, read_config

_LAYOUTS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def load_llm(
    config: Mapping[str, Any], weights: str | None = None, attention: str = "sdpa", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build an LLM from its geometry, or load a pretrained one that has it.

    Args:
        config: geometry as in transformers' configuration, with ``model_type`` qwen2, qwen3 or llama. Beside `weights`
            it is a claim: an entry that the checkpoint contradicts is refused.
        weights: a local folder or hub name; None starts from random weights. On the meta device nothing is loaded or
            fetched; its geometry is read where a copy is at hand.
        attention: attention backend of transformers: ``sdpa``, ``eager``, ``flash_attention_2``.
        trust_remote_code: let `weights` bring a class of its own, with the layout of its ``model_type``, and run it.

    Returns:
        The causal model, in float32: what is trained keeps its master weights; the trainer's precision says what it
        computes in.

    Raises:
        UserError: an unknown layout or entry; a folder that is no checkpoint, is not whole, holds pickles or code that
            is not trusted, or contradicts `config`.
    """
    kind = config.get("model_type", "")
    if kind not in _LAYOUTS:
        raise UserError(
            f"llm.model.config.model_type is '{kind}'; right are {', '.join(_LAYOUTS)}{nearest(str(kind), _LAYOUTS)}"
        )
    config_class, model_class = _LAYOUTS[kind]
    claimed = {key: value for key, value in config.items() if key != "model_type"}
    known = config_class().to_dict()
    for key in claimed:
        if key not in known:
            raise UserError(f"llm.model.config has no entry '{key}'{nearest(key, known)}")
    on_meta = torch.get_default_device().type == "meta"
    try:
        found = None if weights is None else _geometry(weights, on_meta, trust_remote_code)
        if weights is None or found is None:
            settings = config_class(**claimed)
            settings._attn_implementation = attention
            return model_class(settings)
        claim = config_class(**claimed)  # spells entries out as a checkpoint's are
        for key in config:
            if getattr(found, key, None) != getattr(claim, key):
                raise UserError(
                    f"llm.model.config.{key} is {getattr(claim, key)}, but the checkpoint in llm.model.weights "
                    f"'{weights}' has {getattr(found, key, None)}"
                )
        if on_meta:
            found._attn_implementation = attention
            return model_class(found)
        return _load(weights, attention, trust_remote_code)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"llm.model with weights '{weights}' and attention '{attention}' could not be built: {error}"
        ) from error


def _geometry(weights: str, on_meta: bool, trust_remote_code: bool) -> Any:
    if Path(weights).is_dir() and not on_meta:
        read_config(Path(weights), "llm.model.weights", trust_remote_code)
        find_weights(Path(weights), "llm.model.weights")
    try:
        return AutoConfig.from_pretrained(
            weights, local_files_only=on_meta, trust_remote_code=trust_remote_code and not on_meta
        )
    except OSError:
        if on_meta:
            return None
        raise


def _load(weights: str, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        weights,
        attn_implementation=attention,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # they are told below, by name
        output_loading_info=True,
    )
    model, info = loaded  # a pair, as asked for
    check_loaded(info, "llm.model.weights", weights)
    return model
