"""Weights of an earlier run, or of a LLaVA-OneVision checkpoint, for a new model."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.llm import is_adapter, plain_name
from lightning_crosslmm.model import ROLES, CrossLMM
from lightning_crosslmm.onevision import OnevisionFolder
from lightning_crosslmm.onevision_keys import EMBEDDINGS, HEAD, hub_name, ours_of, role_of
from lightning_crosslmm.pretrained_folder import CONFIG
from lightning_crosslmm.run_folder import find_checkpoint
from lightning_crosslmm.weight_files import WeightFiles

log = logging.getLogger(__name__)

_AT_A_TIME_BYTES = 2**26  # beside the model itself
_TOWER_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.")


def find_start(init_from: str) -> Path | OnevisionFolder:
    """Find the weights that ``init_from`` names.

    Args:
        init_from: a checkpoint, a run folder, what ``crosslmm export`` wrote, or a LLaVA-OneVision checkpoint of
            transformers, a folder or a hub name.

    Raises:
        UserError: there are none, or none that can be taken.
    """
    path = Path(init_from)
    is_ours = (path / "config.yaml").is_file() or not (path / CONFIG).is_file()
    if path.exists() and is_ours:
        return find_checkpoint(path, "init_from", ("best", "last"))
    return OnevisionFolder.open(init_from)


def load_weights(model: CrossLMM, start: Path | OnevisionFolder, whole: bool = False) -> dict[str, list[str]]:
    """Take the weights of an earlier run, for a new training (the second stage, for one), or of LLaVA-OneVision.

    Fusion and adapters (``llm.lora``) may be new: their parameters that the checkpoint lacks keep their start. All else
    must be there. With LLaVA-OneVision the pooler may be new, too, and what the model has no place for is left out: the
    tower past the layer that is read, its last norm and head, the newline and the projector of poolers without them.

    Args:
        model: the model to fill.
        start: what ``find_start`` gives, or a run's checkpoint, whole or sharded, or exported.
        whole: fusion and adapters must be there, too.

    Returns:
        Names that kept their start, by role.

    Raises:
        UserError: not a checkpoint, or one of another configuration; lists what is missing, unexpected or of another
            shape, by role.
    """
    own = model.state_dict()
    source = _look_into(model, start)
    files, places, role_of_stored = source.files, source.places, source.role_of
    filled = {name for names in places.values() for name in names}
    missing = [name for name in own if name not in filled]
    new = [] if whole else [name for name in missing if model.role_of(name) in source.may_be_new or is_adapter(name)]
    wrong = {
        "missing": _by_role(model.role_of, (name for name in missing if name not in new)),
        "unexpected": _by_role(
            role_of_stored, (name for name in places if not places[name] and name not in source.left_out)
        ),
        "of another shape": _by_role(
            role_of_stored,
            (
                name
                for name, (shape, _) in files.shapes.items()
                if any(own[each].shape != shape for each in places[name])
            ),
        ),
    }
    if any(wrong.values()):
        told = "; ".join(f"{what}: {names}" for what, names in wrong.items() if names)
        raise UserError(f"'{source.name}' is from another configuration ({told}); {source.mend}")
    for names in files.groups(_AT_A_TIME_BYTES):
        tensors = files.read([name for name in names if places[name]])
        model.load_state_dict({place: tensors[name] for name in tensors for place in places[name]}, strict=False)
    kept = _by_role(model.role_of, missing) or "nothing", _by_role(role_of_stored, source.left_out) or "nothing"
    log.info("weights of %s: %s keeps its start, %s is left out", source.name, *kept)
    return {role: [name for name in missing if model.role_of(name) == role] for role in ROLES}


@dataclass(frozen=True)
class _Source:
    """Where weights come from: their files, the model's names for each stored one, and what need not agree."""

    name: str
    files: WeightFiles
    places: Mapping[str, list[str]]
    role_of: Callable[[str], str]
    may_be_new: frozenset[str]
    left_out: list[str]
    mend: str


def _look_into(model: CrossLMM, start: Path | OnevisionFolder) -> _Source:
    own = list(model.state_dict())
    # an adapted matrix has another name, and a checkpoint from before the adapters its plain one
    own_name = {plain_name(name): name for name in own} | {name: name for name in own}
    if not isinstance(start, OnevisionFolder):
        files = WeightFiles(start)
        places = {name: [own_name[name]] if name in own_name else [] for name in files.shapes}
        mend = "compose the same encoder, pooler, projector, fusion and llm as the config.yaml beside it"
        return _Source(str(start), files, places, model.role_of, frozenset({"fusion"}), [], mend)
    start.check(model)
    files = WeightFiles(start.weights)
    own_of = {theirs: [own_name[name] for name in names] for theirs, names in ours_of(map(plain_name, own)).items()}
    if model.llm.config.tie_word_embeddings:
        own_of[EMBEDDINGS] += own_of.pop(HEAD)  # one matrix, stored once
    places = {name: own_of.get(hub_name(name), []) for name in files.shapes}
    left_out = [name for name in places if not places[name] and _needs_no_place(model, hub_name(name))]
    mend = f"its weights do not fit its {CONFIG}, or it is not whole: download it again"
    may_be_new = frozenset({"fusion", "pooler"})
    return _Source(str(start.path), files, places, lambda name: role_of(hub_name(name)), may_be_new, left_out, mend)


def _needs_no_place(model: CrossLMM, theirs: str) -> bool:
    layer = _TOWER_LAYER.match(theirs)
    return (
        (layer is not None and int(layer[1]) > model.encoder.read_block)
        or theirs.startswith(("vision_tower.vision_model.post_layernorm.", "vision_tower.vision_model.head."))
        or role_of(theirs) == "pooler"
        or (role_of(theirs) == "projector" and model.projector is None)
        or (theirs == HEAD and bool(model.llm.config.tie_word_embeddings))
    )


def _by_role(role: Callable[[str], str], names: Iterable[str]) -> str:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(role(name), []).append(name)
    return ", ".join(f"{len(found[each])} of {each}, such as {found[each][0]}" for each in ROLES if each in found)
