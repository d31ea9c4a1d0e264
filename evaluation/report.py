"""One self-contained HTML report of a result folder: table, distributions, pictures, stability maps."""

import base64
import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from string import Template

import cv2
import numpy as np

from evaluation.metrics import METRICS, Metric
from evaluation.orderings import load_orderings, orderings_html
from evaluation.results import EvaluationResult, MethodScores, load_result
from evaluation.tables import html_table, interval_table, published_summary, terminal_table
from infra.errors import DataError
from infra.images import read_image
from infra.storage import exists, join, read_bytes, write_bytes

__all__ = ["terminal_table", "write_report"]

_TEMPLATE = Path(__file__).with_name("report.html")
_SIDE_PX = 400  # of the shown centre crop, in native pixels
_COLORMAP = cv2.COLORMAP_VIRIDIS


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


def write_report(folder: str | Path, *, num_images: int = 8) -> str:
    """Write FOLDER/report.html and return its path or URI.

    The pictures are of at most `num_images` images, evenly spaced over the images ordered by the first stochastic
    method's L-STD, from the most stable to the least. Raises DataError or StorageError for an incomplete folder.
    """
    result = load_result(folder)
    keys = _chosen_keys(result, num_images)
    maps = {
        (name, key): _read_map(result.picture(name, key))
        for name, method in result.methods.items()
        if method.num_runs > 1
        for key in keys
    }
    # One scale for all maps; the top half per cent may saturate so that single pixels do not darken the rest.
    top = max((float(np.percentile(stds, 99.5)) for stds in maps.values()), default=0.0)
    top = max(math.ceil(top * 100) / 100, 0.01)
    metric = "psnr_y" if "psnr_y" in _metrics(result) else next(iter(_metrics(result)), "")
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"Evaluation: {html.escape(result.name)}",
        meta=_meta(result),
        tables=_tables(result),
        distribution_title=f"{html.escape(METRICS.get(metric, Metric(metric, 0, 4)).label)} per image",
        distribution=_distribution(result, metric) if metric else "",
        images_note=_images_note(result, keys),
        images="\n".join(_image_section(result, key, maps, top) for key in keys),
        config=html.escape(json.dumps(result.run, indent=2, sort_keys=True)),
    )
    target = join(str(folder), "report.html")
    write_bytes(target, page.encode())
    return target


def _metrics(result: EvaluationResult) -> list[str]:
    """Metrics that at least one method has for at least one image."""
    methods = result.methods.values()
    names = list(dict.fromkeys(metric for method in methods for metric in method.scores))
    return [name for name in names if any(np.isfinite(m.scores[name]).any() for m in methods if name in m.scores)]


def _chosen_keys(result: EvaluationResult, num_images: int) -> list[str]:
    methods = list(result.methods.values())
    leader = next((method for method in methods if method.num_runs > 1), methods[0])
    order = [leader.keys[i] for i in np.argsort(leader.l_std, kind="stable")]
    return [order[i] for i in sorted({round(i) for i in np.linspace(0, len(order) - 1, num_images)})]


def _meta(result: EvaluationResult) -> str:
    first = next(iter(result.methods.values()))
    facts = [f"{len(first.keys)} images", f"{len(result.methods)} methods"]
    for name, label in (("crop_border", "crop"), ("seed", "seed"), ("dataset_id", "dataset"), ("fingerprint", "run")):
        if name in result.run:
            facts.append(f"{label} {str(result.run[name])[:24]}" + (" px" if name == "crop_border" else ""))
    return f'<p class="meta">{html.escape(" · ".join(facts))}</p>'


def _tables(result: EvaluationResult) -> str:
    group = result.run.get("published")
    published = published_summary(group) if group else {}
    tables = html_table(result.summary, published)
    tables += f"<h2>95 % intervals over the images</h2>{interval_table(result.methods)}"
    if group:
        title = html.escape(f"Published: CCSR paper, arXiv 2401.00877v1, {group}")
        tables += f"<h2>{title}</h2>{html_table(published)}"
        orderings = load_orderings(result.folder)
        tables += f"<h2>Orderings of the paper</h2>{orderings_html(orderings)}" if orderings else ""
    return tables


def _distribution(result: EvaluationResult, metric: str) -> str:
    """An SVG: per method a box (quartiles, median) and a dot per image, its mean over the runs."""
    values = {
        name: np.sort(method.scores[metric].mean(axis=1)[np.isfinite(method.scores[metric]).all(axis=1)])
        for name, method in result.methods.items()
        if metric in method.scores
    }
    values = {name: numbers for name, numbers in values.items() if len(numbers)}
    low, high = min(v[0] for v in values.values()), max(v[-1] for v in values.values())
    step = 10 ** math.floor(math.log10(max(high - low, 1e-6)))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 8 or s == 2 * step)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    left, width, row = 170, 900, 44

    def x(value: float) -> float:
        return left + (value / step - first) / (last - first) * (width - left - 20)

    bottom = row * len(values) + 12
    digits = max(0, -math.floor(math.log10(step)))
    parts = [
        f'<line x1="{x(i * step):.1f}" x2="{x(i * step):.1f}" y1="6" y2="{bottom}" stroke="var(--line)"/>'
        f'<text x="{x(i * step):.1f}" y="{bottom + 16}" text-anchor="middle">{i * step:.{digits}f}</text>'
        for i in range(first, last + 1)
    ]
    for i, (name, numbers) in enumerate(values.items()):
        y = row * i + row / 2 + 6
        lower, median, upper = np.percentile(numbers, [25, 50, 75])
        parts.append(
            f'<text x="{left - 14}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{x(lower):.1f}" y="{y - 13}" width="{max(x(upper) - x(lower), 1):.1f}" height="26" rx="3" '
            'fill="var(--accent)" fill-opacity=".18" stroke="var(--accent)"/>'
            f'<line x1="{x(median):.1f}" x2="{x(median):.1f}" y1="{y - 13}" y2="{y + 13}" stroke="var(--accent)" '
            'stroke-width="2.5"/>'
        )
        parts += [
            # The golden ratio spreads the dots without chance.
            f'<circle cx="{x(v):.1f}" cy="{y - 9 + 18 * (j * 0.618 % 1):.1f}" r="3" fill="currentColor" opacity=".5"/>'
            for j, v in enumerate(numbers)
        ]
    unit = " (dB)" if metric == "psnr_y" else ""
    note = f"Each dot is an image, its mean over the runs{unit}; boxes are quartiles with the median."
    size = f'viewBox="0 0 {width} {bottom + 24}" style="width:100%;max-width:{width}px"'
    return f'<svg {size} role="img">{"".join(parts)}</svg><p class="note">{note}</p>'


def _images_note(result: EvaluationResult, keys: list[str]) -> str:
    total = len(next(iter(result.methods.values())).keys)
    return (
        f'<p class="note">{len(keys)} of {total} images, from the most to the least stable. Larger pictures show their '
        f"centre of up to {_SIDE_PX} × {_SIDE_PX} px; LR is enlarged to nearest pixels. Best and worst run by PSNR. "
        "Brighter places of a stability map change more from run to run; all maps share one scale.</p>"
    )


def _image_section(result: EvaluationResult, key: str, maps: dict[tuple[str, str], np.ndarray], top: float) -> str:
    height, width = next(iter(result.methods.values())).sizes[_index(result, key)]
    lr = read_image(result.picture("lr", key))
    scale = height // lr.shape[0]
    side_y, side_x = (min(side, _SIDE_PX) // scale * scale for side in (height, width))
    window = _Window((height - side_y) // 2 // scale * scale, (width - side_x) // 2 // scale * scale, side_y, side_x)
    # LR pixels are kept exact and enlarged by the browser.
    lr_uri = _data_uri(".png", window.cut(lr, scale))
    column = [
        '<div class="name">input</div>',
        _figure(lr_uri, "LR", f"LR, {lr.shape[1]} × {lr.shape[0]} px", "pixels"),
    ]
    hr = result.picture("hr", key)
    has_hr = exists(hr)
    column.append(
        _figure(_jpeg(window.cut(read_image(hr))), "HR", f"HR, {width} × {height} px") if has_hr else "<div></div>"
    )
    column.append(_colour_bar(top) if maps else "<div></div>")
    methods = list(result.methods.values())
    columns = column + [part for method in methods for part in _method_column(result, method, key, window, maps, top)]
    # The slider starts with LR against the first stochastic method's best run; a method before it has one picture.
    stochastic = (i for i, method in enumerate(methods) if method.num_runs > 1)
    start = 1 + has_hr + next(stochastic, 0)
    return (
        f'<section><h3>{html.escape(key)}</h3><div class="pictures"><div class="compare">'
        '<div class="choices"><select aria-label="left picture" data-start="0"></select>'
        f'<select aria-label="right picture" data-start="{start}"></select></div>'
        '<div class="slider"><img alt=""><img alt=""><input type="range" min="0" max="100" value="50" step="0.5" '
        'aria-label="boundary between the two pictures"></div></div>'
        f'<div class="grid">{"".join(columns)}</div></div></section>'
    )


def _method_column(
    result: EvaluationResult,
    method: MethodScores,
    key: str,
    window: _Window,
    maps: dict[tuple[str, str], np.ndarray],
    top: float,
) -> list[str]:
    index = _index(result, key)
    psnr = method.scores.get("psnr_y")

    def run_figure(run: int, label: str) -> str:
        picture = window.cut(read_image(result.picture(method.name, key, run)))
        score = f" · {psnr[index, run]:.2f} dB" if psnr is not None and np.isfinite(psnr[index, run]) else ""
        return _figure(_jpeg(picture), f"{method.name} {label}", f"{label}{score}")

    head = f'<div class="name">{html.escape(method.name)}</div>'
    if method.num_runs == 1:
        return [head, run_figure(0, "only run"), '<p class="note">deterministic</p>', "<div></div>"]
    best, worst = method.best_run[index], method.worst_run[index]
    if best is None or worst is None:  # no ground truth to rank the runs by
        figures = [run_figure(0, "run 00"), run_figure(1, "run 01")]
    else:
        figures = [run_figure(best, f"best {best:02d}"), run_figure(worst, f"worst {worst:02d}")]
    levels = np.rint(np.clip(window.cut(maps[method.name, key]) / top, 0, 1) * 255).astype(np.uint8)
    coloured = np.ascontiguousarray(cv2.applyColorMap(levels, _COLORMAP)[..., ::-1])
    caption = f"L-STD {method.l_std[index]:.4f}"
    if np.isfinite(method.sharpness[index]):
        caption += f" · sharpness {method.sharpness[index]:.2f}"
    return [head, *figures, _figure(_jpeg(coloured), f"{method.name} stability map", caption)]


def _index(result: EvaluationResult, key: str) -> int:
    return next(iter(result.methods.values())).keys.index(key)


def _read_map(uri: str) -> np.ndarray:
    stored = cv2.imdecode(np.frombuffer(read_bytes(uri), np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 2:
        raise DataError("this is no stability map (16-bit grey PNG)", where=uri, todo="run ccsr evaluate again")
    return stored / np.float32(65535)


def _figure(uri: str, name: str, caption: str, style: str = "") -> str:
    return (
        f'<figure><img src="{uri}" alt="{html.escape(name)}" class="{style}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _colour_bar(top: float) -> str:
    strip = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], _COLORMAP)[0, ::15, ::-1]
    colours = ", ".join(f"rgb({r} {g} {b})" for r, g, b in strip)
    return (
        '<div><p class="note">std over the runs, of values in 0 .. 1</p>'
        f'<div class="bar" style="background: linear-gradient(90deg, {colours})"></div>'
        f'<div class="note ends"><span>0</span><span>{top / 2:.3f}</span><span>{top:.2f}</span></div></div>'
    )


def _jpeg(picture: np.ndarray) -> str:
    return _data_uri(".jpg", picture)


def _data_uri(suffix: str, picture: np.ndarray) -> str:
    _, data = cv2.imencode(suffix, picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else [])
    kind = {".jpg": "jpeg", ".png": "png"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
