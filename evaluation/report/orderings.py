"""Each ordering of the paper's table beside ours: neighbours in its ranking, their paired difference, a verdict."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from evaluation.compare import per_image_values
from evaluation.metrics.bootstrap import bootstrap_interval
from evaluation.metrics.names import metric_direction, needs_runs
from evaluation.report.tables import published_summary
from evaluation.results import EvaluationResult
from infra.display.table import Cell, Table, cell
from infra.files.storage import exists, join, read_json

ORDERINGS = "orderings.json"
VERDICTS = ("holds", "fails", "unclear", "not tested")


@dataclass(frozen=True)
class Ordering:
    """The paper ranks `better` before `worse` in `metric`; `published_*` are its numbers.

    `mean`, `low`, `high`: ours of `better` minus `worse` with its 95 % bootstrap interval over images; None where one
    side has no number. `verdict`: "holds" or "fails" where the interval excludes 0 on the paper's or the other side,
    "unclear" where it contains 0, "not tested" without numbers, and in stability over runs where those of a
    method never differ or their numbers do.
    """

    metric: str
    better: str
    worse: str
    published_better: float
    published_worse: float
    verdict: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    num_images: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def published_orderings(result: EvaluationResult, group: str) -> list[Ordering]:
    """Orderings of the methods that `result` shares with the paper's table `group` (a row's first word is its name).

    Of every metric and of its G-STD the neighbours in the paper's ranking are compared; equal numbers have no order.
    """
    rows = {name.split()[0]: row for name, row in published_summary(group).items()}
    rows = {name: row for name, row in rows.items() if name in result.methods}
    values = {name: per_image_values(result.methods[name]) for name in rows}
    published = {name: _numbers(row) for name, row in rows.items()}
    metrics = list(dict.fromkeys(metric for numbers in published.values() for metric in numbers))
    found = []
    for metric in metrics:
        direction = metric_direction(metric)
        ranked = sorted(
            ((numbers[metric], name) for name, numbers in published.items() if metric in numbers),
            key=lambda item: -direction * item[0],
        )
        for (first, better), (second, worse) in pairwise(ranked):
            if first != second:
                both = [result.methods[name] for name in (better, worse)]
                alike = both[0].num_runs == both[1].num_runs and not any(method.deterministic for method in both)
                known = alike or not needs_runs(metric)
                paired = _paired(values[better], values[worse], metric) if known else np.zeros(0)
                found.append(Ordering(metric, better, worse, first, second, **_tested(paired, direction)))
    return found


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> the paper's number; G-STD and L-STD of stochastic methods alone, and no FID, which has no images."""
    numbers = {name: m["mean"] for name, m in row["metrics"].items() if name != "fid"}
    if row["num_runs"] > 1:
        gs = {f"g_std_{name}": m["g_std"] for name, m in row["metrics"].items()}
        numbers |= {name: value for name, value in gs.items() if value is not None} | {"l_std": row["l_std"]}
    return numbers


def _paired(better: Mapping[str, np.ndarray], worse: Mapping[str, np.ndarray], metric: str) -> np.ndarray:
    if metric not in better or metric not in worse:
        return np.zeros(0)
    differences = better[metric] - worse[metric]
    return differences[np.isfinite(differences)]


def _tested(differences: np.ndarray, direction: int) -> dict[str, Any]:
    if len(differences) == 0:
        return {"verdict": "not tested"}
    low, high = bootstrap_interval(differences)
    worst, best = sorted((low * direction, high * direction))
    verdict = "holds" if worst > 0 else "fails" if best < 0 else "unclear"
    mean = float(differences.mean())
    return {"verdict": verdict, "mean": mean, "low": low, "high": high, "num_images": len(differences)}


def load_orderings(folder: str) -> list[dict[str, Any]]:
    """What FOLDER/orderings.json holds; empty where the evaluation named no published table."""
    place = join(folder, ORDERINGS)
    return read_json(place) if exists(place) else []


def orderings_note(orderings: Sequence[Mapping[str, Any]]) -> str:
    counts = [(verdict, sum(o["verdict"] == verdict for o in orderings)) for verdict in VERDICTS]
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
    return (
        f"{len(orderings)} orderings of the paper: {shown}. Differences are first minus second, ours, with a 95 % "
        "bootstrap interval over images; unclear: it contains 0; not tested: a metric is unavailable."
    )


def orderings_table(orderings: Sequence[Mapping[str, Any]], group: str) -> Table:
    """Per ordering of the paper's table `group`: its statement, our difference with its interval, the verdict."""
    table = Table(
        ("metric", "the paper", "ours", "95 % interval", "verdict"),
        f"Orderings of the paper, {group}",
        [orderings_note(orderings)],
    )
    styles = {"holds": "good", "fails": "bad"}
    for o in orderings:
        stated = f"{o['better']} ({o['published_better']:g}) before {o['worse']} ({o['published_worse']:g})"
        low, high = o["low"], o["high"]
        interval = Cell([low, high], () if low is None else ((f"{low:+.4f} .. {high:+.4f}", ""),))
        table.add(
            o["metric"],
            stated,
            cell(o["mean"], "+.4f"),
            interval,
            cell(o["verdict"], style=styles.get(o["verdict"], "")),
        )
    return table
