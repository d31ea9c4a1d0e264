"""Commands on finished shard sets: append, verify."""

from typing import Annotated

import typer

from infra.files.locations import location

app = typer.Typer()


@app.command()
def append(
    base: Annotated[str, typer.Argument(parser=location, help="A finished shard set.")],
    more: Annotated[list[str], typer.Argument(parser=location, help="Finished sets whose samples follow.")],
    out: Annotated[str, typer.Option(parser=location, help="Folder or s3:// prefix of the new manifest.")],
) -> None:
    """Make one shard set of several by a new manifest; nothing is copied."""
    from pipelines.sets.append import append as append_sets

    manifest = append_sets([base, *more], out)
    typer.echo(f"{manifest.num_samples} samples, dataset {manifest.dataset_id}: {manifest.uri}")


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(parser=location, help="A shard set's folder or s3:// URI.")],
    against: Annotated[
        str | None, typer.Option(parser=location, help="List instead the samples that this other set has too.")
    ] = None,
    distance: Annotated[int, typer.Option(min=0, max=64, help="With --against: bits of 64 that may differ.")] = 6,
    clean: Annotated[bool, typer.Option("--clean", help="Instead name strays; remove stopped writers'.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Instead show histograms of what filters go by.")] = False,
) -> None:
    """Prove that a shard set is what its manifest says, and shares no picture with another."""
    from pipelines.sets.verify import verify as check

    if clean:
        from pipelines.sets.clean import print_cleaned

        print_cleaned(uri)
    elif stats:
        from pipelines.sharding.screening.filters import print_stats

        print_stats(uri)
    elif against is not None:
        from pipelines.sets.verify import print_duplicates

        print_duplicates(uri, against, distance)
    else:
        manifest = check(uri)
        typer.echo(f"{manifest.num_samples} samples, dataset {manifest.dataset_id}: every byte as recorded")
