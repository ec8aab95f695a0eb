import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.model import ROLES
from lightning_crosslmm.weights import load_weights
from tests.tiny import tiny_encoder, tiny_model


def checkpoint(path, model, drop="", add=()):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if not (drop and drop in name)}
    torch.save({"state_dict": state | dict.fromkeys(add, torch.zeros(2)), "epoch": 3}, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.ckpt"


def test_a_whole_model(path):
    saved, model = tiny_model(), tiny_model(seed=1)
    kept = load_weights(model, checkpoint(path, saved, add=["val_accuracy.accuracy.value"]), whole=True)
    assert kept == {role: [] for role in ROLES}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.state_dict().items())


def test_the_second_stage_keeps_its_new_branch(path):
    saved, model = tiny_model(t2v=False), tiny_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = load_weights(model, checkpoint(path, saved))
    assert all(".t2v." in name for name in kept["fusion"]) and len(kept["fusion"]) > 0
    assert [kept[role] for role in ROLES if role != "fusion"] == [[]] * 4
    after, first = model.state_dict(), saved.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] if name in kept["fusion"] else first[name]), name


def test_fusion_may_be_missing_as_a_whole_but_not_from_a_run_to_go_on_with(path):
    checkpoint(path, tiny_model(v2v=False, t2v=False))
    kept = load_weights(tiny_model(frame_time="sinusoidal"), path)
    assert "frame_time.out.weight" in kept["fusion"]
    with pytest.raises(UserError, match=r"missing: [0-9]+ of fusion, such as llm\.model\.layers\.0\.fusion\."):
        load_weights(tiny_model(), path, whole=True)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("projector.3", "missing: 2 of projector, such as projector.3.weight"),
        ("encoder", "missing: [0-9]+ of encoder, such as encoder.tower"),
        ("llm.model.layers.3.mlp", "missing: 3 of llm, such as llm.model.layers.3.mlp"),
    ],
)
def test_nothing_else_may_be_missing(path, drop, message):
    checkpoint(path, tiny_model(), drop=drop)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(tiny_model(), path)
    assert str(path) in str(caught.value) and "config.yaml" in str(caught.value)


def test_what_the_model_has_no_place_for_is_refused(path):
    with pytest.raises(UserError, match=r"unexpected: [0-9]+ of fusion, such as llm.model.layers.1.fusion."):
        load_weights(tiny_model(), checkpoint(path, tiny_model(interval=1)))


def test_other_shapes_are_listed_by_role(path):
    checkpoint(path, tiny_model(encoder=tiny_encoder(config={"embed_dim": 24})))
    with pytest.raises(
        UserError, match="of another shape: [0-9]+ of encoder, such as .*, 3 of projector, such as projector.0.weight"
    ):
        load_weights(tiny_model(), path)


def test_a_refused_checkpoint_leaves_the_model_as_it_was(path):
    model = tiny_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(model, checkpoint(path, tiny_model(), drop="projector.3"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no checkpoint at all"),
        lambda path: path.mkdir(),
        lambda path: torch.save({"weights": 1}, path),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save({"state_dict": {"x": Fusion(True, True)}}, path),
        lambda path: path.write_bytes(checkpoint(path, tiny_model()).read_bytes()[:-400]),
    ],
    ids=["absent", "empty", "text", "folder", "other keys", "a tensor", "objects", "cut short"],
)
def test_what_is_no_checkpoint_is_refused(path, write):
    write(path)
    with pytest.raises(UserError, match=f"'{path}' is no checkpoint of a run"):
        load_weights(tiny_model(), path)
