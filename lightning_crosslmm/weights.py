"""Weights of an earlier run for a new model."""

from pathlib import Path

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import ROLES, CrossLMM
from lightning_crosslmm.weight_files import WeightFiles

_AT_A_TIME_BYTES = 2**30  # beside the model itself


def load_weights(model: CrossLMM, path: Path, whole: bool = False) -> dict[str, list[str]]:
    """Take the weights of an earlier run, for a new training (the second stage, for one).

    Fusion may be new: parameters of that role that the checkpoint lacks keep their start. Everything else must be
        there.

    Args:
        model: the model to fill.
        path: what ``find_checkpoint`` gives: of a run, whole or sharded, or exported.
        whole: fusion must be there, too.

    Returns:
        Names that kept their start, by role.

    Raises:
        UserError: not a checkpoint, or one of another configuration; lists what is missing, unexpected or of another
            shape, by role.
    """
    files = WeightFiles(path)
    own = model.state_dict()
    missing = [name for name in own if name not in files.shapes]
    wrong = {
        "missing": [name for name in missing if whole or model.role_of(name) != "fusion"],
        "unexpected": [name for name in files.shapes if name not in own],
        "of another shape": [
            name for name, (shape, _) in files.shapes.items() if name in own and shape != own[name].shape
        ],
    }
    if any(wrong.values()):
        counts = [f"{what}: {_by_role(model, names)}" for what, names in wrong.items() if names]
        raise UserError(
            f"'{path}' is from another configuration ({'; '.join(counts)}); "
            "compose the same encoder, pooler, projector, fusion and llm as the config.yaml beside it"
        )
    for names in files.groups(_AT_A_TIME_BYTES):
        model.load_state_dict(files.read(names), strict=False)
    return {role: [name for name in missing if model.role_of(name) == role] for role in ROLES}


def _by_role(model: CrossLMM, names: list[str]) -> str:
    roles = {role: [name for name in names if model.role_of(name) == role] for role in ROLES}
    return ", ".join(f"{len(found)} of {role}, such as {found[0]}" for role, found in roles.items() if found)
