"""Cluster templates: what is rendered has only fields that KubeRay and Kubernetes know, and runs as a batch script."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from infra.cluster.config import ClusterConfig
from infra.cluster.render import render
from infra.config import load_config
from infra.errors import ConfigError
from infra.process.ray_runtime import cpus_here
from tests.manifests import REPOSITORY, documents, example

GROUP = {"cpus": 4, "memory_gib": 8, "max_nodes": 2}


@pytest.mark.parametrize(
    "value", ["yes", "1e3", "0x1F", "null", "- a", "a: b # c", "x\n  privileged: true", "{{ x }}é\x85\x00'\""]
)
def test_a_value_stays_one_value_whatever_it_holds(value, tmp_path, monkeypatch):
    config = example(
        s3={"endpoint_url": value},
        mlflow_uri=value,
        command=["verify", value],
        kubernetes={"annotations": {"example.com/note": value}},
    )
    text = render(config, "kuberay")["raycluster.yaml"]
    assert text.count('{"name": "AWS_ENDPOINT_URL", "value": "') == 3  # in quotes: 1e3 is a number in YAML 1.2
    cluster, job = (documents(config)[name]["spec"] for name in ("RayCluster/ccsr", "RayJob/ccsr-job"))
    pod = cluster["workerGroupSpecs"][1]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert (env["AWS_ENDPOINT_URL"], env["MLFLOW_TRACKING_URI"]) == (value, value)
    assert cluster["headGroupSpec"]["template"]["metadata"]["annotations"] == {"example.com/note": value}
    assert "privileged" not in pod["containers"][0]
    assert shlex.split(job["entrypoint"]) == ["ccsr", "verify", value]


@pytest.mark.parametrize("value", ["a b; touch $(echo no)", "x' `touch no`", "x\ntouch no", "{{ x }}"])
def test_no_value_becomes_a_command_of_the_batch_script(value, tmp_path):
    config = example(s3={"endpoint_url": value}, command=["verify", value], slurm={"setup": ["echo $AWS_ENDPOINT_URL"]})
    code, calls = run_batch(tmp_path, config)
    assert code == 0
    assert f"ccsr verify {value}".splitlines()[0] in calls
    assert not (tmp_path / "no").exists()
    for changes in ({"slurm": {"account": value}}, {"cpu_workers": GROUP | {"partition": value}}):
        with pytest.raises(ConfigError, match="pattern"):
            example(**changes)


def test_every_cluster_wants_a_token_and_places_work_by_node():
    found = documents(example())
    job = found["RayJob/ccsr-job"]["spec"]
    for cluster in (found["RayCluster/ccsr"]["spec"], job["rayClusterSpec"]):
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == version("ray")
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["headGroupSpec"]["labels"] == {"ccsr.io/max-gpus": "32", "ccsr.io/max-cpus": "256"}
        gpu, cpu = cluster["workerGroupSpecs"]
        assert (gpu["labels"], cpu["labels"]) == ({"ccsr.io/kind": "gpu"}, {})
        assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert cpu["rayStartParams"].items() >= {"num-cpus": "16", "object-store-memory": str(8 * 2**30)}.items()
        assert (cpu["minReplicas"], cpu["maxReplicas"]) == (0, 16)
        assert cpu["template"]["spec"]["tolerations"][0]["key"] == "spot"
    for manifest in found.values():
        specs = [value for value in _walk(manifest) if isinstance(value, dict) and "containers" in value]
        assert all(spec["securityContext"]["runAsNonRoot"] for spec in specs)
    assert job["entrypoint"] == "ccsr train -c /etc/ccsr/ccsr_v2_stage1.yaml --set 'seed=a b'"
    config = (REPOSITORY / "configs" / "ccsr_v2_stage1.yaml").read_text()
    assert found["ConfigMap/ccsr-job"]["data"] == {"ccsr_v2_stage1.yaml": config}
    volumes = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "configs", "configMap": {"name": "ccsr-job"}} in volumes


def test_gpu_nodes_take_all_work_where_there_are_no_others():
    cluster = documents(example(cpu_workers=None))["RayCluster/ccsr"]["spec"]
    assert cluster["workerGroupSpecs"][0]["labels"] == {}
    assert cluster["headGroupSpec"]["labels"]["ccsr.io/max-cpus"] == "128"


def test_a_cluster_that_can_grow_has_the_cpus_that_its_head_promises(monkeypatch):
    nodes = [({}, {"ccsr.io/max-cpus": "256"}), ({"CPU": 32.0}, {"ccsr.io/kind": "gpu"}), ({"CPU": 16.0}, {})]
    monkeypatch.setattr("infra.process.ray_runtime.nodes_here", lambda: nodes)
    assert cpus_here() == 256
    monkeypatch.setattr("infra.process.ray_runtime.nodes_here", lambda: nodes[1:])
    assert cpus_here() == 16


def _walk(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(found for item in inside for found in _walk(item))]


def test_mlflow_keeps_its_password_in_a_secret_and_knows_its_name():
    container = documents(example())["Deployment/ccsr-mlflow"]["spec"]["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["MLFLOW_BACKEND_STORE_URI"]["valueFrom"] == {"secretKeyRef": {"name": "ccsr-mlflow-db", "key": "uri"}}
    assert "MLFLOW_TRACKING_URI" not in env
    worker = documents(example())["RayCluster/ccsr"]["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    (address,) = [entry["value"] for entry in worker["env"] if entry["name"] == "MLFLOW_TRACKING_URI"]
    (hosts,) = [word for word in container["command"] if word.startswith("--allowed-hosts=")]
    assert address.removeprefix("http://") in hosts.removeprefix("--allowed-hosts=").split(",")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "registry/ccsr:latest"}, "pin the image"),
        ({"image": "registry:5000/ccsr"}, "pin the image"),
        ({"gpu_workers": GROUP}, "how many `gpus`"),
        ({"cpu_workers": GROUP | {"gpus": 1}}, "are gpu_workers"),
        ({"cpu_workers": GROUP | {"object_store_gib": 5}}, "half of memory_gib"),
        ({"name": "Ours"}, "pattern"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        example(**changes)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"cpu_workers": None, "gpu_workers": None}, "kuberay", "no workers"),
        ({"image": None}, "kuberay", "needs an image"),
        ({"command": []}, "slurm", "names none"),
        ({"command": ["train", "-c", "nowhere.yaml"]}, "kuberay", "cannot be read"),
    ],
)
def test_what_is_missing_for_a_kind_is_told(changes, kind, message):
    with pytest.raises(ConfigError, match=message):
        render(example(**changes), kind)


# Programs that a Slurm node has, in the place of those: they write down how they were called.
STAND_INS = {
    "srun": 'echo "srun $*" >> calls; exec sleep 60',
    "ray": 'echo "ray $* token ${#RAY_AUTH_TOKEN}" >> calls; [ "$1" = health-check ] || exec sleep 60',
    # Waits for all nodes, as the script's own program does.
    "python": r'nodes="^srun\|^ray start"; until [ "$(grep -c "$nodes" calls)" = "$(grep -c "$nodes" ccsr.sbatch)" ]; '
    "do sleep 0.1; done",
    "scontrol": 'echo "scontrol $*" >> calls',
    "ccsr": 'echo "ccsr $*" >> calls; trap "exit ${CODE_AT_TERM:-0}" TERM\n'
    '[ -z "${CODE_AT_TERM:-}" ] && exit ${CODE:-0}\n'
    "sleep 0.5; kill -TERM $PPID; sleep 60 & wait",  # bash may trip over a trap that comes while it reads a $(...)
}


def run_batch(folder: Path, config: ClusterConfig, **environment: str) -> tuple[int, list[str]]:
    """Run the rendered script with replaced commands; its exit code and their calls."""
    (folder / "ccsr.sbatch").write_text(render(config, "slurm")["ccsr.sbatch"])
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    settings = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "123456", "SLURMD_NODENAME": "node0"} | environment
    done = subprocess.run(["bash", "ccsr.sbatch"], cwd=folder, env=settings, timeout=60, check=False)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_the_batch_script_starts_ray_on_every_node_with_a_token(tmp_path):
    config = example(slurm={"setup": ["export LINE='a b'"]}, mlflow_uri="http://there:5000")
    code, calls = run_batch(tmp_path, config, CODE="3")
    assert code == 3, "the job's own exit code"
    assert not any(call.startswith("scontrol") for call in calls)
    (head,) = [call for call in calls if call.startswith("ray start")]
    assert "--port=23456" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-gpus=8 --labels=ccsr.io/kind=gpu --block token 64" in head
    gpu, cpu = sorted(call for call in calls if call.startswith("srun"))
    assert gpu.startswith("srun --het-group=0 --nodes=3 --ntasks=3 --exclude=node0 bash -c until ray start --address=")
    assert re.search(r'"\$RAY_ADDRESS" --num-cpus=32 .* --num-gpus=8 --labels=ccsr.io/kind=gpu --block; do', gpu)
    assert re.search(r"--het-group=1 --nodes=16 .* --num-cpus=16 .* --num-gpus=0 --block", cpu)
    assert "ccsr.io/kind" not in cpu
    text = (tmp_path / "ccsr.sbatch").read_text()
    first, second = text.split("#SBATCH hetjob")
    assert "--gpus-per-node=8" in first
    assert "--gpus-per-node" not in second
    assert (
        "export LINE='a b'\nexport AWS_DEFAULT_REGION=us-east-1\nexport MLFLOW_TRACKING_URI=http://there:5000" in text
    )


@pytest.mark.parametrize(("code", "queued"), [(143, ["scontrol requeue 123456"]), (1, [])])
def test_a_batch_job_whose_time_is_over_saves_and_is_queued_again(tmp_path, code, queued):
    config = example(cpu_workers=None, gpu_workers=GROUP | {"gpus": 1, "max_nodes": 1}, slurm={})
    ended, calls = run_batch(tmp_path, config, CODE_AT_TERM=str(code))
    assert not any("--labels" in call for call in calls)
    assert ended == code
    assert [call for call in calls if call.startswith("scontrol")] == queued
    assert not any(call.startswith("srun") for call in calls), "one node: the head"


def test_the_image_pins_what_the_project_asks_for():
    pinned, beside = (
        dict(line.split("==") for line in (REPOSITORY / name).read_text().splitlines() if not line.startswith("#"))
        for name in ("constraints.txt", "constraints-dev.txt")
    )
    assert not pinned.keys() & beside.keys()
    for requirement in (Requirement(text) for text in requires("ccsr-cluster") or []):
        name = requirement.name.lower()
        if requirement.marker is None:
            assert requirement.specifier.contains(pinned[name]), requirement
        elif any(requirement.marker.evaluate({"extra": extra}) for extra in ("demo", "dev")):
            assert requirement.specifier.contains((pinned | beside)[name]), requirement
    assert "webdataset" in beside, "a test reader is not in the image"
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.\d+\.\d+-", dockerfile, re.MULTILINE)
    assert "--requirement constraints.txt" in dockerfile
    assert dockerfile.index("\nUSER ") < dockerfile.index("\nCMD ")


MANIFESTS = ("access", "kustomization", "mlflow", "raycluster", "rayjob")
KUBERAY_FILES = {"grafana_dashboard.json", *(f"{name}.yaml" for name in MANIFESTS)}


def test_render_writes_its_files(tmp_path):
    command = [str(Path(sys.executable).with_name("ccsr")), "cluster", "render", "-c", "configs/cluster.yaml"]
    for kind, names in (("kuberay", KUBERAY_FILES), ("slurm", {"ccsr.sbatch"})):
        done = subprocess.run(
            [*command, "--kind", kind, "--out", str(tmp_path / kind)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        rendered = render(load_config(REPOSITORY / "configs" / "cluster.yaml", ClusterConfig), kind)
        assert {path.name: path.read_text() for path in (tmp_path / kind).iterdir()} == rendered
        assert rendered.keys() == names
        assert ("needs a Secret `ccsr-s3` with AWS_ACCESS_KEY_ID, AWS" in done.stderr) == (kind == "kuberay")
