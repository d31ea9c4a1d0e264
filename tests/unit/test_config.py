"""Configs: every mistake names its key and what to do; the fingerprint sees the result's causes and nothing else."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from evaluation.config import EvaluateConfig
from infra import ConfigError
from infra.cluster.config import ClusterConfig
from infra.config import (
    Config,
    Location,
    apply_overrides,
    canonical_json,
    difference,
    fingerprint_of,
    load_yaml,
    parse_config,
    result_part,
)
from pipelines.restore import RestoreConfig
from pipelines.sharding.config import ShardConfig
from training.config import TrainConfig

SHARD: dict[str, Any] = {
    "job": "shard",
    "output": "out",
    "sources": [{"kind": "folder", "name": "a", "path": "p"}],
}
TRAIN: dict[str, Any] = {
    "job": "train",
    "init_from": "random",
    "output": "out",
    "stage": 1,
    "data": ["set"],
    "num_updates": 3,
}
EVALUATE: dict[str, Any] = {"job": "evaluate", "output": "out", "data": ["set"], "methods": [{"kind": "bicubic"}]}


def refused(values: dict[str, Any], config_class: type[Config], *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(apply_overrides(values, overrides), config_class, where="run.yaml")
    assert str(caught.value).count("\n") == 2
    return caught.value


@pytest.mark.parametrize(
    ("values", "config_class", "override", "place", "near"),
    [
        (SHARD, ShardConfig, "sede=1", "sede", "seed"),
        (SHARD, ShardConfig, "sources.0.pth=x", "sources.0.pth", "path"),
        (SHARD, ShardConfig, "crop={kind: center, size_pix: 64}", "crop.size_pix", "size_px"),
        (SHARD, ShardConfig, "runtime.ray.num_cpu=1", "runtime.ray.num_cpu", "num_cpus"),
        (SHARD, ShardConfig, "degradation={recipe: second_order, shapen: input}", "degradation.shapen", "sharpen"),
        (
            SHARD,
            ShardConfig,
            "degradation={recipe: second_order, first: {blurr: 1}}",
            "degradation.first.blurr",
            "blur",
        ),
        (TRAIN, TrainConfig, "optimizer.learning_rat=1", "optimizer.learning_rat", "learning_rate"),
        (TRAIN, TrainConfig, "tracking.experment=x", "tracking.experment", "experiment"),
        (EVALUATE, EvaluateConfig, "methods.0.nam=x", "methods.0.nam", "name"),
        # keys of earlier versions
        (TRAIN, TrainConfig, "runtime.use_gpu=true", "runtime.use_gpu", "device"),
        (TRAIN, TrainConfig, "runtime.threads_per_worker=2", "runtime.threads_per_worker", "threads"),
        (EVALUATE, EvaluateConfig, "runtime.threads_per_actor=2", "runtime.threads_per_actor", "threads"),
        (EVALUATE, EvaluateConfig, "runtime.runs_at_once=2", "runtime.runs_at_once", "rows_at_once"),
        (SHARD, ShardConfig, "runtime.num_workers=2", "runtime.num_workers", "num_actors"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_right_one(
    values: dict[str, Any], config_class: type[Config], override: str, place: str, near: str
) -> None:
    error = refused(values, config_class, override)
    assert error.what.startswith(f"unknown key `{place.rsplit('.', 1)[-1]}`")
    assert error.where == f"run.yaml: {place}"
    assert error.todo == f"did you mean `{near}`?"


def test_an_unknown_key_that_is_near_nothing_lists_the_keys_of_its_level() -> None:
    error = refused(SHARD, ShardConfig, "crop={kind: random, size_px: 64, zzz: 1}")
    assert error.todo.startswith("the keys here are: ")
    assert "num_per_image" in error.todo


@pytest.mark.parametrize(
    ("values", "config_class", "override", "place", "message"),
    [
        (SHARD, ShardConfig, "seed=many", "seed", "integer"),
        (SHARD, ShardConfig, "seed=2026-01-01", "seed", "integer"),
        (SHARD, ShardConfig, "sources=[]", "sources", "at least 1"),
        (SHARD, ShardConfig, "sources.0.name=a b", "sources.0.name", "pattern"),
        (SHARD, ShardConfig, "crop={kind: centre, size_px: 64}", "crop", "'center'"),
        (SHARD, ShardConfig, "crop={kind: center, size_px: large}", "crop.size_px", "not 'large'"),
        (SHARD, ShardConfig, "degradation={recipe: second_ordr}", "degradation", "'second_order'"),
        (SHARD, ShardConfig, "degradation={recipe: bsrgan, scale: big}", "degradation.scale", "not 'big'"),
        (TRAIN, TrainConfig, "stage=3", "stage", "not 3"),
        (TRAIN, TrainConfig, "runtime.keep_checkpoints=1", "runtime.keep_checkpoints", "greater than or equal to 2"),
        (TRAIN, TrainConfig, "optimizer.learning_rate=.nan", "optimizer.learning_rate", "greater than 0"),
        (EVALUATE, EvaluateConfig, "methods.0.name=..", "methods.0.name", "pattern"),
        (EVALUATE, EvaluateConfig, "num_runs=1", "num_runs", "greater than or equal to 2"),
    ],
)
def test_a_wrong_value_is_named_by_its_place_in_the_file(
    values: dict[str, Any], config_class: type[Config], override: str, place: str, message: str
) -> None:
    error = refused(values, config_class, override)
    assert error.where == f"run.yaml: {place}"
    assert message in error.what


def test_a_missing_key_is_named() -> None:
    error = refused({key: value for key, value in TRAIN.items() if key != "num_updates"}, TrainConfig)
    assert error.what == "`num_updates` is missing"
    assert error.where == "run.yaml: num_updates"


def test_a_global_batch_that_does_not_divide_lists_the_legal_world_sizes() -> None:
    error = refused(TRAIN, TrainConfig, "runtime.num_workers=5")
    assert (error.where, error.todo) == ("run.yaml: runtime.num_workers", "write one of 1, 2, 3, 4, 6, 8, 12, 24")
    error = refused(TRAIN, TrainConfig, "global_batch_size=7")
    assert "not a multiple of runtime.micro_batch_size, 4" in error.what
    assert (error.where, error.todo) == (
        "run.yaml: global_batch_size",
        "write 4 or 8, or another micro_batch_size",
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_random_weights_are_asked_for_by_name(stage: int) -> None:
    values = {key: value for key, value in TRAIN.items() if key != "init_from"} | {"stage": stage}
    error = refused(values, TrainConfig)
    assert error.what == "`init_from` is missing"
    assert "`random` for random weights" in error.todo
    assert parse_config(values | {"init_from": "random"}, TrainConfig, where="run.yaml").init_from is None


STAGE2 = {"stage": 2, "init_from": "m"}
STABLESR = {"model": {"family": "stablesr"}}
STORED = {"stage": 2, "inputs": "latents", "decoder_loss": {"adaptive": False}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"stage": 0, "start_from": "lr"}, "start_from"),
        ({"stage": 0, "t_max": 0.5}, "t_max"),
        ({"num_steps": 15}, "num_steps"),
        ({"t_min": 0.2}, "t_min"),
        ({"decoder_loss": {"gan_weight": 0.1}}, "decoder_loss"),
        (STAGE2 | {"model": {"family": "v1"}, "start_from": "lr"}, "start_from"),
        (STAGE2 | {"decoder_loss": {"discriminator": "dino", "discriminator_width": 16}}, "discriminator_width"),
        (STAGE2 | {"decoder_loss": {"perceptual": "none", "perceptual_start_update": 3}}, "perceptual_start_update"),
        ({"model": {"family": "stablesr"}, "t_max": 0.5}, "t_max"),
        ({"validation": {"data": ["v"], "sampling": {"wrapping": 0.2}}}, "wrapping"),
        ({"validation": {"data": ["v"], "sampling": {"sampler": "uniform", "t_max": 0.5}}}, "t_max"),
        ({"validation": {"data": ["v"], "sampling": {"sizes": "v1", "enlargement": "bilinear"}}}, "enlargement"),
        ({"model": {"family": "v1"}, "validation": {"data": ["v"], "sampling": {"start": "noise"}}}, "start"),
        ({"validation": {"data": ["v"], "sampling": {"sampler": "uniform", "start": "noise"}}}, "start"),
        ({"validation": {"data": ["v"], "sampling": "stablesr_s200"}}, "start"),
        ({"validation": {"data": ["v"], "sampling": {"negative_prompt": "ugly"}}}, "negative_prompt"),
        (STABLESR | {"validation": {"data": ["v"], "sampling": {"sampler": "uniform"}}}, "sampler"),
        (STABLESR | STORED | {"runtime": {"compile": True}}, "runtime.compile"),
        (STAGE2 | {"decoder_loss": {"gan_weight": 0, "gan_start_update": 9}}, "gan_start_update"),
        ({"degradation": "ccsr", "data": [{"path": "set", "degradation": "bicubic"}]}, "degradation"),
        ({"runtime": {"device": "cuda", "threads": 4}}, "threads"),
        ({"runtime": {"ray": {"address": "head:6379", "num_cpus": 2}}}, "num_cpus"),
        ({"runtime": {"ray": {"address": "head:6379", "object_store_bytes": 2**30}}}, "object_store_bytes"),
    ],
)
def test_a_field_without_effect_is_refused(change: dict[str, Any], field: str) -> None:
    error = refused(TRAIN | change, TrainConfig)
    assert f"`{field}` has no effect" in error.what


BASES: dict[type[Config], dict[str, Any]] = {
    ShardConfig: SHARD,
    TrainConfig: TRAIN,
    EvaluateConfig: EVALUATE,
    ClusterConfig: {"job": "cluster"},
    RestoreConfig: {},
}


@pytest.mark.parametrize(
    ("config_class", "change", "field"),
    [
        (EvaluateConfig, {"runtime": {"device": "cuda", "threads": 4}}, "threads"),
        (EvaluateConfig, {"data": [{"lr": "l", "hr": "h", "scale": 2}]}, "scale"),
        (ShardConfig, {"degradation": None, "draws": 2}, "draws"),
        (ShardConfig, {"runtime": {"device": "cuda"}}, "runtime.device"),
        (ShardConfig, {"sources": [{"kind": "list", "name": "a", "path": "p", "scale": 2}]}, "scale"),
        (ClusterConfig, {"mlflow": {"artifacts": "s3://b/m", "database_secret": "db", "disk_gib": 5}}, "disk_gib"),
        (RestoreConfig, {"runtime": {"num_actors": 2}}, "num_actors"),
        (RestoreConfig, {"runtime": {"ray": {"address": "head:6379"}}}, "ray"),
        (RestoreConfig, {"runtime": {"device": "cuda", "threads": 2}}, "threads"),
    ],
)
def test_every_job_refuses_a_field_without_effect(
    config_class: type[Config], change: dict[str, Any], field: str
) -> None:
    assert f"`{field}` has no effect" in refused(BASES[config_class] | change, config_class).what


@pytest.mark.parametrize(
    ("config_class", "change"),
    [
        (TrainConfig, STABLESR | {"validation": {"data": ["v"], "sampling": "stablesr_s200"}}),
        (TrainConfig, STABLESR | {"validation": {"data": ["v"], "sampling": {"start": "noise"}}}),
        (TrainConfig, STABLESR | STORED | {"runtime": {"activation_checkpointing": True, "channels_last": True}}),
        (TrainConfig, STABLESR | STORED | {"runtime": {"compile": True}, "validation": {"data": ["v"]}}),
        (TrainConfig, STABLESR | {"stage": 2, "decoder_loss": {"gan_weight": 0}}),
        (TrainConfig, STAGE2 | {"decoder_loss": {"gan_weight": 0, "discriminator_width": 32}}),
        (TrainConfig, {"degradation": "ccsr", "data": ["set", {"path": "other", "degradation": "bicubic"}]}),
        (ShardConfig, {"degradation": None, "draws": 2, "latents": {"model": "m", "sampled_steps": 3}}),
        (ShardConfig, {"runtime": {"device": "cuda"}, "latents": {"model": "m"}}),
        (EvaluateConfig, {"trace": True}),  # a model may be added
        (TrainConfig, STAGE2 | {"decoder_loss": {"gan_weight": 0, "adaptive": False}}),
        (EvaluateConfig, {"trace": True, "methods": [{"kind": "model", "name": "m", "model": "m"}]}),
        (RestoreConfig, {"runtime": {"use_ray": True, "num_actors": 2, "ray": {"address": "head:6379"}}}),
        (RestoreConfig, {"runtime": {"device": "auto", "threads": 2}}),
    ],
)
def test_a_field_with_an_effect_is_accepted(config_class: type[Config], change: dict[str, Any]) -> None:
    parse_config(BASES[config_class] | change, config_class, where="run.yaml")


def test_a_field_without_effect_is_no_part_of_the_fingerprint() -> None:
    """Its default may be written, as `ccsr config show` does."""
    config = parse_config(TRAIN, TrainConfig, where="run.yaml")
    assert {"num_steps", "t_min", "decoder_loss"}.isdisjoint(result_part(config))
    again = parse_config(config.model_dump(mode="json"), TrainConfig, where="shown")
    assert result_part(again) == result_part(config)
    assert result_part(parse_config(TRAIN | {"t_max": 0.5}, TrainConfig, where="run.yaml"))["t_max"] == 0.5


def test_a_stage_that_a_family_lacks_is_refused() -> None:
    assert (
        "stablesr has the stages 1, 2"
        in refused(TRAIN | {"stage": 0, "model": {"family": "stablesr"}}, TrainConfig).what
    )


def test_bf16_without_fp32_accumulation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"accumulates bf16 gradients in bf16: use zero_stage 1 or 2"):
        parse_config({**TRAIN, "precision": "bf16", "runtime": {"zero_stage": 0}}, TrainConfig, where="train.yaml")


def test_t_min_must_be_below_t_max_and_method_names_differ() -> None:
    assert "t_min" in refused(TRAIN, TrainConfig, "t_min=0.9").what
    assert "differ" in refused(EVALUATE, EvaluateConfig, "methods=[{kind: bicubic}, {kind: bicubic}]").what
    assert "differ" in refused(EVALUATE, EvaluateConfig, "methods.0.name=hr").what


def test_overrides_set_values_at_any_depth_and_leave_the_original_alone() -> None:
    values = apply_overrides(SHARD, ["sources.0.path=s3://b/x", "runtime.ray.num_cpus=2", "crop={kind: whole}"])
    assert values["sources"][0]["path"] == "s3://b/x"
    assert values["runtime"] == {"ray": {"num_cpus": 2}}
    assert values["crop"] == {"kind": "whole"}
    assert SHARD["sources"][0]["path"] == "p"
    assert "runtime" not in SHARD
    assert apply_overrides({}, ["a=b=c"]) == {"a": "b=c"}


@pytest.mark.parametrize("override", ["seed", "=1", "sources.7.name=x", "sources.x=1", "job.a=1", "seed={a"])
def test_an_override_that_does_not_fit_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides(SHARD, [override])


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)
    for content, message in ((b"a: [1\nb: 2", "not valid YAML"), (b"\xff\xfe\x00", "not valid"), (b"- 1", "not a map")):
        (tmp_path / "run.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            load_yaml(tmp_path / "run.yaml")
        assert str(caught.value).count("\n") == 2


READY = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
HEAVY = {"torch", "diffusers", "transformers", "ray", "deepspeed", "mlflow", "cv2", "numpy", "pyarrow", "s3fs"}


def test_every_ready_config_is_shown_without_a_heavy_import() -> None:
    """In a fresh process, as a user asks for it: 0.3 s of CPU, where the networks alone would take 8."""
    code = """
import sys
from pipelines.cli.main import main
for file in sys.argv[1:]:
    sys.argv = ["ccsr", "config", "show", "-c", file]
    try:
        main()
    except SystemExit as end:
        assert not end.code, file
print("heavy:", *sorted(sys.modules))
"""
    assert len(READY) >= 20
    done = subprocess.run([sys.executable, "-c", code, *map(str, READY)], capture_output=True, text=True, check=True)
    shown, _, modules = done.stdout.rpartition("heavy: ")
    assert shown.count("job: ") == len(READY)
    assert not HEAVY & set(modules.split())


class Inner(Config):
    place: Location
    size: int = 1


class Runtime(Config):
    workers: int = 1


class Everything(Config):
    output: Location
    maybe: Location | None = None
    many: Annotated[tuple[Location, ...], "at least one"] = ()
    named: dict[str, Location] = Field(default_factory=dict)
    inner: Inner = Inner(place="x")
    inners: tuple[Inner, ...] = ()
    numbers: tuple[float, ...] = (1.0,)
    runtime: Runtime = Runtime()
    tracking: Runtime = Runtime()


BASE: dict[str, Any] = {"output": "a", "inners": [{"place": "p"}]}


def fingerprint(**changes: Any) -> str:
    return fingerprint_of(result_part(Everything.model_validate({**BASE, **changes})))


@pytest.mark.parametrize(
    "change",
    [
        {"output": "b"},
        {"maybe": "m"},
        {"many": ["x", "y"]},
        {"named": {"k": "v"}},
        {"inner": {"place": "y"}},
        {"inners": [{"place": "q"}]},
        {"runtime": {"workers": 7}},
        {"tracking": {"workers": 7}},
    ],
)
def test_the_fingerprint_ignores_runtime_tracking_and_locations(change: dict[str, Any]) -> None:
    assert fingerprint(**change) == fingerprint()


@pytest.mark.parametrize(
    "change", [{"inner": {"place": "x", "size": 2}}, {"inners": []}, {"numbers": [2.0]}, {"numbers": [1.0, 1.0]}]
)
def test_the_fingerprint_sees_what_the_result_depends_on(change: dict[str, Any]) -> None:
    assert fingerprint(**change) != fingerprint()


def test_the_jobs_fingerprints_ignore_where_things_are() -> None:
    one = parse_config(TRAIN, TrainConfig, where="")
    changes = ["output=s3://b/o", "data=[s3://b/set]", "init_from=s3://b/m", "runtime.num_workers=2", "tracking.uri=x"]
    other = parse_config(apply_overrides(TRAIN, changes), TrainConfig, where="")
    assert fingerprint_of(result_part(one)) == fingerprint_of(result_part(other))
    longer = parse_config(apply_overrides(TRAIN, ["num_updates=4"]), TrainConfig, where="")
    assert fingerprint_of(result_part(one)) == fingerprint_of(result_part(longer)), "a run can be made longer"
    seeded = parse_config(apply_overrides(TRAIN, ["seed=4"]), TrainConfig, where="")
    assert fingerprint_of(result_part(one)) != fingerprint_of(result_part(seeded))


@pytest.mark.parametrize(("stage", "runtime"), [(0, None), (1, None), (2, {"micro_batch_size": 8})])
def test_of_the_runtime_only_stage_2s_micro_batch_is_part_of_the_result(stage: int, runtime: Any) -> None:
    """Stages 0 and 1 keep the fingerprints that they had before stage 2's held the micro-batch."""
    changes = [f"stage={stage}", "runtime={micro_batch_size: 8, num_workers: 2, zero_stage: 2, device: cuda}"]
    part = result_part(parse_config(apply_overrides(TRAIN, changes), TrainConfig, where=""))
    assert part.get("runtime") == runtime


def test_configs_travel_to_ray_workers_whole() -> None:
    for values, config_class in ((SHARD, ShardConfig), (TRAIN, TrainConfig), (EVALUATE, EvaluateConfig)):
        config = parse_config(values, config_class, where="")
        assert pickle.loads(pickle.dumps(config)) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_difference_is_empty_exactly_where_values_are_equal(old: Any, new: Any) -> None:
    assert difference(old, old) == []
    if canonical_json(old) != canonical_json(new) and old != new:
        assert difference(old, new)


def test_difference_names_each_leaf() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": [1], "e": 0}
    new = {"a": {"b": 1, "c": 3}, "d": [2], "f": 0}
    assert difference({"a": "x" * 1000}, {}) == [f"a: {'x' * 57}... -> absent"]
    assert difference(old, new) == ["a.c: 2 -> 3", "d.0: 1 -> 2", "e: 0 -> absent", "f: absent -> 0"]


def test_a_path_means_the_same_to_a_worker_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = TRAIN | {"data": ["set", {"path": "../other"}, "s3://bucket/set"], "init_from": "runs:/abc"}
    config = parse_config(values | {"tracking": {"uri": "sqlite:///m.db"}}, TrainConfig, where="run.yaml")
    places = [part.path for part in config.data]
    assert places == [str(tmp_path / "set"), str(tmp_path.parent / "other"), "s3://bucket/set"]
    assert (config.output, config.init_from) == (str(tmp_path / "out"), "runs:/abc")
    assert config.tracking.uri == "sqlite:///m.db"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("seed: 1\nstage: 1\nseed: 2\n", (1, 3)),
        ("runtime:\n  use_gpu: true\n  num_workers: 1\n  use_gpu: false\n", (2, 4)),
        ("data:\n- {path: a, weight: 1,\n   path: b}\n", (2, 3)),
        ("on: 1\n'on': 2\n", (1, 2)),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(
    text: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"is there twice, in lines {lines[0]} and {lines[1]}\)") as caught:
        load_yaml(tmp_path / "run.yaml")
    assert caught.value.where == f"{tmp_path}/run.yaml, line {lines[1]}"


def test_keys_of_a_merged_mapping_may_be_written_again(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *a, <<: *b, z: 3}\n")
    assert load_yaml(tmp_path / "run.yaml")["b"] == {"x": 2, "y": 1}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("seed: 1e3", "write 1000"),
        ("seed: 0o10", "write 8"),
        ("seed: '1,000'", "write 1000"),
        ("seed: 010", "write 8, or put it in quotes"),
        ("tracking: {run_name: 007}", "write 7, or put it in quotes"),
        ("seed: 1:30", "write 90, or put it in quotes"),
        ("tracking: {experiment: no}", "quotes"),
        ("precision: off", "quotes"),
        ("output: yes", "quotes"),
        ("tracking: {experiment: 2024}", '"2024"'),
        ("tracking: {run_name: 2024-01-01}", '"2024-01-01"'),
    ],
)
def test_what_yaml_reads_otherwise_is_shown_as_it_must_be_written(text: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_config(TRAIN | load_yaml(tmp_path / "run.yaml"), TrainConfig, where="run.yaml")
    assert meant in str(caught.value)
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("text", ["d: 2024-13-45", "[a]: 1", "a: " + "[" * 600, "a: !!python/name:os.system"])
def test_what_yaml_cannot_read_is_an_error_of_three_lines(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({}, [f"a={text}"])
