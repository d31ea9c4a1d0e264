"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Yield `advance(steps, note)`; `done` steps were finished by an earlier run."""
    if sys.stderr.isatty():
        with _bar(title, total, done) as advance:
            yield advance
    else:
        yield _lines(title, total, done)


@contextmanager
def _bar(title: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda steps=1, note="": bar.update(task, advance=steps, note=note)


def _lines(title: str, total: int, done: int) -> Advance:
    last = began = time.monotonic()
    finished = first = done

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal last, began, finished, first
        now = time.monotonic()
        finished += steps
        if finished - steps == done:  # a resumed run's first report holds what was done before: no speed to tell yet
            began, first = now, finished
        if finished >= total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = _eta((now - began) / max(finished - first, 1) * (total - finished)) if finished > first else ""
            print(" ".join(filter(None, (f"{title}: {finished}/{total}", left, note))), file=sys.stderr, flush=True)

    return advance


def _eta(seconds: float) -> str:
    minutes = round(seconds) // 60
    return f"({minutes // 60}:{minutes % 60:02d}:{round(seconds) % 60:02d} left)" if round(seconds) else ""
