"""An evaluation's result folder: its tables' schemas, its reader and the summary per method."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaluation.metrics.stability import g_std
from infra.errors import DataError
from infra.storage import exists, join, read_bytes, read_json

_AGAIN = "run ccsr evaluate again: it resumes and fills the gaps"
SET_METRICS = "set_metrics.json"
_RESULT_FIELDS = [("method", pa.string()), ("key", pa.string()), ("run", pa.int32()), ("seed", pa.int64())]
_IMAGE_FIELDS = [
    ("method", pa.string()),
    ("key", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("num_runs", pa.int32()),
    ("l_std", pa.float64()),
    ("sharpness", pa.float64()),
    ("best_run", pa.int32()),
    ("worst_run", pa.int32()),
]


@dataclass(frozen=True)
class MethodScores:
    """One method's numbers. `keys` are sorted and equal for all methods of a folder; NaN stands for unavailable.

    `scores`: metric -> float64 (num_images, num_runs). `l_std`, `sharpness`: float64 (num_images,).
    `best_run`, `worst_run`: by PSNR, None where there is none. `sizes`: (height, width) in px.
    """

    name: str
    keys: list[str]
    num_runs: int
    scores: dict[str, np.ndarray]
    l_std: np.ndarray
    sharpness: np.ndarray
    best_run: list[int | None]
    worst_run: list[int | None]
    sizes: list[tuple[int, int]]

    def summary(self) -> dict[str, Any]:
        """`num_images`, `num_runs`, `l_std`, `sharpness` and `metrics`: name -> `mean`, `g_std`, `num_images`.

        A metric's numbers are over the images that have it for every run; None where no image has.
        """
        metrics = {}
        for metric, scores in self.scores.items():
            complete = scores[np.isfinite(scores).all(axis=1)]
            metrics[metric] = {
                "mean": float(complete.mean()) if len(complete) else None,
                "g_std": (g_std(complete) if self.num_runs > 1 else 0.0) if len(complete) else None,
                "num_images": len(complete),
            }
        sharp = self.sharpness[np.isfinite(self.sharpness)]
        return {
            "num_images": len(self.keys),
            "num_runs": self.num_runs,
            "l_std": float(self.l_std.mean()) if self.num_runs > 1 else 0.0,
            "sharpness": float(sharp.mean()) if len(sharp) else None,
            "metrics": metrics,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """A result folder in memory: `run` is run.json; `methods` in the order in which they were evaluated."""

    folder: str
    run: dict[str, Any]
    methods: dict[str, MethodScores]

    @property
    def summary(self) -> dict[str, Any]:
        """`summarise` of the tables plus the numbers of whole sets (FID) in `run["set_metrics"]`.

        `set_metrics`: method -> metric -> number or null; they have a mean and no G-STD.
        """
        summary = {name: method.summary() for name, method in self.methods.items()}
        for name, numbers in self.run.get("set_metrics", {}).items():
            for metric, value in numbers.items():
                num_images = summary[name]["num_images"] if value is not None else 0
                summary[name]["metrics"][metric] = {"mean": value, "g_std": None, "num_images": num_images}
        return summary

    @property
    def name(self) -> str:
        return self.folder.rstrip("/").rsplit("/", 1)[-1]

    def picture(self, kind: str, key: str, run: int | None = None) -> str:
        """Where a picture lies; `kind`: "hr", "lr" or a method, whose stability map it is where `run` is None.

        A map is a 16-bit grey PNG of std * 65535, std in [0, 1]; all others are 8-bit RGB.
        """
        part = [] if kind in ("hr", "lr") else ["l_std" if run is None else f"{run:02d}"]
        return join(self.folder, "images", kind, *part, f"{key}.png")


def results_schema(metrics: Sequence[str]) -> pa.Schema:
    """results.parquet: one row per (method, image, run), a nullable float64 column per metric (null = unavailable)."""
    return pa.schema([*_RESULT_FIELDS, *((metric, pa.float64()) for metric in metrics)])


def images_schema(metrics: Sequence[str]) -> pa.Schema:
    """images.parquet: one row per (method, image), with a nullable `g_std_METRIC` per metric."""
    return pa.schema([*_IMAGE_FIELDS, *((f"g_std_{metric}", pa.float64()) for metric in metrics)])


def image_row(
    method: str,
    key: str,
    size: tuple[int, int],
    scores: Mapping[str, Sequence[float | None]],
    *,
    l_std: float,
    sharpness: float | None,
) -> dict[str, Any]:
    """A row of images.parquet from one image's `scores` (metric -> one number per run; None = unavailable).

    `size`: (height, width) in px. A method of one run is deterministic: its G-STDs are 0.
    """
    known = {metric: _floats(values) for metric, values in scores.items()}
    num_runs = {len(values) for values in known.values()}
    if len(num_runs) != 1 or 0 in num_runs:
        raise DataError(
            f"the metrics have different numbers of runs or none: {sorted(num_runs)}",
            where=f"method {method!r}, image {key!r}",
            todo="give every metric one number (or None) per run",
        )
    row: dict[str, Any] = {"method": method, "key": key, "height": size[0], "width": size[1]}
    row |= {"num_runs": num_runs.pop(), "l_std": l_std, "sharpness": _finite_or_none(sharpness)}
    row |= {"best_run": None, "worst_run": None}
    if "psnr_y" in known and np.isfinite(known["psnr_y"]).all():
        row |= {"best_run": int(known["psnr_y"].argmax()), "worst_run": int(known["psnr_y"].argmin())}
    for metric, values in known.items():
        stability = 0.0 if len(values) == 1 or not np.isfinite(values).all() else g_std(values[None])
        row[f"g_std_{metric}"] = stability if np.isfinite(values).all() else None
    return row


def method_scores(results: pa.Table, images: pa.Table) -> dict[str, MethodScores]:
    """The tables' numbers per method. Raises DataError where a run, an image or a column is missing or doubled."""
    for table, name, fields in ((results, "results", _RESULT_FIELDS), (images, "images", _IMAGE_FIELDS)):
        missing = [column for column, _ in fields if column not in table.column_names]
        if missing or table.num_rows == 0:
            raise DataError(
                f"the table has no {'column ' + ', '.join(missing) if missing else 'rows'}",
                where=f"{name}.parquet",
                todo=_AGAIN,
            )
    metrics = [name for name in results.column_names if name not in dict(_RESULT_FIELDS)]
    names = images["method"].unique().to_pylist()
    strangers = sorted(set(results["method"].unique().to_pylist()) - set(names))
    if strangers:
        raise DataError(f"method {strangers[0]!r} has runs but no images", where="images.parquet", todo=_AGAIN)
    methods = {name: _one_method(name, results, images, metrics) for name in names}
    first = methods[names[0]]
    for method in methods.values():
        unshared = sorted(set(first.keys) ^ set(method.keys))
        if unshared:
            raise DataError(
                f"methods {first.name!r} and {method.name!r} were not evaluated on the same images",
                where=f"{len(unshared)} images, the first is {unshared[0]!r}",
                todo=_AGAIN,
            )
    return methods


def _one_method(name: str, results: pa.Table, images: pa.Table, metrics: list[str]) -> MethodScores:
    rows = results.filter(pc.field("method") == name).sort_by([("key", "ascending"), ("run", "ascending")])
    per_image = images.filter(pc.field("method") == name).sort_by("key").to_pydict()
    keys, num_runs = per_image["key"], max(per_image["num_runs"])
    expected = [(key, run) for key in keys for run in range(num_runs)]
    found = list(zip(rows["key"].to_pylist(), rows["run"].to_pylist(), strict=True))
    if found != expected or len(set(keys)) != len(keys) or min(per_image["num_runs"]) != num_runs:
        odd = sorted(set(expected) ^ set(found)) or [("a key", "a doubled row")]
        raise DataError(
            f"method {name!r} does not have {num_runs} runs of every image",
            where=f"image {odd[0][0]!r}, run {odd[0][1]} ({len(odd)} in all are missing or too many)",
            todo=_AGAIN,
        )
    return MethodScores(
        name=name,
        keys=keys,
        num_runs=num_runs,
        scores={metric: _floats(rows[metric].to_pylist()).reshape(len(keys), num_runs) for metric in metrics},
        l_std=_floats(per_image["l_std"]),
        sharpness=_floats(per_image["sharpness"]),
        best_run=per_image["best_run"],
        worst_run=per_image["worst_run"],
        sizes=list(zip(per_image["height"], per_image["width"], strict=True)),
    )


def summarise(results: pa.Table, images: pa.Table) -> dict[str, Any]:
    """Method -> `MethodScores.summary()`; a deterministic method (one run) has exactly 0 stability."""
    return {name: method.summary() for name, method in method_scores(results, images).items()}


def load_result(folder: str | Path) -> EvaluationResult:
    """Read run.json, results.parquet and images.parquet below a path or s3:// URI.

    set_metrics.json, where there is one, becomes `run["set_metrics"]`. Raises StorageError where a file is missing,
    DataError where one is damaged or incomplete.
    """
    folder = str(folder)
    files = {name: read_bytes(join(folder, name)) for name in ("run.json", "results.parquet", "images.parquet")}
    try:
        run = json.loads(files["run.json"])
        tables = [pq.read_table(io.BytesIO(files[f"{name}.parquet"])) for name in ("results", "images")]
    except ValueError as error:  # json's and pyarrow's errors are ValueErrors
        raise DataError(f"the evaluation result is damaged: {error}", where=folder, todo=_AGAIN) from error
    if exists(join(folder, SET_METRICS)):
        run["set_metrics"] = read_json(join(folder, SET_METRICS))
    return EvaluationResult(folder, run, method_scores(*tables))


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
