"""The `ccsr` commands on pictures: restore, view."""

from typing import Annotated

import typer

from infra.files.locations import location
from pipelines.cli.options import Overrides

app = typer.Typer()


@app.command()
def view(
    result: Annotated[
        str, typer.Argument(metavar="RESULT|OUT", help="A result folder, an MLflow run, or an OUTPUT of restore.")
    ],
    source: Annotated[
        str | None, typer.Option("--input", parser=location, help="INPUT of restore, shown beside its OUTPUT.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: a free one.")] = 8777,
    mlflow: Annotated[str | None, typer.Option(help="MLflow's address; default as for the other commands.")] = None,
) -> None:
    """Look at results in a browser: every run and stability map beside any other, by keyboard."""
    from infra.mlflow.tracking import TrackingConfig
    from pipelines.view import view as run_view

    run_view(result, port, TrackingConfig(uri=mlflow), source)


@app.command()
def restore(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="INPUT", help="An image, a video, a folder or an s3:// prefix.")],
    output: Annotated[
        str,
        typer.Argument(metavar="OUTPUT", help="Folder or s3:// prefix for the results; NAME.png, .mp4, ... for one."),
    ],
    model: Annotated[str, typer.Option(help="A model or run's folder, runs:/ID, models:/NAME@ALIAS, or a hub id.")],
    runs: Annotated[int, typer.Option(help="Seeded runs per image.")] = 1,
    seed: Annotated[int, typer.Option(help="Run r of an image depends on this, the image's name and r alone.")] = 0,
    scale: Annotated[float, typer.Option(help="Enlargement, 1 to 8, fractions too.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of the whole chain.")] = 45,
    t_max: Annotated[float, typer.Option(help="Where the chain continues after its first step.")] = 0.6667,
    t_min: Annotated[float, typer.Option(help="Where it ends.")] = 0.3333,
    tile: Annotated[int, typer.Option(help="Pixels of a tile for larger outputs; 0: never tile.")] = 512,
    color: Annotated[str, typer.Option(help="Colours from the input: adain, wavelet or none.")] = "adain",
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: what this machine has, not with --ray.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 on CUDA.")] = "auto",
    fp16: Annotated[bool, typer.Option("--fp16", help="--dtype float16, on a GPU.")] = False,
    threads: Annotated[
        int, typer.Option(min=1, help="Of a CPU; more are faster, but move single levels from evaluate's pictures.")
    ] = 1,
    noise: Annotated[
        str | None,
        typer.Option(
            help="image: each its own, the default; shared: one field for all frames of INPUT, as in a video."
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="png, jpg, webp or tiff; input: as each input. Default png, or OUTPUT's suffix.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of JPEG and WebP, 1 to 100; default 95.")] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Take CMYK, and alpha and 16 bits in formats without, by converting.")
    ] = False,
    gps: Annotated[bool, typer.Option("--gps", help="Keep the position in EXIF.")] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Write each result beside its enlarged input, in one picture.")
    ] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Use a Ray cluster; --set runtime.num_actors=N.")] = False,
    set_: Overrides = None,
) -> None:
    """Enlarge photographs with a trained model."""
    from pipelines.restore import restore as run_restore
    from pipelines.restore import restore_config
    from pipelines.restore_video import is_video, restore_video

    config = restore_config(context.params)
    if is_video(source) or is_video(output):
        typer.echo(f"{restore_video(source, output, model, config)} frames: {output}")
        return
    typer.echo(f"{run_restore(source, output, model, config)} images: {output}")
