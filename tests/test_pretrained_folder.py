"""Folders that are no checkpoint, not whole, pickled or full of code: refused by every door before a weight is read."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from lightning_crosslmm.encoder import TransformersEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.llm import load_llm
from lightning_crosslmm.weights import find_start
from tests.onevision import LLM, SIDE, TOWER, theirs

ROOT = Path(__file__).resolve().parent.parent
CODE = """
from transformers import Qwen2ForCausalLM


class Mine(Qwen2ForCausalLM):
    pass
"""


def small_llm():
    return load_llm({"model_type": "qwen2", **LLM})


def small_tower():
    return SiglipVisionModel(SiglipVisionConfig(**TOWER, image_size=SIDE))


# each way in: what makes a folder, what opens it, and the setting that names it
DOORS = {
    "init_from": (theirs, find_start),
    "llm.model.weights": (small_llm, lambda folder: load_llm({"model_type": "qwen2"}, weights=folder)),
    "encoder.weights": (
        small_tower,
        lambda folder: TransformersEncoder({"model_type": "siglip_vision_model"}, SIDE, weights=folder),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of each kind, of one file and of several."""
    made = {}
    for setting, (make, _) in DOORS.items():
        for size in ("5GB", "10KB"):
            made[setting, size] = tmp_path_factory.mktemp("saved")
            make().save_pretrained(made[setting, size], max_shard_size=size)
    return made


def write_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BROKEN = {
    "nothing there": (
        "5GB",
        lambda folder: shutil.rmtree(folder) or folder.mkdir(),
        "has no config.json|holds no checkp",
    ),
    "no weights": ("5GB", lambda folder: (folder / "model.safetensors").unlink(), "has a config.json and no weights"),
    "half a config": ("5GB", lambda folder: cut(folder / "config.json"), "config.json is damaged"),
    "a list for a config": (
        "5GB",
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json holds no settings",
    ),
    "half a file": ("5GB", lambda folder: cut(folder / "model.safetensors"), "is cut short, [0-9]+ of [0-9]+ bytes"),
    "a file's beginning": ("5GB", lambda folder: cut(folder / "model.safetensors", 0.01), "is cut short, [0-9]+ of"),
    "an empty file": (
        "5GB",
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "is cut short, 0 of 8 bytes",
    ),
    "a page of a web site": (
        "5GB",
        lambda folder: (folder / "model.safetensors").write_bytes(b"<html><body>not found</body></html>"),
        "model.safetensors is (damaged|cut short)",
    ),
    "pickled": ("5GB", pickled, "has pickled weights .pytorch_model.bin. and no safetensors.*convert"),
    "a missing shard": (
        "10KB",
        lambda folder: sorted(folder.glob("*-of-*"))[1].unlink(),
        "1 of [0-9]+ files are missing",
    ),
    "half a shard": ("10KB", lambda folder: cut(sorted(folder.glob("*-of-*"))[1]), "model-00002-of.* is cut short"),
    "half an index": ("10KB", lambda folder: cut(folder / "model.safetensors.index.json"), "index.json is damaged"),
    "an index of nothing": (
        "10KB",
        lambda folder: write_json(folder / "model.safetensors.index.json", weight_map={}),
        "lists no weights",
    ),
    "an index that leads out": (
        "10KB",
        lambda folder: write_json(folder / "model.safetensors.index.json", weight_map={"a": "../other.safetensors"}),
        "names '../other.safetensors', which is not in the folder",
    ),
    "code": (
        "5GB",
        lambda folder: write_json(folder / "config.json", auto_map={"AutoModel": "mine.Mine"}),
        "wants to run code of its own .auto_map in config.json: mine.Mine.*trust_remote_code",
    ),
}


@pytest.mark.parametrize("setting", DOORS)
@pytest.mark.parametrize("how", BROKEN)
def test_it_is_refused_with_the_reason(how, setting, saved, tmp_path):
    size, break_it, says = BROKEN[how]
    folder = tmp_path / "folder"
    shutil.copytree(saved[setting, size], folder)
    break_it(folder)
    with pytest.raises(UserError, match=rf"(?s){setting}={folder}: .*({says})"):
        DOORS[setting][1](str(folder))


@pytest.mark.parametrize("setting", ["llm.model.weights", "encoder.weights"])
def test_missing_weights_and_other_shapes_are_told_by_name(setting, saved, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(saved[setting, "5GB"], folder)
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if ".layers.1." in name and state[name].ndim == 2)
    save_file({**state, name: torch.zeros(3, 5)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 weights have another shape .*{name}: \(3, 5\) and not"):
        DOORS[setting][1](str(folder))
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{setting}={folder}: lacks 1 weights, such as {name}"):
        DOORS[setting][1](str(folder))


def test_what_there_is_no_place_for_is_logged(saved, caplog, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(saved["llm.model.weights", "5GB"], folder)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.extra": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("INFO", logger="lightning_crosslmm.pretrained_folder"):
        DOORS["llm.model.weights"][1](str(folder))
    assert f"llm.model.weights={folder}: left out 1 weights, such as model.extra" in caplog.messages


def test_code_runs_where_it_is_allowed_and_nowhere_else(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "trusted_folder"
    shutil.copytree(saved["llm.model.weights", "5GB"], folder)
    (folder / "mine.py").write_text(CODE)
    write_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    with pytest.raises(UserError, match="wants to run code of its own"):
        load_llm({"model_type": "qwen2"}, weights=str(folder))
    llm = load_llm({"model_type": "qwen2"}, weights=str(folder), trust_remote_code=True)
    assert type(llm).__name__ == "Mine" and llm.dtype == torch.float32


def test_a_pickle_is_never_opened(saved, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for setting, (_, opens) in DOORS.items():
        folder = tmp_path / setting
        shutil.copytree(saved[setting, "5GB"], folder)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
        with pytest.raises(UserError, match="pickled"):
            opens(str(folder))
    assert not (tmp_path / "ran").exists()


PEAK = """
import json, re, sys, threading
from pathlib import Path
import torch
from lightning_crosslmm.llm import load_llm
from lightning_crosslmm.weights import find_start, load_weights
from tests.onevision import ours

def held():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not done.wait(0.002):
        peaks.append(held())

model, folder = ours(llm=json.loads(sys.argv[2])), sys.argv[1]
before, peaks, done = held(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
load_weights(model, find_start(folder))
done.set()
watcher.join()
print((max(peaks) - before) / sum(weight.numel() * 4 for weight in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_no_second_copy(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 2000}
    theirs(llm=shape).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 9e7
    words = [str(tmp_path), json.dumps(shape)]
    done = subprocess.run([sys.executable, "-c", PEAK, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 0.8
