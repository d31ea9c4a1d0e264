"""Ray nodes that are separate machines as far as one machine allows, to be killed and cut off.

Each has its own network namespace with an address on a bridge, its own processes, host name, temporary folder and
shared memory. Where namespaces may not be made, nodes are plain process groups on 127.0.0.1, and a cut is a SIGSTOP.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.training_runs import free_port

RAY = str(Path(sys.executable).with_name("ray"))
PATIENCE_SECONDS = 120
# Ray gives a node 30 seconds to start, which is short on a busy machine.
RETRIED = ["bash", "-c", 'until "$@"; do sleep 1; done', "-"]
# A node is given up after about five seconds of silence, for Ray's about twenty-five.
QUICK_TO_GIVE_UP = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
}
SPACES = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
# $1: folder, $2: host name; the rest is run as process 1 of the new namespaces.
ENTER = """
hostname "$2"
mount -t tmpfs tmpfs /dev/shm
mount --bind "$1/$2.hosts" /etc/hosts
mount -t tmpfs tmpfs "$1/tmp"
export TMPDIR="$1/tmp" RAY_TMPDIR="$1/tmp"
shift 2
exec "$@"
"""


def _ip(*words: object) -> None:
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


@dataclass
class Node:
    name: str
    address: str
    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        """Its processes, the one that holds its namespaces first."""
        with suppress(psutil.Error):
            holder = psutil.Process(self.process.pid)
            return [process.pid for process in (*holder.children(recursive=True), holder)]
        return []


@dataclass
class Nodes:
    """A Ray cluster: `add` nodes, the first being the head, which takes no work. Every node asks for a token."""

    environment: dict[str, str]
    folder: Path
    isolated: bool = False
    tag: str = field(default_factory=lambda: secrets.token_hex(2))
    nodes: list[Node] = field(default_factory=list)
    s3: Any = None  # the FaultyServer through which the nodes reach S3
    _free_port: int = field(default_factory=free_port)

    @property
    def host(self) -> str:
        """This process's address as the nodes see it."""
        return self._address(1) if self.isolated else "127.0.0.1"

    @property
    def ray_address(self) -> str:
        return f"{self.nodes[0].address}:{self._port}"

    @property
    def _port(self) -> int:
        return 6379 if self.isolated else self._free_port

    def _address(self, number: int) -> str:
        high, low = bytes.fromhex(self.tag)
        return f"10.{high}.{low}.{number}"

    def add(self, *, num_cpus: int) -> Node:
        name, address = f"{self.tag}n{len(self.nodes)}", self._address(10 + len(self.nodes))
        enter: list[str] = []
        if self.isolated:
            self._wire(name, address)
            (self.folder / f"{name}.hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
            enter = ["ip", "netns", "exec", name, "unshare", *SPACES, "bash", "-ec", ENTER, "-", str(self.folder), name]
        else:
            address = "127.0.0.1"
        options = [f"--node-ip-address={address}", f"--num-cpus={num_cpus}", "--object-store-memory=100000000"]
        if self.nodes:
            options.append(f"--address={self.ray_address}")
        else:
            options += [
                "--head",
                f"--port={self._port}",
                "--include-dashboard=false",
                f"--temp-dir={self.folder}/tmp/ray",
            ]
        if not self.isolated:
            options.append("--dashboard-agent-listen-port=0")
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*enter, *RETRIED, RAY, "start", *options, "--block", "--disable-usage-stats"],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        node = Node(name, address, process)
        self.nodes.append(node)
        return node

    def _wire(self, name: str, address: str) -> None:
        _ip("netns", "add", name)
        _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"{name}v", "master", f"{self.tag}b", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "route", "add", "default", "via", self.host)

    def inside(self, node: Node) -> list[str]:
        """Words to put before a command that is to run on the node."""
        if not self.isolated:
            return []
        first = psutil.Process(node.process.pid).children()[0].pid
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid"]
        return ["nsenter", f"--target={first}", *spaces, "env", f"TMPDIR={self.folder}/tmp"]

    def wait(self, num_nodes: int) -> None:
        """Until the head knows of so many nodes that are alive."""
        program = (
            "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR')\n"
            "import time\n"
            "while sum(n['Alive'] for n in ray.nodes()) != int(sys.argv[2]): time.sleep(0.2)\n"
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            command = [*self.inside(self.nodes[0]), sys.executable, "-c", program, self.ray_address, str(num_nodes)]
            done = subprocess.run(
                command, env={**os.environ, **self.environment}, capture_output=True, timeout=PATIENCE_SECONDS
            )
            if done.returncode == 0:
                return
            if time.monotonic() > deadline:
                logs = [path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("\n".join([done.stderr.decode(), *logs]))
            time.sleep(0.5)

    def kill(self, node: Node) -> None:
        """SIGKILL of everything on the node at once."""
        for pid in node.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.process.wait(60)

    def drain(self, node: Node) -> None:
        """What a pod does before it ends: SIGTERM to its `ray start`, which drains the node for half a minute, then
        ends it (and RETRIED starts another)."""
        if self.isolated:
            subprocess.Popen([*self.inside(node), sys.executable, "-m", "infra.cluster.leave"])
            return
        for process in map(psutil.Process, node.pids()):
            words = process.cmdline()
            if RAY in words and Path(words[0]).name.startswith("python"):
                process.terminate()

    def cut(self, node: Node) -> None:
        """Nothing comes from the node any more, and nothing reaches it; its processes run on."""
        if self.isolated:
            _ip("link", "set", f"{node.name}v", "down")
        else:
            for pid in node.pids():
                os.kill(pid, signal.SIGSTOP)

    def mend(self, node: Node) -> None:
        """The end of a cut. A node that the head has given up starts anew by `RETRIED`."""
        if self.isolated:
            _ip("link", "set", f"{node.name}v", "up")
        else:
            for pid in node.pids():
                os.kill(pid, signal.SIGCONT)

    def _tear_down(self) -> None:
        for node in self.nodes:
            self.kill(node)
        if self.isolated:
            for node in self.nodes:
                with suppress(PermissionError):
                    _ip("netns", "delete", node.name)
        with suppress(PermissionError, FileNotFoundError):
            _ip("link", "delete", f"{self.tag}b")


def _may_isolate(bridge: str) -> bool:
    """Make the bridge, if this process may make the namespaces too."""
    spaces = ["unshare", *SPACES, "true"]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("netns", "add", f"{bridge}0")
        done = subprocess.run(["ip", "netns", "exec", f"{bridge}0", *spaces], capture_output=True, check=False)
        _ip("netns", "delete", f"{bridge}0")
    except (PermissionError, FileNotFoundError):
        return False
    return done.returncode == 0


@contextmanager
def cluster_nodes(**environment: str) -> Iterator[Nodes]:
    """An empty cluster whose nodes get `environment`."""
    with tempfile.TemporaryDirectory(prefix="ccsr-", dir="/tmp") as folder:  # Ray's sockets need a short path
        (Path(folder) / "tmp").mkdir()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        nodes = Nodes({"OMP_NUM_THREADS": "1", **QUICK_TO_GIVE_UP, **token, **environment}, Path(folder))
        nodes.isolated = _may_isolate(f"{nodes.tag}b")
        try:
            if nodes.isolated:
                _ip("addr", "add", f"{nodes.host}/24", "dev", f"{nodes.tag}b")
                _ip("link", "set", f"{nodes.tag}b", "up")
            yield nodes
        finally:
            nodes._tear_down()
