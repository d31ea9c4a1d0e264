"""The `ccsr` command. Nothing heavy is imported before a command needs it: `ccsr --help` answers at once."""

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from infra.config import parse_config
from infra.errors import CcsrError, StoppedError
from infra.files.locations import local_path, location, tracking_location
from pipelines.cli import cluster as cluster_commands
from pipelines.cli import models as model_commands
from pipelines.cli import pictures as picture_commands
from pipelines.cli import sets as set_commands
from pipelines.cli.options import AsJson, ConfigCommand, ConfigFile, DryRun, Overrides
from pipelines.cli.registry import JOBS, load_any

app = typer.Typer(
    name="ccsr",
    help="Stable diffusion-based super-resolution at cluster scale: shard, train, evaluate, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(model_commands.app)
app.add_typer(set_commands.app)
app.add_typer(picture_commands.app)
app.add_typer(cluster_commands.app)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error; works anywhere.")] = False,
) -> None:
    """`main` reads --debug from the command line itself; it is declared here to be listed."""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(parser=local_path, help="Output folder; what is complete there is reused.")
    ] = Path("runs/demo"),
) -> None:
    """Run the whole job on bundled photographs: shard, train both stages, evaluate, compare."""
    from pipelines.demo import run_demo

    run_demo(out)


@app.command(cls=ConfigCommand)
def shard(
    config: ConfigFile,
    set_: Overrides = None,
    max_failed_fraction: Annotated[
        float | None, typer.Option(help="More quarantined samples than this: exit code 1. Default: the config's, 0.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Turn image sets into degraded WebDataset shards."""
    allowed = [] if max_failed_fraction is None else [f"runtime.max_failed_fraction={max_failed_fraction}"]
    job = JOBS["shard"]
    values = job.load(config, [*(set_ or []), *allowed])
    if dry_run:
        job.print_preview(values)
        return
    manifest = job.run(values)
    typer.echo(f"{manifest.num_samples} samples, dataset {manifest.dataset_id}: {manifest.uri}")


@app.command(cls=ConfigCommand)
def train(
    config: ConfigFile,
    set_: Overrides = None,
    profile: Annotated[bool, typer.Option("--profile", help="Profile a few updates into OUT/profile.")] = False,
    register: Annotated[str | None, typer.Option(help="NAME[@ALIAS] of the best model in MLflow's registry.")] = None,
    log_only: Annotated[bool, typer.Option("--log-only", help="Only send a finished run to MLflow.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train one stage; the same command resumes."""
    from infra.files.storage import exists, join, read_bytes

    job = JOBS["train"]
    registered = [f"tracking.register={json.dumps(register)}"] if register is not None else []
    values = job.load(config, [*(set_ or []), *registered, *(["runtime.profile=true"] if profile else [])])
    if dry_run:
        job.print_preview(values)
        return
    model = job.run(values, log_only=log_only)
    if profile and exists(place := join(values.output, "profile", "top_ops.txt")):
        typer.echo(read_bytes(place).decode())
    typer.echo(f"model: {model}")


@app.command(cls=ConfigCommand)
def evaluate(
    config: ConfigFile,
    set_: Overrides = None,
    log_only: Annotated[bool, typer.Option("--log-only", help="Only send a finished result to MLflow.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure quality and stability of one or several methods."""
    job = JOBS["evaluate"]
    values = job.load(config, set_)
    if dry_run:
        job.print_preview(values)
        return
    result = job.run(values, log_only=log_only)
    from evaluation.report.orderings import load_orderings, orderings_table
    from evaluation.report.tables import score_table
    from infra.display.table import print_report

    orderings = load_orderings(result.folder)
    beside = [orderings_table(orderings, result.run["published"])] if orderings else []
    print_report([score_table(result.summary), *beside])
    typer.echo(f"report: {result.folder}/report.html")


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Result folders, MLflow run ids or names, each with an optional :METHOD.")
    ],
    csv: Annotated[
        Path | None, typer.Option(parser=local_path, help="Also write the differences to this file.")
    ] = None,
    html: Annotated[str | None, typer.Option(parser=location, help="Also write the tables to this HTML file.")] = None,
    mlflow: Annotated[
        str | None, typer.Option(parser=tracking_location, help="MLflow's address; default as for the other commands.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Also log comparison and page as a run in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Paired per-image differences between evaluated methods, with bootstrap intervals."""
    from evaluation.compare import compare as compare_results
    from evaluation.mlflow_results import log_comparison
    from infra.display.table import print_report
    from infra.files.publish import temporary_folder, write_bytes
    from infra.files.storage import explained
    from infra.mlflow.server import TrackingConfig, check_tracking

    tracking = parse_config({"uri": mlflow}, TrackingConfig, where="--mlflow")
    if log:
        check_tracking(tracking)
    with temporary_folder("compare") as scratch:
        pictures = scratch if log or html is not None else None
        comparison = compare_results(runs, tracking=tracking, scratch=pictures)
        print_report(comparison.tables(), as_json=as_json)
        if csv is not None:
            with explained("cannot write", str(csv)):
                comparison.write_csv(csv)
        if html is not None:
            from evaluation.report.page import comparison_page

            write_bytes(html, comparison_page(comparison).encode())
        if log:
            typer.echo(f"MLflow run: {log_comparison(comparison, runs, tracking)}", err=as_json)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Result folders, MLflow run ids or names, of one test set.")],
    out: Annotated[
        str | None, typer.Option(help="HTML file; default: the folder's report.html, or ./report.html.")
    ] = None,
    mlflow: Annotated[str | None, typer.Option(help="MLflow's address; default as for the other commands.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a result, or of the methods of several results in one table."""
    from evaluation.report.page import report_results
    from evaluation.report.tables import score_table
    from infra.display.table import print_report
    from infra.mlflow.tracking import TrackingConfig

    result, target = report_results(runs, out, TrackingConfig(uri=mlflow))
    print_report([score_table(result.summary)], as_json=as_json)
    typer.echo(f"report: {target}", err=as_json)


@config_app.command("show", cls=ConfigCommand)
def config_show(config: ConfigFile, set_: Overrides = None) -> None:
    """Print a config's effective values."""
    import yaml

    effective = load_any(config, set_)
    typer.echo(yaml.safe_dump(effective.model_dump(mode="json"), sort_keys=False), nl=False)


def main() -> None:
    """Run a command; a user's error becomes three lines and an exit code."""
    end_of_ours = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    ours, theirs = sys.argv[1:end_of_ours], sys.argv[end_of_ours:]
    debug = "--debug" in ours
    sys.argv[1:] = [word for word in ours if word != "--debug"] + theirs
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be in the terminal's encoding
    signal.signal(signal.SIGTERM, terminate)  # ends as Ctrl-C does, so that what is open is closed
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the hub is asked where a command fetches, not at each load
    try:
        app(standalone_mode=True)
    except CcsrError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C, which typer turns into this
            typer.echo("stopped; the same command resumes", err=True)
        if end.code == 130 and terminated:
            sys.exit(StoppedError.exit_code)
        raise


def main_of_job() -> None:
    """`main` of a submitted job: the exit code is its log's last line."""
    from infra.cluster.jobs import ENDED

    try:
        main()
    except SystemExit as end:
        print(f"{ENDED}{end.code or 0}", flush=True)
        raise


if __name__ == "__main__":
    main_of_job()
