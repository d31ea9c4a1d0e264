"""`ccsr demo`: the whole job on photographs that come with scikit-image and scikit-learn."""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluation.config import EvaluateConfig
from evaluation.job import run_evaluate
from evaluation.tables import terminal_table
from infra.config import Config, load_yaml, parse_config
from infra.ray_runtime import RayConfig, ray_cluster
from pipelines.config import ShardConfig
from pipelines.shard import run_shard
from training.config import TrainConfig
from training.train import run_train

CONFIGS = Path(__file__).parent.parent / "configs" / "demo"
PREFIX = "runs/demo"


def demo_config(name: str, config_class: type[Config], out: str) -> Any:
    """A config of configs/demo with every place under runs/demo moved under `out`."""
    path = CONFIGS / f"{name}.yaml"
    return parse_config(_moved(load_yaml(path), out), config_class, where=str(path))


def _moved(value: Any, out: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, out) for item in value]
    return value.replace(PREFIX, out) if isinstance(value, str) else value


def run_demo(out: str) -> None:
    """Shard, train stages 1 and 2, evaluate; print the table, the report's path and the command that opens MLflow."""
    console = Console()
    began = time.monotonic()
    out = str(Path(out).absolute())
    with ray_cluster(RayConfig()):
        console.print("[bold]1/4[/] shard: photographs -> degraded WebDataset tars (Ray Data)")
        for name in ("shard_train", "shard_heldout"):
            manifest = run_shard(demo_config(name, ShardConfig, out))
            console.print(f"    {manifest.num_samples} samples, dataset {manifest.dataset_id}: {manifest.uri}")
        for step, name in ((2, "train_stage1"), (3, "train_stage2")):
            config = demo_config(name, TrainConfig, out)
            console.print(f"[bold]{step}/4[/] train: stage {config.stage} (Ray Train + DeepSpeed, 2 CPU workers)")
            console.print(f"    model: {run_train(config)}")
        console.print("[bold]4/4[/] evaluate: two held-out photographs, recorded seeds (Ray Data actors)")
        result = run_evaluate(demo_config("evaluate", EvaluateConfig, out))
    console.print(terminal_table(result.summary))
    console.print(
        "The networks started from random weights and trained for a minute: the pictures are poor, the numbers are "
        "real.\nThey show how the job runs, not what CCSR reaches.",
        style="dim",
    )
    database = shlex.quote(f"sqlite:///{out}/mlflow.db")
    console.print(f"report:  {result.folder}/report.html", soft_wrap=True)
    mlflow = shlex.quote(os.path.relpath(Path(sys.executable).with_name("mlflow")))
    console.print(f"MLflow:  {mlflow} ui --backend-store-uri {database}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - began:.0f} s")
