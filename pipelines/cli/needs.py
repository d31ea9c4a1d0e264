"""Resource requirements of a command, parsed locally before submission."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from infra.cluster.jobs import COMMANDS, Need
from infra.config import apply_overrides, load_yaml, result_part
from infra.errors import CcsrError, ConfigError, StorageError
from infra.files.locations import is_relative, location
from infra.run import check_config
from pipelines.cli.options import ConfigCommand
from pipelines.cli.registry import JOBS

SUBMITTED = {name: job for name, job in JOBS.items() if name in COMMANDS}
"""The jobs of a YAML file that a cluster runs; `ccsr cluster` is a group that runs here."""


def needs_of(ccsr: Any, arguments: Sequence[str]) -> Need:
    """GPUs and outputs of `ccsr ARGUMENTS`; `ccsr` is the command group. A wrong option is the command's own usage
    error; ConfigError for a wrong config, an output that holds another one's work or is in the job's temporary
    folder."""
    name, *rest = arguments or [""]
    command = ccsr.commands.get(name)
    if command is None or name not in (*SUBMITTED, "restore"):
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


def require_gpus(ccsr: Any, arguments: Sequence[str], most: int) -> None:
    """ConfigError where the job of `ccsr ARGUMENTS`, by its config alone, needs more than `most` GPUs."""
    name, *rest = with_option(list(arguments), ccsr)
    if name not in SUBMITTED:
        return
    options = ccsr.commands[name].make_context(name, rest).params
    needed = SUBMITTED[name].num_gpus(SUBMITTED[name].load(options["config"], options["set_"]))
    if needed > most:
        raise ConfigError(
            f"the job needs {needed} GPUs, the cluster grows to {most}: it would never start",
            where=f"command: {' '.join(arguments)}",
            todo="raise gpu_workers.max_nodes or gpus, or lower runtime.num_workers or num_actors in the job's config",
        )


def with_option(arguments: list[str], ccsr: Any) -> list[str]:
    """The arguments with -c before a config that is given without it: `submit` ships what follows -c."""
    command = ccsr.commands.get(arguments[0]) if arguments else None
    return [arguments[0], *command.with_option(arguments[1:])] if isinstance(command, ConfigCommand) else arguments


def preview_command(ccsr: Any, arguments: Sequence[str], where: str) -> None:
    """Print what the job of `ccsr ARGUMENTS` would do on the cluster `where`, as far as this machine can read it."""
    name, *rest = arguments
    if name in SUBMITTED:
        options = ccsr.commands[name].make_context(name, rest).params
        try:
            SUBMITTED[name].print_preview(SUBMITTED[name].load(options["config"], options["set_"]), where)
        except CcsrError as error:
            print(f"note: seen from this machine, {error.what} ({error.where})")


def _job(name: str, options: dict[str, Any]) -> Need:
    config = SUBMITTED[name].load(options["config"], options["set_"])
    _check_output(config.output, result_part(config), name)
    # As it was written: the config has made a relative one absolute here.
    output = apply_overrides(load_yaml(options["config"]), options["set_"] or [])["output"]
    tracked = config.tracking is None or config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    lost = "without tracking.uri or MLFLOW_TRACKING_URI what this job logs to MLflow is lost at its end"
    return Need(SUBMITTED[name].num_gpus(config), (output,), () if tracked else (lost,))


def _restore(options: dict[str, Any]) -> Need:
    from pipelines.restore import pick_device, restore_config

    config = restore_config(options)
    result = result_part(config)
    if config.dtype == "auto":  # the cluster decides
        del result["dtype"]
    _check_output(location(options["output"]), result, "restore")
    on_gpus = config.runtime.use_ray and pick_device(config.runtime) == "cuda"
    return Need(config.runtime.num_actors if on_gpus else 0, (options["output"],))


def _check_output(output: str, result: dict[str, Any], job: str) -> None:
    """`check_config`, where this machine may read the output."""
    try:
        check_config(output, result, job=job)
    except StorageError as error:
        if "no S3 credentials" not in error.what:
            raise
