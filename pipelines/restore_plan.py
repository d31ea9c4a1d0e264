"""Which file becomes which output of `ccsr restore`, from which content, and what was passed over."""

import hashlib
import json
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.errors import CcsrError, ConfigError, DataError, PartialResultError, printable
from infra.files.locations import check_output, is_inside
from infra.files.publish import put_if_absent, write_bytes
from infra.files.storage import exists, is_s3, join, read_bytes, read_json
from infra.imaging.images import IMAGE_SUFFIXES, UnusableImageError, below, list_images, refuse
from infra.imaging.pictures import FORMATS_OF, enlarged_size
from infra.shards.keys import key_of, keys_of, output_name

SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tif"}
RECORDS = "records"
MIN_SIDE = 16


@dataclass(frozen=True)
class RestoreTask:
    """One image: `key` seeds its noise; `name` and `suffix` of its outputs; `record` ("" for the single file of an
    OUTPUT that is one). `runs` are to be made, `stale` where the record is of other content but no output exists;
    `frame_size`: the (height, width) that it must have as a frame of a film."""

    uri: str
    key: str
    name: str
    suffix: str
    record: str
    runs: tuple[int, ...] = ()
    stale: bool = False
    frame_size: tuple[int, int] | None = None

    @property
    def file_name(self) -> str:
        return self.name + self.suffix


def plan(source: str, output: str, num_runs: int, form: str = "png") -> tuple[str, list[RestoreTask]]:
    """The folder to write to and a task per image. `form`: of the outputs, "input" for each one's own.

    ConfigError for an output that is the input, or that a later run would take as its input.
    """
    is_file = exists(source)
    if Path(output).suffix.lower() in IMAGE_SUFFIXES and (is_s3(output) or not Path(output).is_dir()):
        _check_file_output(source, output, num_runs, form, is_file=is_file)
        folder, _, name = output.rpartition("/")
        stem, dot, suffix = name.rpartition(".")
        return folder, [RestoreTask(source, key_of(Path(source).name), stem, dot + suffix, "")]
    if is_file:
        files = {Path(source).name: source}
    else:
        files = {below(uri, source): uri for uri in list_images(source)}
        check_output(output, [source])
    records = join(output, RECORDS)
    tasks = [
        RestoreTask(uri, key_of(path), output_name(path, key), _suffix(path, form), join(records, f"{key}.json"))
        for (path, uri), key in zip(files.items(), keys_of(list(files)), strict=True)
    ]
    if is_file or is_inside(source, output):
        for task in tasks:
            check_output(place_of(output, task, 0, num_runs), [source])
    return output, tasks


def _suffix(path: str, form: str) -> str:
    own = Path(path).suffix.lower()
    return SUFFIXES.get(form) or (own if own in FORMATS_OF else SUFFIXES["png"])


def _check_file_output(source: str, output: str, num_runs: int, form: str, *, is_file: bool) -> None:
    problems = {
        "INPUT is no file, OUTPUT is one": not is_file,
        f"results are {form.upper()} files": form not in ("input", FORMATS_OF.get(Path(output).suffix.lower())),
        "several runs of an image need several files": num_runs > 1,
        "OUTPUT is INPUT": is_inside(output, source),
    }
    for what, wrong in problems.items():
        if wrong:
            raise ConfigError(what, where=output, todo="give a folder as OUTPUT, or NAME.png for one run of one file")


def check_own(output: str, run_file: str) -> None:
    """ConfigError where the file OUTPUT is there and no run file beside it says that this command made it."""
    if exists(output) and not exists(run_file):
        raise ConfigError("this file is there already", where=output, todo="give another name, or remove it")


def place_of(output: str, task: RestoreTask, run: int, num_runs: int) -> str:
    """Where run `run` of an image goes."""
    return join(output, task.file_name) if num_runs == 1 else join(output, "runs", f"{run:02d}", task.file_name)


def output_size(sides: tuple[int, int], scale: float, where: str) -> tuple[int, int]:
    """(height, width) of a result. UnusableImageError where a side is too short."""
    if min(sides) < MIN_SIDE:
        what = f"{sides[1]}x{sides[0]} px is too small, a side needs {MIN_SIDE}"
        raise refuse("too_small", what, where, todo="use a larger image or video")
    return enlarged_size(sides, scale)


def identity(data: bytes) -> dict[str, Any]:
    """What a record says of a source file."""
    return {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class ChangedSourceError(DataError):
    """The outputs in place were made from other content than the source has now."""

    def __init__(self, where: str) -> None:
        todo = "remove its outputs and record, or give another OUTPUT"
        super().__init__("its outputs were made from another file or from an earlier one", where=where, todo=todo)

    def __reduce__(self) -> tuple:
        return type(self), (self.where,), self.__dict__


def pending(
    tasks: list[RestoreTask], output: str, num_runs: int, done: Collection[str], failures: "Failures"
) -> list[RestoreTask]:
    """The tasks that have `runs` to make.

    Files whose outputs exist are read: an output made from other content is a failure.
    """

    def check(task: RestoreTask) -> RestoreTask | tuple[str, str]:
        runs = tuple(run for run in range(num_runs) if place_of(output, task, run, num_runs) not in done)
        known, some = task.record in done, len(runs) < num_runs
        try:
            stale = known and not _is_of(task.record, identity(read_bytes(task.uri)))
            if some and task.record and (stale or not known):
                raise ChangedSourceError(task.uri)
        except CcsrError as error:
            return failure_of(error)
        return replace(task, runs=runs, stale=stale)

    found = []
    with ThreadPoolExecutor(8) as pool:
        for task, checked in zip(tasks, pool.map(check, tasks), strict=True):
            if isinstance(checked, tuple):
                failures.add(task.uri, *checked)
            elif checked.runs:
                found.append(checked)
    return found


def record_source(task: RestoreTask, data: bytes) -> None:
    """Commit what a task's outputs are made from, before the first is written. ChangedSourceError where another run
    began them from other content."""
    if not task.record:
        return
    found = identity(data)
    record = json.dumps(found | {"source": task.uri.rpartition("/")[2]}).encode()
    if task.stale:
        write_bytes(task.record, record)
    elif not put_if_absent(task.record, record) and not _is_of(task.record, found):
        raise ChangedSourceError(task.uri)


def _is_of(record: str, found: dict[str, Any]) -> bool:
    return {**read_json(record), **found} == read_json(record)


def failure_of(error: Exception) -> tuple[str, str]:
    """The kind of failure to count by, and what to say of it; an error that is neither the user's nor a lack of memory
    is raised."""
    if not isinstance(error, CcsrError):
        import torch

        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            return "memory", "the memory was used up; use a smaller scale or tile, or fewer rows at once"
        raise error
    if isinstance(error, UnusableImageError):
        kind = error.reason
    else:
        kind = "changed" if isinstance(error, ChangedSourceError) else "failed"
    return kind, printable(f"{error.what}; {error.todo}")


class Failures:
    """Images that were passed over, by kind."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[tuple[str, str]]] = {}

    def add(self, uri: str, kind: str, message: str) -> None:
        self._by_kind.setdefault(kind, []).append((uri.rpartition("/")[2], message))

    def report(self, total: int, where: str) -> None:
        """Print a line per kind; PartialResultError if there is any."""
        counts = []
        for kind, found in sorted(self._by_kind.items()):
            names = ", ".join(name for name, _ in found[:5]) + (", ..." if len(found) > 5 else "")
            counts.append(f"{len(found)} {kind} ({names})")
            print(printable(f"not restored: {counts[-1]}: {found[0][1]}"), file=sys.stderr)
        if counts:
            raise PartialResultError(
                f"{sum(map(len, self._by_kind.values()))} of {total} images were not restored: {'; '.join(counts)}",
                where=where,
                todo="see the line of each kind above, then run the same command again; the others are done",
            )
