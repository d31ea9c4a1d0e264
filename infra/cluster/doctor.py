"""`ccsr doctor`: whether this machine, its storage, MLflow and a cluster can do the work; each failure says what to do.

A check returns lines; a check that breaks is a failing line too, so that one bad part hides no other.
"""

import importlib.util
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from infra.cluster.server import ClusterFacts, check_version, cluster_facts, connect, job_server
from infra.errors import CcsrError, ClusterError, StorageError, line_of, without_passwords
from infra.files.publish import put_if_absent
from infra.files.storage import exists, join, read_bytes, remove
from infra.process.memory import GIB
from infra.process.ray_runtime import GPU_KIND, KIND
from infra.run import PACKAGES, ROOT

LEAST_DISK_BYTES = 5 * GIB
LEAST_SHM_BYTES = GIB // 4
DISTRIBUTION = "ccsr-cluster"


@dataclass(frozen=True)
class Line:
    """One finding. `state`: ok, note (works, but look) or fail; `todo` says what to do about the latter two."""

    name: str
    state: str
    found: str
    todo: str = ""


def diagnose(address: str | None, storage: str | None, mlflow: str | None) -> list[Line]:
    """All findings, in order. `address`: a job server; `storage`: a folder or s3:// prefix to write a small file to;
    `mlflow`: a tracking address. None leaves that part out."""
    checks: list[tuple[str, Callable[[], Iterator[Line]]]] = [
        ("versions", _versions),
        ("packages", _packages),
        ("GPU", _gpus),
        ("disk", _disks),
    ]
    if storage is not None:
        checks.append(("storage", lambda: _storage(storage)))
    if mlflow is not None:
        checks.append(("MLflow", lambda: _mlflow(mlflow)))
    if address is not None:
        checks.append(("cluster", lambda: _cluster(address)))
    lines: list[Line] = []
    for name, check in checks:
        try:
            lines += check()
        except CcsrError as error:
            lines.append(Line(name, "fail", without_passwords(f"{error.what} ({error.where})"), error.todo))
        except Exception as error:  # noqa: BLE001  the next checks are still worth their lines
            found = without_passwords(f"{type(error).__name__}: {line_of(error)}")
            lines.append(Line(name, "fail", found, "fix the problem above; the remaining checks still ran"))
    return lines


def _versions() -> Iterator[Line]:
    from packaging.requirements import Requirement

    yield Line("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    try:
        needed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        yield Line("versions", "note", f"{DISTRIBUTION} is not installed here, its packages were brought along", "")
        return
    wrong = []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
    if wrong:
        yield Line(
            "versions", "fail", "; ".join(wrong), f"pip install --upgrade {DISTRIBUTION}, in a virtual environment"
        )
    else:
        found = (f"{name} {metadata.version(name)}" for name in ("torch", "ray", "deepspeed"))
        yield Line("versions", "ok", ", ".join(found))


def _packages() -> Iterator[Line]:
    """Our packages have plain names; another one of that name earlier on the path would be taken instead."""
    root = ROOT.resolve()
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [spec.origin] if spec and spec.origin else []
        if not places or not Path(places[0]).resolve().is_relative_to(root):
            found = places[0] if places else "not found"
            yield Line("packages", "fail", f"`{name}` is {found}, not ours in {root}", f"remove or rename {found}")
    others = [
        str(place)
        for folder in map(Path, sys.path)
        if folder.is_dir() and folder.resolve() != root
        for name in PACKAGES
        for place in (folder / name, folder / f"{name}.py")
        if (place.suffix or (place / "__init__.py").is_file()) and place.exists()
    ]
    if others:
        yield Line(
            "packages", "note", f"same names elsewhere on the path: {', '.join(others)}", "keep them out of jobs"
        )
    else:
        yield Line("packages", "ok", f"{', '.join(PACKAGES)} in {root}")


def _gpus() -> Iterator[Line]:
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi"):
            found = f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it"
            yield Line(
                "GPU", "fail", found, "install a CUDA build of torch that fits the driver (nvidia-smi shows its CUDA)"
            )
        else:
            yield Line("GPU", "ok", "none: this machine works on its CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        if torch.cuda.get_device_capability(index) < (8, 0):
            yield Line("GPU", "note", f"{index}: {name}; no bfloat16 in hardware", "train with precision: fp32")
        elif free < total / 2:
            yield Line("GPU", "note", f"{index}: {name}", "another process holds it: see nvidia-smi")
        else:
            yield Line("GPU", "ok", f"{index}: {name}")
    yield _nccl()


def _nccl() -> Line:
    """One all-reduce of one process, with the library that training takes."""
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return Line("NCCL", "fail", "torch was built without it", "install a CUDA build of torch")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    with tempfile.TemporaryDirectory(prefix="ccsr-doctor-") as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            ones = torch.ones(1, device="cuda")
            dist.all_reduce(ones)
            torch.cuda.synchronize()
        finally:
            dist.destroy_process_group()
    return Line("NCCL", "ok", version)


def _disks() -> Iterator[Line]:
    for name, place, least, use in (
        ("disk", tempfile.gettempdir(), LEAST_DISK_BYTES, "Ray's logs and spilled objects, files on their way to S3"),
        ("shared memory", "/dev/shm", LEAST_SHM_BYTES, "Ray's object store"),
    ):
        if not os.path.isdir(place):
            yield Line(name, "note", f"there is no {place}", "Ray's object store will be on disk and slow")
            continue
        free = shutil.disk_usage(place).free
        found = f"{free / GIB:.1f} GiB free in {place}"
        if free < least:
            todo = f"free {least / GIB:.1f} GiB there ({use}); in a container, give it more"
            yield Line(name, "fail", found, todo)
        else:
            yield Line(name, "ok", found)


def _storage(place: str) -> Iterator[Line]:
    """Write, be refused a second conditional write, read, remove."""
    probe, was_there = join(place, f".writable-{secrets.token_hex(6)}"), os.path.isdir(place)
    first, second = secrets.token_bytes(16), secrets.token_bytes(16)
    if not put_if_absent(probe, first):
        raise StorageError(
            "a new file is said to exist", where=probe, todo="check the proxy or gateway in front of the storage"
        )
    try:
        again = put_if_absent(probe, second)
        content = read_bytes(probe)
        if again or content != first:
            todo = "use a server with conditional writes (If-None-Match): two writers would overwrite each other here"
            yield Line("storage", "fail", f"{place}: a conditional write replaced what was there", todo)
        else:
            yield Line("storage", "ok", f"{place}: write, conditional write, read")
    finally:
        if exists(probe):
            remove(probe, keep_folder=was_there)


def _mlflow(uri: str) -> Iterator[Line]:
    from infra.mlflow.server import ping

    shown = without_passwords(uri)
    if shown != uri:
        todo = "take it out of the address, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where jobs run"
        yield Line("MLflow", "note", f"{shown} holds a password", todo)
    yield Line("MLflow", "ok", f"{shown}: version {ping(uri)}")


def _cluster(address: str) -> Iterator[Line]:
    client = connect(address)  # before ray is imported, which then takes the user's token
    import ray

    place = job_server(address)
    facts = cluster_facts(client)
    versions = f"Ray {facts.ray_version}, Python {facts.python_version} there; {ray.__version__} here"
    try:
        check_version(facts, place)
        yield Line("cluster", "ok", f"{place}: {versions}")
    except ClusterError as error:  # the next lines are still worth having
        yield Line("cluster", "fail", f"{place}: {versions}", error.todo)
    if _asks_for_token(place):
        yield Line("token", "ok", "the cluster answers only with its token")
    elif urlsplit(place).hostname in ("127.0.0.1", "localhost", "::1"):
        yield Line("token", "note", "anyone on this machine may run jobs there", "start Ray with RAY_AUTH_MODE=token")
    else:
        todo = "start Ray with RAY_AUTH_MODE=token and put the token where `ccsr submit` runs"
        yield Line("token", "fail", "anyone who reaches the address may run code there", todo)
    yield from check_nodes(facts)


def check_nodes(facts: ClusterFacts) -> Iterator[Line]:
    gpus = facts.gpus
    cpus = sum(int(node["resources_total"].get("CPU", 0)) for node in facts.nodes)
    grows = f" (up to {gpus.most})" if gpus.most > gpus.present else ""
    yield Line("nodes", "ok", f"{len(facts.nodes)} nodes, {cpus} CPUs, {gpus.present} GPUs{grows}")
    on_gpu_nodes = [node for node in facts.nodes if node["resources_total"].get("GPU")]
    unlabelled = [node["node_ip"] for node in on_gpu_nodes if node["labels"].get(KIND) != GPU_KIND]
    if unlabelled and len(on_gpu_nodes) < len(facts.nodes):
        todo = f"start them with --labels {KIND}={GPU_KIND}"
        yield Line("placement", "note", f"GPU nodes that CPU work may fill: {', '.join(unlabelled)}", todo)
    cpu_nodes = [
        node for node in facts.nodes if node["labels"].get(KIND) != GPU_KIND and node["resources_total"].get("CPU")
    ]
    if not cpu_nodes:
        todo = f"add a CPU node, or take the label {KIND} from a GPU node"
        yield Line("placement", "fail", "every node with CPUs is labelled as GPU node: CPU work finds no place", todo)


def _asks_for_token(place: str) -> bool:
    import requests

    return requests.get(f"{place}/api/jobs/", timeout=10).status_code in (401, 403)
