"""The command line: a user's mistake is three lines and an exit code, and the command starts light."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from photos import make_shard_set, photo, save_photos, shard_config
from PIL import Image

from infra import DataError
from infra.files.publish import write_bytes
from infra.files.storage import list_files
from pipelines.cli import main as cli
from tests.training_runs import noise_shards
from training.config import ModelConfig
from training.models import build_model, save_model
from training.run.checkpoint import TrainingState, save_checkpoint

SHARD = """\
job: shard
output: {out}
sources:
  - {{kind: folder, name: set, path: {photos}}}
degradation: bicubic
"""
TRAIN = """\
job: train
output: {out}
stage: 1
init_from: random
data: [{set}]
crop_px: 32
global_batch_size: 4
num_updates: 2
model: {{preset: tiny, family: v1}}
runtime: {{micro_batch_size: 4}}
"""
EVALUATE = """\
job: evaluate
output: {out}
data: [{set}]
methods: [{{kind: bicubic}}]
"""


class Ended(Exception):
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        super().__init__(code, out, err)
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def ccsr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the command in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ccsr", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a config with the test's places filled in; returns its path."""

    def write(template: str) -> str:
        places = {name: tmp_path / name for name in ("out", "photos", "set")}
        path = tmp_path / "run.yaml"
        path.write_text(template.format(**places))
        return str(path)

    return write


def refused(ended: Ended, code: int, *messages: str) -> None:
    """The run ended with `code` and three lines on stderr that contain `messages` in this order."""
    lines = [line for line in ended.err.rstrip("\n").split("\n") if not line.startswith("    ")]  # items of a list
    assert len(lines) == 3, ended.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  where: ")
    assert lines[2].startswith("  to do: ")
    assert len(lines[2]) > len("  to do: ")
    position = 0
    for message in messages:
        position = ended.err.index(message, position)
    assert ended.code == code
    assert ended.out == ""


def test_a_missing_or_broken_config_is_refused(ccsr: Callable[..., Ended], tmp_path: Path) -> None:
    for job in ("shard", "train", "evaluate"):
        refused(ccsr(job, "-c", str(tmp_path / "absent.yaml")), 2, "cannot be read", "absent.yaml")
    (tmp_path / "broken.yaml").write_text("job: shard\nsources: [")
    refused(ccsr("shard", "-c", str(tmp_path / "broken.yaml")), 2, "not valid YAML", "broken.yaml, line 2")


def test_unknown_keys_and_wrong_types_are_refused(ccsr: Callable[..., Ended], write: Callable[..., str]) -> None:
    for job, template in (("shard", SHARD), ("train", TRAIN), ("evaluate", EVALUATE)):
        config = write(template)
        refused(ccsr(job, "-c", config, "--set", "sed=1"), 2, "unknown key `sed`", "run.yaml: sed", "`seed`")
        refused(ccsr(job, "-c", config, "--set", "seed=one"), 2, "not 'one'", "run.yaml: seed")
        refused(ccsr(job, "-c", config, "--set", "seed"), 2, "--set seed", "a.b=c")
        refused(ccsr("config", "show", "-c", config, "--set", "job=paint"), 2, "unknown job 'paint'", "job")
        refused(ccsr("config", "show", "-c", config, "--set", "sed=1"), 2, "unknown key", "`seed`")


def test_a_missing_or_empty_image_folder_is_refused(
    ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path
) -> None:
    config = write(SHARD)
    refused(ccsr("shard", "-c", config), 3, "no images", str(tmp_path / "photos"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("x")
    refused(ccsr("shard", "-c", config), 3, "no images", str(tmp_path / "photos"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_degradation_is_refused(
    ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path
) -> None:
    save_photos(tmp_path / "photos", [(64, 64)])
    refused(ccsr("shard", "-c", write(SHARD), "--set", "degradation=csr"), 2, "preset 'csr'", "'ccsr'")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused(
    ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path
) -> None:
    save_photos(tmp_path / "photos", [(64, 64)])
    make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    (tmp_path / "file").write_text("x")
    for job, template in (("shard", SHARD), ("train", TRAIN), ("evaluate", EVALUATE)):
        out = str(tmp_path / "file" / "out")
        refused(ccsr(job, "-c", write(template), "--set", f"output={out}"), 5, "cannot write", out)


def test_shard_sets_and_models_that_are_not_there_are_refused(
    ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path
) -> None:
    place = str(tmp_path / "set")
    refused(ccsr("verify", place), 3, "no complete shard set", place, "ccsr shard")
    refused(ccsr("train", "-c", write(TRAIN)), 3, "no complete shard set", place)
    refused(ccsr("evaluate", "-c", write(EVALUATE)), 3, "no complete shard set", place)
    save_photos(tmp_path / "photos", [(64, 64)])
    make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    model = str(tmp_path / "model")
    refused(ccsr("train", "-c", write(TRAIN), "--set", f"init_from={model}"), 4, "no complete model", model)
    method = f"methods=[{{kind: model, name: m, model: {model}}}]"
    refused(ccsr("evaluate", "-c", write(EVALUATE), "--set", method), 4, "no complete model", model)
    assert not (tmp_path / "out").exists()


def test_an_output_made_from_something_else_is_refused_with_the_difference(
    ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path
) -> None:
    save_photos(tmp_path / "photos", [(64, 64)])
    from infra.run import claim_output
    from pipelines.sharding.job import LIBRARIES
    from pipelines.sharding.plan import source_id
    from pipelines.sharding.sources import list_sources

    config = shard_config(tmp_path / "photos", tmp_path / "out", degradation="bicubic")
    inputs = {"source_id": source_id(list_sources(config.sources))}
    claim_output(config.output, config, job="shard", inputs=inputs, libraries=LIBRARIES)
    write_bytes(f"{config.output}/records/000000.json", b"{}")
    before = list_files(config.output)
    refused(
        ccsr("shard", "-c", write(SHARD), "--set", "seed=5"), 2, "something else", "config.seed: 0 -> 5", "run.json"
    )
    save_photos(tmp_path / "photos", [(64, 64), (64, 65)])
    refused(ccsr("shard", "-c", write(SHARD)), 2, "something else", "inputs.source_id")
    assert list_files(config.output) == before


def test_quarantined_samples_beyond_what_is_allowed_end_with_code_1(
    ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path
) -> None:
    """The set is already complete here, so that no Ray is needed: the same command reports it each time."""
    save_photos(tmp_path / "photos", [(64, 64), (70, 70)])
    (tmp_path / "photos" / "bad.png").write_bytes(b"")
    config = shard_config(tmp_path / "photos", tmp_path / "out", degradation="bicubic")
    make_shard_set(config)
    ended = ccsr("shard", "-c", write(SHARD))
    refused(ended, 1, "1 of 3 samples were quarantined (1 empty)", "bad.png", "manifest.json", "max_failed_fraction")
    refused(ccsr("shard", "-c", write(SHARD), "--max-failed-fraction", "0.3"), 1, "1 of 3 samples were quarantined")
    ended = ccsr("shard", "-c", write(SHARD), "--max-failed-fraction", "0.5")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("2 samples, dataset ")


def test_verify_reports_success_and_faults(ccsr: Callable[..., Ended], tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)])
    manifest = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    ended = ccsr("verify", manifest.uri)
    assert ended.code == 0
    assert manifest.dataset_id in ended.out
    (tmp_path / "set" / "stray").write_text("x")
    ended = ccsr("verify", manifest.uri)
    assert ended.code == 3
    assert "error: 1 faults: stray does not belong\n  where: " in ended.err


def test_verify_compares_and_cleans(ccsr: Callable[..., Ended], tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64), (64, 64)])
    for name, picture in (("others", photo(64, 64)), ("skies", np.full((64, 64, 3), 99, np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "again.bmp")
    one, two, three = (
        make_shard_set(shard_config(tmp_path / name, tmp_path / f"{name}-set", name=name)).uri
        for name in ("photos", "others", "skies")
    )
    write_bytes(f"{one}/.run.json.0123456789ab.tmp", b"")
    ended = ccsr("verify", "--clean", one)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("removed\t.run.json.0123456789ab.tmp\t")
    assert ccsr("verify", one, "--against", three, "--distance", "64").out == "no picture is in both sets\n"
    ended = ccsr("verify", one, "--against", two)
    assert ended.code == 3
    assert ended.err.startswith("error: 1 pairs of samples are in both sets: 1 alike\n  where: ")
    assert ended.out == "photos-00-000-0\tothers-again-000-0\t0 bits\n"
    assert "2 pairs of samples are in both sets" in ccsr("verify", one, "--against", two, "--distance", "64").err


def test_estimate_of_a_shard_config(ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 3)
    ended = ccsr("estimate", "-c", write(SHARD), "--set", "samples_per_shard=2", "--set", "runtime.num_actors=2")
    assert ended.code == 0
    rows = {cells[0]: cells[1] for line in ended.out.splitlines() if len(cells := re.split(r"  +", line)) > 1}
    assert (rows["shards"], rows["samples"]) == ("2", "3")
    assert "hours with 2 workers of one core" in rows
    assert not (tmp_path / "out").exists()


def test_a_traceback_comes_only_with_debug(
    ccsr: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(tmp_path / "nothing")
    assert "Traceback" not in ccsr("verify", place).err
    for arguments in (("--debug", "verify", place), ("verify", "--debug", place), ("verify", place, "--debug")):
        with pytest.raises(DataError):
            ccsr(*arguments)


@pytest.mark.parametrize(
    ("arguments", "debug", "shipped"),
    [
        ("--debug submit -- verify x", True, "verify x"),
        ("submit --debug -- verify x", True, "verify x"),
        ("submit --address there --debug -- verify x", True, "verify x"),
        ("submit --debug --address there -- verify x", True, "verify x"),
        ("submit --debug verify x", True, "verify x"),
        ("submit verify x --debug", True, "verify x"),
        ("submit -- verify x", False, "verify x"),
        ("submit -- --debug verify x", False, "verify --debug x"),
        ("submit -- verify --debug x", False, "verify --debug x"),
        ("submit -- verify x --debug", False, "verify --debug x"),
        ("submit --debug -- verify x --debug", True, "verify --debug x"),
    ],
)
def test_global_options_stand_anywhere_before_and_behind_the_dashes(
    ccsr: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, arguments: str, debug: bool, shipped: str
) -> None:
    """Before `--` they are ours, behind it the job's."""

    def submit(address: str | None, command: list[str], *_: object, **__: object) -> None:
        raise DataError(" ".join(command), where="here", todo="look")

    monkeypatch.setattr("infra.cluster.jobs.submit", submit)
    if debug:
        with pytest.raises(DataError) as caught:
            ccsr(*arguments.split())
        assert caught.value.what == shipped
    else:
        refused(ccsr(*arguments.split()), 3, f"error: {shipped}\n")


def test_wrong_arguments_end_with_code_2(ccsr: Callable[..., Ended]) -> None:
    for arguments in (("verify",), ("shard",), ("paint",), ("verify", "a", "b"), ("shard", "-c", "x", "--fast")):
        ended = ccsr(*arguments)
        assert ended.code == 2
        assert "Traceback" not in ended.err


def test_ctrl_c_says_that_the_work_goes_on(
    ccsr: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(uri: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.sets.verify.verify", interrupted)
    ended = ccsr("verify", str(tmp_path))
    assert ended.code == 130
    assert "the same command resumes" in ended.err


def test_config_show_prints_values_that_load_again(
    ccsr: Callable[..., Ended], write: Callable[..., str], tmp_path: Path
) -> None:
    for template in (SHARD, TRAIN, EVALUATE):
        first = ccsr("config", "show", "-c", write(template), "--set", "seed=4")
        assert first.code == 0
        assert yaml.safe_load(first.out)["seed"] == 4
        (tmp_path / "shown.yaml").write_text(first.out)
        assert ccsr("config", "show", "-c", str(tmp_path / "shown.yaml")).out == first.out


HEAVY = {"torch", "ray", "diffusers", "transformers", "mlflow", "deepspeed", "cv2", "pandas", "pyarrow", "s3fs"}


def test_the_command_starts_light() -> None:
    code = "import json, sys; import pipelines.cli.main; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: list[Any] = json.loads(done.stdout)

    assert not HEAVY & set(loaded)


def test_help_lists_every_command(ccsr: Callable[..., Ended]) -> None:
    ended = ccsr("--help")
    assert ended.code == 0
    for name in ("demo", "shard", "verify", "train", "evaluate", "compare", "config"):
        assert name in ended.out


RANDOM = ("--set", "init_from=random")


def squeezed(ended: Ended) -> str:
    assert ended.code == 0, ended.err
    return " ".join(ended.out.split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.usefixtures("here")
def test_a_dry_run_says_what_where_and_how_much_is_there_and_writes_nothing(
    ccsr: Callable[..., Ended],
    write: Callable[..., str],
    tmp_path: Path,
) -> None:
    save_photos(tmp_path / "photos", [(64, 64)] * 3)
    config = write(SHARD)
    before = list_files(str(tmp_path))
    shown = squeezed(ccsr("shard", config, "--dry-run", "--set", "samples_per_shard=2"))
    assert "3 files" in shown
    assert "0 of 2 shards" in shown
    assert "this machine" in shown
    assert "a minute with 2 workers as fast as this machine" in shown
    assert list_files(str(tmp_path)) == before

    make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic"))
    config = write(TRAIN)
    before = list_files(str(tmp_path))
    shown = squeezed(ccsr("train", "--dry-run", config, *RANDOM, "--set", "runtime.ray.address=head:6379"))
    assert "3 samples" in shown
    assert "stage 1 from random weights" in shown
    assert "0 of 2 updates" in shown
    assert "1 CPUs of the cluster head:6379" in shown
    assert "a minute for the networks alone, assuming CPUs as fast as this one, 1 thread a process" in shown
    assert list_files(str(tmp_path)) == before
    save_checkpoint(str(tmp_path / "out"), TrainingState({"position": 4, "num_updates": 1}, {"weights": {}}), keep=2)
    before = list_files(str(tmp_path))
    on_gpus = ["runtime.device=cuda", "runtime.num_workers=2", "runtime.micro_batch_size=2"]
    shown = squeezed(ccsr("train", "--dry-run", config, *RANDOM, *(word for s in on_gpus for word in ("--set", s))))
    assert "1 of 2 updates" in shown
    assert "2 GPUs of this machine" in shown
    assert "a minute for the networks alone, assuming H100 at 40% of its peak" in shown
    assert list_files(str(tmp_path)) == before

    config = write(EVALUATE)
    before = list_files(str(tmp_path))
    shown = squeezed(ccsr("evaluate", "--dry-run", config, "--set", f"output={tmp_path / 'scores'}"))
    assert "psnr_y, ssim_y of 1 methods, 3 pictures" in shown
    assert "0 of 3 records" in shown
    assert "no network of a known size computes" in shown
    save_model(build_model(ModelConfig(preset="tiny"), 0), tmp_path / "model")
    before = list_files(str(tmp_path))
    method = f"methods=[{{kind: model, name: ours, model: {tmp_path / 'model'}}}]"
    shown = squeezed(ccsr("evaluate", "--dry-run", config, "--set", f"output={tmp_path / 'scores'}", "--set", method))
    assert "a minute for the networks alone" in shown
    assert list_files(str(tmp_path)) == before


@pytest.mark.usefixtures("here")
def test_a_dry_run_fails_as_the_run_would(
    ccsr: Callable[..., Ended],
    write: Callable[..., str],
    tmp_path: Path,
) -> None:
    refused(ccsr("train", "--dry-run", write(TRAIN), *RANDOM), 3, "no complete shard set")
    noise_shards(tmp_path / "set", 4)
    refused(ccsr("train", write(TRAIN), "--dry-run", *RANDOM, "--set", "tracking.uri=http://127.0.0.1:9"), 6, "MLflow")
    assert not (tmp_path / "out").exists()


def test_a_config_may_stand_without_its_option(ccsr: Callable[..., Ended], write: Callable[..., str]) -> None:
    path = write(TRAIN)
    shown = ccsr("config", "show", "-c", path, *RANDOM).out
    for words in ([path, *RANDOM], [*RANDOM, path]):
        assert ccsr("config", "show", *words).out == shown
    refused(ccsr("shard", path), 2, "unknown key", path)
    both = ccsr("config", "show", path, "-c", path)
    assert (both.code, both.out) == (2, "")
    assert "unexpected extra argument" in both.err
    none = ccsr("train")
    assert none.code == 2
    assert "--config" in none.err
