"""The jobs of `ccsr`: the schema of each one's config, what runs it, and what it needs of a cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from infra.config import Config, apply_overrides, load_config, load_yaml, parse_config
from infra.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """`schema`, `runner`, `preview` and `time` (of `--dry-run`; "": none) are `module:name`, imported at first use: a
    mistake in a config must not wait for torch. `processes`: the least and the most that work at once."""

    schema: str
    runner: str
    preview: str = ""
    num_gpus: Callable[[Any], int] = lambda config: 0
    processes: Callable[[Any], Any] = lambda config: (config.runtime.num_actors, config.runtime.num_actors)
    time: str = "pipelines.estimate.preview:time_of_networks"

    def load(self, path: Path | str, overrides: Sequence[str] | None = None) -> Any:
        """The job's config. Raises ConfigError."""
        return load_config(path, _imported(self.schema), overrides or [])

    def run(self, config: Config, **options: Any) -> Any:
        """Run the job; returns what its runner returns."""
        return _imported(self.runner)(config, **options)

    def print_preview(self, config: Config, where: str | None = None) -> None:
        """Print what `run` would do; raises what it would before it starts. Nothing is written.

        `where`: the cluster that the job is to be submitted to.
        """
        from infra.display.table import print_report
        from pipelines.estimate.preview import preview_table

        progress = _imported(self.preview)(config)
        of_job = (self.num_gpus(config), self.processes(config), _imported(self.time))
        print_report([preview_table(config, progress, *of_job, where)])


def _shard_gpus(config: Any) -> int:
    return (config.runtime.num_actors or 1) if config.latents and config.runtime.device == "cuda" else 0


def _train_gpus(config: Any) -> int:
    return config.runtime.workers.min if config.runtime.device == "cuda" else 0


def _evaluate_gpus(config: Any) -> int:
    return config.runtime.num_actors if config.runtime.device == "cuda" else 0


JOBS = {
    "shard": Job(
        "pipelines.sharding.config:ShardConfig",
        "pipelines.sharding.job:run_shard",
        "pipelines.sharding.job:preview_shard",
        _shard_gpus,
        time="pipelines.estimate.preview:time_of_shards",
    ),
    "train": Job(
        "training.config:TrainConfig",
        "training.run.driver:run_train",
        "training.run.driver:preview_train",
        _train_gpus,
        processes=lambda config: (config.runtime.workers.min, config.runtime.workers.max),
    ),
    "evaluate": Job(
        "evaluation.config:EvaluateConfig",
        "evaluation.job:run_evaluate",
        "evaluation.job:preview_evaluate",
        _evaluate_gpus,
    ),
    "cluster": Job("infra.cluster.config:ClusterConfig", "infra.cluster.render:render_to"),
}


def load_any(path: Path | str, overrides: Sequence[str] | None = None) -> Any:
    """The config in a YAML file, of the job that its `job` names. Raises ConfigError."""
    values = apply_overrides(load_yaml(path), overrides or [])
    name = values.get("job")
    if name not in JOBS:
        raise ConfigError(f"unknown job {name!r}", where=f"{path}: job", todo=f"write one of: {', '.join(JOBS)}")
    return parse_config(values, _imported(JOBS[name].schema), where=str(path))


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
