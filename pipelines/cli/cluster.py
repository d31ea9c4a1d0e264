"""The `ccsr` commands about clusters: submit, jobs, doctor, cluster render."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.files.locations import local_path, location, tracking_location
from pipelines.cli.options import AsJson, ConfigCommand, ConfigFile, DryRun, Overrides
from pipelines.cli.registry import JOBS

if TYPE_CHECKING:
    from infra.cluster.jobs import JobRow
    from infra.display.table import Table

app = typer.Typer()
jobs_app = typer.Typer(help="Jobs of a Ray cluster.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")
cluster_app = typer.Typer(help="Write what starts a Ray cluster.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's job server (dashboard); default: RAY_API_SERVER_ADDRESS, else this machine's."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As `ccsr submit` and `ccsr jobs list` print it.")]


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(help="-- and a command: shard, train, evaluate, ...")],
    address: Address = None,
    key: Annotated[str | None, typer.Option(help="Name of the job; default: from command, config and code.")] = None,
    image: Annotated[bool, typer.Option("--image", help="Use the packages of the nodes' image, ship none.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Run a command as a job on a Ray cluster, once, and follow its log; Ctrl-C leaves the job running."""
    from infra.cluster.jobs import submit as submit_job
    from pipelines.cli.needs import needs_of, preview_command, with_option

    words = with_option([word for word in command if word != "--debug"], ccsr := context.find_root().command)
    shipped = [words[0], "--debug", *words[1:]] if "--debug" in command else words  # of `main`, which also runs there
    need = needs_of(ccsr, words)
    client, job = submit_job(address, shipped, _echo, need=need, key=key, image=image, dry_run=dry_run)
    if dry_run:
        preview_command(ccsr, words, client.get_address())
    elif job is not None:
        _follow(client, job)


@jobs_app.command("list")
def jobs_list(address: Address = None, as_json: AsJson = False) -> None:
    """The jobs that the cluster remembers."""
    from infra.cluster.jobs import list_jobs
    from infra.cluster.server import connect
    from infra.display.table import print_listing

    print_listing(jobs_table(list_jobs(connect(address))), as_json=as_json)


def jobs_table(jobs: "Sequence[JobRow]") -> "Table":
    """A row per job; times in this machine's zone."""
    from datetime import datetime

    from infra.display.table import Table

    table = Table(("job", "status", "exit", "began", "ended", "command"))
    for job in jobs:
        times = (datetime.fromtimestamp(t).isoformat(" ", "seconds") if t else None for t in (job.began, job.ended))
        table.add(job.id, job.status, job.exit_code, *times, job.command)
    return table


@jobs_app.command("status")
def jobs_status(job: JobId, address: Address = None) -> None:
    """One job's state, its progress while it runs, and what it said at its end."""
    from infra.cluster.jobs import job_status
    from infra.cluster.server import connect

    row = job_status(connect(address), job)
    typer.echo(f"{row.id} {row.status}" + ("" if row.exit_code is None else f", exit code {row.exit_code}"))
    typer.echo(f"command: {row.command}")
    for text in filter(None, (row.progress, row.message)):
        typer.echo(text)


@jobs_app.command("logs")
def jobs_logs(job: JobId, address: Address = None) -> None:
    """A job's log from its beginning until the job ends; returns the job's exit code."""
    from infra.cluster.server import connect

    _follow(connect(address), job)


@jobs_app.command("stop")
def jobs_stop(job: JobId, address: Address = None) -> None:
    """Ask a job to end; a training run writes a checkpoint first."""
    from infra.cluster.jobs import STOP_SECONDS, stop
    from infra.cluster.server import connect

    if stop(connect(address), job):
        typer.echo(f"{job} was asked to end; it has {STOP_SECONDS // 60} minutes to do so")
    else:
        typer.echo(f"{job} had ended before")


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="A cluster's job server to look at too.")] = None,
    storage: Annotated[
        str | None, typer.Option(parser=location, help="A folder or s3:// prefix to write a small file to.")
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option(parser=tracking_location, help="MLflow's address; default: MLFLOW_TRACKING_URI.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look whether this machine, storage, MLflow and a cluster are fit; `ccsr submit -- doctor` looks from inside."""
    import os

    from infra.cluster.doctor import diagnose
    from infra.display.table import Table, print_listing

    lines = diagnose(address, storage, mlflow or os.environ.get("MLFLOW_TRACKING_URI"))
    if as_json:
        print_listing(Table.of(("name", "state", "found", "todo"), map(vars, lines)), as_json=True)
    for line in lines if not as_json else []:
        typer.echo(f"{line.state:4}  {line.name}: {line.found}")
        if line.todo:
            typer.echo(f"      to do: {line.todo}")
    raise typer.Exit(int(any(line.state == "fail" for line in lines)))


@cluster_app.command(cls=ConfigCommand)
def render(
    context: typer.Context,
    config: ConfigFile,
    kind: Annotated[str, typer.Option(help="kuberay or slurm.")],
    out: Annotated[Path, typer.Option(parser=local_path, help="The folder to write to.")] = Path("cluster"),
    set_: Overrides = None,
) -> None:
    """Write KubeRay manifests and an MLflow server, or a Slurm script, from one config."""
    job = JOBS["cluster"]
    cluster = job.load(config, set_)
    if kind == "kuberay" and cluster.command:
        from pipelines.cli.needs import require_gpus

        require_gpus(context.find_root().command, cluster.command, cluster.most_gpus())
    for path in job.run(cluster, kind=kind, folder=out):
        typer.echo(path)
    for name, keys in cluster.secrets().items() if kind == "kuberay" else ():
        typer.echo(f"needs a Secret `{name}` with {keys} in namespace {cluster.kubernetes.namespace}", err=True)


def _echo(text: str) -> None:
    typer.echo(text, nl=False)


def _follow(client: Any, job: str) -> None:
    from infra.cluster.follow import follow

    try:
        code = follow(client, job, _echo)
    except KeyboardInterrupt:
        typer.echo(f"\n{job} still runs: ccsr jobs logs {job}, ccsr jobs stop {job}", err=True)
        raise
    raise typer.Exit(code)
