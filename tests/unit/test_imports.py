"""What a worker imports: the large libraries alone, without the optional packages that these load if installed."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from infra.process.imports import without
from tests.unit.test_house import sources_with

WORKER = """
import json, sys
import evaluation.scoring, training.convert, training.models, training.restore.seeded_runs, training.run.worker
from training.run.step.engine import load_deepspeed
load_deepspeed()
print(json.dumps(sorted(sys.modules)))
"""


def test_packages_are_absent_inside_the_block_only():
    json_module = sys.modules["json"]
    with without("json", "this", importing="json"):
        assert find_spec("this") is not None, "json is loaded"
    with without("json", "this", importing="this"):
        assert find_spec("json") is None
        assert find_spec("this") is None
        with pytest.raises(ModuleNotFoundError):
            import this  # noqa: F401
    assert sys.modules["json"] is json_module
    assert find_spec("this") is not None
    assert "this" not in sys.modules


def test_workers_import_no_optional_package_of_diffusers_and_deepspeed():
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded >= {"diffusers", "deepspeed", "torch"}
    assert not loaded & {"bitsandbytes", "boto3", "botocore", "mlflow", "peft", "ray", "scipy", "transformers"}
    assert "torch._inductor.compile_fx" not in loaded


def test_diffusers_is_imported_in_one_place():
    """Whatever imported it first elsewhere would load them all. The other file writes such a line."""
    importing = sources_with(r"(?m)^\s*(?:from|import) diffusers")
    assert importing.keys() == {"training/models/library.py", "training/restore/standalone.py"}
