"""Names of weights, ours and those of a LLaVA-OneVision checkpoint of transformers (the llava-hf layout), both ways.

Three spellings of theirs are around: that of the hub's files, of the modules since transformers 4.52, and without
``vision_model`` since 5.20. All mean the same; the hub's is the one that every version reads, and what we write.
"""

import re
from collections.abc import Iterable

NEWLINE = "image_newline"
HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.model.embed_tokens.weight"

_THEIRS = (
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"^(?:model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.image_newline$", NEWLINE),
    (r"^(?:language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"^(?:language_model\.model|model\.language_model)\.", "language_model.model."),
)
_OURS = (
    (r"^encoder\.tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    # a second projector, for source tokens alone, reads the same width and starts from the same weights
    (r"^(?:source_)?projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^(?:source_)?projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^pooler\.newline_D$", NEWLINE),
    (r"^llm\.lm_head\.", "language_model.lm_head."),
    (r"^llm\.model\.(?!layers\.\d+\.fusion\.)", "language_model.model."),
)


def hub_name(theirs: str) -> str:
    """Spell one of their names as the hub's files do; a name that is none of theirs stays as it is."""
    return _renamed(theirs, _THEIRS) or theirs


def theirs_of(own: str) -> str | None:
    """Name one of our weights as the hub's files do; None where their architecture has no place for it.

    Args:
        own: a name in the ``state_dict`` of a `CrossLMM` whose projector has two linear layers and no norm.
    """
    return _renamed(own, _OURS)


def ours_of(own: Iterable[str]) -> dict[str, list[str]]:
    """Say where each of their weights goes.

    Args:
        own: every name in the ``state_dict`` of a `CrossLMM`.

    Returns:
        Our names by the hub's name; those that their architecture has no place for are left out.
    """
    found: dict[str, list[str]] = {}
    for name in own:
        if (theirs := theirs_of(name)) is not None:
            found.setdefault(theirs, []).append(name)
    return found


def role_of(hub_name: str) -> str:
    """Name the role that one of their weights has here."""
    roles = {
        "vision_tower": "encoder",
        "multi_modal_projector": "projector",
        NEWLINE: "pooler",
        "language_model": "llm",
    }
    return roles.get(hub_name.split(".", 1)[0], "llm")


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    for pattern, prefix in rules:
        renamed, count = re.subn(pattern, prefix, name)
        if count:
            return renamed
    return None
