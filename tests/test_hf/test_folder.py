"""A run that was exported is the run, under transformers' Auto classes: same weights, same logits, same answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lightning_crosslmm.answer import Answerer
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.export import export_run
from lightning_crosslmm.model import CrossLMM
from lightning_crosslmm.video import encode_video
from tests.runs import small_config, write_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIGLIP = (
    "encoder=siglip2_so400m", "encoder.weights=null", "encoder.image_size=32", "encoder.config.hidden_size=32",
    "encoder.config.intermediate_size=48", "encoder.config.num_hidden_layers=3",
    "encoder.config.num_attention_heads=2", "encoder.config.patch_size=8",
)  # fmt: skip
RUNS = {
    "default": (),
    "fusion=none": ("fusion=none", "llm=llama_tiny", "llm.model.config.tie_word_embeddings=false"),
    "fusion=v2v": ("fusion=v2v", "fusion.scope=frame", "llm=qwen3_tiny"),
    "fusion=t2v": ("fusion=t2v", "fusion.key_source=encoder", "decoding=sampling"),
    "siglip": SIGLIP,
    "tome": ("pooler=tome",),
    "dymu": ("pooler=dymu", "pooler.thresholds=0.5", "virtual_unmerging=expanded"),
    "qformer": ("pooler=qformer",),
    "quecc": ("pooler=quecc",),
    "cheap": ("fusion.kv_latent=8", "fusion.t2v_cache=int8"),
    "shared": ("fusion.layers_per_kv=all",),
    "recompute": ("fusion.t2v_cache=recompute",),
    "onevision": ("pooler=llava_onevision", "fusion=none"),
    "lora": ("experiment=lora",),
}


def clip(path: Path) -> Path:
    frames_FHWC = np.random.default_rng(0).integers(0, 255, (8, 48, 32, 3), dtype=np.uint8)
    path.write_bytes(encode_video(frames_FHWC, 4.0))
    return path


def asked(video: Path, question: str = "t2 moon?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video", "path": str(video)}, {"type": "text", "text": question}]}]


def exported(folder: Path, *words: str, **how: Any) -> CrossLMM:
    model = write_run(folder / "run", small_config(*words))
    export_run(folder / "run", folder / "out", form="hf", **how)
    return model


@pytest.mark.parametrize("name", list(RUNS))
def test_it_answers_as_the_run_does(name: str, tmp_path: Path) -> None:
    trained = exported(tmp_path, *RUNS[name])
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    video = clip(tmp_path / "clip.mp4")
    own = Answerer.from_run(tmp_path / "run")
    inputs = processor.apply_chat_template(asked(video), tokenize=True, add_generation_prompt=True)
    torch.manual_seed(3)
    ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    torch.manual_seed(3)
    (said,) = own.ask(video, ["t2 moon?"])
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == said
    batch = model._batch(_inputs(inputs))
    ours, theirs = own.model.run(own.model.prompt(batch)), model.model.run(model.model.prompt(batch))
    if name == "lora":  # merging rounds once; measured: 4e-6 on values up to 4
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        assert not any("lora" in each for each in model.state_dict())
    else:
        assert torch.equal(ours, theirs)
        buffers = dict(trained.named_buffers())
        assert all(torch.equal(buffer, buffers[each]) for each, buffer in model.model.named_buffers())
        assert all(torch.equal(trained.state_dict()[each], tensor) for each, tensor in model.model.state_dict().items())


def _inputs(features: Any) -> Any:
    from lightning_crosslmm.hf.inputs import Inputs

    return Inputs(**features)


def test_it_can_be_saved_again_asked_and_cut_into_files(tmp_path: Path) -> None:
    trained = exported(tmp_path, *SIGLIP, file_bytes=2**16)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert again.config.to_dict()["parts"] == model.config.to_dict()["parts"]
    loaded = Answerer.from_run(tmp_path / "out").model.state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]) and torch.equal(tensor, loaded[name].cpu())
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    inputs = processor.apply_chat_template(asked(clip(tmp_path / "clip.mp4")), tokenize=True)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.generation_config.max_new_tokens == 5


def test_another_precision_keeps_what_pixels_are_normed_with(tmp_path: Path) -> None:
    exported(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.encoder.mean_C11.dtype == torch.float32 and model.model.encoder.mean_C11.sum() == 1.5
    inputs = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(
        asked(clip(tmp_path / "clip.mp4")), tokenize=True, add_generation_prompt=True
    )
    assert model.generate(**inputs.to("cpu", torch.bfloat16)).shape[1] > inputs["input_ids"].shape[1]


def test_a_pooler_of_ones_own_must_be_allowed(tmp_path: Path) -> None:
    words = ("pooler=none", "pooler._target_=tests.trials.Brightest")
    with pytest.raises(UserError, match="tests.trials.Brightest is not run, .* allow its package explicitly"):
        exported(tmp_path, *words)
    assert not (tmp_path / "out").exists()
    export_run(tmp_path / "run", tmp_path / "out", form="hf", allow=["tests.trials"])
    with pytest.raises(UserError, match="tests.trials.Brightest is not run"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", allow=["tests.trials"])
    assert type(model.model.pooler).__name__ == "Brightest"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts["pooler"].update(_target_="os.system"), "pooler._target_: os.system is not run"),
        (lambda parts: parts["encoder"].update(name="${oc.env:HOME}"), "must be the resolved settings of a model"),
        (lambda parts: parts.pop("llm"), "llm.model: is None; a model needs it"),
    ],
)
def test_a_strangers_folder_runs_nothing(change: Any, message: str, tmp_path: Path) -> None:
    exported(tmp_path)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    change(content["parts"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


ALONE = """
import sys, lightning_crosslmm
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = (each.from_pretrained(sys.argv[1]) for each in (AutoModelForImageTextToText, AutoProcessor))
content = [{"type": "video", "path": sys.argv[2]}, {"type": "text", "text": "t2 moon?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(ids, skip_special_tokens=True)[0].strip().encode())
"""


def test_a_process_of_its_own_needs_nothing_but_the_import(tmp_path: Path) -> None:
    exported(tmp_path)
    video = clip(tmp_path / "clip.mp4")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", video], capture_output=True, text=True, cwd=Path.cwd()
    )
    (said,) = Answerer.from_run(tmp_path / "run").ask(video, ["t2 moon?"])
    assert done.stdout.strip() == repr(said.encode()), done.stderr
