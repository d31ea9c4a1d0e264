"""The actor on which workers say how far they are and what failed, and through which the driver asks them to stop."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from infra.errors import CcsrError

SECONDS_BETWEEN_BEATS = 2.0
SILENT_SECONDS = 4 * SECONDS_BETWEEN_BEATS
DRAINED = "a worker's node is being drained"
NOBODY_RUNS_SECONDS = 60.0  # without any rank's beat


@dataclass
class BoardState:
    """What the driver reads. `error` is a user's error; `news` are lines to print, oldest first; `lost` is what
    the ranks of this attempt met otherwise; `silent_seconds`: since any rank was heard."""

    update: int = 0
    note: str = ""
    error: CcsrError | None = None
    lost: list[str] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    silent_seconds: float = 0.0


class Board:
    """Lives in a Ray actor, one per `ccsr train`, and outlives the workers of an attempt."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state = BoardState()
        self._beats: dict[int, tuple[int, float]] = {}
        self._heard = clock()
        self._attempts = self._num_workers = 0
        self._stop = False
        self._regrouping = ""

    def begin(self, rank: int, num_workers: int) -> bool:
        """A worker of `num_workers` starts; False where an earlier attempt met a user's error: nothing is left."""
        if rank == 0:
            self._attempts += 1
            if self._attempts > 1:
                lost = "; ".join(self._state.lost) or "a worker was lost"
                if num_workers != self._num_workers:
                    lost += f"; {num_workers} workers instead of {self._num_workers}"
                self._state.news.append(f"restart {self._attempts - 1} from the last checkpoint: {lost}")
            self._num_workers = num_workers
            self._beats, self._state.lost = {}, []
        return self._state.error is None

    def beat(self, rank: int, update: int) -> bool:
        """A worker lives and works on `update`; True if it is to stop."""
        self._heard = self._clock()
        self._beats[rank] = update, self._heard
        return self._stop or bool(self._regrouping)

    def write(self, update: int, note: str) -> None:
        self._state.update, self._state.note = update, note

    def warn(self, text: str) -> None:
        self._state.news.append(text)

    def fail(self, error: CcsrError) -> None:
        """A user's error: the first one counts."""
        self._state.error = self._state.error or error

    def lost(self, rank: int, what: str) -> None:
        """Another error on `rank`; which rank was behind is looked up now, before the others are gone too."""
        behind = self.behind()
        self._state.lost.append(f"rank {rank}: {what}" + (f" ({behind})" if behind else ""))

    def stop(self) -> None:
        self._stop = True

    def regroup(self, reason: str) -> None:
        """Ask the workers to save and leave, so that another number of them is started."""
        self._regrouping = reason

    def start_anew(self) -> None:
        """Forget the error that the workers left with: others are started in their place."""
        saved = self._state.error.what if self._state.error else ""
        self._state.error, self._state.lost = None, [f"{self._regrouping or DRAINED}; {saved}"]
        self._regrouping = ""

    def read(self) -> BoardState:
        self._state.silent_seconds = self._clock() - self._heard
        return self._state

    def behind(self) -> str:
        """Which ranks were not heard of lately, else which are at an earlier update than the others; or nothing."""
        if not self._beats:
            return ""
        now = self._clock()
        last = max(update for update, _ in self._beats.values())
        silent = [
            f"rank {rank} was silent for {now - when:.0f} s, last heard at update {update}"
            for rank, (update, when) in self._beats.items()
            if now - when > SILENT_SECONDS
        ]
        slow = [
            f"rank {rank} was still at update {update}, others at {last}"
            for rank, (update, _) in self._beats.items()
            if update < last
        ]
        return ", ".join(silent if 0 < len(silent) < len(self._beats) else slow)


def make_board() -> Any:
    """A board on the driver's own node: it shall not be lost with a worker's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()


class Pulse:
    """A worker's beats, from a thread, so that a frozen process is noticed; call it at each update."""

    def __init__(self, board: Any, rank: int, told_to_end: Callable[[], bool]) -> None:
        self._board, self._rank, self._told_to_end = board, rank, told_to_end
        self._update = -1
        self._stop = False
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def __call__(self, update: int) -> bool:
        """True once the driver asks to stop, or this process receives SIGTERM."""
        self._update = update
        return self._stop or self._told_to_end()

    def _run(self) -> None:
        import ray

        while True:
            try:
                self._stop = ray.get(self._board.beat.remote(self._rank, self._update))
            except ray.exceptions.RayError:  # the driver is gone: Ray ends this worker
                return
            time.sleep(SECONDS_BETWEEN_BEATS)


class Watch:
    """While the block runs, a thread advances the bar to what the board says, prints its news and passes SIGTERM on."""

    def __init__(self, board: Any, advance: Callable[[int, str], None], sigterm: Callable[[], bool]) -> None:
        self._board, self._advance, self._sigterm = board, advance, sigterm
        self.state = BoardState()
        self._shown = self._told = 0
        self.stopped = threading.Event()
        self._thread = threading.Thread(target=self.watch_until_stopped, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self._thread.join()
        if not isinstance(error[1], KeyboardInterrupt):
            self.show()

    def error(self) -> CcsrError | None:
        """The user's error that a worker has met, if any."""
        self.show()
        return self.state.error

    def start_anew(self) -> None:
        """Let new workers start after the old ones have saved and left."""
        import ray

        ray.get(self._board.start_anew.remote())

    def watch_until_stopped(self) -> None:
        asked = False
        while not self.stopped.wait(1.0):
            self.show()
            if not self._sigterm():
                continue
            if not asked:
                self._board.stop.remote()
                asked = True
                print("SIGTERM: the workers are asked to save and end", file=sys.stderr, flush=True)
            if self.state.silent_seconds > NOBODY_RUNS_SECONDS:
                print("SIGTERM: no worker runs that could save; ending", file=sys.stderr, flush=True)
                _thread.interrupt_main(signal.SIGTERM)
                return

    def show(self) -> None:
        import ray

        try:
            self.state = ray.get(self._board.read.remote())
        except ray.exceptions.RayError:  # the driver's own call reports what ended the cluster
            return
        for line in self.state.news[self._told :]:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        self._told = len(self.state.news)
        if self.state.update > self._shown:
            self._advance(self.state.update - self._shown, self.state.note)
            self._shown = self.state.update
