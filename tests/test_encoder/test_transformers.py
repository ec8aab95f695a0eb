import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lightning_crosslmm.encoder import TransformersEncoder
from lightning_crosslmm.errors import UserError

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
}
STOCK = {
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
}
FRAMES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stock_tower(kind):
    config_class, tower_class = STOCK[kind]
    torch.manual_seed(0)
    tower = tower_class(config_class(**SHAPE, image_size=16)).eval()
    with torch.no_grad():  # norms start as the identity, where leaving one out would not show
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


@pytest.fixture(scope="module", params=list(STOCK))
def saved(request, tmp_path_factory):
    """A stock tower and the folder transformers saved it in."""
    folder = tmp_path_factory.mktemp(request.param)
    tower = stock_tower(request.param)
    tower.save_pretrained(folder)
    return request.param, tower, str(folder)


def loaded(kind, folder, **settings):
    return TransformersEncoder({"model_type": kind, **SHAPE}, 16, weights=folder, **settings).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("final_norm", [False, True])
def test_patches_are_the_towers_own_hidden_states(saved, layer, final_norm, attention):
    kind, tower, folder = saved
    encoder = loaded(kind, folder, layer=layer, final_norm=final_norm, attention=attention)
    tower.set_attn_implementation(attention)
    with torch.no_grad():
        states = tower(encoder.normalise(FRAMES), output_hidden_states=True).hidden_states[layer]
        expected_FNE = states[:, 1:] if kind == "clip_vision_model" else states
        if final_norm:
            expected_FNE = getattr(tower, "vision_model", tower).post_layernorm(expected_FNE)
        patches_FNE = encoder(FRAMES)
    assert patches_FNE.shape == (3, 16, 16) and encoder.grid == (4, 4) and encoder.width == 16
    assert torch.equal(patches_FNE, expected_FNE)


def test_the_first_layer_counts_from_zero(saved):
    kind, _, folder = saved
    assert torch.equal(loaded(kind, folder, layer=1)(FRAMES), loaded(kind, folder, layer=-2)(FRAMES))


def test_a_frame_does_not_depend_on_its_chunk(saved):
    kind, _, folder = saved
    encoder = loaded(kind, folder)
    alone_FNE = torch.cat([encoder(frame_CHW[None]) for frame_CHW in FRAMES])
    torch.testing.assert_close(encoder(FRAMES), alone_FNE, rtol=0, atol=2e-6)


def test_every_weight_left_is_used(saved):
    kind, _, folder = saved
    encoder = loaded(kind, folder).train()
    encoder(FRAMES).square().mean().backward()
    idle = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    # CLIP's and SigLIP's last norm is not asked for at layer -2 and is no parameter any more
    assert idle == []


def test_weights_come_from_the_folder_of_a_whole_siglip(tmp_path):
    torch.manual_seed(0)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    whole = SiglipModel(SiglipConfig(text_config=text, vision_config={**SHAPE, "image_size": 16})).eval()
    whole.save_pretrained(tmp_path)
    encoder = loaded("siglip_vision_model", str(tmp_path), layer=-1)
    with torch.no_grad():
        states = whole.vision_model(encoder.normalise(FRAMES), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(encoder(FRAMES), states)


def test_a_checkpoint_that_contradicts_the_configuration_is_refused(saved):
    kind, _, folder = saved
    with pytest.raises(UserError, match="encoder.config.num_attention_heads is 4, but the checkpoint .* has 2"):
        TransformersEncoder({"model_type": kind, **SHAPE, "num_attention_heads": 4}, 16, weights=folder)
    with pytest.raises(UserError, match="encoder.config.image_size is 32, but the checkpoint .* has 16"):
        TransformersEncoder({"model_type": kind, **SHAPE}, 32, weights=folder)


def test_a_checkpoint_of_another_tower_is_refused(saved):
    kind, _, folder = saved
    other = next(name for name in STOCK if name != kind)
    with pytest.raises(UserError, match=f"encoder.config.model_type is {other}, but the checkpoint .* has {kind}"):
        loaded(other, folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=f"encoder.weights={tmp_path}: (has no config.json|model.safetensors is damaged)"
    ):
        loaded("siglip_vision_model", str(tmp_path))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    stock_tower("clip_vision_model").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(
        UserError, match=f"encoder.weights={tmp_path}: (has no config.json|model.safetensors is damaged)"
    ):
        loaded("clip_vision_model", str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "siglip_vision"},
            "encoder.config.model_type is 'siglip_vision'; .* did you mean 'siglip_vision_model'",
        ),
        ({}, "encoder.config.model_type is ''"),
        ({"model_type": "clip_vision_model", "hiden_size": 16}, "no entry 'hiden_size'; did you mean 'hidden_size'"),
    ],
)
def test_misspelt_configurations_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        TransformersEncoder(config, 16)


def test_checkpointing_recomputes_the_layers(saved):
    kind, _, folder = saved
    encoder = loaded(kind, folder).train()
    encoder.gradient_checkpointing_enable()
    calls = []
    body = getattr(encoder.tower, "vision_model", encoder.tower)
    body.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    encoder(FRAMES).square().mean().backward()
    assert len(calls) == 2


def test_on_the_meta_device_the_geometry_is_the_checkpoints(saved):
    kind, tower, folder = saved
    with torch.device("meta"):
        encoder = TransformersEncoder({"model_type": kind}, 16, weights=folder)
    assert encoder.width == tower.config.hidden_size and len(encoder.blocks) == 2
    assert {weight.device.type for weight in encoder.parameters()} == {"meta"}
