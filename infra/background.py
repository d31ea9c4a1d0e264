"""MLflow off the hot path: a thread sends metrics and files, so neither a slow nor a dead server stops the caller."""

import logging
import threading
import time
from collections.abc import Mapping

from infra.tracking import Tracker

MAX_POINTS = 1000  # in one request: MLflow's limit


class BackgroundTracker:
    """One MLflow run. What the server does not take stays queued in order and is tried again; `close` tries last."""

    def __init__(self, tracker: Tracker, *, seconds_between_tries: float = 15.0) -> None:
        self._tracker = tracker
        self._pause = seconds_between_tries
        self._points: list[tuple[str, float, int, int]] = []
        self._files: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._closing = self._refused = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queue one point per value, with the present time."""
        now = int(time.time() * 1000)
        with self._changed:
            self._points += [(name, float(value), now, step) for name, value in values.items()]
            self._changed.notify()

    def file(self, place: str, content: bytes) -> None:
        """Queue bytes as the artifact `place`."""
        with self._changed:
            self._files.append((place, content))
            self._changed.notify()

    @property
    def note(self) -> str:
        """What a progress line should add: empty while the server answers."""
        return f", MLflow away: {len(self._points)} points wait" if self._refused else ""

    def close(self, seconds: float = 60.0) -> int:
        """Send what waits, for at most `seconds`; the number of points and files that the server never took."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        unsent = len(self._points) + len(self._files)
        if unsent:
            logging.getLogger(__name__).warning("MLflow never took %d points and files of this run", unsent)
        return unsent

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._waiting and not self._refused), self._pause)
                last = self._closing
            try:
                self._send()
                self._refused = False
            except Exception:
                # Whatever a server, its artifact store or a client library raises: training must go on.
                if not self._refused:
                    logging.getLogger(__name__).exception("MLflow does not answer; training goes on, its points wait")
                self._refused = True
            if last:
                return

    @property
    def _waiting(self) -> bool:
        return bool(self._points or self._files)

    def _send(self) -> None:
        while self._points:
            batch = self._points[:MAX_POINTS]
            self._tracker.send(batch)
            with self._changed:
                del self._points[: len(batch)]
        while self._files:
            self._tracker.file(*self._files[0])
            with self._changed:
                del self._files[0]
