"""A thread that hurts a cluster of namespaces in a seeded order: workers, nodes, network, disks, MLflow and S3."""

import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import psutil
from cluster_nodes import Node, Nodes
from faulty_server import FaultyServer

KINDS = ("worker killed", "node killed", "node drained", "network cut", "disk full", "MLflow stopped", "S3 busy")
REST_SECONDS, FAULT_SECONDS = (12.0, 25.0), (2.0, 9.0)


class Saboteur(threading.Thread):
    """Hurts what `runs`, until `stop`; `counts` says what it did how often. The head stays, and at least one other node
    works."""

    def __init__(self, nodes: Nodes, s3: FaultyServer, seed: int) -> None:
        super().__init__(daemon=True)
        self._nodes, self._s3 = nodes, s3
        self._rng = np.random.default_rng(seed)
        self._end, self._busy = threading.Event(), False
        self.counts: Counter[str] = Counter()

    @contextmanager
    def runs(self) -> Iterator[None]:
        """A command runs inside the block. A fault at any other time would be survived by nobody."""
        self._busy = True
        yield
        self._busy = False

    def stop(self) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        deck: list[str] = []
        while not self._end.wait(self._rng.uniform(*REST_SECONDS)):
            if not self._busy:
                continue
            deck = deck or self._rng.permutation(KINDS).tolist()
            with suppress(psutil.Error, IndexError, subprocess.CalledProcessError):  # a node that is just starting anew
                if self._hurt(kind := deck.pop()):
                    self.counts[kind] += 1

    def _hurt(self, kind: str) -> bool:
        """False where there was nothing to hurt."""
        workers = [node for node in self._nodes.nodes[1:] if node.process.poll() is None]
        node = workers[self._rng.integers(len(workers))]
        if kind == "worker killed":
            busy = [one for one in self._processes(node) if _name(one).startswith("ray::") and "IDLE" not in _name(one)]
            for process in busy[:1]:
                process.kill()
            return bool(busy)
        if kind == "node killed":
            self._nodes.kill(node)
            self._nodes.add(num_cpus=1)
        elif kind == "node drained":
            self._nodes.drain(node)
        else:
            with {"network cut": self._cut, "disk full": self._full}.get(kind, self._without)(kind, node):
                self._end.wait(self._rng.uniform(*FAULT_SECONDS))
        return True

    def _processes(self, node: Node) -> list[psutil.Process]:
        found = []
        for pid in node.pids():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    @contextmanager
    def _cut(self, kind: str, node: Node) -> Iterator[None]:
        self._nodes.cut(node)
        yield
        self._nodes.mend(node)

    @contextmanager
    def _full(self, kind: str, node: Node) -> Iterator[None]:
        """No byte more fits into the node's temporary folder, which is a file system of its memory."""
        folder = f"{self._nodes.folder}/tmp"
        used = f"$(df --output=used --block-size=1K {folder} | tail -1)"
        for size in (f"$(({used} + 64))k", "50%"):
            script = f"mount -o remount,size={size} {folder}"
            subprocess.run([*self._nodes.inside(node), "bash", "-ec", script], check=True, capture_output=True)
            if size != "50%":
                yield

    @contextmanager
    def _without(self, kind: str, node: Node) -> Iterator[None]:
        if kind == "S3 busy":
            with self._s3.away():
                yield
            return
        servers = [one for one in psutil.Process().children(recursive=True) if "mlflow" in _name(one)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for server in servers:
                with suppress(ProcessLookupError):
                    os.kill(server.pid, number)
            if number == signal.SIGSTOP:
                yield


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
