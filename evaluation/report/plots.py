"""Coordinates of the report's drawings; report.html.j2 makes SVG of them."""

import math
from typing import Any

import numpy as np

from evaluation.metrics.names import METRICS, Metric
from evaluation.results import TRACE, EvaluationResult
from infra.files.storage import exists, join, read_json

_COLOURS = ("#2f6fb2", "#d1661f", "#3c9351", "#9a5fb0", "#b8952b", "#c0455e", "#4aa3a8", "#7a7a7a")


def distribution(result: EvaluationResult, metric: str) -> dict[str, Any]:
    """Coordinates of a drawing: per method a box (quartiles, median) and a dot per image, its mean over the runs."""
    values = {
        name: np.sort(method.scores[metric].mean(axis=1)[np.isfinite(method.scores[metric]).all(axis=1)])
        for name, method in result.methods.items()
        if metric in method.scores
    }
    values = {name: numbers for name, numbers in values.items() if len(numbers)}
    low, high = min(v[0] for v in values.values()), max(v[-1] for v in values.values())
    step = _step(low, high, 8)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    left, width, row = 170, 900, 44

    def x(value: float) -> float:
        return round(float(left + (value / step - first) / (last - first) * (width - left - 20)), 1)

    digits = max(0, -math.floor(math.log10(step)))
    rows = []
    for i, (name, numbers) in enumerate(values.items()):
        y = row * i + row / 2 + 6
        lower, median, upper = map(x, np.percentile(numbers, [25, 50, 75]))
        # The golden ratio spreads the dots without chance.
        dots = [(x(v), round(y - 9 + 18 * (j * 0.618 % 1), 1)) for j, v in enumerate(numbers)]
        rows.append({"name": name, "y": y, "lower": lower, "median": median, "upper": upper, "dots": dots})
    return {
        "metric": METRICS.get(metric, Metric(metric, 0, 4)).label,
        "unit": " (dB)" if metric == "psnr_y" else "",
        "left": left,
        "width": width,
        "bottom": row * len(values) + 12,
        "ticks": [(x(i * step), f"{i * step:.{digits}f}") for i in range(first, last + 1)],
        "rows": rows,
    }


def trace_plots(result: EvaluationResult) -> dict[str, Any] | None:
    """Panels of PSNR, sharpness and L-STD of the decoded x0 over the visited timesteps, T at the left, a line per
    method: means over the traced images. None where nothing was traced."""
    traces = {name: join(method.pictures, TRACE) for name, method in result.methods.items()}
    by_method = {name: list(read_json(place).values()) for name, place in traces.items() if exists(place)}
    if not by_method:
        return None
    panels = []
    for metric in ("psnr_y", "sharpness", "l_std"):
        lines = {
            name: [(step[0]["t"], float(np.mean([one[metric] for one in step]))) for step in zip(*images, strict=True)]
            for name, images in by_method.items()
            if all(step[metric] is not None for image in images for step in image)
        }
        if lines:
            panels.append(_panel(METRICS[metric].label, lines))
    legend = [{"name": name, "colour": _COLOURS[i % len(_COLOURS)]} for i, name in enumerate(by_method)]
    return {"panels": panels, "legend": legend, "num_images": max(map(len, by_method.values()))}


def _panel(label: str, lines: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """One panel of 300 x 190 px; the timesteps fall from 999 at the left to 0 at the right."""
    values = [value for line in lines.values() for _, value in line]
    step = _step(min(values), max(values), 4)
    first, last = math.floor(min(values) / step), max(math.ceil(max(values) / step), math.floor(min(values) / step) + 1)

    def point(t: int, value: float) -> str:
        return f"{290 - 240 * t / 999:.1f},{150 - 135 * (value / step - first) / (last - first):.1f}"

    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return {
        "label": label,
        "y_ticks": [(point(999, i * step).split(",")[1], f"{i * step:.{digits}f}") for i in range(first, last + 1)],
        "x_ticks": [(point(t, 0).split(",")[0], t) for t in (999, 667, 333, 0)],
        "lines": [
            {"colour": _COLOURS[i % len(_COLOURS)], "points": [point(*at) for at in line], "name": name}
            for i, (name, line) in enumerate(lines.items())
        ],
    }


def _step(low: float, high: float, most: int) -> float:
    """A round distance of ticks of which at most about `most` are between `low` and `high`."""
    spread = max(high - low, max(abs(low), abs(high)) / 100, 1e-6)  # equal values have ticks too
    step = 10 ** math.floor(math.log10(spread))
    return next(s for s in (step / 5, step / 2, step, 2 * step) if spread / s <= most or s == 2 * step)
