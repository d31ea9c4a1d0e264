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
from infra.files.storage import exists, join, read_bytes, read_json

_AGAIN = "run ccsr evaluate again: it resumes and fills the gaps"
SET_METRICS = "set_metrics.json"
TRACE = "trace.json"  # among a method's pictures
_RESULT_FIELDS = [("method", pa.string()), ("key", pa.string()), ("run", pa.int32()), ("seed", pa.int64())]
_IMAGE_FIELDS = [
    ("method", pa.string()),
    ("key", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("num_runs", pa.int32()),
    ("l_std", pa.float64()),
    ("l_std_equal_sharpness", pa.float64()),
    ("p_std", pa.float64()),
    ("sharpness", pa.float64()),
    ("best_run", pa.int32()),
    ("worst_run", pa.int32()),
]


@dataclass(frozen=True)
class MethodScores:
    """One method's numbers. `keys` are sorted and equal for all methods of a result; NaN means unavailable.

    `scores`: metric -> float64 (num_images, num_runs). `l_std`, `l_std_equal_sharpness` (NaN also where blurrier than
    bicubic), `p_std`, `sharpness`: float64 (num_images,). `p_g_std`: metric -> float64 (num_images,), over
    perturbations. `best_run`, `worst_run`: by PSNR, None where there is none. `sizes`: (height, width) in px.
    `directions`: of pyiqa's metrics. `pictures`: folder of this method's pictures.
    """

    name: str
    keys: list[str]
    num_runs: int
    scores: dict[str, np.ndarray]
    l_std: np.ndarray
    l_std_equal_sharpness: np.ndarray
    p_std: np.ndarray
    p_g_std: dict[str, np.ndarray]
    sharpness: np.ndarray
    best_run: list[int | None]
    worst_run: list[int | None]
    sizes: list[tuple[int, int]]
    directions: dict[str, int]
    pictures: str

    @property
    def deterministic(self) -> bool:
        """One run, or runs that never differ: the spread over runs is 0 by construction and says nothing."""
        return self.num_runs == 1 or not self.l_std.any()

    def summary(self) -> dict[str, Any]:
        """`num_images`, `num_runs`, `l_std`, `l_std_equal_sharpness`, `num_blurrier`, `p_std`, `sharpness` and
        `metrics`: name -> `mean`, `g_std`, `num_images`, `p_g_std` where known, and for pyiqa's `direction`.

        Numbers are over the images that have them, a metric's over those that have it for every run; None where no
        image has. `num_blurrier`: images on which the method is blurrier than bicubic.
        """
        metrics = {}
        for metric, scores in self.scores.items():
            complete = scores[np.isfinite(scores).all(axis=1)]
            metrics[metric] = {
                "mean": float(complete.mean()) if len(complete) else None,
                "g_std": (g_std(complete) if self.num_runs > 1 else 0.0) if len(complete) else None,
                "num_images": len(complete),
                **({"direction": self.directions[metric]} if metric in self.directions else {}),
                **({} if (p_g_std := _mean_of_known(self.p_g_std[metric])) is None else {"p_g_std": p_g_std}),
            }
        return {
            "num_images": len(self.keys),
            "num_runs": self.num_runs,
            "l_std": float(self.l_std.mean()) if self.num_runs > 1 else 0.0,
            "l_std_equal_sharpness": _mean_of_known(self.l_std_equal_sharpness),
            "num_blurrier": int(np.isnan(self.l_std_equal_sharpness).sum()),
            "p_std": _mean_of_known(self.p_std),
            "sharpness": _mean_of_known(self.sharpness),
            "metrics": metrics,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """A result folder in memory: `run` is run.json; `methods` in the order in which they were evaluated."""

    folder: str
    run: dict[str, Any]
    methods: dict[str, MethodScores]
    name: str

    @property
    def summary(self) -> dict[str, Any]:
        """`MethodScores.summary` of each, plus the numbers of whole sets (FID) in `run["set_metrics"]`.

        `set_metrics`: method -> metric -> number or null; they have a mean and no G-STD.
        """
        summary = {name: method.summary() for name, method in self.methods.items()}
        for name, numbers in self.run.get("set_metrics", {}).items():
            for metric, value in numbers.items():
                num_images = summary[name]["num_images"] if value is not None else 0
                summary[name]["metrics"][metric] = {"mean": value, "g_std": None, "num_images": num_images}
        return summary

    def picture(self, kind: str, key: str, run: int | None = None) -> str:
        """The path or URI of a picture; `kind`: "hr", "lr" or a method, whose stability map it is where `run` is None.

        A map is a 16-bit grey PNG of std * 65535, std in [0, 1]; all others are 8-bit RGB.
        """
        if kind in ("hr", "lr"):
            return join(self.folder, "images", kind, f"{key}.png")
        return join(self.methods[kind].pictures, "l_std" if run is None else f"{run:02d}", f"{key}.png")


def results_schema(metrics: Sequence[str]) -> pa.Schema:
    """results.parquet: one row per (method, image, run), a nullable float64 column per metric (null = unavailable)."""
    return pa.schema([*_RESULT_FIELDS, *((metric, pa.float64()) for metric in metrics)])


def images_schema(metrics: Sequence[str]) -> pa.Schema:
    """images.parquet: one row per (method, image), with a nullable `g_std_METRIC` and `p_g_std_METRIC` per metric."""
    names = [f"{kind}_{metric}" for kind in ("g_std", "p_g_std") for metric in metrics]
    return pa.schema([*_IMAGE_FIELDS, *((name, pa.float64()) for name in names)])


def image_row(
    method: str,
    key: str,
    size: tuple[int, int],
    scores: Mapping[str, Sequence[float | None]],
    *,
    l_std: float,
    sharpness: float | None,
    l_std_equal_sharpness: float | None = 0.0,
    p_std: float | None = None,
    perturbed: Mapping[str, Sequence[float | None]] | None = None,
) -> dict[str, Any]:
    """A row of images.parquet from one image's `scores` (metric -> one number per run; None = unavailable).

    `size`: (height, width) in px. A method of one run is deterministic: its G-STDs are 0. `perturbed`: metric -> one
    number per perturbation of the LR image.
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
    row |= {"l_std_equal_sharpness": _finite_or_none(l_std_equal_sharpness), "p_std": _finite_or_none(p_std)}
    row |= {"best_run": None, "worst_run": None}
    if "psnr_y" in known and np.isfinite(known["psnr_y"]).all():
        row |= {"best_run": int(known["psnr_y"].argmax()), "worst_run": int(known["psnr_y"].argmin())}
    for metric, values in known.items():
        row[f"g_std_{metric}"] = _std(values)
        row[f"p_g_std_{metric}"] = _std(_floats((perturbed or {}).get(metric, [None])))
    return row


def _std(values: np.ndarray) -> float | None:
    if not np.isfinite(values).all():
        return None
    return g_std(values[None]) if len(values) > 1 else 0.0


def method_scores(
    results: pa.Table, images: pa.Table, folder: str = "", directions: Mapping[str, int] | None = None
) -> dict[str, MethodScores]:
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
    unknown = sorted(set(results["method"].unique().to_pylist()) - set(names))
    if unknown:
        raise DataError(f"method {unknown[0]!r} has runs but no images", where="images.parquet", todo=_AGAIN)
    ours = {metric: direction for metric, direction in (directions or {}).items() if metric in metrics}
    methods = {name: _one_method(name, results, images, metrics, ours, folder) for name in names}
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


def _one_method(
    name: str, results: pa.Table, images: pa.Table, metrics: list[str], directions: dict[str, int], folder: str
) -> MethodScores:
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
        l_std_equal_sharpness=_floats(per_image["l_std_equal_sharpness"]),
        p_std=_floats(per_image["p_std"]),
        p_g_std={metric: _floats(per_image[f"p_g_std_{metric}"]) for metric in metrics},
        sharpness=_floats(per_image["sharpness"]),
        best_run=per_image["best_run"],
        worst_run=per_image["worst_run"],
        sizes=list(zip(per_image["height"], per_image["width"], strict=True)),
        directions=directions,
        pictures=join(folder, "images", name),
    )


def load_result(folder: str | Path) -> EvaluationResult:
    """Read run.json, results.parquet, images.parquet and methods/*.json below a path or s3:// URI.

    The methods' configs and inputs join `run["config"]["methods"]` and `run["inputs"]["methods"]`; set_metrics.json,
    where there is one, becomes `run["set_metrics"]`. Raises StorageError where a file is missing, DataError where one
    is damaged, incomplete or of an earlier version.
    """
    folder = str(folder)
    files = {name: read_bytes(join(folder, name)) for name in ("run.json", "results.parquet", "images.parquet")}
    try:
        run = json.loads(files["run.json"])
        tables = [pq.read_table(io.BytesIO(files[f"{name}.parquet"])) for name in ("results", "images")]
    except ValueError as error:  # json's and pyarrow's errors are ValueErrors
        raise DataError(f"the evaluation result is damaged: {error}", where=folder, todo=_AGAIN) from error
    if "convention" not in run:
        raise DataError(
            "an earlier version made this result: it names no convention, and its NIQE is that of another luma",
            where=folder,
            todo="evaluate again into another output",
        )
    methods = method_scores(tables[0], tables[1], folder, run.get("directions"))
    identities = {name: read_json(method_file(folder, name)) for name in methods}
    for part, field in (("config", "config"), ("inputs", "input")):
        run.setdefault(part, {})["methods"] = {name: identity[field] for name, identity in identities.items()}
    if exists(join(folder, SET_METRICS)):
        stored = read_json(join(folder, SET_METRICS))
        run["set_metrics"] = {name: stored[name] for name in methods if name in stored}
    return EvaluationResult(folder, run, methods, folder.rstrip("/").rsplit("/", 1)[-1])


def is_deterministic(summary: Mapping[str, Any]) -> bool:
    """`MethodScores.deterministic` of a method's summary."""
    return summary["num_runs"] == 1 or not summary["l_std"]


def method_file(folder: str, method: str) -> str:
    """The file that says what a method's numbers in this result depend on: its `config` and `input` (an id)."""
    return join(folder, "methods", f"{method}.json")


def _mean_of_known(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
