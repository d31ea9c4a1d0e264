"""The table in the paper's layout: metric / G-STD per method, best and second marked; the intervals of its means."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.compare import per_image_values
from evaluation.metrics.bootstrap import bootstrap_interval
from evaluation.metrics.names import METRICS, Metric, needs_runs
from evaluation.results import MethodScores, is_deterministic
from infra.display.table import Cell, Table
from infra.errors import ConfigError

# Tables 1, 3, 4 and 5 of arXiv 2401.00877v1: group -> method -> metric -> mean or [mean, G-STD].
_PUBLISHED = Path(__file__).with_name("published.json")
_OF_METHODS = ("l_std", "l_std_equal_sharpness", "p_std")  # numbers of a method, not of one of its metrics
_ARROWS = {1: "↑ ", -1: "↓ ", 0: ""}
_STYLES = ("", "best", "second")  # by rank
UNAVAILABLE = "unavailable"


@dataclass
class Number:
    """One number of a cell; `rank`: 1 best, 2 second, 0 neither or not ranked."""

    text: str
    rank: int = 0
    value: float | None = None


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, list[list[Number]]]]:
    """Rows of the paper's table: a label and, per method of `summary`, one or two numbers (docs/metrics.md).

    `summary` is `EvaluationResult.summary`. The first number is the mean, the second the G-STD; L-STD is
    next to sharpness. Stability is ranked among methods whose runs differ only.
    """
    methods = summary.values()
    found = {name: numbers for method in methods for name, numbers in method["metrics"].items()}
    whole = {name for name in _OF_METHODS if any(method.get(name) is not None for method in methods)} | {"l_std"}
    rows = []
    for metric in [*(m for m in METRICS if m in found or m in whole), *sorted(found.keys() - METRICS.keys())]:
        label, direction, digits = METRICS.get(metric, Metric(metric, 0, 4))
        direction = found.get(metric, {}).get("direction", direction)
        second: list[float | None]
        if metric in whole:
            first = [method.get(metric) for method in methods]
            second = [method["sharpness"] if metric == "l_std" else None for method in methods]
            ranked = first if metric == "p_std" else _over_runs(first, summary)
            if metric == "l_std_equal_sharpness":
                ranked = [None if m.get("num_blurrier") else n for m, n in zip(methods, ranked, strict=True)]
            both, second_direction, second_digits = "sharpness", 0, METRICS["sharpness"].digits
        else:
            cells = [method["metrics"].get(metric, {"mean": None, "g_std": None}) for method in methods]
            first, second = [cell["mean"] for cell in cells], [cell["g_std"] for cell in cells]
            ranked, both, second_direction, second_digits = first, "G-STD ↓", -1, 4
        numbers = [_ranked(ranked, first, direction, digits)]
        label = _ARROWS[direction] + label
        if any(value is not None for value in second):
            label += f" / {both}"
            numbers.append(_ranked(_over_runs(second, summary), second, second_direction, second_digits))
        columns = [[number for number in column if number.text] for column in zip(*numbers, strict=True)]
        rows.append((label, [column or [Number(UNAVAILABLE)] for column in columns]))
    return rows


def table_notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know: runs, deterministic methods, metrics that some images lack."""
    runs = sorted({method["num_runs"] for method in summary.values() if not is_deterministic(method)})
    notes = [f"Mean over {' or '.join(map(str, runs))} runs. Best bold, second best underlined."] if runs else []
    single = [name for name, method in summary.items() if is_deterministic(method)]
    if len(runs) > 1:
        notes.append("Stability over unlike numbers of runs is not ranked: it grows with the number.")
    if single:
        notes.append(f"Deterministic, so exactly 0 stability, which is not ranked: {', '.join(single)}.")
    for name, method in summary.items():
        if method.get("num_blurrier"):
            notes.append(
                f"{name} is blurrier than bicubic on {method['num_blurrier']} of {method['num_images']} images: it has "
                "no L-STD at equal sharpness there and is not ranked in it."
            )
        for metric, numbers in method["metrics"].items():
            if 0 < numbers["num_images"] < method["num_images"]:
                label = METRICS.get(metric, Metric(metric, 0, 4)).label
                notes.append(f"{label} of {name}: {numbers['num_images']} of {method['num_images']} images.")
    return notes


def score_table(summary: Mapping[str, Any], title: str = "", published: Mapping[str, Any] | None = None) -> Table:
    """`summary` with methods in columns, metric / G-STD in rows; under a method's numbers those of its row in
    `published`, if any (a row's first word is its name)."""
    rows = {name.split()[0]: row for name, row in (published or {}).items()}
    beside = {name: rows[name] for name in summary if name in rows}
    theirs = {label.partition(" / ")[0]: dict(zip(beside, cells, strict=True)) for label, cells in table_rows(beside)}
    table = Table(["metric", *summary], title, table_notes(summary))
    for label, cells in table_rows(summary):
        papers = theirs.get(label.partition(" / ")[0], {})
        table.add(label, *(_shown(cell, papers.get(name, [])) for name, cell in zip(summary, cells, strict=True)))
    return table


def _shown(numbers: list[Number], papers: list[Number]) -> Cell:
    parts = [(numbers[0].text, _STYLES[numbers[0].rank])]
    for number in numbers[1:]:
        parts += [(" ", ""), ("/", "between"), (" ", ""), (number.text, _STYLES[number.rank])]
    paper = " / ".join(number.text for number in papers)
    if paper not in ("", UNAVAILABLE):
        parts += [("\n", ""), (f"paper: {paper}", "beside")]
    return Cell([number.value for number in numbers], tuple(parts))


def interval_table(methods: Mapping[str, MethodScores]) -> Table:
    """Every metric's mean over the images, its G-STD and L-STD, each with its 95 % bootstrap interval.

    Equal resamples of the images for every cell; images without a number are left out of that row alone. No L-STD at
    equal sharpness of a method that is blurrier than bicubic on some images: the rest would flatter it.
    """
    values = {name: per_image_values(method) for name, method in methods.items()}
    rows = list(dict.fromkeys(metric for row in values.values() for metric in row if metric != "sharpness"))
    table = Table(["metric", *methods], "95 % intervals over the images")
    for metric in rows:
        cells = [
            _interval(values[name].get(metric, np.array([])))
            if not (needs_runs(metric) and method.deterministic)
            and not (metric == "l_std_equal_sharpness" and np.isnan(method.l_std_equal_sharpness).any())
            else Cell(None, ())
            for name, method in methods.items()
        ]
        if any(cell.parts for cell in cells):
            table.add(_long_label(metric), *cells)
    return table


def _long_label(metric: str) -> str:
    for start, label in (("g_std_", "G-STD of "), ("p_g_std_", "G-STD over perturbations of ")):
        if metric.startswith(start):
            return label + metric.removeprefix(start)
    return METRICS[metric].label if metric in _OF_METHODS else metric


def _interval(values: np.ndarray) -> Cell:
    known = values[np.isfinite(values)]
    if not len(known):
        return Cell(None, ())
    mean, (low, high) = float(known.mean()), bootstrap_interval(known)
    return Cell([mean, low, high], ((f"{mean:.4f}", ""), (" ", ""), (f"{low:.4f} .. {high:.4f}", "beside")))


def published_summary(group: str) -> dict[str, Any]:
    """The paper's numbers of one table and test set, such as "Table 1, RealSR", in the form of a summary.

    Raises ConfigError for an unknown group.
    """
    groups = json.loads(_PUBLISHED.read_text(encoding="utf-8"))
    if group not in groups:
        raise ConfigError(
            f"the paper has no numbers for {group!r}", where="published", todo=f"choose one of: {'; '.join(groups)}"
        )
    summary = {}
    for name, row in groups[group].items():
        pairs = {metric: value if isinstance(value, list) else [value, None] for metric, value in row.items()}
        l_std = pairs.pop("l_std", [0.0, None])[0]
        summary[name] = {
            "num_images": 0,
            "num_runs": 10 if l_std else 1,
            "l_std": l_std,
            "sharpness": None,
            "metrics": {m: {"mean": mean, "g_std": g_std, "num_images": 0} for m, (mean, g_std) in pairs.items()},
        }
    return summary


def _over_runs(values: list[float | None], summary: Mapping[str, Any]) -> list[float | None]:
    """Those that can be ranked: of methods whose runs differ, if all these have equally many."""
    runs = [0 if is_deterministic(method) else method["num_runs"] for method in summary.values()]
    alike = len({number for number in runs if number}) == 1
    return [value if alike and number else None for value, number in zip(values, runs, strict=True)]


def _ranked(ranked: list[float | None], shown: list[float | None], direction: int, digits: int) -> list[Number]:
    """Numbers from `shown`; those in `ranked` compete as they are shown, equal ones share a rank. One competitor is not
    marked."""
    ranked = [None if value is None else round(value, digits) for value in ranked]
    order = sorted({value for value in ranked if value is not None}, reverse=direction > 0)
    rank = {value: i + 1 for i, value in enumerate(order[:2])} if direction and len(order) > 1 else {}
    return [
        Number(
            "" if value is None else f"{value:.{digits}f}" if value else "0",
            0 if key is None else rank.get(key, 0),
            value,
        )
        for key, value in zip(ranked, shown, strict=True)
    ]
