"""LLaVA-OneVision folders as transformers saves them: the same logits, the same answers, and what is refused."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import train
from data.probe import write_probe
from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import ROLES
from lightning_crosslmm.pooler import AveragePooler, PerceiverPooler
from lightning_crosslmm.run_folder import find_checkpoint
from lightning_crosslmm.text import load_tokenizer
from lightning_crosslmm.weight_files import WeightFiles
from lightning_crosslmm.weights import find_start, load_weights
from tests.onevision import SIDE, ours, their_inputs, theirs, words
from tests.tiny import tiny_batch, tiny_encoder, tiny_llm, tiny_model

CLOSE = {"rtol": 0, "atol": 1e-5}
VIDEO, PLAIN = [0, 0, 0, 0], [31, 17, 0, 0]
BATCHES = {
    "a video": ([["look", 3, "what?"]], [VIDEO]),
    "videos of unequal prompts": ([["look", 3, "what?"], [3, "and?"], ["none"]], [VIDEO, VIDEO]),
    "two images without tiles": ([["see", 1, "and", 1, "same?"]], [PLAIN, PLAIN]),
    "a wide image in tiles": ([["see", 3, "what?"]], [[14, 30, 1, 2]]),
    "a tall image in tiles": ([["see", 7, "what?"]], [[60, 33, 3, 2]]),
    "an image of more than nine tiles": ([["see", 17, "what?"]], [[80, 75, 4, 4]]),
    "an image and a video": ([["see", 5, "and", 2, "same?"], [5, "?"]], [[40, 40, 2, 2], VIDEO, [37, 40, 2, 2]]),
}


def batch_of(name):
    samples, pictures = BATCHES[name]
    batch = tiny_batch(*samples)
    noise = torch.Generator().manual_seed(0)
    shape = (len(batch.frames_FCHW), 3, SIDE, SIDE)
    frames_FCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
    batch = replace(batch, frames_FCHW=frames_FCHW, picture_V4=torch.tensor(pictures))
    batch.validate()
    return batch


def logits(model, batch):
    """All logits of each sample."""
    with torch.no_grad():
        prompt = model.prompt(batch)
        logits_RTW = model.llm.lm_head(model.run(prompt))
    return [logits_RTW[row][prompt.layout.sample_RT[row] >= 0] for row in range(len(logits_RTW))]


@pytest.fixture(
    scope="module", params=[(-1, False), (-2, False), (2, True)], ids=["last layer", "layer before", "tied"]
)
def pair(request, tmp_path_factory):
    """Their model, and ours with the weights of the folder they saved."""
    layer, tied = request.param
    stock, folder = theirs(layer, tied), tmp_path_factory.mktemp("onevision")
    stock.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = ours(layer - (layer > 0), tied)
    load_weights(model, find_start(str(folder)))
    return stock, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    theirs().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", BATCHES)
def test_logits_are_those_of_transformers(name, pair):
    stock, model = pair
    batch = batch_of(name)
    pooled = model.encode(batch).pooled
    pooled.validate()
    for sample, found_TW in enumerate(logits(model, batch)):
        with torch.no_grad():
            expected_TW = stock(**their_inputs(batch, pooled, sample)).logits[0]
        assert expected_TW.abs().max() > 1
        torch.testing.assert_close(found_TW, expected_TW, **CLOSE)


@pytest.mark.parametrize("name", ["videos of unequal prompts", "an image and a video"])
def test_answers_are_those_of_transformers(name, pair):
    stock, model = pair
    batch = batch_of(name)
    pooled = model.encode(batch).pooled
    settings = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = model.generate(batch, Greedy(10), stop_id=9999, pad_id=0)
    for sample, ids in enumerate(found):
        inputs = their_inputs(batch, pooled, sample)
        expected = stock.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
        assert ids == expected.tolist()
    assert len({token for ids in found for token in ids}) > 1


def test_fusion_on_top_changes_no_bit_until_its_gates_move(folder):
    plain, fused = ours(), ours(v2v=True, t2v=True, interval=2, gate_init=0.0, seed=2)
    for model in (plain, fused):
        kept = load_weights(model, find_start(str(folder)))
    assert kept["fusion"] and not any(kept[role] for role in ROLES if role != "fusion")
    batch = batch_of("an image and a video")
    for before_TW, after_TW in zip(logits(plain, batch), logits(fused, batch), strict=True):
        assert torch.equal(before_TW, after_TW)
    gates = [gate for name, gate in fused.named_parameters() if "gate" in name]
    assert gates
    with torch.no_grad():
        for gate in gates:
            gate.fill_(0.5)
    assert not torch.equal(logits(plain, batch)[0], logits(fused, batch)[0])


def test_a_step_of_training_moves_every_part_and_the_gates_first(folder):
    model = ours(v2v=True, t2v=True, interval=2, gate_init=0.0)
    load_weights(model, find_start(str(folder)))
    model.train()
    batch = tiny_batch(["see", 2, "what?", "=cat"])
    batch = replace(batch, frames_FCHW=torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    output = model(batch)
    torch.nn.functional.cross_entropy(output.logits_YW, output.target_Y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {model.role_of(name) for name in moved} == set(ROLES)
    assert "pooler.newline_D" in moved
    of_fusion = {name for name in moved if model.role_of(name) == "fusion"}
    assert of_fusion and all("gate" in name for name in of_fusion)


@pytest.mark.parametrize(
    "pooler", [lambda: AveragePooler(2), lambda: PerceiverPooler(3, depth=1, heads=2, head_width=4)]
)
def test_another_pooler_takes_the_rest_and_the_log_says_what_stayed_behind(pooler, folder, caplog):
    model = ours(layer=-2, pooler=pooler(), v2v=True)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["vision_feature_layer"] == -1
    start = find_start(str(folder))
    start.config.vision_feature_layer = -2
    with caplog.at_level(logging.INFO, logger="lightning_crosslmm.weights"):
        kept = load_weights(model, start)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.projector[0].weight, stored["multi_modal_projector.linear_1.weight"])
    assert set(kept["pooler"]) == {name for name in model.state_dict() if name.startswith("pooler.")}
    assert kept["fusion"] and not kept["encoder"] + kept["projector"] + kept["llm"]
    (line,) = caplog.messages
    assert f"{len(kept['fusion'])} of fusion, such as llm.model.layers" in line
    assert "18 of encoder, such as vision_tower" in line and "1 of pooler, such as image_newline" in line


def test_older_spellings_of_names_are_the_same_weights(folder, tmp_path):
    stored = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    nested = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in stored.items()}
    newer = {
        ("" if "lm_head" in name else "model.")
        + name.replace("language_model.model", "language_model").replace("language_model.lm_head", "lm_head"): tensor
        for name, tensor in stored.items()
    }
    assert newer.keys() == theirs().state_dict().keys()
    one, *others = (ours(seed=seed) for seed in range(3))
    load_weights(one, find_start(str(folder)))
    for model, state in zip(others, (nested, newer), strict=True):
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        load_weights(model, find_start(str(tmp_path)))
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: ours(llm={"hidden_size": 64}),
            ["llm.model.config.hidden_size=64", "'++llm.model.config.hidden_size=32'"],
        ),
        (lambda: ours(layer=-2), ["encoder.layer=1", "'++encoder.layer=-1'"]),
        (lambda: ours(norm=True), ["projector.norm=true", "'++projector.norm=false'"]),
        (
            lambda: ours(llm={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
            ["rope_theta:10000.0", "'++llm.model.config.rope_parameters={rope_theta:500.0,rope_type:default}'"],
        ),
        (lambda: ours(llm={"rms_norm_eps": 1e-6}), ["rms_norm_eps=1e-06", "rms_norm_eps=1e-05"]),
        (lambda: ours(tied=True), ["tie_word_embeddings=true", "tie_word_embeddings=false"]),
        (lambda: ours(llm={"num_hidden_layers": 2}), ["num_hidden_layers=2", "num_hidden_layers=4"]),
        (
            lambda: tiny_model(encoder=tiny_encoder()),
            ["its encoder is a siglip_vision_model, this model's a TimmEncoder"],
        ),
    ],
)
def test_a_model_of_other_settings_is_refused_naming_both(make, says, folder):
    with pytest.raises(UserError) as caught:
        load_weights(make(), find_start(str(folder)))
    for word in [str(folder), *says]:
        assert word in str(caught.value)


def test_pixels_are_scaled_as_the_folder_says(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"encoder.std=\[0.5,0.5,0.5\]; write '\+\+encoder.std=\[0.2,0.2,0.2\]'"):
        load_weights(ours(), find_start(str(tmp_path)))
    with torch.device("meta"):
        find_start(str(tmp_path)).check(ours())  # what has no values there is compared later


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is relu"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is default"),
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer is \[-1, -2\]"),
    ],
)
def test_what_has_no_counterpart_here_is_refused(changes, says, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=says):
        load_weights(ours(), find_start(str(tmp_path)))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda state: state.pop("multi_modal_projector.linear_2.bias"),
            "missing: 1 of projector, such as projector.2.bias",
        ),
        (lambda state: state.pop("image_newline"), ""),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected: 1 of llm, such as extra"),
        (
            lambda state: state.update({"language_model.model.norm.weight": torch.zeros(7)}),
            "of another shape: 1 of llm, such as language_model.model.norm.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed_by_role(break_it, says, folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    break_it(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = ours()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not says:  # a pooler may be new
        assert load_weights(model, find_start(str(tmp_path)))["pooler"] == ["pooler.newline_D"]
        return
    with pytest.raises(UserError, match=says):
        load_weights(model, find_start(str(tmp_path)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_llm_alone_is_no_start(tmp_path):
    tiny_llm().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type is qwen2 in its config.json; right are llava_onevision and run"):
        find_start(str(tmp_path))


def test_a_hub_name_without_a_hub_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="init_from=nobody/nothing: is no file or folder, and the hub does not give it"):
        find_start("nobody/nothing")
    with pytest.raises(UserError, match="init_from=nothing: there is no such file or folder"):
        find_start("nothing")


def test_a_hub_name_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revision = "0" * 40
    snapshot = tmp_path / "models--some--ov" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(revision)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    assert find_start("some/ov").weights == snapshot / "model.safetensors"


def test_train_py_measures_a_folder_and_trains_fusion_on_top_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    theirs().save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    shape = {"clips": {"val": 3}, "num_frames": 2, "image_size": 32, "noise": 0.1, "seed": 1}
    write_probe(Path("val"), "val", **shape, kinds=["colour_of_shape"], questions_per_clip=2, clips_per_shard=3)
    quick = ["data.train=val", "data.val=val", "data.sampling.num_frames=2", "data.num_workers=0"]
    quick += ["callbacks.progress=null", "decoding.max_new_tokens=2", "data.global_batch_size=2"]
    quick += ["optim.warmup_steps=0", "data.max_tokens=99", "trainer.log_every_n_steps=1"]

    def run(*more):
        return train.run(compose_overrides(train.CONF_DIR, [*words(folder), *quick, *more]))

    run("mode=validate", "run_dir=measured")
    assert "val/accuracy" in json.loads(Path("measured/metrics_validate.json").read_text())
    steps = ["trainer.max_steps=1", "trainer.val_check_interval=1", "run_dir=run"]
    run("fusion=crosslmm", "pooler=average", *steps)
    files = WeightFiles(find_checkpoint(Path("run"), "run_dir"))
    found = files.read(["projector.0.weight", "encoder.tower.embeddings.patch_embedding.weight"])
    stored = load_file(folder / "model.safetensors")
    moved = (found["projector.0.weight"] - stored["multi_modal_projector.linear_1.weight"]).abs().max()
    assert 0 < moved < 1e-3
    with pytest.raises(UserError, match="write '..encoder.layer=-1'"):
        run("mode=validate", "encoder.layer=-2", "run_dir=refused")
