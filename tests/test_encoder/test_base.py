import pytest
import torch

from lightning_crosslmm.encoder.base import block_number
from lightning_crosslmm.errors import UserError
from tests.tiny import tiny_encoder


def noise(num_frames=3, size=16):
    return torch.randint(0, 256, (num_frames, 3, size, size), dtype=torch.uint8)


def test_pixels_are_brought_to_the_towers_scale():
    encoder = tiny_encoder().double()
    frames_FCHW = noise()
    scaled_FCHW = (frames_FCHW.double() / 255 - encoder.mean_C11.double()) / encoder.std_C11.double()
    torch.testing.assert_close(encoder.normalise(frames_FCHW), scaled_FCHW, rtol=0, atol=1e-6)


def test_pixels_take_the_towers_dtype():
    assert tiny_encoder().bfloat16().normalise(noise()).dtype == torch.bfloat16


def test_frames_of_another_size_are_refused():
    with pytest.raises(UserError, match="expects frames of 16x16 pixels, got 20x20; set data.image_size"):
        tiny_encoder()(noise(size=20))


def test_an_empty_chunk_is_refused():
    with pytest.raises(UserError, match="encoder.frames_per_chunk is 0"):
        tiny_encoder(frames_per_chunk=0)


def test_the_scale_is_no_weight():
    assert not any("mean" in name or "std" in name for name in tiny_encoder().state_dict())


@pytest.mark.parametrize(("layer", "block"), [(0, 0), (-1, 2), (-3, 0), (2, 2)])
def test_layers_count_from_either_end(layer, block):
    assert block_number(layer, 3) == block


@pytest.mark.parametrize("layer", [3, -4])
def test_a_block_past_the_end_is_refused(layer):
    with pytest.raises(UserError, match=rf"encoder.layer is {layer}; this tower has blocks 0 to 2 \(or -3 to -1\)"):
        block_number(layer, 3)
