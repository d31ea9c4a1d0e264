"""Paired comparison of evaluated methods: differences per image, bootstrap intervals, wins, losses, config diff."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.find import find_result, require_same_set
from evaluation.metrics.bootstrap import bootstrap_interval
from evaluation.metrics.names import OVER_RUNS, metric_direction
from evaluation.results import EvaluationResult, MethodScores
from infra.display.table import Cell, Table, cell
from infra.errors import ConfigError
from infra.files.publish import temporary_folder
from infra.mlflow.server import TrackingConfig


@dataclass(frozen=True)
class Difference:
    """One metric of `candidate` minus that of the baseline, over the images that both have.

    `differences`: float64 (num_images,), in the metric's unit, in the order of `keys`. `low`, `high`: the 95 %
    bootstrap interval of their mean. `direction`: +1 where higher is better, -1 where lower is, 0 where neither.
    """

    candidate: str
    metric: str
    direction: int
    keys: list[str]
    differences: np.ndarray
    baseline_mean: float
    candidate_mean: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        return float(self.differences.mean())

    @property
    def wins(self) -> int:
        """Images on which the candidate is better."""
        return int(np.count_nonzero(self.differences * self.direction > 0))

    @property
    def losses(self) -> int:
        return int(np.count_nonzero(self.differences * self.direction < 0))

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval excludes 0, "unclear" where it does not, "" without a direction."""
        if self.direction == 0:
            return ""
        low, high = sorted((self.low * self.direction, self.high * self.direction))
        return "better" if low > 0 else "worse" if high < 0 else "unclear"

    def worse_images(self) -> list[tuple[str, float]]:
        """Images on which the candidate is worse, with their differences, the worst first."""
        signed = self.differences * self.direction
        return [(self.keys[i], float(self.differences[i])) for i in np.argsort(signed, kind="stable") if signed[i] < 0]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `config_diff`: dotted config key -> its value per label, where the labels differ.

    `results`: those that were compared, in the order given; `compared`: their methods by label, for pictures.
    """

    baseline: str
    differences: list[Difference]
    config_diff: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    results: list[EvaluationResult] = field(default_factory=list)
    compared: EvaluationResult | None = None

    def tables(self) -> list[Table]:
        """A table per candidate and, where the configs differ, the differing values."""
        candidates = list(dict.fromkeys(row.candidate for row in self.differences))
        tables = [self._difference_table(candidate) for candidate in candidates]
        return [*tables, *([self._config_table()] if self.config_diff else [])]

    def _difference_table(self, candidate: str) -> Table:
        """One row per metric; below it up to three images that got worse in each."""
        rows = [row for row in self.differences if row.candidate == candidate]
        worse = [(row.metric, ", ".join(key for key, _ in row.worse_images()[:3])) for row in rows]
        table = Table(
            ("metric", "baseline", "value", "differs", "95 % interval", "wins", "losses", "verdict"),
            f"{candidate} against {self.baseline}",
            [f"worse in {metric}: {keys}" for metric, keys in worse if keys] + self.notes,
        )
        styles = {"better": "good", "worse": "bad"}
        for row in rows:
            table.add(
                Cell(row.metric, ((f"{'↓ ↑'[row.direction + 1]} {_short(row.metric)}", ""),)),
                cell(row.baseline_mean, ".4f"),
                cell(row.candidate_mean, ".4f"),
                cell(row.mean, "+.4f"),
                Cell([row.low, row.high], ((f"{row.low:+.4f} .. {row.high:+.4f}", ""),)),
                row.wins if row.direction else None,
                row.losses if row.direction else None,
                cell(row.verdict, style=styles.get(row.verdict, "")),
            )
        return table

    def _config_table(self) -> Table:
        labels = list(next(iter(self.config_diff.values())))
        table = Table(("key", *labels), "config differences")
        for key, values in self.config_diff.items():
            table.add(key, *(Cell(values[label], ((str(values[label]), ""),)) for label in labels))
        return table

    def write_csv(self, path: str | Path) -> None:
        """One row per (candidate, metric, image), every image of every comparison; a mean's row has no image."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = ["difference", "low", "high", "wins", "losses", "verdict"]
            writer.writerow(["baseline", "method", "metric", "image", *columns])
            for row in self.differences:
                head = [self.baseline, row.candidate, row.metric]
                writer.writerow([*head, "", row.mean, row.low, row.high, row.wins, row.losses, row.verdict])
                for key, value in zip(row.keys, row.differences, strict=True):
                    better = value * row.direction
                    verdict = "better" if better > 0 else "worse" if better < 0 else ""
                    writer.writerow([*head, key, float(value), "", "", "", "", verdict])


def _short(metric: str) -> str:
    """Folded, so that a terminal of 80 columns has room for the other columns."""
    return metric.replace("_equal_", " at\n  equal\n  ")


def compare(
    results: Sequence[str | Path | EvaluationResult],
    *,
    seed: int = 0,
    num_resamples: int = 10_000,
    tracking: TrackingConfig | None = None,
    scratch: Path | None = None,
) -> Comparison:
    """Compare every method against a baseline, image by image.

    `results`: result folders, ids or names of MLflow runs (in the store of `tracking`), `RESULT:METHOD` for one method
    (without it, all methods of the result), or loaded results. The baseline is the first method that is named so, or
    else the first whose runs differ. Scores are averaged over an image's runs. Left out, with a note: G-STD and L-STD
    of unlike numbers of runs, as their expectation grows with the number, or of runs that never differ; L-STD at equal
    sharpness where one is blurrier than bicubic; P-STD over other perturbations.
    `scratch`: a folder for the pictures of MLflow's runs; without one the tables alone are fetched.
    Raises DataError where dataset, convention or images differ, ConfigError for an unknown method or fewer than two.
    """
    with temporary_folder("compare") as tables:
        place, tracking = scratch or tables, tracking or TrackingConfig()
        parts = [_select(one, tracking, place, pictures=scratch is not None) for one in results]
    entries = [entry for part in parts for entry in part]
    if len(entries) < 2:
        raise ConfigError(
            "there is nothing to compare",
            where=", ".join(label for label, _, _ in entries) or "no result",
            todo="give at least two results or methods (FOLDER or FOLDER:METHOD)",
        )
    entries = [(_unique(label, i, entries), result, method) for i, (label, result, method) in enumerate(entries)]
    named = len(parts[0]) == 1
    first = 0 if named else next((i for i, (_, _, method) in enumerate(entries) if not method.deterministic), 0)
    baseline, base_result, base = entries[first]
    others = entries[:first] + entries[first + 1 :]
    for label, result, method in others:
        require_same_set(base_result, result, base, method, (baseline, label))
    notes, rows = [], []
    base_values = per_image_values(base)
    for label, result, method in others:
        values = per_image_values(method)
        skipped, reasons = _incomparable(base_result, result, base, method)
        notes += [f"{label}: {reason}" for reason in reasons]
        for metric in base_values:
            if metric not in values or any(metric.startswith(start) for start in skipped):
                continue
            both = np.isfinite(values[metric]) & np.isfinite(base_values[metric])
            if not both.any():
                continue
            differences = values[metric][both] - base_values[metric][both]
            low, high = bootstrap_interval(differences, seed=seed, num_resamples=num_resamples)
            rows.append(
                Difference(
                    candidate=label,
                    metric=metric,
                    direction=metric_direction(metric, base.directions | method.directions),
                    keys=[key for key, known in zip(base.keys, both, strict=True) if known],
                    differences=differences,
                    baseline_mean=float(base_values[metric][both].mean()),
                    candidate_mean=float(values[metric][both].mean()),
                    low=low,
                    high=high,
                )
            )
        absent = sorted(set(base_values) ^ set(values))
        if absent:
            notes.append(f"{label}: not compared, because only one side has it: {', '.join(absent)}")
    configs = {label: _flat(_own_config(result, method)) for label, result, method in entries}
    compared = replace(base_result, methods={label: replace(method, name=label) for label, _, method in entries})
    return Comparison(baseline, rows, _differing(configs), notes, [result for _, result, _ in entries], compared)


def _incomparable(
    base_result: EvaluationResult, result: EvaluationResult, base: MethodScores, method: MethodScores
) -> tuple[list[str], list[str]]:
    """Beginnings of the names of numbers that say nothing beside each other, and the reasons."""
    skipped: list[str] = []
    reasons = []
    if method.deterministic or base.deterministic:
        which = "it is" if not base.deterministic else "the baseline is" if not method.deterministic else "both are"
        skipped += OVER_RUNS
        reasons.append(f"{which} deterministic, so stability over runs is not compared")
    elif method.num_runs != base.num_runs:
        skipped += OVER_RUNS
        reasons.append(f"{method.num_runs} runs against {base.num_runs}, so stability over runs is not compared")
    elif blurrier := int((np.isnan(method.l_std_equal_sharpness) | np.isnan(base.l_std_equal_sharpness)).sum()):
        skipped.append("l_std_equal_sharpness")
        reasons.append(
            f"it or the baseline is blurrier than bicubic on {blurrier} of {len(base.keys)} images, so L-STD at equal "
            "sharpness is not compared"
        )
    perturbations = [one.run["config"].get("perturbations") for one in (base_result, result)]
    if perturbations[0] != perturbations[1]:
        skipped += ["p_std", "p_g_std_"]
        reasons.append("other perturbations of the input, so stability against them is not compared")
    return skipped, reasons


_Entry = tuple[str, EvaluationResult, MethodScores]


def _select(
    one: str | Path | EvaluationResult, tracking: TrackingConfig, scratch: Path, *, pictures: bool
) -> list[_Entry]:
    name = ""
    if not isinstance(one, EvaluationResult):
        folder, _, name = str(one).rpartition(":")
        if "/" in name or not folder or Path(one).exists():  # no method: the colon, if any, belongs to the folder
            folder, name = str(one), ""
        one = find_result(folder, tracking, scratch, pictures=pictures)
    if name and name not in one.methods:
        raise ConfigError(
            f"there is no method {name!r} in this result",
            where=one.folder,
            todo=f"choose one of {', '.join(one.methods)}",
        )
    return [(f"{one.name}:{m}", one, one.methods[m]) for m in ([name] if name else one.methods)]


def _unique(label: str, index: int, entries: list[_Entry]) -> str:
    """Two folders may have one name; then a number tells the labels apart."""
    same = [i for i, (other, _, _) in enumerate(entries) if other == label]
    return f"{label} #{same.index(index) + 1}" if len(same) > 1 else label


def per_image_values(method: MethodScores) -> dict[str, np.ndarray]:
    """Per image: each metric's mean over the runs, its std over the runs and over perturbations, L-STD, L-STD at equal
    sharpness, P-STD and sharpness; NaN = unavailable."""
    values = {}
    for metric, scores in method.scores.items():
        first = scores[:, :1]  # means of equal numbers would round away from them
        values[metric] = first[:, 0] + (scores - first).mean(axis=1)
        values[f"g_std_{metric}"] = np.std(scores - first, axis=1)
    values |= {f"p_g_std_{metric}": stds for metric, stds in method.p_g_std.items()}
    names = ("l_std", "l_std_equal_sharpness", "p_std", "sharpness")
    return values | {name: getattr(method, name) for name in names}


def _own_config(result: EvaluationResult, method: MethodScores) -> dict[str, Any]:
    """The config with this method's part alone, without its name."""
    config = result.run["config"]
    own = {key: value for key, value in config["methods"][method.name].items() if key != "name"}
    return {key: value for key, value in config.items() if key != "methods"} | {"method": own}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value; the entries of a list are identified by their `name`, else by their index."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        items = [(entry.get("name", i), entry) for i, entry in enumerate(value)]
    else:
        return {prefix: value}
    return {key: plain for name, entry in items for key, plain in _flat(entry, f"{prefix}.{name}".lstrip(".")).items()}


def _differing(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    values = {key: {label: config.get(key, "(not set)") for label, config in configs.items()} for key in keys}
    return {key: row for key, row in values.items() if any(value != row[next(iter(row))] for value in row.values())}
