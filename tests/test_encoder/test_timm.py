import os

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from lightning_crosslmm.encoder import TimmEncoder
from lightning_crosslmm.errors import UserError
from tests.tiny import VIT_SHAPE, tiny_encoder

FRAMES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WITH_CLASS = {"class_token": True, "reg_tokens": 2, "global_pool": "token"}


def block_outputs(shape, pixels_FCHW):
    """Run timm's own model, never pruned, and note what each block gives."""
    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **VIT_SHAPE, **shape).eval()
    found = []
    for block in tower.blocks:
        block.register_forward_hook(lambda _, __, out: found.append(out))
    tower.forward_features(pixels_FCHW)
    return [out[:, tower.num_prefix_tokens :] for out in found], tower.norm


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("shape", [{"global_pool": ""}, WITH_CLASS], ids=["patches", "class and registers"])
def test_patches_are_the_towers_own(layer, final_norm, shape, monkeypatch):
    shape = {**shape, "class_token": shape.get("class_token", False)}
    monkeypatch.delitem(VIT_SHAPE, "class_token")
    torch.manual_seed(0)
    encoder = TimmEncoder(
        "vit_tiny_patch16_224", 16, layer=layer, final_norm=final_norm, config={**VIT_SHAPE, **shape}
    ).eval()
    outputs, norm = block_outputs(shape, encoder.normalise(FRAMES))
    expected_FNE = norm(outputs[layer]) if final_norm else outputs[layer]
    assert torch.equal(encoder(FRAMES), expected_FNE)
    assert (encoder.width, encoder.grid) == (16, (4, 4))


def test_blocks_past_the_layer_are_gone():
    assert len(tiny_encoder(layer=-2).tower.blocks) == 2
    assert isinstance(tiny_encoder(final_norm=False).tower.norm, torch.nn.Identity)


def test_a_frame_does_not_depend_on_its_chunk():
    encoder = tiny_encoder().eval()
    alone_FNE = torch.cat([encoder(frame_CHW[None]) for frame_CHW in FRAMES])
    torch.testing.assert_close(encoder(FRAMES), alone_FNE, rtol=0, atol=2e-6)


@pytest.mark.parametrize("image_size", [16, 32])
def test_convolutional_stem(image_size):
    config = {**VIT_SHAPE, "global_pool": ""}
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size, stem="conv", config=config).eval()
    frames_FCHW = torch.nn.functional.interpolate(FRAMES, image_size)
    patches_FNE = encoder(frames_FCHW)
    assert encoder.grid == (image_size // 4,) * 2 and patches_FNE.shape == (3, (image_size // 4) ** 2, 16)
    assert sum(isinstance(part, torch.nn.Conv2d) for part in encoder.modules()) == 3
    torch.testing.assert_close(patches_FNE[:1], encoder(frames_FCHW[:1]), rtol=0, atol=2e-6)


def test_a_stems_raster_is_the_pictures():
    stem = TimmEncoder(
        "vit_tiny_patch16_224", 16, stem="conv", config=VIT_SHAPE | {"global_pool": ""}
    ).tower.patch_embed
    dark_11HW = torch.zeros(1, 3, 16, 16)
    lit = dark_11HW.clone()
    lit[..., 5, 14] = 9.0  # inside patch row 1, column 3
    moved_N = (stem(lit) - stem(dark_11HW)).abs().sum(-1)[0]
    assert int(moved_N.argmax()) == 1 * 4 + 3


@pytest.mark.parametrize(("patch_size", "image_size"), [(6, 24), (2, 16), (8, 20)])
def test_a_stem_that_cannot_reach_the_patch_is_refused(patch_size, image_size):
    with pytest.raises(
        UserError, match=f"patch_size {patch_size} and encoder.image_size {image_size}: .* 4, 8, 16 or 32"
    ):
        config = {**VIT_SHAPE, "global_pool": "", "patch_size": patch_size}
        TimmEncoder("vit_tiny_patch16_224", image_size, stem="conv", config=config)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "vit_tiny_patch16_244",
            {},
            "vit_tiny_patch16_244', which timm does not know; did you mean 'vit_tiny_patch16_224'",
        ),
        ("resnet18", {}, "resnet18"),
        ("vit_tiny_patch16_224", {"config": {"embed_dimm": 16}}, "could not build .*embed_dimm"),
        (
            "vit_tiny_patch16_224",
            {"stem": "convv"},
            "encoder.stem is 'convv'; right are patch, conv; did you mean 'conv'",
        ),
        ("vit_tiny_patch16_224", {"config": VIT_SHAPE | {"global_pool": ""}, "layer": 3}, "encoder.layer is 3"),
    ],
)
def test_what_cannot_be_built_is_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        TimmEncoder(name, 16, **settings)


def test_checkpointing_gives_the_same_gradients():
    def gradients(checkpointed):
        torch.manual_seed(0)
        encoder = tiny_encoder()
        if checkpointed:
            encoder.gradient_checkpointing_enable()
        calls = []
        encoder.tower.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
        encoder(FRAMES).square().mean().backward()
        return len(calls), [parameter.grad for parameter in encoder.parameters()]

    (once, plain), (twice, recomputed) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("damage", ["another shape", "the file is missing"])
def test_weights_of_timm_that_do_not_fit_are_refused(damage, tmp_path):
    file, name = tmp_path / "weights.pt", "blocks.1.mlp.fc1.weight"
    if damage == "another shape":
        torch.save({**tiny_encoder().tower.state_dict(), name: torch.zeros(3, 5)}, file)
    with pytest.raises(UserError, match=f"(?s)timm could not build encoder.name .*({name}|weights.pt)"):
        tiny_encoder(pretrained=True, config={"pretrained_cfg_overlay": {"file": str(file)}})


def save_folder(folder):
    encoder = tiny_encoder()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    save_for_hf(encoder.tower, folder, model_config={"architecture": "vit_tiny_patch16_224"}, safe_serialization=True)
    return encoder


def test_a_local_folder_of_timm_is_loaded(tmp_path):
    saved = save_folder(tmp_path)
    loaded = tiny_encoder(pretrained=str(tmp_path))
    assert torch.equal(loaded(FRAMES), saved(FRAMES))
    with torch.device("meta"):
        tiny_encoder(pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
        (lambda path: (path / "model.safetensors").rename(path / "model.bin"), "has pickled weights"),
        (lambda path: os.truncate(path / "model.safetensors", 2000), "cut short|damaged"),
        (
            lambda path: (path / "config.json").write_text('{"architecture": "vit_x"}'),
            "holds a vit_x",
        ),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (
            lambda path: save_file({"norm.bias": torch.zeros(16)}, path / "model.safetensors"),
            r"lacks \d+ weights, such as blocks.0.attn",
        ),
    ],
)
def test_a_local_folder_that_does_not_fit_is_refused(damage, message, tmp_path):
    save_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        tiny_encoder(pretrained=str(tmp_path))
