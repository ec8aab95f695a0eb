"""A card says what the run recorded, leaves out what it did not, and is headed by YAML."""

import json
import re
from pathlib import Path

import yaml

import train
from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.export import export_run
from lightning_crosslmm.model_card import model_card
from tests.runs import small_config, write_run

PROVENANCE = {
    "commit": "abc",
    "uncommitted_changes": True,
    "data_fingerprint": {"train": "f1", "val": "f2"},
    "packages": {"torch": "2.11", "xformers": None},
    "seed": 3,
    "device": "cpu",
    "ended": None,
    "exported": {"checkpoint": "step-00000001", "step": 1, "monitor": "val/accuracy"},
}


def head(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", card, re.DOTALL)[1])


def test_it_says_what_is_known() -> None:
    config = compose_overrides(train.CONF_DIR, ["experiment=[crosslmm_2b,lora]", "data.train=shards"])
    card = model_card("mine", "hf", config, PROVENANCE, {"val/accuracy": 0.51234567, "val/loss": None}, has_cost=True)
    assert head(card)["library_name"] == "transformers" and head(card)["pipeline_tag"] == "video-text-to-text"
    assert head(card)["base_model"] == ["Qwen/Qwen2.5-1.5B-Instruct", "google/siglip2-so400m-patch14-384"]
    for row in (
        "| LLM | Qwen/Qwen2.5-1.5B-Instruct |", "| LoRA | rank 16, merged |", "| val/accuracy | 0.512346 |",
        "| Commit | `abc` and uncommitted changes |", "| Data | train `f1`, val `f2` |", "| Versions | torch 2.11 |",
        "| Seed | 3 |", "| Steps | 1 |", "| Frames | 32 |",
    ):  # fmt: skip
        assert row in card, row
    assert "AutoModelForImageTextToText" in card and "`cost.json`" in card
    assert "None" not in card and "Ended" not in card and "val/loss" not in card


def test_it_says_nothing_that_is_not_known() -> None:
    card = model_card("mine", "safetensors", small_config(), {}, {}, has_cost=False)
    assert head(card) == {
        "library_name": "lightning-crosslmm",
        "pipeline_tag": "video-text-to-text",
        "tags": ["crosslmm", "video"],
    }
    assert "AutoModel" not in card and "crosslmm ask" in card
    assert not any(word in card for word in ("None", "Metrics", "comes from", "LoRA", "cost.json"))


def test_it_lies_in_every_export(tmp_path: Path) -> None:
    write_run(tmp_path / "run", small_config())
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(PROVENANCE))
    (tmp_path / "run" / "metrics.json").write_text('{"val/accuracy": 0.25}')
    (tmp_path / "run" / "cost.json").write_text('{"kind": "card"}')
    for form in ("safetensors", "hf"):
        export_run(tmp_path / "run", tmp_path / form, form=form)
        card = (tmp_path / form / "README.md").read_text()
        assert "# run\n" in card and "| val/accuracy | 0.25 |" in card and "| Checkpoint | step-00000001 |" in card
        assert head(card)["library_name"] == {"hf": "transformers"}.get(form, "lightning-crosslmm")
        assert (tmp_path / form / "cost.json").read_text() == '{"kind": "card"}'
