"""The figures of a report: accuracy against a cost with its Pareto front, and learning curves."""

import io
import math
import statistics
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lightning_crosslmm.report.arms import Arm
from lightning_crosslmm.report.estimates import Estimate, estimate
from lightning_crosslmm.report.measures import Measure

COLOURS = {"none": "#7f7f7f", "T2V": "#e08214", "V2V": "#2b7bba", "both": "#b2182b", "": "#33638d"}
MARKERS = {"none": "o", "T2V": "^", "V2V": "s", "both": "D", "": "o"}
GREY, LEGEND_ROWS, PANEL_COLUMNS = "#c9ced6", 26, 4
NEAR, ASIDE, LINE = 34.0, 9.0, 9.0
"""Of labels, in points: how near points share a column, how far beside it they stand, how far apart in it."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its heading, the caption below it, and the PNG."""

    title: str
    caption: str
    png: bytes


def draw_pareto(arms: Sequence[Arm], task: str, measure: Measure) -> bytes | None:
    """Draw accuracy against a cost, each arm by its number in the table, and the front of those that none beats.

    Args:
        arms: in the order of the table.
        task: the accuracy.
        measure: the cost.

    Returns:
        A PNG; None where fewer than two arms have both.
    """
    points: list[tuple[int, Arm, float, Estimate]] = []
    for place, arm in enumerate(arms, start=1):
        cost, found = measure.of(arm), estimate(list(arm.values(task).values()))
        if cost is not None and cost > 0 and found is not None:
            points.append((place, arm, cost * measure.scale, found))
    if len(points) < 2:
        return None
    columns = math.ceil(len(points) / LEGEND_ROWS)
    longest = max(len(arm.label) for _, arm, _, _ in points)
    legend_in = columns * (0.6 + 0.077 * longest)
    figure = Figure(figsize=(7.5 + legend_in, 5.6))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.75 / figure.get_figwidth(), 0.11, 6.5 / figure.get_figwidth(), 0.83))
    for _, arm, cost, found in points:
        reach = found.half_width or 0.0
        axes.vlines(cost, found.mean - reach, found.mean + reach, COLOURS[arm.kind], linewidth=1, alpha=0.3)
        axes.plot(cost, found.mean, **_look(arm), markersize=6, markeredgecolor="white", markeredgewidth=0.6)
    front = pareto_front([(cost, found.mean) for _, _, cost, found in points])
    best = {str(place) for place, _, cost, found in points if (cost, found.mean) in front}
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1, drawstyle="steps-post", zorder=1)
    axes.set(xlabel=measure.title, ylabel=task)
    axes.set_title("Up and to the left is better; the line and bold numbers are the Pareto front", fontsize=9)
    costs = [cost for _, _, cost, _ in points]
    if max(costs) > 5 * min(costs):
        axes.set_xscale("log")
    axes.grid(color="#e6e8ec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
    axes.autoscale_view()  # now, because labels are placed by it
    means = [found.mean for *_, found in points]
    room = 0.08 * (max(means) - min(means)) + 0.005
    axes.set_ylim(min(means) - room, max(means) + room)  # intervals of few seeds may reach far out
    _label_points(axes, [(str(place), cost, found.mean) for place, _, cost, found in points], best)
    handles = [axes.plot([], [], label=f"{place}  {_plain(arm.label)}", **_look(arm))[0] for place, arm, _, _ in points]
    left = (7.4 / figure.get_figwidth(), 0.94)
    legend = figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=left, ncols=columns, fontsize=8, frameon=False, borderpad=0
    )
    for text, (place, *_) in zip(legend.get_texts(), points, strict=True):
        text.set_fontweight("bold" if str(place) in best else "normal")
    return _png(figure)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give the points that no other beats: none is as cheap and better, or as good and cheaper; the cheapest first.

    Args:
        points: (cost, accuracy).
    """
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def draw_learning(arms: Sequence[Arm], task: str) -> bytes | None:
    """Draw an accuracy over optimizer steps: a panel for arms that share all but fusion's branches, the others in grey.

    A line is the mean over the seeds that were measured at a step, a band reaches from the lowest to the highest.

    Returns:
        A PNG; None where no run measured it twice.
    """
    curves = {arm.label: mean_curve(arm, task) for arm in arms}
    shown = [arm for arm in arms if len(curves[arm.label]) > 1]
    if not shown:
        return None
    families = sorted({arm.family: arm.family_label for arm in shown}.items(), key=lambda item: item[1])
    columns = min(PANEL_COLUMNS, len(families))
    rows = math.ceil(len(families) / columns)
    panel_in = (2.9, 2.1) if len(families) > 1 else (6.0, 3.6)
    width, height = panel_in[0] * columns + 0.9, panel_in[1] * rows + 1.3
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    room = {"left": 0.7 / width, "right": 1 - 0.2 / width, "bottom": 0.6 / height, "top": 1 - 0.7 / height}
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, gridspec_kw=room).flat)
    figure.subplots_adjust(wspace=0.06, hspace=0.22)
    lines = {arm.label: [(step, mean) for step, mean, _, _ in curves[arm.label]] for arm in shown}
    handles = {}
    for panel, (family, label) in zip(panels, families, strict=False):
        others = [lines[arm.label] for arm in shown if arm.family != family]
        panel.add_collection(LineCollection(others, colors=GREY, linewidths=0.6, zorder=1))
        for arm in (arm for arm in shown if arm.family == family):
            steps, means, lows, highs = zip(*curves[arm.label], strict=True)
            look = {"color": COLOURS[arm.kind], "linewidth": 1.6, "label": f"fusion: {arm.kind}"}
            panel.fill_between(steps, lows, highs, color=COLOURS[arm.kind], alpha=0.18, linewidth=0, zorder=2)
            (handles[arm.kind],) = panel.plot(steps, means, **look, zorder=3)
        panel.set_title(_plain(label), fontsize=9, pad=4)
        panel.grid(color="#eef0f3", linewidth=0.6)
        panel.tick_params(labelsize=8)
    for number in range(len(families), len(panels)):
        panels[number].set_axis_off()
        panels[number - columns].tick_params(labelbottom=True)  # the lowest of its column now
    figure.supxlabel("optimizer steps", fontsize=9)
    figure.supylabel(task, fontsize=9)
    if set(handles) != {""}:
        told = [handles[kind] for kind in COLOURS if kind in handles and kind]
        figure.legend(handles=told, loc="upper center", ncols=4, fontsize=9, frameon=False)
    return _png(figure)


def mean_curve(arm: Arm, task: str) -> list[tuple[int, float, float, float]]:
    """Give (step, mean, lowest, highest) over the seeds that were measured at each step."""
    values: dict[int, list[float]] = {}
    for run in arm.by_seed.values():
        for step, value in run.curves.get(task, []):
            values.setdefault(step + 1, []).append(value)  # loggers count from 0
    return [(step, statistics.fmean(found), min(found), max(found)) for step, found in sorted(values.items())]


def _look(arm: Arm) -> dict[str, Any]:
    return {"color": COLOURS[arm.kind], "marker": MARKERS[arm.kind], "linestyle": "none"}


def _plain(text: str) -> str:
    """What matplotlib draws as it stands: no formulas."""
    return text.replace("$", r"\$")


def _label_points(axes: Axes, labels: Sequence[tuple[str, float, float]], bold: Set[str]) -> None:
    """Write each label beside its point: points near one column share it by turns left and right, rising as they do."""
    scale = axes.figure.dpi / 72
    at = {text: axes.transData.transform((x, y)) / scale for text, x, y in labels}  # in points of the page
    columns: list[list[str]] = []
    for text in sorted(at, key=lambda text: at[text][0]):
        if columns and at[text][0] - at[columns[-1][0]][0] < NEAR:
            columns[-1].append(text)
        else:
            columns.append([text])
    places = {text: (x, y) for text, x, y in labels}
    for column in columns:
        rising = sorted(column, key=lambda text: at[text][1])
        edges = (max(at[text][0] for text in column) + ASIDE, min(at[text][0] for text in column) - ASIDE)
        for number, edge in enumerate(edges):
            own = rising[number::2]
            for text, y in zip(own, spread([at[text][1] for text in own], LINE), strict=True):
                axes.annotate(
                    text, places[text], (edge - at[text][0], y - at[text][1]), textcoords="offset points",
                    ha="right" if number else "left", va="center", fontsize=7.5,
                    fontweight="bold" if text in bold else "normal",
                    bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
                    arrowprops={"arrowstyle": "-", "color": "#9aa1ab", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
                )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places apart to at least a gap, as little as it takes; groups that touch stay around their middle.

    Args:
        places: rising.
        gap: between neighbours.
    """
    groups: list[tuple[float, int]] = []  # (middle, members)
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (low, count), (high, more) = groups[-2:]
            groups[-2:] = [((low * count + high * more) / (count + more), count + more)]
    return [middle + gap * (number - (count - 1) / 2) for middle, count in groups for number in range(count)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
