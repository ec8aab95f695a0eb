"""``crosslmm cost``: the settings of a run and a few words of its own in, a card out."""

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_crosslmm.compose import ANY_TARGET, compose_overrides
from lightning_crosslmm.cost.card import cost_card
from lightning_crosslmm.cost.hardware import find_gpu
from lightning_crosslmm.cost.sample import Sample
from lightning_crosslmm.cost.table import cost_table
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.short_words import spelled_out

TEXT_TOKENS, ANSWER_TOKENS = 64, 8
"""Of the sample, where not told: a question of a line and a short answer, as in the benchmarks of the paper."""


def cost(words: Sequence[str], conf_dir: Path, as_json: bool) -> str:
    """Write the cost card of a configuration.

    Args:
        words: settings as for ``train.py``; and ``gpu=NAME``, ``text_tokens=N``, ``answer_tokens=N`` and
            ``pooled_per_frame=X``. With a GPU named, ``trainer=gpu`` unless a trainer is chosen.
        conf_dir: folder of ``train.yaml``.
        as_json: JSON instead of a table.

    Raises:
        UserError: the folder is none, a setting is wrong, or a GPU is not in the table.
    """
    own = {"gpu": "", "text_tokens": "", "answer_tokens": "", "pooled_per_frame": ""}
    overrides = []
    for word in words:
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
        else:
            overrides.append(word)
    if not (conf_dir / "train.yaml").is_file():
        raise UserError(
            f"--conf {conf_dir}: has no train.yaml; the configurations lie in the repository and not in the installed "
            f"package, so run this in a checkout, or give its folder with --conf CHECKOUT/conf"
        )
    if own["gpu"]:
        find_gpu(own["gpu"])
        if not any(word.startswith(("trainer=", "trainer.precision=")) for word in overrides):
            overrides.append("trainer=gpu")
    config = compose_overrides(conf_dir, spelled_out(overrides))
    sampling = config.data.sampling
    sample = Sample(
        sampling.num_frames or sampling.max_frames or 0,
        int(_number("text_tokens", own["text_tokens"] or TEXT_TOKENS)),
        int(_number("answer_tokens", own["answer_tokens"] or ANSWER_TOKENS)),
    )
    stated = _number("pooled_per_frame", own["pooled_per_frame"]) if own["pooled_per_frame"] else None
    card = cost_card(config, ANY_TARGET, sample, gpu=own["gpu"] or None, pooled_per_frame=stated)
    return json.dumps(card, indent=1) if as_json else "\n".join(cost_table(card))


def _number(name: str, value: str | int) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{name}={value}: must be a number") from None
