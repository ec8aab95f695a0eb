"""Load or build a decoder-only LLM of transformers."""

from collections.abc import Mapping
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

_LAYOUTS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def load_llm(config: Mapping[str, Any], weights: str | None = None, attention: str = "sdpa") -> PreTrainedModel:
    """Build an LLM from its geometry, or load a pretrained one that has it.

    Args:
        config: geometry as in transformers' configuration, with ``model_type`` qwen2, qwen3 or llama. Beside `weights`
            it is a claim: an entry that the checkpoint contradicts is refused.
        weights: a local folder or hub name; None starts from random weights. On the meta device nothing is loaded or
            fetched; its geometry is read where a copy is at hand.
        attention: attention backend of transformers: ``sdpa``, ``eager``, ``flash_attention_2``.

    Returns:
        The causal model, in float32: what is trained keeps its master weights; the trainer's precision says what it
        computes in.

    Raises:
        UserError: an unknown layout or entry, a folder that is no checkpoint, or one that contradicts `config`.
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
        found = None if weights is None else _geometry(weights, on_meta)
        if weights is None or found is None:
            settings = config_class(**claimed)
            settings._attn_implementation = attention
            return model_class(settings)
        for key, value in config.items():
            if getattr(found, key, None) != value:
                raise UserError(
                    f"llm.model.config.{key} is {value}, but the checkpoint in llm.model.weights "
                    f"'{weights}' has {getattr(found, key, None)}"
                )
        if on_meta:
            found._attn_implementation = attention
            return model_class(found)
        return AutoModelForCausalLM.from_pretrained(weights, attn_implementation=attention, dtype=torch.float32)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"llm.model with weights '{weights}' and attention '{attention}' could not be built: {error}"
        ) from error


def _geometry(weights: str, on_meta: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(weights, local_files_only=on_meta)
    except OSError:
        if on_meta:
            return None
        raise
