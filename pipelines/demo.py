"""`ccsr demo`: the paper's claim on photographs that come with Python wheels, on top of the tiny base shipped here."""

import os
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from evaluation.report.tables import score_table
from infra.config import Config, load_yaml, parse_config
from infra.files.storage import exists, join
from infra.process.ray_runtime import RayConfig, ray_cluster
from pipelines.sharding.config import ShardConfig
from pipelines.sharding.job import run_shard
from training.config import TrainConfig
from training.run.driver import run_train

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs" / "demo"
BASE = "training/models/tiny_base"
PREFIX = "runs/demo"
TRAININGS = ("train_uniform", "train_stage1", "train_stage2")


def demo_config(name: str, config_class: type[Config], out: str) -> Any:
    """A config of configs/demo with every place under runs/demo moved under `out`, and the base found from anywhere."""
    path = CONFIGS / f"{name}.yaml"
    return parse_config(_moved(load_yaml(path), out), config_class, where=str(path))


def _moved(value: Any, out: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, out) for item in value]
    return value.replace(PREFIX, out).replace(BASE, str(REPOSITORY / BASE)) if isinstance(value, str) else value


def run_demo(folder: Path) -> None:
    """Shard, train, evaluate; print the table, the report's path and the command that opens MLflow."""
    console = Console()
    began = time.monotonic()
    out = str(folder.absolute())
    # One Ray for all steps; none where an earlier run left nothing to do.
    done = exists(join(out, "evaluation", "report.html"))
    with nullcontext() if done else ray_cluster(RayConfig()):
        console.print("[bold]1/5[/] shard: photographs -> degraded WebDataset tars (Ray Data)")
        for name in ("shard_train", "shard_heldout"):
            manifest = run_shard(demo_config(name, ShardConfig, out))
            console.print(f"    {manifest.num_samples} samples, dataset {manifest.dataset_id}: {manifest.uri}")
        seconds = 0.0
        for step, name in enumerate(TRAININGS, start=2):
            config = demo_config(name, TrainConfig, out)
            what = "conventional" if config.stage == 0 else f"stage {config.stage}"
            console.print(f"[bold]{step}/5[/] train: {what} (Ray Train + DeepSpeed, 2 CPU workers)")
            before = time.monotonic()
            console.print(f"    model: {run_train(config)}")
            seconds += time.monotonic() - before
        console.print("[bold]5/5[/] evaluate: four held-out photographs, ten recorded seeds (Ray Data actors)")
        result = run_evaluate(demo_config("evaluate", EvaluateConfig, out))
    console.print(score_table(result.summary), soft_wrap=True)
    console.print(
        f"Most of this comes from the weights that are shipped ({BASE}, docs/tiny-base.md): VAE, UNet and a first "
        f"ControlNet.\nThe {seconds:.0f} s of training just now only adapted the ControlNet, to conventional sampling "
        "for `uniform` and to the truncated\nchain for the others, and made the decoder of `ccsr`. Four small pictures "
        "show the direction, not what CCSR reaches.",
        style="dim",
    )
    database = shlex.quote(f"sqlite:///{out}/mlflow.db")
    console.print(f"report:  {result.folder}/report.html", soft_wrap=True)
    mlflow = shlex.quote(os.path.relpath(Path(sys.executable).with_name("mlflow")))
    console.print(f"MLflow:  {mlflow} ui --backend-store-uri {database}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - began:.0f} s")
