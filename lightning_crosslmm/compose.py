"""Configs: composed, explained, built, saved and loaded. The library's only door to Hydra and OmegaConf."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.run_folder import replacing
from lightning_crosslmm.targets import check_node

if TYPE_CHECKING:
    from lightning_crosslmm.llm import Lora
    from lightning_crosslmm.model import CrossLMM

ANY_TARGET = ("",)
"""For a config its user runs himself: every module that can be imported."""

PART_TARGETS = tuple(
    f"lightning_crosslmm.{part}"
    for part in ("encoder", "pooler", "projector", "fusion", "llm", "decoding", "optim", "video.FrameSampling")
)
"""For the config of a run folder, which may be a stranger's: the parts of a model and nothing else of the library."""

_COMPOSING_FAILS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)


def compose_overrides(conf_dir: Path, overrides: Sequence[str]) -> DictConfig:
    """Compose ``train.yaml`` of a folder with overrides, as the command line would.

    Args:
        conf_dir: folder of ``train.yaml`` and its groups.
        overrides: words such as ``pooler=max`` (an arm) or ``optim.weight_decay=0`` (a value).

    Returns:
        The composed config, interpolations unresolved.

    Raises:
        UserError: an unknown group, arm or key, a setting given twice, bad grammar; with the nearest right one.
    """
    if not (conf_dir / "train.yaml").is_file():
        raise UserError(f"{conf_dir}: has no train.yaml; give the folder that holds it")
    try:
        config = _compose(conf_dir, overrides)
        _refuse_ineffective(_parse(overrides), conf_dir)
    except _COMPOSING_FAILS as error:
        raise UserError(explain(error, conf_dir, overrides)) from error
    return config


def check_command_line(conf_dir: Path, words: Sequence[str]) -> list[DictConfig]:
    """Compose everything a command line asks for, every job of a sweep too, so that mistakes show before work starts.

    Args:
        conf_dir: folder of ``train.yaml``.
        words: the command line without the program. With a flag of Hydra other than ``-m`` nothing is checked.

    Returns:
        The config of each job; none where nothing was checked.

    Raises:
        UserError: see :func:`compose_overrides`; or a setting that must be given and is not.
    """
    flags = {word for word in words if word.startswith("-")}
    if flags - {"-m", "--multirun"}:
        return []
    overrides = [word for word in words if word not in flags]
    try:
        parsed = _parse(overrides)
    except OverrideParseException as error:
        raise UserError(explain(error, conf_dir, overrides)) from error
    for override in parsed:
        if flags and override.key_or_group == "run_dir":
            raise UserError(
                f"{override.input_line}: the jobs of a sweep have folders of their own; use hydra.sweep.dir=PATH"
            )
        if not flags and override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: several values; add -m to run one job for each, or write key=[a,b]"
            )
    jobs = [compose_overrides(conf_dir, job) for job in itertools.product(*(_values(override) for override in parsed))]
    for config in jobs:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{missing[0]}: must be given; write {missing[0]}=...")
    return jobs


def explain(error: Exception, conf_dir: Path, overrides: Sequence[str]) -> str:
    """Make one message from an error of composing: what was typed, and what would be right."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: is no setting; write key=value, and quote values that hold any of ()[]{{}}:= or spaces"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, arm = error.missing_cfg_file.rpartition("/")
        arms = sorted(error.options or _groups(conf_dir).get(group, []))
        return f"{group}={arm}: {group} has no arm '{arm}'{nearest(arm, arms)}; it has {', '.join(arms) or 'none'}"
    try:
        _refuse_unknown(_parse(overrides), conf_dir)
    except UserError as found:
        return str(found)
    except _COMPOSING_FAILS:
        pass  # then the error speaks for itself
    cause = error.__cause__ or error
    return f"{' '.join(overrides) or conf_dir / 'train.yaml'}: {' '.join(str(cause).split())}"


def instantiate(config: DictConfig, allow: Sequence[str], **objects: Any) -> Any:
    """Build what a config describes: every node with a ``_target_``, innermost first.

    Args:
        config: a node; a mapping without ``_target_`` gives a dict of what its values describe.
        allow: packages or names of what may be called, :data:`ANY_TARGET` or :data:`PART_TARGETS`.
        objects: further arguments of the outermost target, already built.

    Returns:
        The object; arguments are plain dicts, lists and values, no OmegaConf containers.

    Raises:
        UserError: a target that is not allowed or does not exist, an argument that does not fit, or what the class
            itself refused. Names the path in the config and the class.
    """
    where = config._get_full_key(None)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or where}: {' '.join(str(error).splitlines()[:1])}") from error
    for path, node in _walk(plain, where):
        if isinstance(node, dict) and "_target_" in node:
            check_node(node, path, allow, objects if node is plain else {})
    try:
        return hydra_instantiate(config, _convert_="all", **objects)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        target = config.get("_target_", "its parts")
        raise UserError(f"{where}: {target} cannot be built: {error.__cause__ or error}") from error


def build_model(config: DictConfig, allow: Sequence[str]) -> "CrossLMM":
    """Build the model of a config from its parts.

    Args:
        config: composed; reads the groups ``encoder``, ``pooler``, ``projector``, ``fusion`` and ``llm.model``, and
            ``virtual_unmerging``.
        allow: see :func:`instantiate`.

    Returns:
        The model, on the CPU, with the weights its parts load or draw.

    Raises:
        UserError: a part is missing or cannot be built.
    """
    from lightning_crosslmm.model import CrossLMM  # here, so that composing alone does not import torch

    parts = {}
    for name, path in dict(
        encoder="encoder", pooler="pooler", projector="projector", fusion="fusion", llm="llm.model"
    ).items():
        node = OmegaConf.select(config, path)
        if not isinstance(node, DictConfig):
            raise UserError(f"{path}: is {node}; a model needs it, choose an arm with {name}=...")
        parts[name] = instantiate(node, allow)
    model = CrossLMM(**parts, virtual_unmerging=config.get("virtual_unmerging", "none"))  # older runs have none
    model.checks_pooler = bool(config.get("check_pooler"))
    if (adapters := lora_of(config)) is not None:
        adapters.adapt(model.llm)
    return model


def lora_of(config: DictConfig) -> "Lora | None":
    """Read ``llm.lora``: adapters on the LLM's matrices, or None.

    Raises:
        UserError: it is no mapping, or holds an entry that does not fit.
    """
    from lightning_crosslmm.llm import Lora

    node = OmegaConf.select(config, "llm.lora")  # older runs have none
    if node is None:
        return None
    settings: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else None
    if settings is None:
        raise UserError(f"llm.lora: is {node}; write llm.lora={{rank: 16}}, or null for none")
    check_node({**settings, "_target_": "lightning_crosslmm.llm.Lora"}, "llm.lora", PART_TARGETS, {})
    return Lora(**settings)


def save_resolved(config: DictConfig, run_dir: Path) -> None:
    """Write ``config.yaml`` into a run folder, every interpolation resolved."""
    with replacing(run_dir / "config.yaml") as part:
        part.write_text(OmegaConf.to_yaml(config, resolve=True))


def load_run(run_dir: Path) -> DictConfig:
    """Read the config a run was trained with. Nothing in it is executed, not even an interpolation.

    Raises:
        UserError: no such folder, no ``config.yaml`` in it, or one that no run wrote.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        what = (
            "has no config.yaml; give a folder that train.py wrote" if run_dir.is_dir() else "there is no such folder"
        )
        raise UserError(f"{run_dir}: {what}")
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: must be a mapping of settings, found {type(config).__name__}")
    if "${" in path.read_text():
        raise UserError(f"{path}: holds an interpolation (${{...}}); the config of a run is resolved")
    return config


def _compose(conf_dir: Path, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"):
        return compose("train", list(overrides))


def _parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _values(override: Override) -> list[str]:
    if override.is_discrete_sweep():
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    return [_typed(override)]


def _groups(conf_dir: Path) -> dict[str, list[str]]:
    """Groups of a config folder with their arms; a folder in a group is a group, ``trainer/plugin``, too."""
    groups: dict[str, list[str]] = {}
    for path in conf_dir.rglob("*.yaml"):
        if path.parent != conf_dir:
            groups.setdefault(path.parent.relative_to(conf_dir).as_posix(), []).append(path.stem)
    return groups


def _typed(override: Override) -> str:
    assert override.input_line is not None, "Hydra's parser keeps what it read"
    return override.input_line


def _group_of(override: Override) -> str:
    return override.key_or_group.partition("@")[0]


def _refuse_unknown(parsed: Sequence[Override], conf_dir: Path) -> None:
    """Find the override that names no group and no key, and say which it might have meant."""
    groups = _groups(conf_dir)
    base = _compose(conf_dir, [_typed(override) for override in parsed if _group_of(override) in groups])
    keys = [path for path, _ in _walk(OmegaConf.to_container(base), "") if path]
    for override in parsed:
        key = override.key_or_group
        if _group_of(override) in groups or key in keys or override.is_hydra_override() or override.is_add():
            continue
        name = key.rpartition(".")[2]
        namesakes = [path for path in keys if path.rpartition(".")[2] == name]
        hint = f"; did you mean '{namesakes[0]}'?" if namesakes else nearest(key, [*groups, *keys])
        raise UserError(f"{override.input_line}: there is no setting '{key}'{hint}")


def _refuse_ineffective(parsed: Sequence[Override], conf_dir: Path) -> None:
    """Refuse what Hydra takes and nothing reads: a setting given twice, or one added at the top."""
    seen: dict[str, str] = {}
    for override in parsed:
        key = override.key_or_group
        if key in seen:
            raise UserError(f"{seen[key]} and {override.input_line}: '{key}' is given twice; keep one of them")
        seen[key] = _typed(override)
    groups = _groups(conf_dir)
    for override in parsed:
        if override.is_add() and not override.is_hydra_override() and _group_of(override) not in groups:
            top = override.key_or_group.partition(".")[0]
            known = [*groups, *map(str, _compose(conf_dir, []))]
            if top not in known:
                raise UserError(f"{override.input_line}: nothing reads '{top}'{nearest(top, known)}")


def _walk(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every node below and including this one, with its dotted path."""
    yield where, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _walk(child, f"{where}.{key}" if where else str(key))
