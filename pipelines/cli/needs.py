"""What a command that is to be submitted needs, told by reading it here as the cluster will read it."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import typer

from infra.cluster.jobs import Need
from infra.config import ConfigT, apply_overrides, load_yaml, parse_config
from infra.errors import ConfigError
from infra.locations import is_relative, location


def needs_of(arguments: Sequence[str]) -> Need:
    """GPUs and outputs of `ccsr ARGUMENTS`. A wrong option is the command's own usage error; ConfigError for a wrong
    config, or an output that would lie in the job's temporary folder."""
    from pipelines.cli.main import app

    name, *rest = arguments or [""]
    command = typer.main.get_command(app).commands.get(name)  # type: ignore[attr-defined]
    if command is None or name not in READERS:
        return Need()  # `submit` says what can be submitted
    need = READERS[name](command.make_context(name, rest).params)
    for output in need.outputs:
        if is_relative(output):
            raise ConfigError(
                "a relative output would be lost with the job's temporary folder",
                where=output,
                todo="give an s3:// URI, or an absolute path that all nodes share",
            )
    return dataclasses.replace(need, outputs=tuple(map(location, need.outputs)))


def _load(options: dict[str, Any], config_class: type[ConfigT]) -> tuple[ConfigT, tuple[str]]:
    """The config, and its output as it was written: a relative one became absolute here."""
    values = apply_overrides(load_yaml(options["config"]), options["set_"] or [])
    config = parse_config(values, config_class, where=str(options["config"]))
    return config, (values["output"],)


def _shard(options: dict[str, Any]) -> Need:
    from pipelines.sharding.config import ShardConfig

    config, output = _load(options, ShardConfig)
    on_gpus = config.latents and config.runtime.use_gpu
    return Need((config.runtime.num_workers or 1) if on_gpus else 0, output)


def _train(options: dict[str, Any]) -> Need:
    from training.config import TrainConfig

    config, output = _load(options, TrainConfig)
    return Need(config.runtime.num_workers if config.runtime.use_gpu else 0, output, _tracking_note(config))


def _evaluate(options: dict[str, Any]) -> Need:
    from evaluation.config import EvaluateConfig

    config, output = _load(options, EvaluateConfig)
    return Need(config.runtime.num_actors if config.runtime.use_gpu else 0, output, _tracking_note(config))


def _restore(options: dict[str, Any]) -> Need:
    from pipelines.restore import RestoreRuntime, pick_device

    values = {"runtime": {"device": options["device"], "use_ray": options["ray"]}}
    values = apply_overrides(values, options["set_"] or [])["runtime"]
    runtime = parse_config(values, RestoreRuntime, where="command line: runtime")
    on_gpus = runtime.use_ray and pick_device(runtime) == "cuda"
    return Need(runtime.num_actors if on_gpus else 0, (options["output"],))


def _tracking_note(config: Any) -> tuple[str, ...]:
    if config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return ()
    return ("without tracking.uri or MLFLOW_TRACKING_URI what this job logs to MLflow is lost at its end",)


READERS = {"shard": _shard, "train": _train, "evaluate": _evaluate, "restore": _restore}
