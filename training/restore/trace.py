"""What each timestep of a restoration brings: the predictions of x0 on the way, decoded (CCSR paper, section 3.1)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from training.config import SamplingConfig
from training.models import CcsrModel
from training.restore.seeded_runs import ROWS_AT_ONCE, decode_images, prepare_image, sample_rows


@torch.inference_mode()
def trace_runs(
    model: CcsrModel,
    lr: np.ndarray,
    size: tuple[int, int],
    config: SamplingConfig,
    *,
    seed: int,
    key: str,
    runs: Sequence[int],
    rows_at_once: int = ROWS_AT_ONCE,
    num_traced: int = 4,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield each visited timestep, the first first, and the predictions of x0 there of the first `num_traced` runs,
    decoded; at the last one those of all runs, which are what `restore_runs` yields. Arguments and errors as there."""
    image = prepare_image(model, lr, size, config, key=key, num_runs=min(rows_at_once, len(runs)))
    visited: dict[int, list[Tensor]] = {}
    for first in range(0, len(runs), rows_at_once):
        rows = [(image, run) for run in runs[first : first + rows_at_once]]
        sample_rows(model, rows, config, seed, lambda t, x0: visited.setdefault(t, []).append(x0))
    for t, parts in visited.items():
        latents = torch.cat(parts)[: None if t == min(visited) else num_traced]
        together = latents.split(rows_at_once)  # as `restore_runs`, for the same bytes
        yield t, [one for some in together for one in decode_images(model, some, [image] * len(some), config)]
