"""An exported model in plain diffusers, in a process that cannot import this project, restores as `ccsr restore`."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from photos import make_shard_set, photo, save_photos, shard_config
from PIL import Image
from result_folder import noisy, photographs, write_result
from typer.testing import CliRunner

from evaluation.report.tables import interval_table
from evaluation.results import load_result
from infra.errors import CcsrError, ConfigError, ModelError
from infra.imaging.images import encode_png, read_image
from pipelines.cli.main import app
from pipelines.export_model import export_diffusers
from tests.small_networks import smaller_tiny
from training.config import ModelConfig, SamplingConfig
from training.models import build_model, load_model, save_model
from training.restore.pipeline import CcsrPipeline
from training.restore.seeded_runs import restore_runs

LR = photo(22, 30)
# Every sampler setting at least once; tiles of 64 px of an output of 88 x 120.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "v1": [{}, {"t_max": 0.8, "t_min": 0.25, "tile": 64}, {"sampler": "uniform", "color_fix": "none"}, {"sizes": "v1"}],
    "v2": [
        {"start": "noise", "color_fix": "wavelet"},
        {"num_steps": 1, "enlargement": "bilinear"},
        {"guidance": 3.0, "prompt": "clean", "negative_prompt": "blurry", "tile": 64},
        {"sampler": "uniform"},
        {"sizes": "v2"},
        {"sizes": "v1_tiled", "tile": 512},
    ],
    "stablesr": [{}, {"start": "noise", "wrapping": 1.0}, {"wrapping": 0.0, "tile": 64}],
    "onestep": [{}, {"color_fix": "wavelet", "tile": 64}],
}
RUN = """
import importlib.util, json, sys
import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

folder, image, settings = sys.argv[1], Image.open(sys.argv[2]), json.loads(sys.argv[3])
ours = [name for name in ("infra", "training", "pipelines") if importlib.util.find_spec(name)]
assert not ours, ours
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
for number, setting in enumerate(settings):
    out = pipeline(image=image, seed=7, key="a", run=2, **setting).images[0]
    out.save(f"{sys.argv[4]}/{number}.png")
"""


def made(folder: Path, family: Any) -> str:
    with nullcontext() if family == "stablesr" else smaller_tiny():  # whose GroupNorms have 32 groups
        model = build_model(ModelConfig(family=family, prediction="v" if family == "v1" else "eps"), 3)
    generator = torch.Generator().manual_seed(4)
    model.prepare_stage2(5)
    if family == "v1":
        with smaller_tiny():
            model.condition_encoder = build_model(ModelConfig(family=family), 9).vae
    for network in model.networks.values():
        for parameter in network.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.03
    shape = model.prompt.shape
    model.prompts |= {text: torch.randn(shape, generator=generator) for text in ("clean", "blurry")}
    save_model(model, folder)
    return str(folder)


def outside(exported: str, tmp_path: Path, settings: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Run in a process whose working directory and path know nothing of this project."""
    (tmp_path / "lr.png").write_bytes(encode_png(LR))
    (tmp_path / "images").mkdir(exist_ok=True)
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    arguments = [exported, f"{tmp_path}/lr.png", json.dumps(settings), f"{tmp_path}/images"]
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": f"{tmp_path}/hf", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-c", hide + RUN, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("v1", "stablesr", "onestep")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["v2", *LONG])
def test_diffusers_alone_restores_as_we_do(family: str, tmp_path: Path) -> None:
    source = made(tmp_path / "model", family)
    exported = export_diffusers(source, f"{tmp_path}/out")
    files = {path.name: path.read_text() for path in Path(exported).glob("*.py")}
    assert max(len(text.splitlines()) for text in files.values()) < 300
    settings = [{"num_steps": 4, **setting} for setting in SETTINGS[family]]
    done = outside(exported, tmp_path, [*settings, {"num_steps": 4, "scale": 2.5}])
    assert done.returncode == 0, done.stderr
    model = load_model(source)
    scales = [*([4.0] * len(settings)), 2.5]
    for number, (setting, scale) in enumerate(zip([*settings, {"num_steps": 4}], scales, strict=True)):
        config = SamplingConfig.model_validate({"tile": 512, **setting})
        size = (int(22 * scale), int(30 * scale))
        (ours,) = restore_runs(model, LR, size, config, seed=7, key="a", runs=[2])
        theirs = np.asarray(Image.open(tmp_path / "images" / f"{number}.png"))
        difference = np.abs(ours.astype(int) - theirs)
        assert (difference <= 1).mean() >= 0.999, (setting, difference.max())
    again = load_model(exported)
    assert again.config == model.config, "an exported directory is a model directory too"


def test_the_command_writes_a_card_and_a_model_that_restore_takes(tmp_path: Path) -> None:
    """The card in the hub's form: licence, the sets with their licences, the chosen method's means with intervals."""
    source = made(tmp_path / "model", "v2")
    save_photos(tmp_path / "photos", [(48, 48), (40, 64)])
    config = shard_config(tmp_path / "photos", tmp_path / "set", name="garden", degradation="bicubic")
    config = config.model_copy(update={"sources": [config.sources[0].model_copy(update={"licence": "CC0 | own"})]})
    data = make_shard_set(config).uri
    result = write_result(tmp_path / "result", photographs(3), {"bicubic": (1, noisy(0)), "ours": (2, noisy(5))})
    command = ["export", source, f"{tmp_path}/out", "--to", "diffusers", "--licence", "apache-2.0"]
    command += ["--data", data, "--metrics"]
    done = CliRunner().invoke(app, [*command, f"{result}:ours"])
    assert done.exit_code == 0, done.exception
    card = ModelCard.load(f"{tmp_path}/out/README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0",
        "diffusers",
        "image-to-image",
    )
    assert "| garden | 2 | CC0 \\| own |" in card.text
    rows = interval_table({"ours": load_result(result).methods["ours"]}).rows
    cells = [["".join(text for text, _ in cell.parts) for cell in row] for row in rows]
    assert len(cells) > 2
    assert all(f"| {metric} | {value} |" in card.text for metric, value in cells)
    assert "Means over 3 images with 95 % bootstrap intervals" in card.text
    assert 'custom_pipeline="out"' in card.text

    plain = CliRunner().invoke(app, ["export", source, f"{tmp_path}/plain"])
    assert plain.exit_code == 0, plain.exception
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "Not recorded: `ccsr export --data SHARDS`" in text
    assert "None given: `ccsr export --metrics RESULT`" in text

    (tmp_path / "a.png").write_bytes(encode_png(LR))
    for name, model in (("one", source), ("two", f"{tmp_path}/out")):
        command_of = ["restore", f"{tmp_path}/a.png", f"{tmp_path}/{name}.png", "--model", model, "--device", "cpu"]
        assert CliRunner().invoke(app, [*command_of, "--steps", "3", "--scale", "2"]).exit_code == 0
    np.testing.assert_array_equal(read_image(f"{tmp_path}/one.png"), read_image(f"{tmp_path}/two.png"))

    for options, what in (
        ([*command, f"{result}:theirs"], "no method is called theirs"),
        (["export", source, f"{tmp_path}/other", "--to", "onnx"], "no form is called 'onnx'"),
        (["export", source, f"{source}/inside"], "inside an input"),
    ):
        error = CliRunner().invoke(app, options).exception
        assert isinstance(error, CcsrError), error
        assert what in str(error)
        assert str(error).count("\n") == 2


def test_a_set_that_the_run_did_not_see_is_no_training_data(tmp_path: Path) -> None:
    source = made(tmp_path / "run" / "model", "v2")
    inputs = {"dataset_ids": ["0123456789abcdef"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"job": "train", "inputs": inputs}))
    export_diffusers(source, f"{tmp_path}/out")
    assert "| dataset 0123456789abcdef |  | not stated |" in (tmp_path / "out" / "README.md").read_text()
    save_photos(tmp_path / "photos", [(48, 48)])
    other = make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation="bicubic")).uri
    with pytest.raises(ConfigError, match="not trained on this set"):
        export_diffusers(source, f"{tmp_path}/second", data=[other])
    assert not (tmp_path / "second").exists()


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    source = Path(made(tmp_path / "model", "v2"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="something else"):
        export_diffusers(str(source), f"{tmp_path}/full")
    (source / "prompt.safetensors").unlink()
    with pytest.raises(ModelError, match="prompt") as caught:
        export_diffusers(str(source), f"{tmp_path}/out")
    assert str(caught.value).count("\n") == 2
    assert not (tmp_path / "out").exists()


def test_an_older_diffusers_and_an_unknown_setting_are_three_lines(tmp_path: Path) -> None:
    exported = export_diffusers(made(tmp_path / "model", "v2"), f"{tmp_path}/out")
    with pytest.raises(ConfigError, match=r"steps\n  where: CcsrPipeline"):
        CcsrPipeline(None, None)(LR, steps=4)
    code = (Path(exported) / "sampling.py").read_text().replace("diffusers.__version__.split", "'0.20.1'.split")
    with pytest.raises(ImportError, match=r"is too old for this pipeline\n  where: .*\n  do: pip"):
        exec(compile(code, "sampling.py", "exec"), {})
