"""The page of an exported model: what it is and where it comes from, as far as its run recorded it."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

_ROLES = {
    "Encoder": ("encoder.name", "encoder.weights", "encoder._target_"),
    "Pooler": ("pooler._target_",),
    "Fusion": ("fusion._target_",),
    "LLM": ("llm.model.weights", "llm.model.config.model_type"),
}
_FUSION = ("v2v", "t2v", "interval", "scope", "key_source")

_HOW_HF = """```python
import lightning_crosslmm  # tells the Auto classes about it
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
messages = [{"role": "user", "content": [{"type": "video", "path": VIDEO}, {"type": "text", "text": QUESTION}]}]
inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
ids = model.generate(**inputs.to(model.device))
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

"""
_HOW_ASK = """```bash
pip install lightning-crosslmm
crosslmm ask VIDEO "QUESTION" --run FOLDER
```
"""


def model_card(
    title: str, form: str, config: DictConfig, provenance: Mapping[str, Any], metrics: Mapping[str, Any], has_cost: bool
) -> str:
    """Write a model card in Markdown, headed by YAML that a hub reads.

    What the run did not record is left out.

    Args:
        title: of the page.
        form: ``hf`` or ``safetensors``, which says how to load the folder.
        config: of the run, with the checkpoints that it began from.
        provenance: ``provenance.json``, with what was exported.
        metrics: ``metrics.json``.
        has_cost: a ``cost.json`` lies beside it.
    """
    head = {
        "library_name": "transformers" if form == "hf" else "lightning-crosslmm",
        "pipeline_tag": "video-text-to-text",
    }
    bases = [OmegaConf.select(config, path) for path in ("llm.model.weights", "encoder.weights")]
    hub = [name for name in bases if name and name.count("/") == 1 and not name.startswith((".", "/"))]
    tags = {"tags": ["crosslmm", "video"], **({"base_model": hub} if hub else {})}
    sections = [
        f"---\n{OmegaConf.to_yaml(OmegaConf.create({**head, **tags}))}---\n\n# {title}\n",
        "A video LMM trained with lightning_crosslmm. `config.yaml` holds every setting, `provenance.json` the whole "
        f"record{', `cost.json` what it costs' if has_cost else ''}.\n",
        _table("What it is", _parts(config)),
        f"## How to load it\n\n{_HOW_HF if form == 'hf' else ''}{_HOW_ASK}",
        _table("Metrics", {name: f"{value:.6g}" for name, value in metrics.items() if isinstance(value, float | int)}),
        _table("Where it comes from", _origin(provenance)),
    ]
    return "\n".join(section for section in sections if section)


def _parts(config: DictConfig) -> dict[str, Any]:
    rows = {
        role: next(filter(None, (OmegaConf.select(config, path) for path in paths)), None)
        for role, paths in _ROLES.items()
    }
    fusion = {name: config.fusion[name] for name in _FUSION if name in config.fusion}
    if rows["Fusion"] and fusion:
        rows["Fusion"] = ", ".join(f"{name} {value}" for name, value in fusion.items())
    lora = OmegaConf.select(config, "llm.lora")
    rows["LoRA"] = f"rank {lora.rank}, merged" if lora and "rank" in lora else lora and "merged"
    rows["Frames"] = OmegaConf.select(config, "data.sampling.num_frames") or OmegaConf.select(
        config, "data.sampling.max_frames"
    )
    return rows


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    exported, packages = provenance.get("exported", {}), provenance.get("packages") or {}
    fingerprint = provenance.get("data_fingerprint")
    if isinstance(fingerprint, Mapping):
        fingerprint = ", ".join(f"{split} `{value}`" for split, value in fingerprint.items())
    changed = " and uncommitted changes" if provenance.get("uncommitted_changes") else ""
    return {
        "Checkpoint": exported.get("checkpoint"),
        "Steps": exported.get("step"),
        "Chosen by": exported.get("monitor"),
        "Commit": provenance.get("commit") and f"`{provenance['commit']}`{changed}",
        "Data": fingerprint,
        "Seed": provenance.get("seed"),
        "Started": provenance.get("started"),
        "Ended": provenance.get("ended"),
        "Device": provenance.get("device"),
        "Processes": provenance.get("processes"),
        "Versions": ", ".join(f"{name} {version}" for name, version in packages.items() if version) or None,
    }


def _table(title: str, rows: Mapping[str, Any]) -> str:
    known = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items() if value is not None]
    return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *known, ""]) if known else ""
