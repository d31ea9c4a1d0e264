"""Histograms in text."""

from collections.abc import Sequence

import numpy as np


def bars(values: Sequence[float] | np.ndarray, edges: np.ndarray) -> list[str]:
    """A bar of # for each stretch between edges; what is outside belongs to the outermost."""
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return [
        f"{low:6g} to {high:<6g} {count:5d} {'#' * round(50 * count / counts.max())}".rstrip()
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
