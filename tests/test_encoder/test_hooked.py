"""Hooks between blocks: nothing changes unless the hook changes something, in every kind of tower."""

import pytest
import timm
import torch

from lightning_crosslmm.encoder import TimmEncoder, TransformersEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import FolderPooler, TomePooler
from lightning_crosslmm.taps import BlockHook
from tests.tiny import tiny_encoder, tiny_model

FRAMES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RICH = {"class_token": True, "reg_tokens": 2, "global_pool": "token", "qk_norm": True, "init_values": 0.3}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}


def transformers_encoder(kind, **settings):
    return TransformersEncoder({"model_type": f"{kind}_vision_model", **SHAPE}, image_size=16, **settings)


TOWERS = {
    "timm": tiny_encoder,
    "timm, rich": lambda: tiny_encoder(config=RICH),
    "siglip": lambda: transformers_encoder("siglip", layer=-1, final_norm=True),
    "clip": lambda: transformers_encoder("clip"),
}


def built(tower):
    torch.manual_seed(0)
    return TOWERS[tower]().eval()


every_tower = pytest.mark.parametrize("tower", list(TOWERS))


class Watch(BlockHook):
    """Change nothing and note everything."""

    wants_class_row = True

    def __init__(self):
        self.seen = []

    def after_attention(self, block, tokens_FnE, keys_FnK, class_Fn):
        self.seen.append((block, tokens_FnE, keys_FnK, class_Fn))
        return tokens_FnE


@every_tower
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_hook_that_does_nothing_changes_nothing(tower, checkpointed):
    encoder, watch = built(tower), Watch()
    plain_FNE = encoder(FRAMES)
    if checkpointed:
        encoder.gradient_checkpointing_enable()
        encoder.train()
    assert torch.equal(encoder(FRAMES, hook=watch), plain_FNE)
    assert [block for block, *_ in watch.seen] == list(range(encoder.read_block + 1))
    facts = encoder.facts()
    assert (facts.num_blocks, facts.num_prefix) == (encoder.read_block + 1, watch.seen[0][1].shape[1] - 16)
    assert facts.has_class_token == (facts.num_prefix > 0)


@every_tower
def test_keys_and_the_class_row_are_the_blocks_own(tower):
    encoder, watch = built(tower), Watch()
    received = []
    for block in getattr(encoder.tower, "blocks", None) or encoder.tower.encoder.layers:
        attention = getattr(block, "attn", None) or block.self_attn
        names = ("q_norm", "k_norm") if hasattr(attention, "qkv") else ("q_proj", "k_proj")
        for name in names:
            getattr(attention, name).register_forward_hook(lambda _, __, out: received.append(out.detach()))
    encoder(FRAMES, hook=watch)
    for (_, _, keys_FnK, class_Fn), query, key in zip(watch.seen, received[::2], received[1::2], strict=True):
        if query.ndim == 3:
            query, key = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in (query, key))
        torch.testing.assert_close(keys_FnK, (key[:, 0] + key[:, 1]) / 2)
        row_FHn = ((query[:, :, 0, None] * key).sum(dim=-1) / 8**0.5).softmax(dim=-1)
        torch.testing.assert_close(class_Fn, row_FHn.mean(dim=1))
        assert not keys_FnK.requires_grad and not class_Fn.requires_grad


class Hide(BlockHook):
    """Hide the last tokens from all others, and drop them at the end; or drop them at the start."""

    def __init__(self, count, drop_first):
        self.count, self.drop_first = count, drop_first

    def begin(self, tokens_FnE, num_prefix):
        self.total = tokens_FnE.shape[1]
        return tokens_FnE[:, : -self.count] if self.drop_first else tokens_FnE

    def key_bias(self, block):
        if self.drop_first:
            return None
        bias_Fn = torch.zeros(len(FRAMES), self.total)
        bias_Fn[:, -self.count :] = -torch.inf
        return bias_Fn


@every_tower
def test_a_hidden_key_is_as_good_as_gone(tower):
    encoder = built(tower)
    gone_FnE = encoder(FRAMES, hook=Hide(4, drop_first=True))
    hidden_FNE = encoder(FRAMES, hook=Hide(4, drop_first=False))
    torch.testing.assert_close(hidden_FNE[:, :12], gone_FnE, rtol=0, atol=2e-6)


class Extra(BlockHook):
    """Append tokens that only read."""

    num_isolated = 2

    def begin(self, tokens_FnE, num_prefix):
        generator = torch.Generator().manual_seed(0)
        extra_12E = torch.randn(1, 2, tokens_FnE.shape[-1], generator=generator)
        return torch.cat([tokens_FnE, extra_12E.expand(len(tokens_FnE), -1, -1)], dim=1)


@every_tower
def test_isolated_tokens_see_and_are_not_seen(tower):
    encoder = built(tower)
    found_FnE = encoder(FRAMES, hook=Extra())
    assert torch.equal(found_FnE[:, :16], encoder(FRAMES))
    assert not torch.equal(found_FnE[0, 16:], found_FnE[1, 16:])  # they are told apart by what they saw


@every_tower
def test_checkpointing_gives_the_same_gradients_and_makes_no_decision_twice(tower):
    decisions = []

    def gradients(checkpointed):
        encoder = built(tower).train()
        pooler = TomePooler(3)
        pooler.enter(encoder.facts())
        if checkpointed:
            encoder.gradient_checkpointing_enable()
        hook = pooler.hook()
        decide = hook.decide
        hook.decide = lambda *args: decisions.append(1) or decide(*args)
        encoder(FRAMES, hook=hook).square().mean().backward()
        return [parameter.grad for parameter in encoder.parameters()]

    plain, again = gradients(False), gradients(True)
    for one, other in zip(plain, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert len(decisions) == 2 * (built(tower).read_block + 1)


@every_tower
def test_autocast(tower):
    encoder = built(tower)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(encoder(FRAMES, hook=Watch()), encoder(FRAMES))
        hidden_FNE = encoder(FRAMES, hook=Hide(4, drop_first=False))
    assert hidden_FNE.isfinite().all()


def test_names_of_parameters_stay():
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
    encoder = tiny_encoder(config={"class_token": True, "global_pool": "token"})
    names = {name for name, _ in plain.named_parameters()}
    assert {name.removeprefix("tower.") for name, _ in encoder.named_parameters()} == names


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: TimmEncoder("eva02_tiny_patch14_224", 28, config={"depth": 2}),
        lambda: transformers_encoder("siglip", attention="flex_attention"),
    ],
    ids=["another kind of block", "an attention that takes no bias"],
)
def test_towers_that_run_no_hook_are_refused_with_both_names(encoder):
    for pooler in (TomePooler(1), FolderPooler(2, "in_encoder")):
        with pytest.raises(UserError, match=rf"pooler {type(pooler).__name__} needs blocks, encoder \w+Encoder gives"):
            tiny_model(pooler=pooler, encoder=encoder())
