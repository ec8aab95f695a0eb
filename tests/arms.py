"""The arms of fusion, and one batch of everything, for tests of the assembled model."""

import pytest
import torch

from lightning_crosslmm.decoding import Greedy
from tests.tiny import tiny_batch

NEVER = 9999  # no token of the vocabulary: nothing stops
CLOSE = {"rtol": 0, "atol": 2e-5}  # logits of order 1 to 10 in single precision, summed in another order
SAMPLES = (
    ["look", 3, "and", 1, "what?", "=cat", "and?", 2, "=dog"],
    ["nothing to see, but long", "=ok"],
    [2, "?", "=z"],
)
BATCH = tiny_batch(*SAMPLES)
ARMS = {
    "crosslmm": {},
    "before the layer": {"placement": "before_layer"},
    "frame by frame": {"scope": "frame"},
    "window": {"scope": "window", "window_frames": 1},
    "encoder's tokens": {"key_source": "encoder"},
    "shared keys": {"share_kv": True},
    "keys of all layers": {"layers_per_kv": "all"},
    "latent": {"kv_latent": 8},
    "latent of all layers, shared keys": {"layers_per_kv": 2, "kv_latent": 8, "share_kv": True},
    "recompute": {"t2v_cache": "recompute"},
    "recompute from the encoder's, latent": {"t2v_cache": "recompute", "key_source": "encoder", "kv_latent": 8},
    "time": {"frame_time": "sinusoidal"},
    "channels": {"gate": "channel"},
    "no gate, host's weights": {"gate": "none", "weights": "host"},
    "v2v": {"t2v": False},
    "t2v": {"v2v": False},
    "t2v with time": {"v2v": False, "frame_time": "sinusoidal"},
    "none": {"v2v": False, "t2v": False},
    "none with time": {"v2v": False, "t2v": False, "frame_time": "sinusoidal"},
    "encoder's tokens with time": {"key_source": "encoder", "frame_time": "sinusoidal"},
}
arms = pytest.mark.parametrize("arm", list(ARMS))


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits_YW


def generated(model, batch, count=12, stop_id=NEVER):
    """Generate, and note the logits of each step."""
    steps = []
    hook = model.llm.lm_head.register_forward_hook(lambda _, __, out: steps.append(out[:, -1]))
    rows = model.generate(batch, Greedy(count), stop_id=stop_id, pad_id=0)
    hook.remove()
    return rows, torch.stack(steps, dim=1)
