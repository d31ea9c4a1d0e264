"""ccsr convert, weights and estimate: what they write, print and refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from infra import ConfigError, ModelError, StorageError
from infra.files.publish import upload_folder, write_bytes
from infra.files.storage import list_files, read_bytes
from pipelines.cli.main import app
from pipelines.convert import run_convert
from training.config import ModelConfig
from training.models import build_model, load_model, save_model
from training.models.directory import WEIGHTS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory: it serves as a base, with its cached prompt in place of a text encoder."""
    model = build_model(ModelConfig(), seed=5)
    model.prompts[""] = torch.full_like(model.prompt, 0.5)
    place = tmp_path_factory.mktemp("base") / "model"
    save_model(model, place)
    return place


@pytest.fixture
def v2(base: Path, tmp_path: Path) -> Path:
    """controlnet/ and vae/ as v2 publishes them, of other weights than the base's."""
    published = build_model(ModelConfig(), seed=6)
    torch.nn.init.ones_(published.controlnet.controlnet_cond_embedding.weight)
    save_model(published, tmp_path / "published")
    controlnet = tmp_path / "published" / "controlnet"
    config = json.loads((controlnet / "config.json").read_text()) | {"use_vae_encode_condition": True}
    (controlnet / "config.json").write_text(json.dumps(config))
    state = {key.replace("controlnet_cond_embedding", "condition_conv_in"): value
             for key, value in published.controlnet.state_dict().items()}  # fmt: skip
    save_file(state, controlnet / WEIGHTS)
    return tmp_path / "published"


def test_a_base_alone_becomes_a_fresh_model(base: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "m"), "--base", str(base), "--family", "v1"])
    assert done.exit_code == 0, done.output
    found, source = load_model(tmp_path / "m"), load_model(base)
    assert found.config == ModelConfig(preset="tiny", family="v1")
    assert torch.equal(found.prompt, source.prompt)
    unet = found.unet.state_dict()
    assert all(torch.equal(value, unet[key]) for key, value in source.unet.state_dict().items())
    assert torch.equal(found.controlnet.conv_in.weight, source.unet.conv_in.weight)
    assert not found.controlnet.controlnet_mid_block.weight.any()


def test_a_base_becomes_a_start_for_stablesr_and_its_prediction_is_kept(base: Path, tmp_path: Path) -> None:
    velocity = build_model(ModelConfig(prediction="v"), seed=5)
    save_model(velocity, tmp_path / "velocity")
    for number, place in enumerate((base, tmp_path / "velocity", tmp_path / "velocity")):
        options = ["--base", str(place), "--family", "stablesr"]
        done = CliRunner().invoke(app, ["convert", str(tmp_path / f"m{number}"), *options])
        assert done.exit_code == 0, done.output
    models = [load_model(tmp_path / f"m{number}") for number in range(3)]
    assert [m.config for m in models[:2]] == [ModelConfig(family="stablesr", prediction=p) for p in ("eps", "v")]
    first, again = (model.adapter.state_dict() for model in models[1:])
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    unet = models[1].unet.state_dict()
    assert all(torch.equal(value, unet[name]) for name, value in velocity.unet.state_dict().items())


def test_v2_from_and_to_s3(base: Path, v2: Path, s3: str, tmp_path: Path) -> None:
    for name, folder in (("base", base), ("controlnet", v2 / "controlnet"), ("vae", v2 / "vae")):
        upload_folder(folder, f"{s3}/{name}", last="config.json")
    options = {"controlnet": f"{s3}/controlnet", "vae": f"{s3}/vae", "base": f"{s3}/base"}
    run_convert(str(tmp_path / "local"), **options)
    for _ in range(2):  # the second replaces the first
        assert run_convert(f"{s3}/out", **options) == f"{s3}/out"
    there = {uri.removeprefix(f"{s3}/out/"): read_bytes(uri) for uri in list_files(f"{s3}/out")}
    here = (tmp_path / "local").rglob("*")
    assert there == {p.relative_to(tmp_path / "local").as_posix(): p.read_bytes() for p in here if p.is_file()}
    model = load_model(tmp_path / "local")
    assert model.config.family == "v2"
    assert (model.controlnet.controlnet_cond_embedding.weight == 1).all()
    write_bytes(f"{s3}/photos/cat.png", b"")
    with pytest.raises(StorageError, match="not a model directory"):
        run_convert(f"{s3}/photos", **options)


def test_nothing_is_written_where_the_source_does_not_fit(base: Path, v2: Path, tmp_path: Path) -> None:
    options = {"controlnet": str(v2 / "controlnet"), "vae": str(v2 / "vae"), "base": str(base)}
    state = load_file(v2 / "vae" / WEIGHTS)
    save_file(state | {"post_quant_conv.bias": torch.full((4,), torch.nan)}, v2 / "vae" / WEIGHTS)
    with pytest.raises(ModelError, match=r"post_quant_conv\.bias holds NaN"):
        run_convert(str(tmp_path / "out"), **options)
    with pytest.raises(ModelError, match="not a CCSR v1 checkpoint"):
        run_convert(str(tmp_path / "out"), v1=str(v2 / "controlnet" / WEIGHTS))
    with pytest.raises(StorageError, match="no such file"):
        run_convert(str(tmp_path / "out"), v1=str(tmp_path / "v1.ckpt"))
    with pytest.raises(ModelError, match="not a StableSR checkpoint"):
        run_convert(str(tmp_path / "out"), stablesr=str(v2 / "controlnet" / WEIGHTS))
    for wrong in (
        {"vae": "x"},
        {"v1": "x", "vae": "x", "controlnet": "x"},
        {"family": "v3"},
        {"v1": "x", "family": "v1"},
        {"v1": "x", "stablesr": "x"},
        {"wrapping": "x"},
    ):
        with pytest.raises(ConfigError):
            run_convert(str(tmp_path / "out"), **wrong)
    assert not (tmp_path / "out").exists()


def test_a_base_is_downloaded_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match="ccsr weights fetch sd21-base"):
        run_convert(str(tmp_path / "out"))
    with pytest.raises(ModelError, match="ccsr weights fetch team/base"):
        run_convert(str(tmp_path / "out"), base="team/base")
    with pytest.raises(StorageError, match="cannot download"):
        run_convert(str(tmp_path / "out"), base="team/base", fetch=True)
    assert not (tmp_path / "out").exists()


def test_weights_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "dists_weights.pt").write_bytes(b"weights")

    def ccsr(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["weights", *arguments, "--folder", str(tmp_path / "w")])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    assert str(tmp_path / "w" / "dists_weights.pt") in ccsr("fetch", "dists", "--mirror", str(tmp_path / "mirror"))
    row = next(line for line in ccsr("list").splitlines() if "dists_weights.pt" in line)
    assert "present" in row
    assert "ok" in next(line for line in ccsr("check").splitlines() if "dists_weights.pt" in line)
    (tmp_path / "w" / "dists_weights.pt").write_bytes(b"other")
    with pytest.raises(ModelError, match="1 files are not what they should be"):
        ccsr("check")


def test_estimate_prints_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    full = CliRunner().invoke(app, ["estimate", "--model", "sd21"]).output
    rows = {cells[0]: cells[1] for line in full.splitlines() if len(cells := re.split(r"  +", line.strip())) > 1}
    assert rows["UNet"] == "865,910,724"
    assert rows["v1: PatchGAN"] == "2,765,633"
    assert rows["CCSR v1 as published (paper: 1700.91 M)"] == "1,700,914,491"
    config = ["-c", "configs/demo/train_stage2.yaml", "--set", "num_steps=6"]
    stage2 = CliRunner().invoke(app, ["estimate", *config]).output
    assert any("trained by this config (stage 2)" in line and "926,647" in line for line in stage2.splitlines())
