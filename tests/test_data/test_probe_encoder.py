"""The encoder's first look at pictures is kept, and taken again by whoever would do just the same."""

import logging
from pathlib import Path

import pytest
import torch

from data.probe_encoder import EncoderFit, fit_encoder, fit_encoder_once
from lightning_crosslmm.encoder import TimmEncoder
from tests.tiny import tiny_encoder

FIT = EncoderFit(steps=2, batch_size=2, lr=1e-2)


def fitted(folder: Path, *, fit: EncoderFit = FIT, noise: float = 0.1, seed: int = 0, **settings: int) -> TimmEncoder:
    torch.manual_seed(settings.pop("weights", 0))
    encoder = tiny_encoder(**settings)
    fit_encoder_once(encoder, fit, 16, noise, seed, folder)
    return encoder


def test_the_same_fit_is_done_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, again = fitted(tmp_path), fitted(tmp_path)
    torch.manual_seed(0)
    plain = tiny_encoder()
    fit_encoder(plain, FIT, 16, 0.1, 0)
    for other in (again, plain):
        torch.testing.assert_close(first.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 1
    assert [message.split(":")[0].split(" from ")[0] for message in caplog.messages] == [
        "encoder fitted",
        "encoder taken",
    ]


def test_another_fit_is_another_file(tmp_path: Path) -> None:
    for settings in (
        {},
        {"fit": EncoderFit(steps=3, batch_size=2, lr=1e-2)},
        {"noise": 0.2},
        {"seed": 1},
        {"weights": 1},
        {"layer": -2},
    ):
        fitted(tmp_path, **settings)
    assert len(list(tmp_path.iterdir())) == 6
