import json

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.llm import load_llm
from tests.tiny import LLM_SHAPE, tiny_llm


def claims(kind, **changes):
    return {"model_type": kind, **LLM_SHAPE, **({"head_dim": 8} if kind == "qwen3" else {}), **changes}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_a_folder_saved_by_transformers(kind, shard_size, tmp_path):
    torch.manual_seed(0)
    saved = tiny_llm(kind)
    saved.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    torch.manual_seed(1)
    loaded = load_llm(claims(kind), weights=str(tmp_path), attention="eager")
    assert type(loaded) is type(saved) and loaded.config._attn_implementation == "eager"
    for (name, found), (_, expected) in zip(loaded.named_parameters(), saved.named_parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_a_checkpoint_in_half_precision_gets_master_weights_in_single(tmp_path):
    saved = tiny_llm().bfloat16()
    saved.save_pretrained(tmp_path)
    llm = load_llm(claims("qwen2"), weights=str(tmp_path))
    for name, parameter in llm.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, saved.get_parameter(name).float()), name


def test_geometry_alone_gives_random_weights_in_single_precision():
    llm = tiny_llm("llama", attention="eager", num_hidden_layers=2)
    assert len(llm.model.layers) == 2 and llm.config._attn_implementation == "eager"
    assert next(llm.parameters()).dtype == torch.float32


def test_on_the_meta_device_the_geometry_is_the_checkpoints(tmp_path):
    tiny_llm("qwen2", rms_norm_eps=1e-3, hidden_act="relu").bfloat16().save_pretrained(tmp_path)
    with torch.device("meta"):
        llm = load_llm({"model_type": "qwen2"}, weights=str(tmp_path), attention="eager")
    assert (llm.config.rms_norm_eps, llm.config.hidden_act, llm.config.hidden_size) == (1e-3, "relu", 32)
    assert llm.config._attn_implementation == "eager"
    assert {(weight.device.type, weight.dtype) for weight in llm.parameters()} == {("meta", torch.float32)}


def test_nothing_is_loaded_on_the_meta_device(tmp_path):
    with torch.device("meta"):
        llm = load_llm(claims("qwen2"), weights=str(tmp_path / "absent"))
    assert next(llm.parameters()).device.type == "meta"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "qwen"},
            "llm.model.config.model_type is 'qwen'; right are qwen2, qwen3, llama; did you mean 'qwen",
        ),
        ({}, "llm.model.config.model_type is ''"),
        (
            {"model_type": "qwen2", "hiddensize": 8},
            "llm.model.config has no entry 'hiddensize'; did you mean 'hidden_size'",
        ),
    ],
)
def test_misspelt_geometry_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        load_llm(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "llm.model.config.num_hidden_layers is 5, but the checkpoint .* has 4"),
        ({"model_type": "llama"}, "llm.model.config.model_type is llama, but the checkpoint .* has qwen2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, but the checkpoint .* has False"),
    ],
)
def test_a_checkpoint_that_contradicts_the_geometry_is_refused(changes, message, tmp_path):
    tiny_llm().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_llm(claims("qwen2", **changes), weights=str(tmp_path))


@pytest.mark.parametrize("content", [None, "not json", json.dumps({"model_type": "qwen2"})])
def test_a_folder_that_is_no_checkpoint_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        UserError, match=f"llm.model.weights={tmp_path}: (has no config.json|config.json is damaged|.*no weights)"
    ):
        load_llm({"model_type": "qwen2"}, weights=str(tmp_path))


def test_a_missing_shard_is_named(tmp_path):
    tiny_llm().save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(UserError, match="model-00001-of"):
        load_llm(claims("qwen2"), weights=str(tmp_path))


def test_a_damaged_file_is_refused(tmp_path):
    tiny_llm().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="model.safetensors is damaged or no safetensors file"):
        load_llm(claims("qwen2"), weights=str(tmp_path))


def test_an_attention_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="attention 'flash_attention_9' could not be built"):
        load_llm(claims("qwen2"), attention="flash_attention_9")
