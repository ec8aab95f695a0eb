"""The tables of a report, as cells that every format writes in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_crosslmm.report.arms import KINDS, Arm, choose_baselines
from lightning_crosslmm.report.estimates import Estimate, estimate, paired_difference
from lightning_crosslmm.report.measures import MEASURES, number, share, tasks
from lightning_crosslmm.report.runs import DONE, Run

ORDER = tuple(KINDS.values())
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this number of seeds"


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Args:
        text: what it says.
        value: what it is sorted by; None sorts by the text.
    """

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows below a heading.

    Args:
        title: its heading.
        columns: their headings; a column of numbers begins with a cell that has a value.
        rows: cells, as many as columns.
        notes: sentences to read it by.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def difference(arm: Arm, base: Arm | None, task: str) -> Estimate | None:
    """Estimate how much better an arm does than another on the same data; None where that cannot be told."""
    if base is None or base is arm or base.data != arm.data:
        return None
    return paired_difference(arm.values(task), base.values(task))


def arms_table(arms: Sequence[Arm], wanted_baseline: str | None) -> Table:
    """Put arms against tasks and costs.

    Args:
        arms: at least one.
        wanted_baseline: see `choose_baselines`.
    """
    names, bases = tasks(arms), choose_baselines(arms, wanted_baseline)
    main = names[0] if names else ""
    measures = [measure for measure in MEASURES if any(measure.of(arm) is not None for arm in arms)]
    rows = []
    for place, (arm, base) in enumerate(zip(arms, bases, strict=True), start=1):
        cells = [Cell(str(place), place), Cell(arm.label), Cell(str(len(arm.by_seed)), len(arm.by_seed))]
        for name in names:
            found = estimate(list(arm.values(name).values()))
            cells.append(Cell(share(found), found.mean if found else float("-inf")))
            if name == main:
                cells.append(_difference_cell(arm, base, main))
        for measure in measures:
            value = measure.of(arm)
            cells.append(Cell(measure.text(value), float("-inf") if value is None else value))
        rows.append(tuple(cells))
    titles = [title for name in names for title in ((name, "against baseline") if name == main else (name,))]
    return Table(
        "Arms",
        ("#", "arm", "seeds", *titles, *(measure.title for measure in measures)),
        tuple(rows),
        tuple(_notes(arms, bases, wanted_baseline)),
    )


def _difference_cell(arm: Arm, base: Arm | None, task: str) -> Cell:
    if base is arm:
        return Cell("baseline", 0.0)
    found = difference(arm, base, task)
    if found is not None:
        shared = "" if found.count == len(arm.by_seed) else f" (n={found.count})"
        return Cell(share(found, signed=True) + shared, found.mean)
    return Cell("other data" if base is not None and base.data != arm.data else "–", float("-inf"))


def _notes(arms: Sequence[Arm], bases: Sequence[Arm | None], wanted: str | None) -> list[str]:
    notes = ["Accuracy: mean over seeds ± half of Student's 95 % interval."]
    if any(len(arm.by_seed) == 1 for arm in arms):
        notes.append("Where only one seed is done there is no interval.")
    single = {base.label for base in bases if base is not None}
    of = single.pop() if len(single) == 1 else f"the arm with {wanted} that agrees in everything else"
    notes.append(f"Baseline: {of}. Differences are paired: their interval is that of the differences per seed.")
    if any(arm.values("cost/flops/prefill/total") for arm in arms):
        notes.append("FLOPs (2 per multiply-accumulate, attention included) and LLM tokens: of cost.json's sample.")
    samples = {value for arm in arms for value in arm.values("prefill/samples").values()}
    if samples:
        many = " or ".join(number(value) for value in sorted(samples))
        notes.append(
            f"Prefill time is measured, per sample, on the first questions of {many} samples at once; peak memory is "
            "that of all of them, beside the weights."
        )
    return notes


def claim_table(arms: Sequence[Arm]) -> Table:
    """Try the paper's ordering, none < T2V < V2V < both, on arms that agree in all but the branches of fusion.

    **Source** CrossLMM, arXiv:2505.17020v1, the ablation of its two branches.

    Steps between kinds that are not there are left out, so that of none and both alone there is one step.
    """
    names, families = tasks(arms), {arm.family: arm.family_label for arm in arms if arm.kind}
    rows = []
    for family, label in sorted(families.items(), key=lambda item: item[1]):
        by_kind = {arm.kind: arm for arm in arms if arm.family == family and arm.kind}
        there = [by_kind[kind] for kind in ORDER if kind in by_kind]
        for lower, upper in zip(there[:-1], there[1:], strict=True):
            found = difference(upper, lower, names[0]) if names else None
            count = found.count if found else 0
            rows.append(
                (
                    Cell(label),
                    Cell(f"{lower.kind} < {upper.kind}"),
                    Cell(share(found, signed=True), found.mean if found else float("-inf")),
                    Cell(str(count), count),
                    Cell(verdict(found)),
                )
            )
    whole = sum(1 for family in families if {arm.kind for arm in arms if arm.family == family} == set(ORDER))
    notes = (
        f"Each step is the paired difference in {names[0] if names else 'accuracy'} over shared seeds with its 95 % "
        "interval. It holds where the interval lies above 0, does not where it lies below, and is undecided else; "
        "intervals are not widened for the number of steps tried.",
        f"All four are there for {whole} of the {len(families)} groups of arms that share all other settings.",
    )
    return Table(
        "The claim none < T2V < V2V < both",
        ("shared settings", "step", "difference", "seeds", "verdict"),
        tuple(rows),
        notes,
    )


def verdict(found: Estimate | None) -> str:
    """Say whether a step upwards holds."""
    if found is None or found.low is None or found.high is None:
        return UNDECIDED
    return HOLDS if found.low > 0 else FAILS if found.high < 0 else UNDECIDED


def undone_table(runs: Sequence[Run], arms: Sequence[Arm]) -> Table:
    """List runs that failed, are unfinished, or are missing: seeds that other arms have."""
    undone = [run for run in runs if run.status != DONE]
    rows = [(Cell(run.name), Cell(run.status), Cell(run.message.strip())) for run in undone]
    seeds = {run.seed for run in runs if run.seed is not None}
    listed = [({*run.words.items()}, run.seed) for run in undone]
    for arm in arms:
        for seed in sorted(seeds - arm.by_seed.keys()):
            if not any(own == seed and words >= {*arm.words.items()} for words, own in listed):
                rows.append((Cell(f"{arm.label}, seed={seed}"), Cell("missing"), Cell("no run folder")))
    return Table("Runs that are not in the tables", ("run", "status", "message"), tuple(rows))
