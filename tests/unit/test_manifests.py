"""Rendered manifests against every field of KubeRay's and Kubernetes' schemas, and what an administrator asks for.

Unknown fields, which an API server drops in silence, are errors here.
"""

import hashlib
import subprocess
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from infra.cluster.render import CERTIFICATE, TLS_VARIABLES
from infra.errors import ConfigError
from pipelines.cli.main import app
from pipelines.cli.needs import require_gpus
from tests.manifests import ALL, CONFIGS, CRDS, REPOSITORY, documents, example, pods

OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.31", "1.37"
# sha256 of the fields of RayCluster and RayJob that CONFIGS use, as they passed KubeRay's schema (v1.7.0-rc.0).
CHECKED_FIELDS = "23e3a3ba7ee33f680f0e6bf96f77ce946e7b8ef212aa419545dfa6e95fbdde94"


def used_fields(value: Any, place: str = "") -> set[str]:
    """The places of all values in a document, lists without their indices."""
    if isinstance(value, dict):
        return {place}.union(*(used_fields(inside, f"{place}.{key}") for key, inside in value.items()))
    if isinstance(value, list):
        return {place}.union(*(used_fields(inside, f"{place}[]") for inside in value))
    return {f"{place}: {type(value).__name__}"}


def test_the_fields_are_those_that_passed_kuberays_schema() -> None:
    fields = sorted({f for name in CONFIGS for d in rays_own(name).values() for f in used_fields(d)})
    assert hashlib.sha256("\n".join(fields).encode()).hexdigest() == CHECKED_FIELDS, (
        "other fields than were checked: run these tests with KubeRay's CRDs in ../shared/crds, then write this digest"
    )


def rays_own(name: str) -> dict[str, dict[str, Any]]:
    return {kind: d for kind, d in documents(example(**CONFIGS[name])).items() if d["apiVersion"].startswith("ray.io")}


def _closed(schema: Any) -> Any:
    """A CRD's schema that refuses the fields which the API server would drop in silence."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: _closed(value) for key, value in schema.items()}
    is_closed = "properties" in schema and "type" in schema and "x-kubernetes-preserve-unknown-fields" not in schema
    return inside | ({"additionalProperties": False} if is_closed else {})


@cache
def _checker(kind: str) -> jsonschema.Draft202012Validator:
    assert CRDS is not None
    definition = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema["properties"]["metadata"] = {}
    return jsonschema.Draft202012Validator(_closed(schema))


@pytest.mark.skipif(
    CRDS is None, reason="KubeRay's CRDs (2.3 MB) are not in the repository: put them in ../shared/crds"
)
@pytest.mark.parametrize("name", CONFIGS)
def test_manifests_fit_kuberays_schema(name: str) -> None:
    found = rays_own(name)
    assert {document["kind"] for document in found.values()} == {"RayCluster", "RayJob"}
    for document in found.values():
        checker = _checker(document["kind"])
        assert [f"{error.json_path}: {error.message}" for error in checker.iter_errors(document)] == []
        document["spec"]["entryPoint"] = "x"
        assert [error.validator for error in checker.iter_errors(document)] == ["additionalProperties"]


_schema = cache(kubernetes_validate.utils.schema_contents)  # parsed once, not for each object


@pytest.mark.parametrize(
    ("name", "version"), [("all", OLDEST_KUBERNETES), *((name, NEWEST_KUBERNETES) for name in CONFIGS)]
)
def test_objects_and_pods_fit_kubernetes_schema(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", _schema)
    found = documents(example(**CONFIGS[name]))
    own = ("ray.io", "monitoring.coreos.com", "kustomize")
    objects = [document for document in found.values() if not document["apiVersion"].startswith(own)]
    assert len(objects) >= 5
    for document in objects:
        kubernetes_validate.validate(document, version, strict=True)
    for pod in pods(found):
        one = {"apiVersion": "v1", "kind": "Pod", "metadata": pod["metadata"] | {"name": "pod"}, "spec": pod["spec"]}
        kubernetes_validate.validate(one, version, strict=True)
        one["spec"]["tolerations"] = [{"tolerationSecond": 1}]
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(one, version, strict=True)


def test_each_pod_is_closed_and_sized() -> None:
    found = documents(example(**CONFIGS["all"]))
    assert len(pods(found)) == 3 + 3 + 1 + 1  # a cluster's, a job's and its submitter's, MLflow's
    for pod in pods(found):
        spec = pod["spec"]
        assert pod["metadata"]["labels"].items() >= ALL["labels"].items()
        assert pod["metadata"]["annotations"] == ALL["annotations"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert (spec["serviceAccountName"], spec["priorityClassName"]) == ("robot", "batch-high")
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        is_head = spec["containers"][0]["name"] == "ray-head"
        assert spec["automountServiceAccountToken"] is is_head, "of a head for its autoscaler, of no job's worker"
        paths = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert paths >= {"/tmp", "/home/ccsr"}
        for container in (*spec["containers"], *spec.get("initContainers", [])):
            assert container["imagePullPolicy"] == "Always"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            names = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= names


def test_who_may_call_whom() -> None:
    found = documents(example(**CONFIGS["all"]))
    ray, mlflow = (found[f"NetworkPolicy/{name}"]["spec"] for name in ("ccsr", "ccsr-mlflow"))
    label = {"matchLabels": {"ccsr.io/cluster": "ccsr"}}
    assert mlflow["ingress"] == [{"from": [{"podSelector": label}], "ports": [{"port": 5000}]}]
    assert ray["podSelector"] == label
    among, operator, prometheus = ray["ingress"]
    assert among == {"from": [{"podSelector": label}]}
    assert operator["from"][0]["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "kuberay"}}
    assert prometheus["ports"] == [{"port": 8080}]
    rays = [pod for name in ("RayCluster/ccsr", "RayJob/ccsr-job") for pod in pods({name: found[name]})]
    selected = [pod for pod in rays if pod["metadata"]["labels"].get("ccsr.io/cluster") == "ccsr"]
    assert selected == rays, "a job's submitter too"
    assert len(selected) == 2 * 3 + 1
    for pod in selected[:3]:
        (metrics,) = [p for p in pod["spec"]["containers"][0]["ports"] if p["name"] == "metrics"]
        assert metrics["containerPort"] == 8080
    budget = found["PodDisruptionBudget/ccsr-gpu"]["spec"]
    assert (budget["minAvailable"], budget["selector"]["matchLabels"]["ray.io/group"]) == (1, "gpu")
    assert found["RoleBinding/ccsr"]["subjects"][0] == {
        "kind": "ServiceAccount", "name": "robot", "namespace": "research"
    }  # fmt: skip
    assert "ServiceAccount/robot" not in found
    assert "ServiceAccount/ccsr" in documents(example())


def test_with_tls_whatever_calls_the_gcs_has_certificates() -> None:
    spec = documents(example(**CONFIGS["all"]))["RayCluster/ccsr"]["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    callers = [spec["autoscalerOptions"], *(group["template"]["spec"]["containers"][0] for group in groups)]
    assert len(callers) == 4
    for caller in callers:
        assert {entry["name"]: entry.get("value") for entry in caller["env"]}.items() >= TLS_VARIABLES.items()
        assert {"name": "tls", "mountPath": "/etc/ccsr-tls"} in caller["volumeMounts"]
    assert "env" not in documents(example())["RayCluster/ccsr"]["spec"]["autoscalerOptions"]


def test_a_queued_cluster_is_not_suspended_again_and_does_not_grow() -> None:
    found = documents(example(**CONFIGS["queue"]))
    for name in ("RayCluster/ccsr", "RayJob/ccsr-job"):
        assert found[name]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu-queue"
    assert found["RayJob/ccsr-job"]["spec"]["suspend"] is True
    assert "suspend" not in found["RayCluster/ccsr"]["spec"], "a second apply would end what runs"
    cluster = found["RayCluster/ccsr"]["spec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert [group["replicas"] for group in cluster["workerGroupSpecs"]] == [4, 16]


def test_kustomize_finds_the_base() -> None:
    found = documents(example())["Kustomization/"]
    assert found["resources"] == ["access.yaml", "mlflow.yaml", "raycluster.yaml"]


NODE = {"cpus": 31.5, "memory_gib": 250, "gpus": 8, "taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]}
GPUS = {"cpus": 30, "memory_gib": 240, "max_nodes": 4, "gpus": 8, "node_type": NODE}
HEAD = {"cpus": 3, "memory_gib": 15, "node_type": {"cpus": 4, "memory_gib": 16}}
SPOT = {"key": "spot", "value": "true", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu_workers": GPUS | {"memory_gib": 256}}, "memory_gib: 256 does not fit node_type, which has 250"),
        ({"gpu_workers": GPUS | {"gpus": 16}}, "gpus: 16 does not fit"),
        (
            {"gpu_workers": GPUS | {"node_type": NODE | {"taints": [SPOT]}}},
            "no toleration covers node_type's taint spot",
        ),
        ({"head": HEAD | {"cpus": 4}}, "head.cpus: 4.5 with the autoscaler's 0.5 does not fit node_type, which has 4"),
        ({"head": HEAD | {"memory_gib": 16}}, "head.memory_gib: 17 with the autoscaler's 1 does not fit"),
        ({"gpu_workers": GPUS | {"min_nodes": 5}}, "min_nodes"),
        ({"gpu_workers": GPUS | {"shm_gib": 300}}, "shm_gib"),
        ({"gpu_workers": GPUS | {"tolerations": [{"effect": "NoSchedule"}]}}, "operator: Exists"),
        ({"s3": {"secret": "My_Secret"}}, "s3.secret"),
        ({"kubernetes": {"pull_secrets": ["a b"]}}, "pull_secrets"),
        ({"kubernetes": {"labels": {"team": "a b"}}}, "labels"),
        ({"kubernetes": {"labels": {"-x": "a"}}}, "labels"),
        ({"kubernetes": {"namespace": "a.b"}}, "namespace"),
    ],
)
def test_what_kubernetes_would_refuse_or_never_schedule_is_refused_here(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        example(**changes)
    assert message in f"{refused.value.what} {refused.value.where}"


def test_a_head_shares_its_machine_with_the_autoscaler_unless_queued() -> None:
    spec = documents(example(head=HEAD))["RayCluster/ccsr"]["spec"]
    assert spec["autoscalerOptions"]["resources"]["limits"] == {"cpu": "0.5", "memory": "1Gi"}
    example(head=HEAD | {"cpus": 4, "memory_gib": 16}, kubernetes={"queue": "gpu-queue"})


def test_a_job_that_needs_more_gpus_than_the_cluster_grows_to_is_refused() -> None:
    ccsr, command = get_command(app), ["train", "-c", str(REPOSITORY / "configs" / "ccsr_v2_stage1.yaml")]
    command += ["--set", "runtime.num_workers=24"]
    require_gpus(ccsr, command, 24)
    require_gpus(ccsr, ["doctor"], 0)
    require_gpus(ccsr, ["cluster", "render", "-c", str(REPOSITORY / "configs" / "cluster.yaml")], 0)
    with pytest.raises(ConfigError, match="needs 24 GPUs, the cluster grows to 16"):
        require_gpus(ccsr, command, example(gpu_workers=GPUS | {"max_nodes": 2}).most_gpus())


def test_gpus_are_tolerated_and_secrets_are_named() -> None:
    config = example(gpu_workers=GPUS, **{key: CONFIGS["all"][key] for key in ("kubernetes", "s3")})
    spec = documents(config)["RayCluster/ccsr"]["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert config.secrets().keys() == {"keys", "ccsr-mlflow-db", "ray-ca", "registry"}


def test_each_pods_certificate_is_of_its_address(tmp_path: Any) -> None:
    """The init container's own script, with a CA as `tls_secret` holds it."""
    ca, tls = tmp_path / "ca", tmp_path / "tls"
    ca.mkdir(), tls.mkdir()
    request = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=ca -days 1 -keyout tls.key -out tls.crt"
    subprocess.run(request.split(), cwd=ca, check=True, capture_output=True)
    script = CERTIFICATE.replace("/etc/ccsr-tls", str(tls)).replace("/etc/ccsr-ca", str(ca))
    environment = {"PATH": "/usr/bin:/bin", "POD_IP": "10.1.2.3", "NAMESPACE": "research"}
    subprocess.run(["bash", "-ec", script], env=environment, check=True, capture_output=True)
    for asked in ("-verify_ip=10.1.2.3", "-verify_hostname=ccsr-head-svc.research.svc.cluster.local"):
        check = ["openssl", "verify", "-CAfile", "ca.crt", *asked.split("="), "tls.crt"]
        assert subprocess.run(check, cwd=tls, check=True, capture_output=True, text=True).stdout == "tls.crt: OK\n"
