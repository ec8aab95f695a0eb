"""Low-rank adapters on the LLM's own matrices (peft's only door), and their sum with what they adapt."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn
from transformers import PreTrainedModel

from lightning_crosslmm.errors import UserError, nearest

_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = "default"
_PART = re.compile(r"(.+)\.(base_layer\.weight|base_layer\.bias|lora_[AB]\.default\.weight)")


@dataclass(frozen=True)
class Lora:
    """Which matrices of the decoder layers get an adapter, and of what shape.

    ``W x + (alpha / rank) B A dropout(x)``, A (rank, in) random, B (out, rank) zero: a fresh model is unchanged.

    Source: LoRA, arXiv:2106.09685, Eq. (3) and section 4.1.
    Differs: the paper adapts query and value projections; all seven matrices of a layer are the default here, as later
        work found better at the same size. Fusion blocks inside the layers are not adapted: they are trained whole.

    Args:
        rank: of each adapter, 1 or more.
        alpha: scale times `rank`, above 0.
        dropout: share of the adapter's inputs dropped in training, 0 <= dropout < 1.
        targets: names of the matrices, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.

    Raises:
        UserError: a value outside its range, or an unknown name.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Sequence[str] = _MATRICES

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"llm.lora: rank {self.rank} must be 1 or more, alpha {self.alpha} above 0, dropout {self.dropout} at "
                "least 0 and below 1"
            )
        unknown = [name for name in self.targets if name not in _MATRICES]
        if unknown or not self.targets:
            wrong = f"has '{unknown[0]}'{nearest(unknown[0], _MATRICES)}" if unknown else "is empty"
            raise UserError(f"llm.lora.targets {wrong}; right are {', '.join(_MATRICES)}")

    def adapt(self, llm: PreTrainedModel) -> None:
        """Put adapters into an LLM; fusion blocks may be in its layers already, and stay as they are.

        Raises:
            UserError: peft is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError(
                f"llm.lora={{rank: {self.rank}, ...}} needs peft: pip install 'lightning-crosslmm[lora]' ({error})"
            ) from error
        names = [
            name
            for name, part in llm.named_modules()
            if isinstance(part, nn.Linear) and ".fusion." not in name and name.rpartition(".")[2] in self.targets
        ]
        settings: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        inject_adapter_in_model(LoraConfig(target_modules=names, **settings), llm, _ADAPTER)


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is an adapter's."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """Say what an adapted matrix, or its bias, is called in a model without adapters."""
    return name.replace(".base_layer.", ".")


def merged_shapes(shapes: Mapping[str, tuple[Size, torch.dtype]]) -> dict[str, tuple[Size, torch.dtype]]:
    """List weights as they are once adapters are merged: under plain names, without adapters."""
    return {plain_name(name): shape for name, shape in shapes.items() if not is_adapter(name)}


def read_merged(
    read: Callable[[Iterable[str]], dict[str, Tensor]],
    names: Sequence[str],
    stored: Iterable[str],
    scale: float,
) -> dict[str, Tensor]:
    """Read some weights with their adapters added: ``W + scale B A``, in float32 and rounded once to W's dtype.

    Args:
        read: gives tensors by their stored names.
        names: plain names.
        stored: every name there is.
        scale: alpha / rank.
    """
    parts: dict[str, dict[str, str]] = {name: {"": name} for name in names}
    for name in stored:
        match = _PART.fullmatch(name)
        if match and (plain := f"{match[1]}.{'bias' if match[2].endswith('bias') else 'weight'}") in parts:
            parts[plain][match[2].split(".")[0]] = name
            parts[plain].pop("", None)
    tensors = read([name for own in parts.values() for name in own.values()])
    merged = {}
    for plain, own in parts.items():
        weight = tensors[own.get("") or own["base_layer"]]
        if "lora_A" in own:
            update = tensors[own["lora_B"]].float() @ tensors[own["lora_A"]].float()
            weight = (weight.float() + scale * update).to(weight.dtype)
        merged[plain] = weight
    return merged
