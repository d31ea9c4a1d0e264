"""The rendered manifests in a real API server: it takes every object and pod, drops no field, and applies twice.

Runs where kube-apiserver, etcd and kubectl are on PATH (docs/cluster.md says how Debian's sources give the first). No
node and no operator: nothing starts.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.cluster.render import render_to
from tests.manifests import ALL, CONFIGS, CRDS, example, pods
from tests.training_runs import free_port

PROGRAMS = ("kube-apiserver", "etcd", "kubectl")
Kubectl = Callable[..., str]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason=f"needs {', '.join(PROGRAMS)} on PATH"),
    pytest.mark.skipif(CRDS is None, reason="KubeRay's CRDs are not in ../shared/crds"),
]


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """`kubectl WORDS` as the administrator of an API server that knows KubeRay's CRDs; returns what it printed."""
    folder, port, etcd = tmp_path_factory.mktemp("api"), free_port(), f"http://127.0.0.1:{free_port()}"
    subprocess.run(["openssl", "genrsa", "-out", str(folder / "key"), "2048"], check=True, capture_output=True)
    (folder / "tokens").write_text("secret,admin,1,system:masters\n")
    commands = {
        "etcd": {
            "data-dir": folder / "etcd",
            "listen-client-urls": etcd,
            "advertise-client-urls": etcd,
            "listen-peer-urls": f"http://127.0.0.1:{free_port()}",
        },
        "kube-apiserver": {
            "etcd-servers": etcd,
            "bind-address": "127.0.0.1",
            "secure-port": port,
            "cert-dir": folder / "certificates",
            "token-auth-file": folder / "tokens",
            "authorization-mode": "RBAC",
            "disable-admission-plugins": "ServiceAccount",  # waits for tokens that a controller makes
            "service-account-issuer": "https://127.0.0.1",
            "service-account-key-file": folder / "key",
            "service-account-signing-key-file": folder / "key",
        },
    }
    server = ["kubectl", "--server", f"https://127.0.0.1:{port}", "--token=secret", "--insecure-skip-tls-verify"]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*server, *words], env=environment, capture_output=True, text=True, check=False)

    def call(*words: str) -> str:
        done = run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def until_taken(*words: str) -> None:
        deadline = time.monotonic() + 120
        while (done := run(*words)).returncode:
            assert time.monotonic() < deadline, f"{done.stderr}\n{(folder / 'kube-apiserver.log').read_text()[-3000:]}"
            time.sleep(1)

    with ExitStack() as ends:
        for program, options in commands.items():
            log = ends.enter_context((folder / f"{program}.log").open("wb"))
            process = subprocess.Popen([program, *(f"--{k}={v}" for k, v in options.items())], stdout=log, stderr=log)
            ends.callback(process.wait, 60)
            ends.callback(process.terminate)
        until_taken("get", "--raw", "/readyz")
        assert CRDS is not None
        for path in CRDS.glob("*.yaml"):
            definition = with_filled_defaults(yaml.load(path.read_text(), yaml.CSafeLoader))
            (folder / "crd.json").write_text(json.dumps(definition))
            call("create", "--validate=false", "-f", str(folder / "crd.json"))
        until_taken("wait", "--for=condition=Established", "crd", "--all")
        call("create", "priorityclass", ALL["priority_class"], "--value=1")
        yield call


def with_filled_defaults(schema: Any) -> Any:
    """A CRD with another text for `default: ""`, which Kubernetes 1.20 reads as null and refuses."""
    if isinstance(schema, list):
        return [with_filled_defaults(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: "unset" if (k, one) == ("default", "") else with_filled_defaults(one) for k, one in schema.items()}


def missing(wanted: Any, found: Any, place: str = "") -> list[str]:
    """The places of `wanted` that `found` does not have or has otherwise."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [m for key, value in wanted.items() for m in missing(value, found.get(key), f"{place}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) <= len(found):  # the server may add
        return [m for pair in zip(wanted, found, strict=False) for m in missing(*pair, f"{place}[]")]
    return [] if wanted == found or wanted in ({}, []) else [f"{place}: {wanted!r}, there {found!r}"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_server_takes_every_object_and_every_pod(kubectl: Kubectl, tmp_path: Path, name: str) -> None:
    namespace = name.lower().replace(" ", "-")
    changes = CONFIGS[name]
    settings = {"namespace": namespace, **{k: v for k, v in changes.get("kubernetes", {}).items() if k != "namespace"}}
    config = example(**changes | {"kubernetes": settings})
    kubectl("create", "namespace", namespace)
    if config.s3.service_account:
        kubectl("create", "serviceaccount", config.s3.service_account, "-n", namespace)
    objects = []
    for path in render_to(config, "kuberay", tmp_path):
        if path.suffix == ".yaml" and path.name != "kustomization.yaml":
            objects += list(yaml.safe_load_all(path.read_text()))
    served = kubectl("api-versions").split()
    assert len(objects) >= 7
    for number, wanted in enumerate(objects):
        if wanted["kind"] == "PodMonitor":  # of Prometheus' operator, whose CRD is not here
            continue
        if wanted["apiVersion"] == "policy/v1" and "policy/v1" not in served:  # before Kubernetes 1.21
            wanted["apiVersion"] = "policy/v1beta1"
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(wanted))
        kubectl("apply", "-f", str(file))
        found = json.loads(kubectl("get", "-f", str(file), "-o", "json"))
        assert missing(wanted, found) == [], wanted["kind"]
        for index, pod in enumerate(pods({"": wanted})):
            metadata = pod["metadata"] | {"name": f"pod-{number}-{index}", "namespace": namespace}
            one = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
            file.write_text(json.dumps(one))
            kubectl("apply", "-f", str(file))
            assert missing(one, json.loads(kubectl("get", "-f", str(file), "-o", "json"))) == []


def test_a_second_apply_leaves_an_admitted_cluster_running(kubectl: Kubectl, tmp_path: Path) -> None:
    """What Kueue's webhook and controller write to `suspend` is not the manifest's to change."""
    cluster = ("raycluster", "ccsr")

    def apply(**labels: str) -> tuple[int, bool]:
        """The specification's number and `suspend`, afterwards."""
        render_to(example(kubernetes={"queue": "gpu-queue", "labels": labels}), "kuberay", tmp_path)
        kubectl("apply", "-f", str(tmp_path / "raycluster.yaml"))
        found = json.loads(kubectl("get", *cluster, "-o", "json"))
        return found["metadata"]["generation"], found["spec"].get("suspend")

    first, _ = apply()
    for suspended in ("true", "false"):  # at its creation, at its admission
        kubectl("patch", *cluster, "--type=merge", "-p", f'{{"spec":{{"suspend":{suspended}}}}}')
    assert apply() == (first + 2, False), "nothing changed"
    assert apply(team="sr") == (first + 3, False), "the pods' labels changed"


def test_kustomize_builds_the_base(kubectl: Kubectl, tmp_path: Path) -> None:
    render_to(example(), "kuberay", tmp_path)
    kinds = [document["kind"] for document in yaml.safe_load_all(kubectl("kustomize", str(tmp_path)))]
    assert {"RayCluster", "Deployment", "NetworkPolicy"} <= set(kinds)
    assert "RayJob" not in kinds
