"""A run that began from pretrained checkpoints or files is built anew without them, and is the same model."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import SiglipVisionConfig, SiglipVisionModel

from lightning_crosslmm.answer import Answerer
from lightning_crosslmm.compose import ANY_TARGET, build_model
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.export import export_run
from lightning_crosslmm.llm import load_llm
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.pooler.calibration import calibrate
from lightning_crosslmm.standalone import config_of, leans_on_files, parts_of, standalone
from tests.runs import small_config, write_run

SIGLIP = (
    "encoder=siglip2_so400m", "encoder.image_size=32", "encoder.config.hidden_size=32",
    "encoder.config.intermediate_size=48", "encoder.config.num_hidden_layers=3",
    "encoder.config.num_attention_heads=2", "encoder.config.patch_size=8",
)  # fmt: skip


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[str, ...]:
    """Checkpoints that hold more than the config claims: another rotary base, another epsilon."""
    plain = small_config(*SIGLIP, "encoder.weights=null")
    shape = OmegaConf.to_container(plain.llm.model.config)
    rotary = {"rope_theta": 77.0, "rope_type": "default"}
    load_llm({**shape, "rope_parameters": rotary}).save_pretrained(tmp_path / "llm")
    shape = {key: value for key, value in plain.encoder.config.items() if key != "model_type"}
    SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, layer_norm_eps=0.5)).save_pretrained(
        tmp_path / "vision"
    )
    return (*SIGLIP, f"llm.model.weights={tmp_path / 'llm'}", f"encoder.weights={tmp_path / 'vision'}")


def settled(config: DictConfig) -> tuple[DictConfig, CrossLMM]:
    with torch.device("meta"):
        return standalone(config, build_model(config, ANY_TARGET)), build_model(config, ANY_TARGET)


def test_all_that_a_checkpoint_decided_is_written_down(pretrained: tuple[str, ...]) -> None:
    config = small_config(*pretrained)
    alone, _ = settled(config)
    assert leans_on_files(config) and not leans_on_files(alone) and config.llm.model.weights
    first, second = build_model(config, ANY_TARGET), build_model(alone, ANY_TARGET)
    assert alone.llm.model.config.rope_parameters.rope_theta == 77.0 and alone.encoder.config.layer_norm_eps == 0.5
    assert alone.encoder.config.num_hidden_layers == 3 and second.encoder.read_block == first.encoder.read_block == 1
    assert torch.equal(first.llm.model.rotary_emb.inv_freq, second.llm.model.rotary_emb.inv_freq)
    passing = ("_name_or_path", "architectures", "dtype", "transformers_version")
    told = [
        {key: value for key, value in model.llm.config.to_dict().items() if key not in passing}
        for model in (first, second)
    ]
    assert told[0] == told[1]


def test_a_run_is_asked_and_exported_without_its_beginnings(pretrained: tuple[str, ...], tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", small_config(*pretrained))
    export_run(tmp_path / "run", tmp_path / "out")
    asked = Answerer.from_run(tmp_path / "run").model
    shutil.rmtree(tmp_path / "llm"), shutil.rmtree(tmp_path / "vision")
    published = Answerer.from_run(tmp_path / "out").model
    rotary = model.llm.model.rotary_emb.inv_freq
    assert all(torch.equal(rotary, each.llm.model.rotary_emb.inv_freq.cpu()) for each in (asked, published))
    with pytest.raises(UserError, match=r"llm.model.weights='.*llm': no copy of its config.json is at hand"):
        Answerer.from_run(tmp_path / "run")


def test_thresholds_of_a_file_are_written_down(tmp_path: Path) -> None:
    encoder = build_model(small_config(), ANY_TARGET).encoder
    frames_FCHW = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = calibrate(encoder, [frames_FCHW], tokens_per_frame=9)
    found.write(tmp_path / "calibration.json")
    config = small_config("pooler=dymu", f"pooler.thresholds={tmp_path / 'calibration.json'}")
    alone, model = settled(config)
    assert leans_on_files(config) and not leans_on_files(alone)
    assert tuple(alone.pooler.thresholds) == tuple(found.thresholds)
    again = build_model(alone, ANY_TARGET)
    assert tuple(again.pooler.threshold_of_block) == tuple(model.pooler.threshold_of_block)
    alone.pooler.thresholds = [0.5]
    with pytest.raises(UserError, match="pooler.thresholds has 1 cosines; this encoder runs 2 blocks"):
        build_model(alone, ANY_TARGET)


def test_parts_go_out_and_come_back() -> None:
    config = small_config("experiment=lora")
    parts = parts_of(config)
    assert "lora" not in parts["llm"] and "data" not in parts
    assert build_model(config_of(parts, "x"), ANY_TARGET).fused_layers == (0, 2)
    for wrong in (None, [1], {"encoder": {"name": "${oc.env:HOME}"}}):
        with pytest.raises(UserError, match="x: 'parts' must be the resolved settings of a model"):
            config_of(wrong, "x")
    for part, name in ((parts["llm"]["model"], "weights"), (parts["pooler"], "thresholds")):
        part[name] = "somewhere"
        with pytest.raises(UserError, match="x: 'parts' name files or checkpoints beside the folder"):
            config_of(parts, "x")
        part.pop(name)


def test_code_beside_a_checkpoint_is_not_given_away(pretrained: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="llm.model.trust_remote_code=true: the LLM is code that lies beside"):
        settled(small_config(*pretrained, "llm.model.trust_remote_code=true"))
