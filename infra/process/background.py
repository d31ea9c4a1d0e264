"""MLflow off the hot path: threads send metrics and files, so neither a slow nor a dead server stops the caller."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.errors import line_of
from infra.mlflow.server import refused_for_good
from infra.mlflow.tracking import Tracker

MAX_POINTS = 1000  # in one request: MLflow's limit
MAX_FAILURES = 3
SECONDS_BETWEEN_LAST_TRIES = 1.0


class BackgroundTracker:
    """One MLflow run. What the server does not take stays queued and is tried again until `close` gives up; what it
    refuses for good is dropped with a warning. Points do not wait for files."""

    def __init__(
        self,
        tracker: Tracker,
        *,
        warn: Callable[[str], object] = logging.getLogger(__name__).warning,
        seconds_between_tries: float = 15.0,
    ) -> None:
        self._warn = warn
        self._points = _Sender("points", tracker.send, MAX_POINTS, warn, seconds_between_tries)
        self._files = _Sender("files", lambda files: _send_file(tracker, *files[0]), 1, warn, seconds_between_tries)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queue one point per value, with the present time."""
        now = int(time.time() * 1000)
        self._points.put((name, float(value), now, step) for name, value in values.items())

    def file(self, place: str, content: bytes) -> None:
        """Queue bytes as the artifact `place`."""
        self._files.put([(place, content)])

    def image(self, key: str, png: bytes, step: int) -> None:
        """Queue a picture for MLflow's image grid."""
        self._files.put([(key, png, step)])

    def again(self, points: Iterable[Sequence[Any]], files: Iterable[Sequence[Any]]) -> None:
        """Queue what an earlier `close` kept."""
        self._points.put(points)
        self._files.put(files)

    @property
    def note(self) -> str:
        """What a progress line should add: empty while the server answers."""
        return f", MLflow away: {len(self._points.waiting)} points wait" if self._points.failing else ""

    @property
    def num_waiting(self) -> int:
        """Points and files that the server has not taken yet."""
        return len(self._points.waiting) + len(self._files.waiting)

    def close(self, seconds: float = 60.0, keep: Callable[[list[Any], list[Any]], object] | None = None) -> int:
        """Send what waits, trying again for at most `seconds`; the number of points and files that the server never
        took. `keep` gets the points and the files among them that may be sent later."""
        senders = self._points, self._files
        for sender in senders:
            sender.end_by(time.monotonic() + seconds)
        unsent = sum(sender.num_unsent() for sender in senders)
        points, files = ([item.content for item in (*s.set_aside, *s.waiting)] for s in senders)
        if keep and (points or files):
            keep(points, files)
        if unsent:
            self._warn(f"MLflow never took {unsent} points and files of this run")
        return unsent


def _send_file(tracker: Tracker, place: str, content: bytes, step: int | None = None) -> None:
    if step is None:
        tracker.file(place, content)
    else:
        tracker.image(place, content, step)


@dataclass
class _Item:
    content: Any
    num_failures: int = 0
    num_taken_before: int = 0  # items that got through before its first failure


class _Sender:
    """A queue and the thread that sends it in order, up to `most` items in one call of `send`.

    A batch that is refused is halved until the item at fault is alone, and is dropped. Where one item is sent at a
    time, one that fails goes behind the others: a server may answer a bad one as if it were out of order itself. It is
    set aside after MAX_FAILURES failures if another one got through meanwhile.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[list[Any]], None],
        most: int,
        warn: Callable[[str], object],
        pause: float,
    ) -> None:
        self._name, self._send, self._most, self._warn, self._pause = name, send, most, warn, pause
        self._changed = threading.Condition()
        self._deadline = math.inf  # until it is closed
        self._num_taken = self._num_dropped = 0
        self._last_words = ""
        self.waiting: list[_Item] = []
        self.set_aside: list[_Item] = []
        self.failing = False
        self._thread = threading.Thread(target=self._run, name=f"mlflow {name}", daemon=True)
        self._thread.start()

    def put(self, contents: Iterable[Any]) -> None:
        with self._changed:
            self.waiting += map(_Item, contents)
            self._changed.notify()

    def end_by(self, deadline: float) -> None:
        """Send what waits, until the monotonic clock shows `deadline`."""
        with self._changed:
            self._deadline = deadline
            self._changed.notify()

    def num_unsent(self) -> int:
        """Wait for the end; the number of items that were not taken."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return len(self.waiting) + len(self.set_aside) + self._num_dropped

    @property
    def _closing(self) -> bool:
        return self._deadline < math.inf

    def _due(self) -> bool:
        """Wait until something should be sent; False once it is closed and done, or its time is over."""
        with self._changed:
            if self.failing and self._closing:
                self._changed.wait(SECONDS_BETWEEN_LAST_TRIES)
            elif self.failing:
                self._changed.wait_for(lambda: self._closing, self._pause)
            self._changed.wait_for(lambda: self.waiting or self._closing)
            return bool(self.waiting) and time.monotonic() < self._deadline

    def _run(self) -> None:
        size = self._most
        while self._due():
            batch = self.waiting[:size]
            try:
                self._send([item.content for item in batch])
                self.failing, size = False, min(2 * size, self._most)
                self._num_taken += len(batch)
            except Exception as error:  # noqa: BLE001  whatever a server or a client library raises: training continues
                refused = refused_for_good(error)
                if refused and len(batch) > 1:
                    size = len(batch) // 2
                    continue
                if not refused and not self._is_hopeless(batch[0]):
                    self._keep(error)
                    continue
                if refused:
                    self._num_dropped += 1
                else:
                    self.set_aside.append(batch[0])
                self._warn_of(batch[0], error, "dropped" if refused else "set aside")
            with self._changed:
                del self.waiting[: len(batch)]

    def _is_hopeless(self, item: _Item) -> bool:
        if not item.num_failures:
            item.num_taken_before = self._num_taken
        item.num_failures += 1
        others_got_through = self._num_taken > item.num_taken_before
        return self._most == 1 and item.num_failures >= MAX_FAILURES and others_got_through

    def _keep(self, error: Exception) -> None:
        if not self.failing:
            self._warn(f"MLflow does not take {self._name}; they wait and are sent again ({line_of(error)})")
        with self._changed:
            self.failing = True
            if self._most == 1:
                self.waiting.append(self.waiting.pop(0))

    def _warn_of(self, item: _Item, error: Exception, what: str) -> None:
        if (words := line_of(error)) != self._last_words:
            self._warn(f"MLflow does not take {item.content[0]!r} of the {self._name}, it is {what} ({words})")
        self._last_words = words
