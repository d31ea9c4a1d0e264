"""The `ccsr` commands about clusters: submit."""

from typing import Annotated

import typer

app = typer.Typer()


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    command: Annotated[list[str], typer.Argument(help="-- and a command: shard, train, evaluate, ...")],
    address: Annotated[str | None, typer.Option(help="The cluster's job server; default: RAY_ADDRESS.")] = None,
) -> None:
    """Run a command as a job on a Ray cluster and follow its log."""
    from infra.jobs import submit as submit_job

    raise typer.Exit(submit_job(address, command, lambda lines: typer.echo(lines, nl=False)))
