"""`ccsr view`: the pictures of an evaluation or of a restoration in a browser, image by image, from a local server."""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

from evaluation.find import find_result
from evaluation.report import page
from evaluation.results import EvaluationResult
from infra.display.templating import render
from infra.errors import CcsrError, ConfigError, DataError
from infra.files.locations import location
from infra.files.publish import temporary_folder
from infra.files.storage import exists, join, list_files, read_bytes
from infra.imaging.images import IMAGE_SUFFIXES, encode_png
from infra.imaging.pictures import decode_picture
from infra.imaging.pixels import MAP_TOP, StabilityAccumulator, coloured
from infra.mlflow.tracking import TrackingConfig
from infra.run import read_run
from pipelines.restore_plan import RECORDS, plan

_TEMPLATE = Path(page.__file__).with_name("view.html.j2")
_OF_A_RUN = re.compile(r"runs/(\d+)/(.+)")
_SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}  # by every browser


class Shown(NamedTuple):
    """A picture of an image's page; `load` gives its file and media type when the browser asks for it."""

    name: str
    caption: str
    load: Callable[[], tuple[bytes, str]]


class Album(NamedTuple):
    """What a folder shows. `columns`: of the image with that number in `keys`, its pictures; `start`: the number of the
    one that the slider shows on its right side at first."""

    title: str
    keys: list[str]
    columns: Callable[[int], dict[str, list[Shown]]]
    start: Callable[[dict[str, list[Shown]]], int]


def album_of(uri: str, scratch: Path, tracking: TrackingConfig, source: str | None = None) -> Album:
    """The pictures of an evaluation (a folder, or an MLflow run by id or name, whose pictures are fetched below
    `scratch`) or of `ccsr restore`'s OUTPUT, beside those of `source`, its INPUT.

    DataError for a folder without pictures, ConfigError for another job's; other errors as of `find_result`.
    """
    job = "evaluate"
    if exists(join(folder := location(uri), "run.json")):
        uri, job = folder, read_run(folder)["job"]
    if job not in ("evaluate", "restore"):
        raise ConfigError(f"this is the output of ccsr {job}", where=uri, todo="give that of evaluate or restore")
    if source is not None and job == "evaluate":
        raise ConfigError("an evaluation holds its inputs", where="--input", todo="leave it out")
    album = (
        _restored(uri, source) if job == "restore" else _evaluated(find_result(uri, tracking, scratch, pictures=True))
    )
    if not album.keys:
        raise DataError("there are no pictures here", where=uri, todo="run the same ccsr command again: it resumes")
    return album


def _evaluated(result: EvaluationResult) -> Album:
    def columns(number: int) -> dict[str, list[Shown]]:
        key = keys[number]
        kinds = [kind for kind in ("lr", "hr") if exists(result.picture(kind, key))]
        found = {
            "input": [Shown(kind.upper(), kind.upper(), partial(_file, result.picture(kind, key))) for kind in kinds]
        }
        for name, method in result.methods.items():
            index = method.keys.index(key)
            psnr = method.scores["psnr_y"][index] if "psnr_y" in method.scores else [float("nan")] * method.num_runs
            labels = [f"run {run:02d}" if method.num_runs > 1 else "only run" for run in range(method.num_runs)]
            found[name] = [
                Shown(
                    f"{name} {label}",
                    label + (f" · {psnr[run]:.2f} dB" if psnr[run] == psnr[run] else ""),
                    partial(_file, result.picture(name, key, run)),
                )
                for run, label in enumerate(labels)
            ]
            if method.num_runs > 1:
                place, caption = result.picture(name, key), f"L-STD {method.l_std[index]:.4f}"
                found[name].append(Shown(f"{name} stability map", caption, partial(_stored_map, place)))
        return found

    keys = page.stored_keys(result, len(next(iter(result.methods.values())).keys))
    return Album(f"Evaluation: {result.name}", keys, columns, lambda c: page.first_shown(result, len(c["input"])))


def _restored(folder: str, source: str | None) -> Album:
    config = read_run(folder)["config"]
    num_runs = config["num_runs"]
    runs: dict[str, dict[int, str]] = {}
    for uri in list_files(folder):
        name, run = uri.removeprefix(join(folder, "")), 0
        if num_runs > 1 and (of_a_run := _OF_A_RUN.fullmatch(name)):
            run, name = int(of_a_run[1]), of_a_run[2]
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(f"{RECORDS}/"):
            runs.setdefault(name, {})[run] = uri
    tasks = plan(source, folder, num_runs, config["format"])[1] if source else []
    inputs = {task.file_name: task.uri for task in tasks}
    keys = sorted(runs)

    def columns(number: int) -> dict[str, list[Shown]]:
        name = keys[number]
        found = {"input": [Shown("LR", "input", partial(_file, inputs[name]))]} if name in inputs else {}
        places = sorted(runs[name].items())
        found["restored"] = [Shown(f"run {run:02d}", f"run {run:02d}", partial(_file, uri)) for run, uri in places]
        if len(places) > 1:
            load = partial(_computed_map, [uri for _, uri in places])
            found["restored"].append(Shown("stability map", f"of {len(places)} runs", load))
        return found

    return Album(
        f"Restored: {folder.rpartition('/')[2]}", keys, columns, lambda c: min(1, sum(map(len, c.values())) - 1)
    )


def _file(uri: str) -> tuple[bytes, str]:
    kind = _SHOWN.get(Path(uri).suffix.lower())
    data = read_bytes(uri)
    return (data, kind) if kind else (encode_png(_pixels(uri, data)), "image/png")


def _pixels(uri: str, data: bytes) -> np.ndarray:
    """uint8 (H, W, 3); alpha on white."""
    return decode_picture(data, where=uri, form="jpg", convert=True).rgb


def _stored_map(uri: str) -> tuple[bytes, str]:
    return encode_png(coloured(page.read_map(uri))), "image/png"


def _computed_map(uris: list[str]) -> tuple[bytes, str]:
    runs = StabilityAccumulator(crop_border=0)
    for uri in uris:
        runs.add(_pixels(uri, read_bytes(uri)))
    return encode_png(coloured(runs.map())), "image/png"


def page_of(album: Album, number: int) -> str:
    """The HTML page of one image; its pictures are at /NUMBER/INDEX."""
    columns, index = album.columns(number), 0
    figures: dict[str, list[page.Figure]] = {}
    for name, pictures in columns.items():
        figures[name] = [page.Figure(p.name, p.caption, f"/{number}/{index + i}") for i, p in enumerate(pictures)]
        index += len(pictures)
    has_map = any("stability map" in picture.name for pictures in columns.values() for picture in pictures)
    return render(
        _TEMPLATE,
        title=album.title,
        facts=[],
        number=number,
        total=len(album.keys),
        image={"key": album.keys[number], "columns": figures, "start": album.start(columns)},
        rows=max(map(len, columns.values())),
        colours=page.map_colours() if has_map else "",
        top=MAP_TOP,
    )


def reply(album: Album, path: str) -> tuple[HTTPStatus, bytes, str]:
    """Status, content and media type for an address: /NUMBER is an image's page, /NUMBER/INDEX one of its pictures.

    There are no paths in it, so nothing but the album's own pictures can be read.
    """
    numbers = path.strip("/").split("/") if path.strip("/") else ["0"]
    valid = len(numbers) <= 2 and all(n.isascii() and n.isdigit() and len(n) < 10 for n in numbers)
    if valid and int(numbers[0]) < len(album.keys):
        number = int(numbers[0])
        if len(numbers) == 1:
            return HTTPStatus.OK, page_of(album, number).encode(), "text/html; charset=utf-8"
        pictures = [picture for column in album.columns(number).values() for picture in column]
        if int(numbers[1]) < len(pictures):
            return HTTPStatus.OK, *pictures[int(numbers[1])].load()
    return HTTPStatus.NOT_FOUND, b"no such page", "text/plain"


def serve(album: Album, port: int) -> ThreadingHTTPServer:
    """A server of `album` on 127.0.0.1, bound to `port` (0: a free one) but not running yet.

    Requests under another host name (a web page that rebinds its name to this machine) are refused. ConfigError where
    the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in ("127.0.0.1", "localhost"):
                status, data, kind = HTTPStatus.FORBIDDEN, b"ask 127.0.0.1 or localhost", "text/plain"
            else:
                try:
                    status, data, kind = reply(album, self.path)
                except CcsrError as error:  # a picture was removed or damaged since
                    status, data, kind = HTTPStatus.NOT_FOUND, str(error).encode(), "text/plain; charset=utf-8"
            with suppress(ConnectionError):  # the browser has turned the page
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is logged."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        where = f"127.0.0.1:{port}"
        raise ConfigError(f"cannot listen ({error.strerror})", where=where, todo="use --port 0: a free port") from error


def view(uri: str, port: int, tracking: TrackingConfig, source: str | None = None) -> None:
    """Serve the pictures of `uri` (see `album_of`) until Ctrl-C, after printing the address."""
    with temporary_folder("view") as scratch:
        album = album_of(uri, scratch, tracking, source)
        with serve(album, port) as server, suppress(KeyboardInterrupt):
            print(f"{len(album.keys)} images: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", flush=True)
            server.serve_forever()
