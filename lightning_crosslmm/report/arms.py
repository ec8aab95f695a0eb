"""Arms: the settings in which runs differ, seeds aside, and which arm is compared with which."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.report.runs import DONE, Run

FUSED = ("fusion.v2v", "fusion.t2v")
KINDS = {("false", "false"): "none", ("false", "true"): "T2V", ("true", "false"): "V2V", ("true", "true"): "both"}
"""The paper's four, by what its two branches are set to."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed.

    Args:
        words: the settings that tell it from the others, by the names that the user gave them where those do.
        suffix: of the label, where runs of other data or another commit have the same settings.
        settings: every setting in which any runs differ, as this arm has it.
        kind: of fusion, see `KINDS`; "" if unknown.
        pooler: the pooler's class; "" if unknown.
        data: fingerprints of its runs.
        by_seed: its finished runs.
    """

    words: dict[str, str]
    suffix: str
    settings: dict[str, str]
    kind: str
    pooler: str
    data: str
    by_seed: dict[int, Run]

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        return (", ".join(f"{key}={value}" for key, value in self.words.items()) or "all runs") + self.suffix

    @property
    def family(self) -> tuple[tuple[str, str], ...]:
        """What it shares with the arms that differ from it in fusion's branches alone."""
        rest = {key: value for key, value in self.settings.items() if key not in FUSED}
        return (*sorted(rest.items()), ("", self.suffix))

    @property
    def family_label(self) -> str:
        """Name of those arms together."""
        rest = {key: value for key, value in self.words.items() if key != "fusion"}
        rest |= {key: value for key, value in self.settings.items() if key.startswith("fusion.")}
        told = [f"{key}={value}" for key, value in rest.items() if key not in FUSED]
        return (", ".join(told) or "all") + self.suffix

    def values(self, name: str) -> dict[int, float]:
        """Give a final number of each run that has it, by seed."""
        return {seed: run.numbers[name] for seed, run in sorted(self.by_seed.items()) if name in run.numbers}


def varying_settings(runs: Sequence[Run]) -> list[str]:
    """Name the settings in which runs differ, those left out that follow the seed."""
    configured = [run for run in runs if run.settings]
    names = sorted({name for run in configured for name in run.settings})
    return [
        name
        for name in names
        if len({run.settings.get(name) for run in configured}) > 1
        and not all(run.settings.get(name) == str(run.seed) for run in configured)
    ]


def group_runs(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """Put finished runs together that differ in their seed alone, by what they share and then the paper's ordering.

    Runs of other data or of another commit are never put together. Of two with one seed the first counts.

    Returns:
        The arms; and what there is to say about runs that were kept apart or left out.
    """
    varying, notes = varying_settings(runs), list[str]()
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if run.status == DONE:
            own = tuple((name, run.settings[name]) for name in varying if name in run.settings)
            groups.setdefault(own, []).append(run)
    arms: list[Arm] = []
    for own, words in zip(groups, _labels(list(groups.values()), varying), strict=True):
        members = groups[own]
        origins = sorted({(run.data, run.commit) for run in members})
        for origin in origins:
            of_origin = [run for run in members if (run.data, run.commit) == origin]
            arm = _arm(of_origin, dict(own), words, _suffix(origin, origins))
            arms.append(arm)
            kept = {run.name for run in arm.by_seed.values()}
            notes += [f"{run.name} repeats a run of {arm.label}: left out" for run in of_origin if run.name not in kept]
        if len(origins) > 1:
            told = arms[-1].label.removesuffix(arms[-1].suffix)
            notes.append(f"{told}: its runs are of {len(origins)} origins (data, commit), each in a row of its own")
    order = {kind: place for place, kind in enumerate(("", *KINDS.values()))}
    return sorted(arms, key=lambda arm: (arm.family_label, order[arm.kind], arm.label)), notes


def _arm(members: Sequence[Run], own: dict[str, str], words: dict[str, str], suffix: str) -> Arm:
    settings = members[0].settings
    return Arm(
        words=words,
        suffix=suffix,
        settings=own,
        kind=KINDS.get((settings.get(FUSED[0], ""), settings.get(FUSED[1], "")), ""),
        pooler=settings.get("pooler._target_", "").rpartition(".")[2],
        data=members[0].data,
        by_seed={-1 if run.seed is None else run.seed: run for run in reversed(members)},
    )


def _suffix(origin: tuple[str, str], origins: Sequence[tuple[str, str]]) -> str:
    """Say what sets an origin apart from the others of the same settings."""
    return "".join(
        f" [{what} {origin[place]}]"
        for place, what in enumerate(("data", "commit"))
        if len({other[place] for other in origins}) > 1
    )


def _labels(groups: Sequence[Sequence[Run]], varying: Sequence[str]) -> list[dict[str, str]]:
    """Name each group by the words of its runs where those tell it from all others, else by its settings."""
    said = [min((run.words for run in members), key=lambda words: (len(words), str(words))) for members in groups]
    shared = set.intersection(*({*words.items()} for words in said)) if said else set()
    settings = {name for members in groups for name in members[0].settings}
    told = [
        {
            key: value
            for key, value in words.items()
            if key != "seed" and (key, value) not in shared and (_has(varying, key) or not _has(settings, key))
        }
        for words in said
    ]
    times = Counter(str(sorted(words.items())) for words in told)
    return [
        words
        if times[str(sorted(words.items()))] == 1 and (words or len(groups) == 1)
        else {
            name.removesuffix("._target_"): members[0].settings[name].rpartition(".")[2]
            if name.endswith("._target_")
            else members[0].settings[name]
            for name in varying
            if name in members[0].settings
        }
        for words, members in zip(told, groups, strict=True)
    ]


def _has(names: Iterable[str], key: str) -> bool:
    """Tell whether a word's key is a setting of these, or a group of them."""
    plain = key.lstrip("+~")
    return any(name == plain or name.startswith(f"{plain}.") for name in names)


def choose_baselines(arms: Sequence[Arm], wanted: str | None) -> list[Arm | None]:
    """Tell for each arm which one it is compared with.

    Without a wish that is one arm for all: of those without fusion (of all, if none is) those with the average pooler
    (or all, if none has it), and of these the first by name.

    Args:
        arms: at least one.
        wanted: settings as ``fusion=none`` or ``pooler=average,fusion=none``. If several arms have them, each arm is
            compared with the one that agrees with it in everything else.

    Returns:
        The baseline of each arm: itself where it is one, None where there is none.

    Raises:
        UserError: no arm has the settings.
    """
    if wanted is None:
        plain = [arm for arm in arms if arm.kind == "none"] or list(arms)
        first = ([arm for arm in plain if arm.pooler == "AveragePooler"] or plain)[0]
        return [first for _ in arms]
    words = dict(word.partition("=")[::2] for word in wanted.split(","))
    chosen = [arm for arm in arms if all(arm.words.get(key) == value for key, value in words.items())]
    if not chosen:
        labels = [arm.label for arm in arms]
        raise UserError(
            f"--baseline {wanted}: no arm has these settings{nearest(wanted, labels)}; arms are {'; '.join(labels)}"
        )
    if len(chosen) == 1:
        return [chosen[0] for _ in arms]
    return [
        next((base for base in chosen if _rest(base.words, words) == _rest(arm.words, words)), None) for arm in arms
    ]


def _rest(words: Mapping[str, str], without: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in words.items() if key not in without}
