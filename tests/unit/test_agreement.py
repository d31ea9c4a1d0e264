"""What ends a run on one rank is known on all: here with one rank, the rest in tests/integration/test_training.py."""

import os
import signal
import threading
import time

import pytest

from infra import DataError
from training.run.agreement import WorkerContext, agree, attempt, sigterm_noted


def test_sigterm_is_noted_from_any_thread_and_ends_the_process_only_outside() -> None:
    heard: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)

    def loop() -> None:
        with sigterm_noted() as sigterm:
            heard.append(sigterm())
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 60
            while not sigterm() and time.monotonic() < deadline:
                time.sleep(0.01)
            heard.append(sigterm())

    thread = threading.Thread(target=loop)  # where Python itself allows no handler
    thread.start()
    thread.join(90)
    assert heard == [False, True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_error_is_raised_where_it_happened_and_a_stop_is_told() -> None:
    context = WorkerContext(0, 1, "cpu", {})
    error = DataError("bad", where="here", todo="look")

    def fail() -> None:
        raise error

    assert attempt(fail) == (None, error)
    assert attempt(lambda: 3) == (3, None)
    assert agree(context) is False
    assert not context.agreed
    assert agree(context, stop=True) is True
    assert context.agreed
    with pytest.raises(DataError, match="bad"):
        agree(context, error)
