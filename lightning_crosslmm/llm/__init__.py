"""LLMs: decoder-only models of transformers with the Qwen2, Qwen3 or Llama layout, unforked."""

from lightning_crosslmm.llm.layers import host_layer, insert_block
from lightning_crosslmm.llm.load import load_llm
from lightning_crosslmm.llm.lora import Lora, is_adapter, merged_shapes, plain_name, read_merged

__all__ = [
    "Lora",
    "host_layer",
    "insert_block",
    "is_adapter",
    "load_llm",
    "merged_shapes",
    "plain_name",
    "read_merged",
]
