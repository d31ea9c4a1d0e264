"""The rendered manifests of the example config, for tests."""

from pathlib import Path
from typing import Any

import yaml

from infra.cluster.config import ClusterConfig
from infra.cluster.render import render
from infra.config import parse_config

REPOSITORY = Path(__file__).parents[2]


def documents(config: ClusterConfig) -> dict[str, dict[str, Any]]:
    """Everything that is rendered for Kubernetes, by kind and name."""
    files = [text for name, text in render(config, "kuberay").items() if name.endswith(".yaml")]
    found = [document for text in files for document in yaml.load_all(text, yaml.CSafeLoader)]
    return {f"{one['kind']}/{one.get('metadata', one).get('name', '')}": one for one in found}


def example(**changes: Any) -> ClusterConfig:
    values = yaml.safe_load((REPOSITORY / "configs" / "cluster.yaml").read_text())
    values["command"] = ["train", "-c", str(REPOSITORY / "configs" / "ccsr_v2_stage1.yaml"), "--set", "seed=a b"]
    return parse_config(values | changes, ClusterConfig, where="test")
