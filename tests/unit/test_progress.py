"""Progress without a terminal: a line now and then, with the time that is left; and as gauges."""

import sys
import time
from types import SimpleNamespace

import pytest

from infra.display import progress as module
from infra.display.progress import last_line, progress
from infra.process.gauges import show


def test_lines_tell_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run: its first report is 1000 updates that an earlier one did, then 10 updates a minute."""
    clock = iter([0.0, 10.0, 70.0, 130.0, 131.0, 190.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress("training", 1100) as advance:
        advance(1000, "loss 3")
        advance(10, "loss 2")
        advance(10)
        advance(1)
        advance(79)
    printed = capsys.readouterr().err
    assert last_line("warning: a/b\n" + printed + "ccsr: done\n") == "training: 1100/1100"
    assert last_line("Traceback: 1/2x\n") == ""
    assert printed.splitlines() == [
        "training: 1000/1100 loss 3",
        "training: 1010/1100 (0.167/s, 0:09:00 left) loss 2",
        "training: 1020/1100 (0.167/s, 0:08:00 left)",
        "training: 1100/1100",
    ]


def test_a_gauge_is_set_again_until_it_gets_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's agent forgets what is not."""
    told: list[tuple[float, dict[str, str]]] = []
    gauge = SimpleNamespace(set=lambda value, tags: told.append((value, tags)))
    monkeypatch.setattr("infra.process.gauges.ray_gauge", lambda name, tags: gauge)
    monkeypatch.setattr("infra.process.gauges.held", {})
    monkeypatch.setattr("infra.process.gauges.AGAIN_SECONDS", 0.01)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    show({"ccsr_progress_done": 3}, job_title="sharding")
    deadline = time.monotonic() + 20
    while len(told) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told[2] == (3, {"job_title": "sharding"})
    show({"ccsr_progress_done": 4}, job_title="sharding")
    assert told[-1][0] == 4
