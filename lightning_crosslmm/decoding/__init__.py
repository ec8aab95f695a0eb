"""Decoding: how the next token is chosen. `greedy` takes the likeliest, `sampling` draws."""

from lightning_crosslmm.decoding.autoregressive import Decoding, Greedy, Sampling, Streamer

__all__ = ["Decoding", "Greedy", "Sampling", "Streamer"]
