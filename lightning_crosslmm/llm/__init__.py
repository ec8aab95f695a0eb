"""LLMs: decoder-only models of transformers with the Qwen2, Qwen3 or Llama layout, unforked."""

from lightning_crosslmm.llm.layers import host_layer, insert_block
from lightning_crosslmm.llm.load import load_llm

__all__ = ["host_layer", "insert_block", "load_llm"]
