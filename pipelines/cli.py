"""The `ccsr` command. Nothing heavy is imported before a command needs it: `ccsr --help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import CcsrError

app = typer.Typer(
    name="ccsr",
    help="Stable diffusion-based super-resolution at cluster scale: shard, train, evaluate, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigFile = Annotated[Path, typer.Option("-c", "--config", help="The run's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a value: a.b=c. May be repeated.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error; works anywhere.")] = False,
) -> None:
    """`main` reads --debug from the command line itself; it stands here to be listed."""


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Output folder; what is complete there is reused.")] = "runs/demo",
) -> None:
    """Run the whole job on bundled photographs: shard, train both stages, evaluate, compare."""
    from pipelines.demo import run_demo

    run_demo(out)


@app.command()
def shard(config: ConfigFile, set_: Overrides = None) -> None:
    """Turn image sets into degraded WebDataset shards."""
    from infra.config import load_config
    from pipelines.config import ShardConfig
    from pipelines.shard import run_shard

    manifest = run_shard(load_config(config, ShardConfig, set_ or []))
    typer.echo(f"{manifest.num_samples} samples, dataset {manifest.dataset_id}: {manifest.uri}")


@app.command()
def verify(uri: Annotated[str, typer.Argument(help="A shard set's folder or s3:// URI.")]) -> None:
    """Prove that a shard set is what its manifest says."""
    from pipelines.verify import verify as check

    manifest = check(uri)
    typer.echo(f"{manifest.num_samples} samples, dataset {manifest.dataset_id}: every byte as recorded")


@app.command()
def train(config: ConfigFile, set_: Overrides = None) -> None:
    """Train one stage; the same command resumes."""
    from infra.config import load_config
    from training.config import TrainConfig
    from training.train import run_train

    typer.echo(f"model: {run_train(load_config(config, TrainConfig, set_ or []))}")


@app.command()
def evaluate(config: ConfigFile, set_: Overrides = None) -> None:
    """Measure quality and stability of one or several methods."""
    from rich.console import Console

    from evaluation.config import EvaluateConfig
    from evaluation.job import run_evaluate
    from evaluation.tables import terminal_table
    from infra.config import load_config

    result = run_evaluate(load_config(config, EvaluateConfig, set_ or []))
    Console().print(terminal_table(result.summary))
    typer.echo(f"report: {result.folder}/report.html")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Result folders, each with an optional :METHOD.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the differences to this file.")] = None,
) -> None:
    """Paired per-image differences between evaluated methods, with bootstrap intervals."""
    from rich.console import Console

    from evaluation.compare import compare as compare_results

    comparison = compare_results(runs)
    for table in comparison.tables():
        Console().print(table)
    if csv is not None:
        comparison.write_csv(csv)


@app.command()
def restore(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="An image, a folder or an s3:// prefix.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3:// prefix for the results.")],
    model: Annotated[str, typer.Option(help="A model directory.")],
    runs: Annotated[int, typer.Option(help="Seeded runs per image.")] = 1,
    seed: Annotated[int, typer.Option(help="Run r of an image depends on this, the image's name and r alone.")] = 0,
    scale: Annotated[int, typer.Option(help="Enlargement, 1 to 8.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of the whole chain.")] = 45,
) -> None:
    """Enlarge photographs with a trained model."""
    from infra.config import parse_config
    from pipelines.restore import RestoreConfig
    from pipelines.restore import restore as run_restore

    values = {"num_runs": runs, "seed": seed, "scale": scale, "sampling": {"num_steps": steps}}
    config = parse_config(values, RestoreConfig, where="command line")
    typer.echo(f"{run_restore(source, output, model, config)} images: {output}")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    command: Annotated[list[str], typer.Argument(help="-- and a command: shard, train, evaluate, ...")],
    address: Annotated[str | None, typer.Option(help="The cluster's job server; default: RAY_ADDRESS.")] = None,
) -> None:
    """Run a command as a job on a Ray cluster and follow its log."""
    from infra.jobs import submit as submit_job

    raise typer.Exit(submit_job(address, command, lambda lines: typer.echo(lines, nl=False)))


@config_app.command("show")
def config_show(config: ConfigFile, set_: Overrides = None) -> None:
    """Print a config's effective values."""
    import yaml

    from infra.config import apply_overrides, load_yaml, parse_config

    values = apply_overrides(load_yaml(config), set_ or [])
    effective = parse_config(values, _config_class(values, str(config)), where=str(config))
    typer.echo(yaml.safe_dump(effective.model_dump(mode="json"), sort_keys=False), nl=False)


def _config_class(values: dict[str, Any], where: str) -> Any:
    from infra.errors import ConfigError

    job = values.get("job")
    if job == "shard":
        from pipelines.config import ShardConfig

        return ShardConfig
    if job == "train":
        from training.config import TrainConfig

        return TrainConfig
    if job == "evaluate":
        from evaluation.config import EvaluateConfig

        return EvaluateConfig
    raise ConfigError(f"unknown job {job!r}", where=f"{where}: job", todo="write job: shard, train or evaluate")


def main() -> None:
    """Run a command; a user's error becomes three lines and an exit code."""
    arguments, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    debug = "--debug" in arguments.split(" ")
    if debug:
        sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != "--debug" or rest)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched behind the user's back
    try:
        app(standalone_mode=True)
    except CcsrError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C, which typer turns into this
            typer.echo("stopped; the same command goes on from here", err=True)
        raise


if __name__ == "__main__":
    main()
