"""The board: what the workers tell reaches the driver, and which rank held the others up."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from infra.errors import StoppedError
from training.run.monitoring import board as module
from training.run.monitoring.board import DRAINED, Board, BoardState, Watch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_silent_rank_is_named_else_the_one_that_is_behind() -> None:
    clock = Clock()
    board = Board(clock)
    assert board.behind() == ""
    for rank in range(3):
        board.beat(rank, 7)
    assert board.behind() == ""
    board.beat(2, 8)
    assert board.behind() == "rank 0 was still at update 7, others at 8, rank 1 was still at update 7, others at 8"
    clock.now = 30.0
    board.beat(0, 8)
    board.beat(2, 8)
    assert board.behind() == "rank 1 was silent for 30 s, last heard at update 7"
    clock.now = 90.0  # all silent says nothing about who is to blame
    assert board.behind() == "rank 1 was still at update 7, others at 8"


def test_a_restart_is_told_with_its_reason_and_a_users_error_ends_the_restarts() -> None:
    clock = Clock()
    board = Board(clock)
    assert all(board.begin(rank, 2) for rank in (1, 0))
    assert board.read().news == []
    board.beat(0, 3)
    board.beat(1, 2)
    board.lost(0, "RuntimeError: timed out")
    assert board.begin(0, 2)
    reason = "rank 0: RuntimeError: timed out (rank 1 was still at update 2, others at 3)"
    assert board.read().news == [f"restart 1 from the last checkpoint: {reason}"]
    assert board.behind() == "", "the beats were of workers that are gone"
    board.fail("first")
    board.fail("second")
    assert board.read().error == "first"
    assert not board.begin(0, 2)


def test_a_stop_reaches_every_rank_at_its_next_beat_and_progress_is_the_last_written() -> None:
    board = Board(Clock())
    assert not board.beat(0, 1)
    board.stop()
    assert board.beat(0, 1)
    assert board.beat(1, 1)
    board.write(5, "loss 1")
    assert replace(board.read(), news=[]) == replace(board.read(), update=5, note="loss 1", news=[])
    board.warn("look")
    assert board.read().news == ["look"]


@pytest.mark.parametrize("reason", ["", "4 workers have become possible"])
def test_workers_that_saved_and_left_are_started_anew_with_the_reason(reason: str) -> None:
    board = Board()
    assert board.begin(0, 2)
    if reason:
        board.regroup(reason)
        assert board.beat(0, 1), "asked to save and leave"
    board.fail(StoppedError("saved", where="", todo=""))
    assert not board.begin(0, 2), "a restart of Ray's before the driver knows: nothing to do"
    board.start_anew()
    assert board.begin(0, 4)
    assert not board.beat(0, 1)
    assert board.read().error is None
    said = f"{reason or DRAINED}; saved; 4 workers instead of 2"
    assert board.read().news[-1] == f"restart 2 from the last checkpoint: {said}"


@pytest.mark.parametrize(("silent_seconds", "ended"), [(59.0, []), (61.0, ["SIGTERM"])])
def test_sigterm_ends_the_driver_where_no_worker_runs_that_could_save(
    monkeypatch: pytest.MonkeyPatch, silent_seconds: float, ended: list[str]
) -> None:
    """Workers that wait for GPUs never come to an update."""
    found: list[str] = []
    monkeypatch.setattr(module, "_thread", SimpleNamespace(interrupt_main=lambda signum: found.append(signum.name)))
    asked: list[bool] = []
    stop = SimpleNamespace(remote=lambda: asked.append(True))
    watch = Watch(SimpleNamespace(stop=stop), lambda *_: None, lambda: True)
    watch.state = BoardState(silent_seconds=silent_seconds)
    monkeypatch.setattr(watch, "show", lambda: None)
    waits = iter([False, False, True])
    monkeypatch.setattr(watch, "stopped", SimpleNamespace(wait=lambda seconds: next(waits)))
    watch.watch_until_stopped()
    assert asked == [True]
    assert found == ended


def test_silence_is_counted_from_the_last_beat_or_start() -> None:
    clock = Clock()
    board = Board(clock)
    clock.now = 5.0
    assert board.read().silent_seconds == 5
    board.beat(1, 3)
    clock.now = 12.0
    assert board.read().silent_seconds == 7
