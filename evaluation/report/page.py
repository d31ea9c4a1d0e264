"""One self-contained HTML report of a result folder: table, distributions, pictures, stability maps."""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from evaluation.compare import Comparison
from evaluation.config import CONVENTIONS
from evaluation.find import find_result, merge_results
from evaluation.report.orderings import load_orderings, orderings_table
from evaluation.report.plots import distribution, trace_plots
from evaluation.report.tables import interval_table, published_summary, score_table
from evaluation.results import EvaluationResult, MethodScores, load_result
from infra.display.table import Table
from infra.display.templating import render
from infra.errors import DataError
from infra.files.publish import temporary_folder, write_bytes
from infra.files.storage import exists, join, list_files, read_bytes
from infra.imaging.images import read_image
from infra.imaging.pixels import COLORMAP, coloured
from infra.mlflow.tracking import TrackingConfig

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_SIDE_PX = 400  # of the shown centre crop, in native pixels


@dataclass(frozen=True)
class _Window:
    """The centre part of an HR-sized picture that the report shows, px."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, picture: np.ndarray, scale: int = 1) -> np.ndarray:
        """That part of `picture` (H / scale, W / scale, ...)."""
        top, left, height, width = (n // scale for n in (self.top, self.left, self.height, self.width))
        return picture[top : top + height, left : left + width]


@dataclass(frozen=True)
class Figure:
    """A picture in a page; its name is what the sliders' lists show."""

    name: str
    caption: str
    uri: str


def write_report(result: str | Path | EvaluationResult, target: str | None = None, *, num_images: int = 8) -> str:
    """Write the report of a result (or of its folder) to `target`, by default FOLDER/report.html; return where it is.

    The pictures are of at most `num_images` images, evenly spaced over the images ordered by the first stochastic
    method's L-STD, from the most stable to the least. Raises DataError or StorageError for an incomplete folder.
    """
    if not isinstance(result, EvaluationResult):
        result = load_result(result)
    metric = "psnr_y" if "psnr_y" in _metrics(result) else next(iter(_metrics(result)), "")
    page = render(
        _TEMPLATE,
        title=f"Evaluation: {result.name}",
        facts=_facts(result),
        tables=_tables(result),
        distribution=distribution(result, metric) if metric else None,
        trace=trace_plots(result),
        **_pictures(result, num_images),
        config=json.dumps(result.run, indent=2, sort_keys=True),
    )
    target = target or join(result.folder, "report.html")
    write_bytes(target, page.encode())
    return target


def _pictures(result: EvaluationResult, num_images: int) -> dict[str, Any]:
    """What the page shows of up to `num_images` images; no images where a result has none stored."""
    keys = stored_keys(result, num_images)
    maps = {
        (name, key): read_map(result.picture(name, key))
        for name, method in result.methods.items()
        if method.num_runs > 1
        for key in keys
    }
    # One scale for all maps; the top half per cent may saturate so that single pixels do not darken the rest.
    top = max((float(np.percentile(stds, 99.5)) for stds in maps.values()), default=0.0)
    top = max(math.ceil(top * 100) / 100, 0.01)
    return {
        "images": [_image(result, key, maps, top) for key in keys],
        "num_images": len(next(iter(result.methods.values())).keys),
        "side_px": _SIDE_PX,
        "colours": map_colours() if maps else "",
        "top": top,
    }


def map_colours() -> str:
    """The colours of stability maps from 0 to their top, as CSS writes a gradient."""
    strip = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], COLORMAP)[0, ::15, ::-1]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in strip)


def report_results(places: Sequence[str], target: str | None, tracking: TrackingConfig) -> tuple[EvaluationResult, str]:
    """The report of one result, or of several merged: folders, or MLflow runs by id or name. Returns both."""
    with temporary_folder("report") as scratch:
        found = [find_result(place, tracking, scratch, pictures=True) for place in places]
        result = merge_results(found) if len(found) > 1 else found[0]
        of_folder = len(found) == 1 and "mlflow_experiment" not in result.run
        return result, write_report(result, target or (None if of_folder else "report.html"))


def comparison_page(comparison: Comparison) -> str:
    """The tables of `compare` and the methods' pictures side by side, as one self-contained HTML page."""
    facts = [f"baseline {comparison.baseline}", *_facts(comparison.results[0])[2:4]]
    config = json.dumps({result.name: result.run for result in comparison.results}, indent=2, sort_keys=True)
    drawn: dict[str, Any] = {"distribution": None, "trace": None, "images": []}
    drawn |= _pictures(comparison.compared, num_images=8) if comparison.compared else {}
    tables = comparison.tables()
    return render(_TEMPLATE, title="Comparison", facts=facts, tables=tables, config=config, **drawn)


def _metrics(result: EvaluationResult) -> list[str]:
    """Metrics that at least one method has for at least one image."""
    methods = result.methods.values()
    names = list(dict.fromkeys(metric for method in methods for metric in method.scores))
    return [name for name in names if any(np.isfinite(m.scores[name]).any() for m in methods if name in m.scores)]


def stored_keys(result: EvaluationResult, num_images: int) -> list[str]:
    """Up to `num_images` images whose pictures are there, from the most to the least stable."""
    methods = list(result.methods.values())
    leader = next((method for method in methods if not method.deterministic), methods[0])
    folders = {method.pictures for method in methods}  # an MLflow run has the pictures of its first images alone
    present = [{place.rsplit("/", 1)[-1] for place in list_files(join(folder, "00"))} for folder in folders]
    here = {key for key in leader.keys if all(f"{key}.png" in names for names in present)}
    order = [leader.keys[i] for i in np.argsort(leader.l_std, kind="stable") if leader.keys[i] in here]
    if not order:
        return []
    return [order[i] for i in sorted({round(i) for i in np.linspace(0, len(order) - 1, num_images)})]


def _facts(result: EvaluationResult) -> list[str]:
    first = next(iter(result.methods.values()))
    facts = [f"{len(first.keys)} images", f"{len(result.methods)} methods"]
    convention = result.run["convention"]
    facts.append(f"convention {convention} ({CONVENTIONS[convention]} px cut from each side)")
    names = (("dataset_id", "dataset"), ("seed", "seed"), ("fingerprint", "result"))
    return facts + [f"{label} {str(result.run[name])[:24]}" for name, label in names if name in result.run]


def _tables(result: EvaluationResult) -> list[Table]:
    group = result.run.get("published")
    published = published_summary(group) if group else {}
    tables = [score_table(result.summary, "Quality and stability", published), interval_table(result.methods)]
    if group:
        tables.append(score_table(published, f"Published: CCSR paper, arXiv 2401.00877v1, {group}"))
        orderings = load_orderings(result.folder)
        tables += [orderings_table(orderings, group)] if orderings else []
    return tables


def _image(result: EvaluationResult, key: str, maps: dict[tuple[str, str], np.ndarray], top: float) -> dict[str, Any]:
    """The pictures of one image: LR, HR if there is one, and up to three per method."""
    height, width = next(iter(result.methods.values())).sizes[_index(result, key)]
    lr = read_image(result.picture("lr", key))
    scale = height // lr.shape[0]
    side_y, side_x = (min(side, _SIDE_PX) // scale * scale for side in (height, width))
    window = _Window((height - side_y) // 2 // scale * scale, (width - side_x) // 2 // scale * scale, side_y, side_x)
    # LR pixels are kept exact and enlarged by the browser.
    inputs = [Figure("LR", f"LR, {lr.shape[1]} × {lr.shape[0]} px", _data_uri(".png", window.cut(lr, scale)))]
    if exists(hr := result.picture("hr", key)):
        inputs.append(Figure("HR", f"HR, {width} × {height} px", _jpeg(window.cut(read_image(hr)))))
    methods = result.methods.values()
    columns = {method.name: _method_pictures(result, method, key, window, maps, top) for method in methods}
    return {"key": key, "columns": {"input": inputs, **columns}, "start": first_shown(result, len(inputs))}


def first_shown(result: EvaluationResult, num_before: int) -> int:
    """Number of the figure that a slider shows at first against LR: of the first stochastic method, before which come
    `num_before` figures and one of each method."""
    stochastic = (i for i, method in enumerate(result.methods.values()) if not method.deterministic)
    return num_before + next(stochastic, 0)


def _method_pictures(
    result: EvaluationResult,
    method: MethodScores,
    key: str,
    window: _Window,
    maps: dict[tuple[str, str], np.ndarray],
    top: float,
) -> list[Figure]:
    """The only run of a deterministic method; else best run, worst run and stability map."""
    index = _index(result, key)
    psnr = method.scores.get("psnr_y")

    def run_picture(run: int, label: str) -> Figure:
        picture = window.cut(read_image(result.picture(method.name, key, run)))
        score = f" · {psnr[index, run]:.2f} dB" if psnr is not None and np.isfinite(psnr[index, run]) else ""
        return Figure(f"{method.name} {label}", f"{label}{score}", _jpeg(picture))

    if method.num_runs == 1:
        return [run_picture(0, "only run")]
    best, worst = method.best_run[index], method.worst_run[index]
    if best is None or worst is None:  # no ground truth to rank the runs by
        pictures = [run_picture(0, "run 00"), run_picture(1, "run 01")]
    else:
        pictures = [run_picture(best, f"best {best:02d}"), run_picture(worst, f"worst {worst:02d}")]
    caption = f"L-STD {method.l_std[index]:.4f}"
    for label, values, form in (
        ("equal sharpness", method.l_std_equal_sharpness, ".4f"),
        ("sharpness", method.sharpness, ".2f"),
    ):
        if np.isfinite(values[index]):
            caption += f" · {label} {values[index]:{form}}"
    return [
        *pictures,
        Figure(f"{method.name} stability map", caption, _jpeg(coloured(window.cut(maps[method.name, key]), top))),
    ]


def _index(result: EvaluationResult, key: str) -> int:
    return next(iter(result.methods.values())).keys.index(key)


def read_map(uri: str) -> np.ndarray:
    stored = cv2.imdecode(np.frombuffer(read_bytes(uri), np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 2:
        raise DataError("this is no stability map (16-bit grey PNG)", where=uri, todo="run ccsr evaluate again")
    return stored / np.float32(65535)


def _jpeg(picture: np.ndarray) -> str:
    return _data_uri(".jpg", picture)


def _data_uri(suffix: str, picture: np.ndarray) -> str:
    _, data = cv2.imencode(suffix, picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else [])
    kind = {".jpg": "jpeg", ".png": "png"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
