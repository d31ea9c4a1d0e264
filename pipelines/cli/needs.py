"""Resource requirements of a command, parsed locally before submission."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from infra.cluster.jobs import Need
from infra.config import apply_overrides, load_yaml, parse_config
from infra.errors import ConfigError
from infra.locations import is_relative, location
from pipelines.cli.registry import JOBS


def needs_of(ccsr: Any, arguments: Sequence[str]) -> Need:
    """GPUs and outputs of `ccsr ARGUMENTS`; `ccsr` is the command group. A wrong option is the command's own usage
    error; ConfigError for a wrong config, or an output in the job's temporary folder."""
    name, *rest = arguments or [""]
    command = ccsr.commands.get(name)
    if command is None or name not in (*JOBS, "restore"):
        return Need()  # `submit` says what can be submitted
    options = command.make_context(name, rest).params
    need = _restore(options) if name == "restore" else _job(name, options)
    for output in need.outputs:
        if is_relative(output):
            raise ConfigError(
                "a relative output would be lost with the job's temporary folder",
                where=output,
                todo="give an s3:// URI, or an absolute path that all nodes share",
            )
    return dataclasses.replace(need, outputs=tuple(map(location, need.outputs)))


def _job(name: str, options: dict[str, Any]) -> Need:
    config = JOBS[name].load(options["config"], options["set_"])
    # As it was written: the config has made a relative one absolute here.
    output = apply_overrides(load_yaml(options["config"]), options["set_"] or [])["output"]
    tracked = not hasattr(config, "tracking") or config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    lost = "without tracking.uri or MLFLOW_TRACKING_URI what this job logs to MLflow is lost at its end"
    return Need(JOBS[name].num_gpus(config), (output,), () if tracked else (lost,))


def _restore(options: dict[str, Any]) -> Need:
    from pipelines.restore import RestoreRuntime, pick_device

    values = {"runtime": {"device": options["device"], "use_ray": options["ray"]}}
    values = apply_overrides(values, options["set_"] or [])["runtime"]
    runtime = parse_config(values, RestoreRuntime, where="command line: runtime")
    on_gpus = runtime.use_ray and pick_device(runtime) == "cuda"
    return Need(runtime.num_actors if on_gpus else 0, (options["output"],))
