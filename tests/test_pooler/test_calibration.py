"""Calibration: it hits its target on other pictures, does not depend on order, and knows its encoder."""

import pytest
import torch
import torch.multiprocessing

from lightning_crosslmm.encoder import TransformersEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import DymuPooler
from lightning_crosslmm.pooler.calibration import Calibration, calibrate
from lightning_crosslmm.run_folder import choose_checkpoint
from tests.slow_merging import CLASS, Token, in_tower, through_tower
from tests.tiny import tiny_encoder, tiny_model


def pictures(count, seed):
    """Noise under a smooth picture, more of it in some than in others, so that some merge more."""
    noise = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2, 2, generator=noise)
    smooth = torch.nn.functional.interpolate(coarse, 16, mode="bilinear")
    rough = torch.rand(count, 3, 16, 16, generator=noise) * (0.5 + 0.5 * torch.rand(count, 1, 1, 1, generator=noise))
    return ((smooth + rough) * 127).to(torch.uint8)


def encoder_of(seed=0, **settings):
    torch.manual_seed(seed)
    return tiny_encoder(**settings).eval()


@pytest.mark.parametrize("tower", [{}, CLASS], ids=["patches", "class"])
@pytest.mark.parametrize("target", [6, 10])
def test_it_hits_its_target_on_other_pictures(tower, target, tmp_path):
    encoder = encoder_of(**tower)
    found = calibrate(encoder, pictures(2000, 0).split(500), target)
    assert abs(found.reached / target - 1) < 0.002
    found.write(tmp_path / "thresholds.json")
    with torch.no_grad():
        pooled, _ = in_tower(DymuPooler(str(tmp_path / "thresholds.json")), encoder, pictures(2000, 1), chunk=500)
    counts_F = pooled.frame_offsets.diff()
    assert abs(counts_F.float().mean() / target - 1) < 0.02
    assert counts_F.max() > counts_F.min()


def test_the_order_of_frames_and_how_they_are_cut_do_not_matter():
    frames_FCHW = pictures(60, 0)
    found = calibrate(encoder_of(), frames_FCHW.split(60), 8)
    shuffled_FCHW = frames_FCHW[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    for chunks in (shuffled_FCHW.split(60), shuffled_FCHW.split(7)):
        again = calibrate(encoder_of(), chunks, 8)
        assert again.thresholds == pytest.approx(found.thresholds, abs=2e-6)  # chunks of another size round otherwise


def test_the_first_threshold_is_the_first_edge_that_is_not_taken():
    encoder, frames_FCHW = encoder_of(), pictures(4, 0)
    edges = []
    for frame_CHW in frames_FCHW:

        def note(block, tokens: list[Token], keys, row, edges=edges):
            if block == 0:
                for a in range(0, 16, 2):
                    edges.append(max(float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in range(1, 16, 2)))
            return tokens

        with torch.no_grad():
            through_tower(encoder, frame_CHW, note, proportional=True)
    found = calibrate(encoder, [frames_FCHW], 7)  # 9 of 16 are to go in 3 blocks: 3 x 4 frames in the first
    assert found.thresholds[0] == pytest.approx(sorted(edges, reverse=True)[12], abs=1e-6)


def _rank(rank, place, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    found = calibrate(encoder_of(), pictures(40, 0).chunk(2)[rank].split(10), 8)
    torch.save((found.thresholds, found.reached, found.num_frames), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path / "store", tmp_path), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = calibrate(encoder_of(), pictures(40, 0).split(10), 8)
    assert one == other == (alone.thresholds, alone.reached, alone.num_frames)


def test_the_file_keeps_thresholds_to_the_last_bit(tmp_path):
    encoder = encoder_of()
    found = calibrate(encoder, [pictures(8, 0)], 8)
    found.write(tmp_path / "thresholds.json")
    assert Calibration.read(tmp_path / "thresholds.json", encoder.facts()) == found
    model = tiny_model(pooler=DymuPooler(str(tmp_path / "thresholds.json")), encoder=encoder).bfloat16()
    assert tuple(model.pooler.threshold_of_block) == found.thresholds  # no precision setting reaches them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": -2}, "another encoder: its block was 2, here it is 1"),
        ({"config": {"num_heads": 4}}, "another encoder: its config was .*'num_heads': 2.* it is .*'num_heads': 4"),
    ],
)
def test_a_file_of_another_encoder_is_refused(settings, message, tmp_path):
    calibrate(encoder_of(), [pictures(4, 0)], 8).write(tmp_path / "thresholds.json")
    with pytest.raises(UserError, match=f"thresholds.json' was calibrated on {message}.*; write one for this encoder"):
        tiny_model(pooler=DymuPooler(str(tmp_path / "thresholds.json")), encoder=encoder_of(**settings))


@pytest.mark.parametrize("content", ["[]", "{", '{"thresholds": [1]}'])
def test_another_kind_of_file_is_refused(content, tmp_path):
    (tmp_path / "thresholds.json").write_text(content)
    with pytest.raises(UserError, match="is no calibration file"):
        tiny_model(pooler=DymuPooler(str(tmp_path / "thresholds.json")))


@pytest.mark.parametrize("target", [3.9, 16])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(UserError, match=f"tokens_per_frame is {target}; with 16 patches and 3 blocks it is 4 to 15"):
        calibrate(encoder_of(), [pictures(2, 0)], target)


def test_no_frames_and_no_hooks_are_refused():
    with pytest.raises(UserError, match="there are no frames"):
        calibrate(encoder_of(), [pictures(1, 0)[:0]], 8)
    config = {"model_type": "siglip_vision_model", "hidden_size": 8, "num_attention_heads": 2, "patch_size": 4}
    config |= {"intermediate_size": 8, "num_hidden_layers": 2}
    encoder = TransformersEncoder(config, image_size=16)
    encoder.gives = encoder.gives - {"blocks"}
    with pytest.raises(UserError, match="TransformersEncoder runs no hook between its blocks"):
        calibrate(encoder, [pictures(1, 0)], 8)


@pytest.mark.parametrize("setting", ["resume", "ckpt"])
def test_the_mode_reads_weights_by_init_from_alone(setting, tmp_path):
    settings = {"resume": None, "init_from": "run", "ckpt": None}
    assert choose_checkpoint("calibrate", tmp_path, **settings) is None
    with pytest.raises(UserError, match=f"{setting}=x: mode=calibrate does not read it; use init_from=PATH"):
        choose_checkpoint("calibrate", tmp_path, **settings | {setting: "x"})
