"""Features that are taken again are those the tower would give: forward, backward, from disk, on every rank."""

from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.answer import Answerer
from lightning_crosslmm.compose import load_run
from lightning_crosslmm.encoder import FeatureCache
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.export import export_run
from lightning_crosslmm.pooler import TomePooler, VisionzipPooler
from tests import reused
from tests.clips import mux
from tests.ranks import on_ranks
from tests.runs import small_config, write_run
from tests.tiny import tiny_batch, tiny_encoder, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weights_only"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


def twice(batch, extra=0):
    """Two questions about one video, whose last frames stand still; `extra` is added to one of those."""
    frames_FCHW = batch.frames_FCHW.clone()
    frames_FCHW[3] = frames_FCHW[2].clamp(max=250) + extra
    frames_FCHW[2] = frames_FCHW[2].clamp(max=250)
    frames_FCHW[4:8] = frames_FCHW[:4]
    return replace(batch, frames_FCHW=frames_FCHW)


def batch(extra=0):
    return twice(tiny_batch(["see", 4, "what?", "=cat"], [4, "or?", "=do"], ["no", 1, "=it"]), extra)


def model(tolerance=None, folder=None, keeps=True, **settings):
    encoder_settings = {"same_frame_tolerance": tolerance, "feature_cache": FeatureCache(folder and str(folder))}
    torch.manual_seed(0)
    made = tiny_model(encoder=tiny_encoder(**encoder_settings, **settings.pop("encoder", {})), **settings)
    if keeps:
        made.encoder.requires_grad_(False)
        made.keep_features()
    frames = []
    made.encoder.register_forward_pre_hook(lambda _, given: frames.append(len(given[0])))
    return made, frames


def test_frames_that_repeat_are_encoded_once_and_the_answers_stay():
    (plain, all_frames), (spared, frames) = model(), model(0)
    expected, found = plain(batch()), spared(batch())
    assert all_frames == [9] and frames == [4]
    torch.testing.assert_close(found.logits_YW, expected.logits_YW, rtol=0, atol=1e-5)
    source, right = spared.encode(batch()).source, plain.encode(batch()).source
    assert source.num_tokens == right.num_tokens and torch.equal(source.coordinate_S3, right.coordinate_S3)
    assert spared.reuse.encoded_share(is_training=False) == 8 / 18


def test_off_means_that_nothing_is_compared_or_counted():
    made, frames = model()
    made(batch())
    assert frames == [9] and not made.reuse.is_on and made.reuse.encoded_share(is_training=False) == 1.0


def test_a_tolerance_spares_more_and_says_so():
    (exact, exactly), (lossy, nearly) = model(0), model(1)
    one, other = exact(batch(extra=1)), lossy(batch(extra=1))
    assert exactly == [5] and nearly == [4]
    assert not torch.equal(one.logits_YW, other.logits_YW)


def test_gradients_of_frames_that_repeat_add_up():
    (plain, _), (spared, frames) = model(keeps=False), model(0, keeps=False)
    for made in (plain, spared):
        made.train()
        made(batch()).logits_YW.square().sum().backward()
    assert frames == [4]
    for (name, one), (_, other) in zip(plain.named_parameters(), spared.named_parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
        else:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4 * float(one.grad.abs().max() + 1e-9))


def test_what_a_pooler_asks_for_is_taken_again_too(tmp_path):
    settings = {"encoder": {"config": {"class_token": True}}}
    results = []
    for tolerance, folder in ((None, None), (0, None), (0, tmp_path), (None, tmp_path)):
        made, frames = model(tolerance, folder, pooler=VisionzipPooler(dominant=3, contextual=2), **settings)
        results.append((made(batch()).logits_YW, frames))
    expected = results[0][0]
    assert [frames for _, frames in results] == [[9], [4], [4], []]
    for found, _ in results[1:]:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(results[2][0], results[3][0])


def test_hits_and_misses_of_one_batch_go_together(tmp_path):
    made, frames = model(None, tmp_path)
    first = made(tiny_batch(["see", 4, "what?", "=cat"]))
    both = tiny_batch(["see", 4, "what?", "=cat"], [3, "more", "=ox"], ["none", "=so"])
    expected, _ = model()
    assert torch.equal(made(tiny_batch(["see", 4, "what?", "=cat"])).logits_YW, first.logits_YW) and frames == [4]
    torch.testing.assert_close(made(both).logits_YW, expected(both).logits_YW, rtol=0, atol=1e-5)
    assert frames == [4, 3] and len(list(tmp_path.glob("features-*"))) == 2
    other = tiny_batch(["see", 4, "what?", "=cat"])
    other.frames_FCHW[0, 0, 0, 0] ^= 1
    made(other)
    assert frames == [4, 3, 4]


def test_other_weights_and_other_poolers_do_not_hit(tmp_path):
    made, frames = model(None, tmp_path)
    made(batch())
    with torch.no_grad():
        made.encoder.tower.norm.bias += 1
    expected, _ = model()
    expected.load_state_dict(made.state_dict())
    assert torch.equal(made(batch()).logits_YW, expected(batch()).logits_YW) and frames == [9, 9]


def test_each_encoded_frame_is_kept_once(tmp_path):
    still = tiny_batch(["see", 8, "what?", "=cat"])
    still.frames_FCHW[:] = still.frames_FCHW[:1].clone()
    sizes = []
    for tolerance in (None, 0):
        folder = tmp_path / str(tolerance)
        model(tolerance, folder)[0](still)
        sizes.append(sum(path.stat().st_size for path in folder.glob("features-*")))
    assert sizes[1] < 0.3 * sizes[0]


def test_the_tower_runs_for_those_who_measure_it(tmp_path):
    made, frames = model(None, tmp_path)
    made(batch())
    with made.reuse.without_cache():
        made(batch())
    made(batch())
    assert frames == [9, 9] and made.reuse.encoded_share(is_training=False) == 9 / 18


@pytest.mark.parametrize("setting", ["same_frame_tolerance", "feature_cache.folder"])
def test_a_pooler_inside_the_encoder_is_refused(setting, tmp_path):
    value = {"same_frame_tolerance": 0, "feature_cache.folder": tmp_path}[setting]
    message = rf"encoder.{setting}={value} spares .* pooler TomePooler acts inside it .*; set encoder.{setting}=null"
    with pytest.raises(UserError, match=message):
        model(*((0,) if value == 0 else (None, tmp_path)), pooler=TomePooler(merges_per_block=2))


@pytest.mark.parametrize("tolerance", [-1, 256])
def test_a_tolerance_that_no_difference_has_is_refused(tolerance):
    with pytest.raises(UserError, match=rf"encoder.same_frame_tolerance is {tolerance}; right are null, 0"):
        tiny_encoder(same_frame_tolerance=tolerance)


def test_a_trained_encoder_with_a_cache_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"feature_cache.folder=.*optim.lr.encoder trains it; set optim.lr.encoder=null"
    ):
        reused.module("one", tmp_path, None, trains_encoder=True)


def test_two_epochs_with_a_cache_are_those_without_to_the_bit(tmp_path):
    plain = reused.train("one", 1)
    cold = reused.train("one", 1, tmp_path / "kept", save=(tmp_path / "half.ckpt", 3))
    warm = reused.train("one", 1, tmp_path / "kept")
    resumed = reused.train("one", 1, tmp_path / "kept", resume=tmp_path / "half.ckpt")
    anew = reused.train("one", 1, tmp_path / "other", resume=tmp_path / "half.ckpt")
    assert plain["calls"] == [3, 8, 3, 8] and cold["calls"] == [3, 8, 0, 0] and warm["calls"] == [0, 0, 0, 0]
    assert resumed["calls"] == [0] and anew["calls"] == [8]
    for other in (cold, warm):
        assert torch.equal(other["losses"], plain["losses"])
    for other in (resumed, anew):
        assert torch.equal(other["losses"], plain["losses"][3:])
    for other in (cold, warm, resumed, anew):
        assert all(torch.equal(other["end"][name], tensor) for name, tensor in plain["end"].items())
    assert plain["share"] is None and cold["share"] == 0.5 and warm["share"] == 0.0


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reuse")
    return on_ranks(2, reused.on_two, folder, folder=folder)


def test_ranks_that_hit_and_ranks_that_miss_train_on_together(two):
    for rank in two:
        for name in ("cold", "one is warm", "one has none"):
            assert torch.equal(rank[name]["losses"], rank["off"]["losses"]), name
            assert all(torch.equal(rank[name]["end"][key], tensor) for key, tensor in rank["off"]["end"].items()), name
        torch.testing.assert_close(rank["ddp"]["losses"], rank["off"]["losses"], rtol=1e-5, atol=1e-5)
        assert rank["ddp"]["calls"][2:] == [0, 0]


def test_the_tower_runs_as_often_on_all_ranks_as_the_one_that_needs_it_most(two):
    for name in ("off", "cold", "one is warm", "one has none"):
        assert two[0][name]["calls"] == two[1][name]["calls"], name
    assert two[0]["cold"]["calls"][2:] == [0, 0] and two[0]["off"]["calls"][2:] != [0, 0]
    assert two[0]["one is warm"]["share"] == 0 and two[1]["one is warm"]["calls"][0] > 0
    assert two[1]["one has none"]["calls"] == two[1]["one has none"]["calls"][:2] * 2


def test_shared_out_weights_are_read_once(two):
    named = len(two[0]["off"]["end"])
    for rank in two:
        assert 0 < rank["cold"]["weights read"] < named and rank["cold"]["weights read"] == rank["ddp"]["weights read"]


def test_frames_that_repeat_train_the_encoder_on_all_ranks(two):
    for rank in two:
        torch.testing.assert_close(rank["trained"]["losses"], rank["trained, off"]["losses"], rtol=1e-4, atol=1e-4)
        assert rank["trained"]["calls"] == two[1]["trained"]["calls"]
    assert two[0]["trained"]["share"] < 0.5 and two[1]["trained"]["share"] == 1


def test_a_run_elsewhere_asks_and_exports_without_the_folder(tmp_path):
    folder = tmp_path / "features"
    words = (f"encoder.feature_cache.folder={folder}", "encoder.same_frame_tolerance=0")
    write_run(tmp_path / "run", small_config(*words))
    mux(tmp_path / "clip.mp4", range(0, 400, 40))
    Answerer.from_run(tmp_path / "run").ask(tmp_path / "clip.mp4", ["what?"])
    export_run(tmp_path / "run", tmp_path / "exported")
    alone = load_run(tmp_path / "exported").encoder
    assert not folder.exists() and alone.feature_cache.folder is None and alone.same_frame_tolerance == 0
