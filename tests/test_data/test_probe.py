"""The probe set: what is drawn is what is asked, and one pooled token cannot hold the answer."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from data.probe import ask, conversation, write_probe
from data.probe_encoder import EncoderFit, fit_encoder
from data.probe_scene import COLOURS, PLACES, SHAPES, render, shape_masks
from lightning_crosslmm.conversation import Conversation
from lightning_crosslmm.encoder import TimmEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import open_shards, read_sample
from lightning_crosslmm.video import FrameSampling, read_clip

SETTINGS = {
    "clips": {"train": 3, "val": 2},
    "num_frames": 2,
    "image_size": 64,
    "noise": 0.1,
    "kinds": ["colour_of_shape", "colour_at_place", "place_of_shape"],
    "questions_per_clip": 8,
    "seed": 0,
    "clips_per_shard": 2,
}


def scenes(num_frames=3, num_things=4, noise=0.0):
    return render(np.random.default_rng(0), num_frames, 64, noise, num_things)


def test_shapes_differ_in_every_pair():
    masks = shape_masks(20)
    assert masks.shape == (8, 20, 20)
    for one, other in itertools.combinations(masks, 2):
        assert (one != other).mean() > 0.1


@pytest.mark.parametrize("num_things", [1, 2, 4])
def test_a_frame_holds_its_things_in_their_quadrants(num_things):
    drawn = scenes(6, num_things)
    rgb = np.array(list(COLOURS.values()))
    for frame, (shape_O, colour_O) in enumerate(zip(drawn.shape_FO, drawn.colour_FO, strict=True)):
        present = [thing for thing in range(4) if shape_O[thing] >= 0]
        assert len(present) == num_things and len({shape_O[thing] for thing in present}) == num_things
        for thing in range(4):
            top, left = thing // 2 * 32, thing % 2 * 32
            quadrant = drawn.frames_FHWC[frame, top : top + 32, left : left + 32].astype(int)
            painted = (abs(quadrant - rgb[colour_O[thing]]) <= 1).all(axis=-1).sum()
            expected = shape_masks(20)[shape_O[thing]].sum() if thing in present else 0
            assert painted == expected


def test_questions_name_what_is_there():
    drawn = scenes()
    shape, colour = SHAPES[drawn.shape_FO[2, 1]], list(COLOURS)[drawn.colour_FO[2, 1]]
    assert ask(drawn, "colour_of_shape", 2, 1) == (f"t2 {shape}?", colour)
    assert ask(drawn, "colour_at_place", 2, 1) == ("t2 tr?", colour)
    assert ask(drawn, "place_of_shape", 2, 1) == (f"t2 {shape} at?", PLACES[1])


def test_no_thing_is_asked_about_twice():
    drawn = scenes(2)
    asked = conversation(np.random.default_rng(0), drawn, "clip", ["colour_of_shape"], 8)
    questions = [message.content.removeprefix("<video>\n") for message in asked.messages if message.role == "user"]
    assert len(set(questions)) == 8 and asked.messages[0].content.startswith("<video>\n")
    assert asked.answer_kinds == ("colour_of_shape",) * 8


def test_a_bag_of_colours_answers_two_in_five():
    """README's ceiling for who knows which colours the asked frame holds and nothing else: the most frequent one."""
    bags = itertools.product(range(len(COLOURS)), repeat=4)
    ceiling = np.mean([Counter(bag).most_common(1)[0][1] / 4 for bag in bags])
    assert ceiling == pytest.approx(0.412, abs=5e-4)


def test_what_is_written_is_what_was_drawn(tmp_path):
    write_probe(tmp_path / "train", "train", **SETTINGS)
    shards = open_shards(tmp_path / "train")
    assert shards.num_samples == (2, 1) and set(shards.answer_kinds) <= set(SETTINGS["kinds"])
    entry = shards.index(0).entries[0]
    members = read_sample(shards.paths[0], entry)
    clip = read_clip(members["0.mp4"], "clip", FrameSampling("uniform", 2))
    assert clip.frame_time_s_F.tolist() == [0.0, 0.25]
    told = Conversation.from_json(members["json"], "shard", entry.key)
    for asked, answer in itertools.pairwise(told.messages):
        if answer.role != "assistant":
            continue
        time, place = asked.content.removeprefix("<video>\n").rstrip("?").split(" ")[:2]
        if place not in PLACES:
            continue
        # H.264 and noise shift a colour by less than half the way to another
        top, left = PLACES.index(place) // 2 * 32, PLACES.index(place) % 2 * 32
        quadrant = clip.frames_FCHW[int(time[1:]), :, top : top + 32, left : left + 32].float().flatten(1)
        brightest = quadrant[:, quadrant.sum(dim=0).topk(20).indices].mean(dim=1)
        distance = {name: (brightest - torch.tensor(rgb)).norm().item() for name, rgb in COLOURS.items()}
        assert min(distance, key=distance.get) == answer.content


def test_splits_and_seeds_draw_other_clips_and_the_same_ones_again(tmp_path):
    written = {}
    for name, split, seed in (("a", "train", 0), ("again", "train", 0), ("val", "val", 0), ("other", "train", 1)):
        write_probe(tmp_path / name, split, **(SETTINGS | {"seed": seed}))
        written[name] = (tmp_path / name / "shard-000000.tar").read_bytes()
    assert written["a"] == written["again"]
    assert len(set(written.values())) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ["colour_of_shap"]}, "did you mean 'colour_of_shape'"),
        ({"kinds": []}, "must name a kind"),
        ({"questions_per_clip": 9}, "be 1 to 8"),
        ({"image_size": 15}, "must be even and 16 or more"),
        ({"noise": 2.0}, "between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_drawn(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write_probe(tmp_path / "train", "train", **(SETTINGS | changes))
    assert not (tmp_path / "train").exists()


def test_the_encoder_learns_to_name_things_and_stays_as_frozen_as_it_was():
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 4, "class_token": False, "global_pool": ""}
    encoder = TimmEncoder("vit_tiny_patch16_224", 32, stem="conv", config=shape)
    encoder.requires_grad_(False)
    before = [parameter.clone() for parameter in encoder.parameters()]
    right = fit_encoder(encoder, EncoderFit(steps=150, batch_size=32, lr=3e-3), 64, 0.0, seed=0)
    assert right > 8 / 256  # who guesses shape, colour and place gets 1 in 256
    assert any(not torch.equal(old, new) for old, new in zip(before, encoder.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}])
def test_a_fit_without_effect_is_refused(changes):
    with pytest.raises(UserError, match="data.encoder_fit=null"):
        EncoderFit(**({"steps": 1, "batch_size": 1, "lr": 1e-3} | changes))
