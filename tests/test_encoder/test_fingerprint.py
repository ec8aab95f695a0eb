import copy

import pytest
import torch
from torch import nn

from lightning_crosslmm.encoder import FeatureCache, TransformersEncoder, fingerprint
from lightning_crosslmm.encoder.fingerprint import Fingerprint, check_repeatable, digests_of
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.taps import Asks
from tests.tiny import tiny_encoder

CPU = torch.device("cpu")
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIGLIP |= {"num_attention_heads": 2, "patch_size": 8}


def encoder(**settings):
    torch.manual_seed(0)
    return tiny_encoder(**settings)


def name(encoder, asks=None, tolerance=0.0):
    return Fingerprint().of(encoder, asks or Asks(), CPU, tolerance)


def test_it_is_the_same_for_the_same_encoder_built_anew():
    assert name(encoder()) == name(encoder()) == name(copy.deepcopy(encoder()))


def test_settings_that_change_no_feature_do_not_matter():
    spared = encoder(frames_per_chunk=3, same_frame_tolerance=0, feature_cache=FeatureCache("folder", 10))
    assert name(spared) == name(encoder())


@pytest.mark.parametrize("settings", [{"layer": 1}, {"final_norm": False}, {"config": {"num_heads": 4}}])
def test_other_settings_make_another_name(settings):
    made = encoder(**settings)
    made.load_state_dict(encoder().state_dict(), strict=False)
    assert name(made) != name(encoder())


def test_settings_that_no_weight_shows_make_another_name():
    names = set()
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        names.add(name(TransformersEncoder(SIGLIP, 16, attention=attention)))
    assert len(names) == 2


def test_what_is_asked_and_how_it_computes_make_another_name():
    names = [name(encoder()), name(encoder(), Asks(keys=True)), name(encoder(), Asks(layers=(0,)))]
    names += [name(encoder(), tolerance=1.0), name(encoder().double())]
    with torch.autocast("cpu", torch.bfloat16):
        names.append(name(encoder()))
    assert len(set(names)) == len(names)


def changed_in_place(made):
    with torch.no_grad():
        made.tower.blocks[0].mlp.fc1.bias[0] += 1e-6


def loaded(made):
    torch.manual_seed(1)
    made.load_state_dict(tiny_encoder().state_dict())


def replaced(made):
    made.tower.blocks[0].mlp.fc1.bias = nn.Parameter(torch.ones_like(made.tower.blocks[0].mlp.fc1.bias))


def other_pixels(made):
    made.mean_C11 = made.mean_C11 + 0.1


@pytest.mark.parametrize("change", [changed_in_place, loaded, replaced, other_pixels])
def test_a_change_of_weights_is_seen_at_once(change):
    made, known = encoder(), Fingerprint()
    before = known.of(made, Asks(), CPU, 0.0)
    change(made)
    assert known.of(made, Asks(), CPU, 0.0) != before


def test_weights_are_read_once(monkeypatch):
    made, known, read = encoder(), Fingerprint(), []
    monkeypatch.setattr(fingerprint, "bytes_of", lambda tensor: read.append(tensor) or b"")
    for _ in range(3):
        known.of(made, Asks(), CPU, 0.0)
    assert len(read) == len(made.state_dict()) + 2  # and mean and std


def test_visuals_are_named_after_their_frames_alone():
    frames_FCHW = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, 3, 8, 8)[[0, 1, 2, 0, 1, 3]]
    first, second, third = digests_of(b"i" * 32, frames_FCHW, torch.tensor([0, 2, 3, 6]))
    assert (first,) == tuple(digests_of(b"i" * 32, frames_FCHW[3:5], torch.tensor([0, 2])))
    others = [*digests_of(b"j" * 32, frames_FCHW, torch.tensor([0, 2, 3, 6])), second, third]
    assert len({first, *others}) == 6 and len(first) == 32


def test_an_encoder_that_is_trained_is_refused():
    with pytest.raises(UserError, match=r"encoder.feature_cache.folder=kept .* optim.lr.encoder trains it"):
        check_repeatable(encoder(), "kept")
    check_repeatable(encoder().requires_grad_(False), "kept")


@pytest.mark.parametrize("rate", ["drop_path_rate", "proj_drop_rate", "patch_drop_rate", "attn_drop_rate"])
def test_an_encoder_that_drops_at_random_is_refused(rate):
    with pytest.raises(UserError, match=r"encoder.feature_cache.folder=kept .* TimmEncoder drops at random in tower"):
        check_repeatable(encoder(config={rate: 0.1}).requires_grad_(False), "kept")


def test_attention_of_transformers_drops_too():
    made = TransformersEncoder({**SIGLIP, "attention_dropout": 0.1}, 16).requires_grad_(False)
    with pytest.raises(UserError, match=r"TransformersEncoder drops at random in tower"):
        check_repeatable(made, "kept")
