"""What an average of the weights does: one checkpoint's weights and their average on held-out photographs.

`python -m benchmarks.ema CHECKPOINT --data SHARDS [-c CONFIG]`. Differences are paired by photograph; intervals are
95 % bootstrap over photographs, as `ccsr compare` has them.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from evaluation import l_std, psnr_y
from evaluation.metrics.bootstrap import bootstrap_interval
from evaluation.metrics.image import sharpness
from infra.config import load_config
from infra.imaging.images import decode_image
from infra.imaging.pictures import resized
from infra.imaging.pixels import l_std_equal_sharpness
from infra.shards.manifest import Manifest
from infra.shards.shard import image_of, read_sample
from training.config import TrainConfig
from training.models import CcsrModel
from training.restore.seeded_runs import restore_runs
from training.run.checkpoint import load_checkpoint
from training.run.export import initial_model

STAGE1 = Path(__file__).parents[1] / "configs" / "demo" / "train_stage1.yaml"
WEIGHTS = ("weights", "ema")
METRICS = {"PSNR-Y, dB": ".3f", "sharpness": ".3f", "L-STD": ".5f", "L-STD at equal sharpness": ".5f"}


@cache
def model_of(checkpoint: str, config_file: str, kind: str) -> CcsrModel:
    config = load_config(config_file, TrainConfig)
    model, tensors = initial_model(config), load_checkpoint(checkpoint).tensors[kind]
    with torch.no_grad():
        for name, parameter in model.trained_part(config.stage).named_parameters():
            parameter.copy_(tensors[name])
    return model


def scores(checkpoint: str, config_file: str, data: str, place: int, num_runs: int) -> list[list[float]]:
    """A row of METRICS for each of WEIGHTS, of one photograph. Not a number where runs are less sharp than bicubic."""
    torch.set_num_threads(1)
    entry = Manifest.load(data).entries[place]
    members = read_sample(data, entry)
    lr, hr = (decode_image(image_of(members, name), where=entry.key) for name in ("lr", "hr"))
    size, rows = hr.shape[:2], []
    sampling = load_config(config_file, TrainConfig).trained_sampling
    for kind in WEIGHTS:
        model = model_of(checkpoint, config_file, kind)
        runs = list(restore_runs(model, lr, size, sampling, seed=0, key=entry.key, runs=range(num_runs)))
        equal = l_std_equal_sharpness(runs, resized(lr, size))
        means = (float(np.mean([metric(run, hr) for run in runs])) for metric in (psnr_y, sharpness))
        rows.append([*means, l_std(runs), equal])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="OUTPUT/checkpoints/POSITION of a run with `ema`")
    parser.add_argument("--data", required=True, help="shard set of held-out pairs")
    parser.add_argument("-c", "--config", default=str(STAGE1))
    parser.add_argument("--num-runs", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    places = range(len(Manifest.load(options.data).entries))
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        asked = [
            pool.submit(scores, options.checkpoint, options.config, options.data, place, options.num_runs)
            for place in places
        ]
        found = np.array([one.result() for one in asked])  # photographs, WEIGHTS, METRICS
    print(f"{len(places)} photographs, {options.num_runs} runs each, {load_checkpoint(options.checkpoint).facts}")
    print("| | weights | average | average - weights | 95 % interval | relative |\n|---|---|---|---|---|---|")
    for number, (name, form) in enumerate(METRICS.items()):
        values = found[np.isfinite(found[:, :, number]).all(1), :, number]
        differences = values[:, 1] - values[:, 0]
        low, high = bootstrap_interval(differences) if len(differences) else (math.nan, math.nan)
        raw, average = values.mean(0) if len(values) else (math.nan, math.nan)
        cells = [f"{raw:{form}}", f"{average:{form}}", f"{differences.mean():+{form}}"]
        cells += [f"{low:+{form}} .. {high:+{form}}", f"{differences.mean() / raw:+.1%}"]
        print(f"| {name} ({len(values)}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
