"""What towers give besides patches, against attention written out in full."""

import math

import pytest
import timm
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from lightning_crosslmm.encoder import TimmEncoder, TransformersEncoder, saliency
from lightning_crosslmm.encoder.base import asked_block
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.taps import Asks, Taps
from tests.tiny import VIT_SHAPE

FRAMES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
STOCK = {"siglip": (SiglipVisionConfig, SiglipVisionModel), "clip": (CLIPVisionConfig, CLIPVisionModel)}
TIMM = {
    "patches": {"global_pool": ""},
    "class": {"class_token": True, "reg_tokens": 2, "global_pool": "token", "qk_norm": True},
    "map": {"global_pool": "map"},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def shaken(tower):
    """Norms start as the identity, where leaving one out would not show; small weights make flat attention."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return tower.eval()


class Stock:
    """The full tower of a library with its weights, and an encoder with the same."""

    def __init__(self, kind, tmp_path, layer=-2, final_norm=False, attention="sdpa"):
        self.kind, self.layer = kind, layer
        torch.manual_seed(0)
        if kind in STOCK:
            config, tower = STOCK[kind]
            self.tower = shaken(tower(config(**SHAPE, image_size=16)))
            self.tower.save_pretrained(tmp_path)
            self.tower.set_attn_implementation("eager")
            self.encoder = TransformersEncoder(
                {"model_type": f"{kind}_vision_model", **SHAPE},
                16,
                weights=str(tmp_path),
                layer=layer,
                final_norm=final_norm,
                attention=attention,
            )
            self.body = getattr(self.tower, "vision_model", self.tower)
            self.prefix = int(kind == "clip")
            return
        shape = {**VIT_SHAPE, **TIMM[kind]}
        make = {"num_classes": 0, "img_size": 16}
        self.tower = shaken(timm.create_model("vit_tiny_patch16_224", **make, **shape))
        # the encoder reads the weights when it is built, so they come to it as a checkpoint does
        weights, build = self.tower.state_dict(), timm.create_model

        def loaded(*names, **settings):
            tower = build(*names, **settings)
            tower.load_state_dict(weights)
            return tower

        timm.create_model = loaded
        try:
            self.encoder = TimmEncoder("vit_tiny_patch16_224", 16, layer=layer, final_norm=final_norm, config=shape)
        finally:
            timm.create_model = build
        self.prefix = self.tower.num_prefix_tokens

    def states(self):
        """Outputs of all blocks, prefix included."""
        pixels = self.encoder.normalise(FRAMES)
        with torch.no_grad():
            if self.kind in STOCK:
                return list(self.tower(pixels, output_hidden_states=True).hidden_states[1:])
            found = []
            handles = [b.register_forward_hook(lambda _, __, out: found.append(out)) for b in self.tower.blocks]
            self.tower.forward_features(pixels)
            [handle.remove() for handle in handles]
            return found

    def attention(self):
        """(F, H, n, n) weights of the block that is read, and its keys (F, H, n, K), from the block's own input."""
        pixels = self.encoder.normalise(FRAMES)
        with torch.no_grad():
            if self.kind in STOCK:
                weights = self.tower(pixels, output_attentions=True).attentions[self.layer]
                layer = self.body.encoder.layers[self.layer]
                given_FnE = layer.layer_norm1(self.states()[self.layer - 1])
                return weights, layer.self_attn.k_proj(given_FnE).unflatten(-1, (2, -1)).transpose(1, 2)
            block = self.tower.blocks[self.layer]
            qkv = block.attn.qkv(block.norm1(self.states()[self.layer - 1]))
            query, key, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            query, key = block.attn.q_norm(query), block.attn.k_norm(key)
            return (query @ key.transpose(-1, -2) / math.sqrt(8)).softmax(-1), key

    def probed(self):
        """Weights of the attention-pooling head for the tokens of the block that is read, after the last norm."""
        tokens_FnE = self.states()[self.layer][:, self.prefix :]
        with torch.no_grad():
            if self.kind in STOCK:
                tokens_FnE, head = self.body.post_layernorm(tokens_FnE), self.body.head
                return head.attention(head.probe.expand(3, -1, -1), tokens_FnE, tokens_FnE)[1][:, 0]
            tokens_FnE, head = self.tower.norm(tokens_FnE), self.tower.attn_pool
            key_FHNK = head.kv(tokens_FnE).unflatten(-1, (2, head.num_heads, -1)).permute(2, 0, 3, 1, 4)[0]
            query_H1K = head.q(head.latent).view(head.num_heads, 1, -1)
            return (query_H1K @ key_FHNK.transpose(-1, -2) * head.scale).softmax(-1)[:, :, 0].mean(1)

    def taps(self, **asks):
        asks = Asks(**asks)
        self.encoder.prepare(asks)
        taps = Taps(asks)
        return self.encoder.eval()(FRAMES, taps=taps), taps


every_tower = pytest.mark.parametrize("kind", [*STOCK, *TIMM])


@every_tower
@pytest.mark.parametrize(("layer", "final_norm"), [(-2, False), (-1, True)])
def test_taps_are_those_of_plain_attention(kind, layer, final_norm, tmp_path):
    stock = Stock(kind, tmp_path, layer, final_norm)
    weights_FHnn, keys_FHnK = stock.attention()
    plain = stock.encoder.eval()(FRAMES)
    patches, taps = stock.taps(saliency="received", keys=True, layers=(-3, 1.0, 0))
    assert torch.equal(patches, plain)  # asking changes nothing
    prefix = stock.prefix
    expected_FN = weights_FHnn[:, :, prefix:, prefix:].mean(dim=(1, 2))
    torch.testing.assert_close(taps.saliency_FN, expected_FN, **CLOSE)
    torch.testing.assert_close(taps.keys_FNK, keys_FHnK[:, :, prefix:].mean(1), rtol=1e-5, atol=1e-6)
    states = [state[:, prefix:] for state in stock.states()]
    expected_FNAE = torch.stack([states[-3], states[layer], states[0]], dim=2)
    torch.testing.assert_close(taps.layers_FNAE, expected_FNAE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "class"])
def test_attention_of_the_class_token(kind, tmp_path):
    stock = Stock(kind, tmp_path)
    _, taps = stock.taps(saliency="class_token")
    torch.testing.assert_close(taps.saliency_FN, stock.attention()[0][:, :, 0, stock.prefix :].mean(1), **CLOSE)
    assert taps.keys_FNK is None and taps.layers_FNAE is None and taps.saliency_FN.dtype == torch.float32


@pytest.mark.parametrize("kind", ["siglip", "map"])
@pytest.mark.parametrize(("layer", "final_norm"), [(-2, False), (-1, True)])
def test_attention_of_the_pooling_heads_probe(kind, layer, final_norm, tmp_path):
    stock = Stock(kind, tmp_path, layer, final_norm)
    _, taps = stock.taps(saliency="probe")
    torch.testing.assert_close(taps.saliency_FN, stock.probed(), **CLOSE)
    torch.testing.assert_close(taps.saliency_FN.sum(1), torch.ones(3))


def test_the_probe_stays_only_when_asked_for(tmp_path):
    stock = Stock("siglip", tmp_path)
    stock.encoder.prepare(Asks(saliency="received"))
    assert not any("head" in name or "probe" in name for name in stock.encoder.state_dict())
    stock = Stock("siglip", tmp_path)
    stock.encoder.prepare(Asks(saliency="probe"))
    assert "probe_HE" in stock.encoder.state_dict()
    assert not any("head" in name for name, _ in stock.encoder.named_parameters())


def test_towers_say_what_they_have(tmp_path):
    gives = {kind: Stock(kind, tmp_path / kind).encoder.gives for kind in (*STOCK, *TIMM)}
    assert all({"grid", "layers", "keys", "saliency.received"} <= words for words in gives.values())
    assert {kind for kind, words in gives.items() if "saliency.class_token" in words} == {"clip", "class"}
    assert {kind for kind, words in gives.items() if "saliency.probe" in words} == {"siglip", "map"}


def test_rotary_attention_gives_no_queries_and_keys():
    encoder = TimmEncoder(
        "eva02_tiny_patch14_224", 16, config={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    )
    assert encoder.gives & {"keys", "saliency.received", "saliency.class_token"} == set()
    asks = Asks(layers=(0, -1))
    encoder.prepare(asks)
    taps = Taps(asks)
    patches_FNE = encoder.eval()(FRAMES, taps=taps)
    assert taps.layers_FNAE.shape == (3, 16, 2, 16)
    assert torch.equal(encoder.tower.norm(taps.layers_FNAE[:, :, 1]), patches_FNE)


@every_tower
def test_gradients_flow_through_layers_and_not_through_saliency(kind, tmp_path):
    def gradients(checkpointed):
        stock = Stock(kind, tmp_path, layer=-1, final_norm=False)
        encoder = stock.encoder.train()
        if checkpointed:
            encoder.gradient_checkpointing_enable()
        asks = Asks(saliency="received", keys=True, layers=(0, 1.0))
        encoder.prepare(asks)
        taps = Taps(asks)
        patches_FNE = encoder(FRAMES, taps=taps)
        assert not taps.saliency_FN.requires_grad and not taps.keys_FNK.requires_grad
        assert torch.equal(taps.layers_FNAE[:, :, 1], patches_FNE)
        taps.layers_FNAE[:, :, 0].square().mean().backward()
        return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}

    found = gradients(checkpointed=False)
    first, last = (".layers.0.", ".layers.2.") if kind in STOCK else (".blocks.0.", ".blocks.2.")
    assert any(first in name and grad.abs().sum() > 0 for name, grad in found.items())
    assert not any(last in name and grad.abs().sum() > 0 for name, grad in found.items())
    recomputed = gradients(checkpointed=True)
    assert all(torch.equal(found[name], recomputed[name]) for name in found)


def test_chunks_of_queries_add_up(monkeypatch):
    noise = torch.Generator().manual_seed(0)
    query_FHnK, key_FHnK = (torch.randn(2, 3, 11, 4, generator=noise) for _ in range(2))
    whole_FN = saliency.received_saliency(query_FHnK, key_FHnK, 0.5, 2)
    monkeypatch.setattr(saliency, "LARGEST", 2 * 3 * 11 * 2)  # two queries at a time
    sizes, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: sizes.append(self.numel()) or softmax(self, dim))
    torch.testing.assert_close(saliency.received_saliency(query_FHnK, key_FHnK, 0.5, 2), whole_FN, **CLOSE)
    assert len(sizes) == 5 and max(sizes) == 2 * 3 * 11 * 2


def test_saliency_stays_in_float32_under_autocast(tmp_path):
    stock = Stock("siglip", tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, taps = stock.taps(saliency="received", keys=True)
    assert taps.saliency_FN.dtype == torch.float32 and taps.keys_FNK.dtype == torch.bfloat16
    # what is received sums to 1 over the patches; in bfloat16 it would miss that by some 1e-3
    torch.testing.assert_close(taps.saliency_FN.sum(1), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((3,), r"pooler.layers has 3; the encoder's tower has blocks 0 to 2 \(or -3 to -1\)"),
        ((0, -1), "pooler.layers has -1, block 2 of 3, but encoder.layer reads block 1, .* set encoder.layer=-1"),
        ((2,), "pooler.layers has 2, block 2 of 3, .* or take layers to 1"),
        ((1.5,), "pooler.layers has 1.5; a share of the encoder's depth is above 0 and at most 1.0"),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "patches"])
def test_layers_the_tower_does_not_run_are_refused(kind, layers, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Stock(kind, tmp_path, layer=-2).encoder.prepare(Asks(layers=layers))


def test_shares_of_the_depth():
    # hidden states 12, 16, 22 and 23 of CLIP ViT-L/14, which is read at 23 of 24
    assert [asked_block(layer / 23, 24, 22) for layer in (12, 16, 22, 23)] == [11, 15, 21, 22]
    assert [asked_block(layer / 23, 2, 1) for layer in (12, 16, 22, 23)] == [0, 0, 1, 1]


def test_a_misspelt_saliency_is_refused():
    with pytest.raises(UserError, match="pooler.saliency is 'recieved'; right are .* did you mean 'received'"):
        Asks(saliency="recieved")


def test_probe_without_a_norm_before_it():
    probe_HE = saliency.fold_probe(torch.ones(1, 4), torch.eye(4)[None], None)
    tokens_FNE = torch.randn(2, 3, 4)
    expected_FN = (tokens_FNE.sum(-1) / 2).softmax(1)
    torch.testing.assert_close(saliency.probe_saliency(tokens_FNE, probe_HE, None), expected_FN)
