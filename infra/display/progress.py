"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

from infra.process.gauges import show

SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Yield `advance(steps, note)`; `done` steps were finished by an earlier run. Prometheus sees it too."""
    with _bar(title, total, done) if sys.stderr.isatty() else nullcontext(_lines(title, total, done)) as display:
        finished = done

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal finished
            finished += steps
            show({"ccsr_progress_done": finished, "ccsr_progress_total": total}, job_title=title)
            display(steps, note)

        yield advance


def last_line(log: str) -> str:
    """The last line of progress in a log, "" if it has none: TITLE: DONE/TOTAL (RATE, TIME left) NOTE."""
    return next((line for line in reversed(log.splitlines()) if re.match(r"[^:]+: \d+/\d+( |$)", line)), "")


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
            left = _eta((finished - first) / max(now - began, 1e-9), total - finished) if finished > first else ""
            print(" ".join(filter(None, (f"{title}: {finished}/{total}", left, note))), file=sys.stderr, flush=True)

    return advance


def _eta(rate: float, num_left: int) -> str:
    seconds = round(num_left / rate)
    minutes = seconds // 60
    return f"({rate:.3g}/s, {minutes // 60}:{minutes % 60:02d}:{seconds % 60:02d} left)" if seconds else ""
