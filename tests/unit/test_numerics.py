"""GPU numerics: what the settings switch, that they are part of the result, and that commands without Ray apply them.

The workers on Ray: tests/integration/test_numerics_on_ray.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.pretrain
import pipelines.restore
from benchmarks.pretrain import PretrainConfig
from evaluation.config import EvaluateConfig
from infra import ConfigError
from infra.config import Config, parse_config, result_part
from infra.process.numerics import NumericsConfig, set_numerics
from infra.run import claim_output
from pipelines.restore import RestoreConfig
from pipelines.sharding.config import ShardConfig
from training.config import TrainConfig

TRAIN = {"job": "train", "init_from": "random", "output": "o", "stage": 1, "data": ["d"], "num_updates": 1}
EVALUATE = {"job": "evaluate", "output": "o", "data": ["d"], "methods": [{"kind": "bicubic"}]}
SHARD = {"job": "shard", "output": "o", "sources": [{"kind": "folder", "name": "f", "path": "p"}]}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, Any]]]:
    """This process's settings; torch's own before and after the test."""
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")

    def read() -> dict[str, Any]:
        backends = torch.backends
        return {
            "tf32": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32],
            "benchmark": backends.cudnn.benchmark,
            "deterministic": [backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()],
            "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }

    yield read
    set_numerics(NumericsConfig())
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


DETERMINISTIC = {"tf32": [False] * 2, "benchmark": False, "deterministic": [True] * 2, "workspace": ":4096:8"}


def test_everything_is_set_either_way(settings: Callable[[], dict[str, Any]]) -> None:
    """A process that is used again keeps nothing of the job before."""
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    set_numerics(NumericsConfig())
    exact = {"tf32": [False, False], "benchmark": False, "deterministic": [False, False], "workspace": None}
    assert settings() == exact
    set_numerics(NumericsConfig(tf32=True))
    assert settings() == exact | {"tf32": [True, True]}
    set_numerics(NumericsConfig(deterministic=True))
    assert settings() == DETERMINISTIC
    set_numerics(NumericsConfig())
    assert settings() == exact | {"workspace": ":4096:8"}  # cuBLAS has read it


def test_the_schema_imports_no_torch() -> None:
    code = "import sys; import infra.process.numerics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["tf32", "deterministic"])
@pytest.mark.parametrize(
    ("kind", "values", "place"),
    [
        (TrainConfig, TRAIN, ()),
        (EvaluateConfig, EVALUATE, ()),
        (RestoreConfig, {}, ()),
        (ShardConfig, SHARD | {"latents": {"model": "m"}}, ("latents",)),
    ],
)
def test_both_are_part_of_the_result(
    kind: type[Config], values: dict[str, Any], place: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    def config(**numerics: bool) -> Config:
        outer = {"numerics": numerics}
        for key in place:
            outer = {key: values[key] | outer}
        return parse_config(values | outer, kind, where="test")

    default = result_part(config())
    for key in place:
        default = default[key]
    was = default["numerics"][name]
    claim_output(str(tmp_path), config(), job="j", inputs={}, libraries=())
    (tmp_path / "record.json").touch()
    with pytest.raises(ConfigError, match=f"numerics.{name}: {was} -> {not was}"):
        claim_output(str(tmp_path), config(**{name: not was}), job="j", inputs={}, libraries=())


def test_a_shard_that_is_written_again_has_the_same_bytes_unless_that_is_switched_off() -> None:
    def latents(**numerics: bool) -> Any:
        values = SHARD | {"latents": {"model": "m", "numerics": numerics}}
        config = parse_config(values, ShardConfig, where="test").latents
        assert config is not None
        return config.numerics

    assert latents(tf32=True).deterministic
    assert not latents(deterministic=False).deterministic
    assert "numerics" not in str(result_part(parse_config(SHARD, ShardConfig, where="test")))


def test_what_no_gpu_does_deterministically_is_refused_before_it_starts() -> None:
    values = TRAIN | {"stage": 2, "decoder_loss": {"discriminator": "dino"}, "numerics": {"deterministic": True}}
    parse_config(values, TrainConfig, where="test")
    with pytest.raises(ConfigError, match=r"dino.* by area"):
        parse_config(values | {"runtime": {"device": "cuda"}}, TrainConfig, where="test")


class Reached(Exception):
    pass


def test_commands_in_one_process_apply_them(
    tmp_path: Path, settings: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def reached(*_: Any) -> None:
        seen.append(settings())
        set_numerics(NumericsConfig())
        raise Reached

    numerics = NumericsConfig(deterministic=True)
    monkeypatch.setattr(pipelines.restore, "Restorer", reached)
    with pytest.raises(Reached):
        list(pipelines.restore.restore_pending([{}], "o", "m", RestoreConfig(numerics=numerics)))
    monkeypatch.setattr(benchmarks.pretrain, "build_model", reached)
    photos = {"photos": str(tmp_path), "train": ("a",), "validation": ("a",)}
    updates = {"vae_updates": 0, "decoder_updates": 0, "denoiser_updates": 0}
    with pytest.raises(Reached):
        benchmarks.pretrain.pretrain(PretrainConfig(**photos, **updates, threads=1, numerics=numerics), tmp_path)
    assert seen == [DETERMINISTIC, DETERMINISTIC]
