"""Restoring: run r's picture is a function of (model, LR, seed, key, r), whatever is computed beside it."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import typer
from photos import photo
from PIL import Image, ImageCms
from pydantic import ValidationError
from typer.testing import CliRunner

from infra import ConfigError, DataError, ModelError, PartialResultError
from infra.files.publish import upload_folder, write_bytes
from infra.files.storage import read_bytes
from infra.imaging.images import decode_image, encode_png
from pipelines.cli.main import app
from pipelines.cli.needs import needs_of
from pipelines.restore import RestoreConfig, RestoreRuntime, resolved
from pipelines.restore import restore as run_restore
from tests.small_networks import smaller_tiny
from training.config import ModelConfig, SamplingConfig
from training.models import CcsrModel, build_model, save_model
from training.restore import seeded_runs
from training.restore.banded_vae import VAE_BYTES, WHOLE_PLANES, plane_bytes
from training.restore.seeded_runs import prepare_image, restore_batch, restore_runs
from training.restore.trace import trace_runs
from training.sampling import ccsr_v1_timesteps, ccsr_v2_timesteps

FAST = SamplingConfig(num_steps=4)


@pytest.fixture(scope="module", params=["v1", "v2"])
def model(request: pytest.FixtureRequest) -> CcsrModel:
    """A tiny model whose ControlNet has an effect: no weight of it is zero."""
    with smaller_tiny():
        model = build_model(ModelConfig(family=request.param), seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.controlnet.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def restored(
    model: CcsrModel,
    runs: Sequence[int],
    *,
    size: tuple[int, int] = (32, 48),
    config: SamplingConfig = FAST,
    **changes: Any,
) -> list[np.ndarray]:
    lr = photo(size[0] // 4, size[1] // 4)
    return list(restore_runs(model, lr, size, config, **{"seed": 0, "key": "image", "runs": runs, **changes}))


def test_a_runs_picture_does_not_depend_on_the_other_runs(model: CcsrModel) -> None:
    """In float64, whose rounding is far below a grey level: what remains is which noise goes where."""
    exact = copy.deepcopy(model).to(dtype=torch.float64)
    reference = restored(exact, range(4), rows_at_once=1)
    for rows_at_once in (3, 8):
        for one, other in zip(reference, restored(exact, range(4), rows_at_once=rows_at_once), strict=True):
            assert (one == other).all()
    (alone,) = restored(exact, [3])
    assert (alone == reference[3]).all()
    last, first = restored(exact, [2, 0])
    assert (last == reference[2]).all()
    assert (first == reference[0]).all()


def test_in_float32_other_batches_move_single_levels_of_few_pixels(model: CcsrModel) -> None:
    """Matrix kernels add up in another order for another batch size: about 1e-6 in eps."""
    reference = np.stack(restored(model, range(6), rows_at_once=1)).astype(int)
    assert (np.stack(restored(model, range(6), rows_at_once=1)) == reference).all()
    for rows_at_once in (2, 6):
        difference = np.abs(np.stack(restored(model, range(6), rows_at_once=rows_at_once)) - reference)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_a_sampling_field_that_the_models_family_lacks_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    write_bytes(f"{tmp_path}/model/ccsr.json", b'{"family": "v1"}')
    config = RestoreConfig(sampling=SamplingConfig(start="noise"))
    with pytest.raises(ConfigError, match="`start` has no effect on a model of family v1"):
        run_restore(str(tmp_path), str(tmp_path / "out"), str(tmp_path / "model"), config)
    assert not (tmp_path / "out").exists()


def test_runs_seeds_and_keys_give_other_pictures(model: CcsrModel) -> None:
    pictures = [
        *restored(model, range(3)),
        *restored(model, [0], seed=1),
        *restored(model, [0], key="other image"),
        *restored(model, [0], config=SamplingConfig(num_steps=4, sampler="uniform")),
        *restored(model, [0], config=SamplingConfig(num_steps=4, color_fix="none")),
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


@pytest.mark.parametrize("sampler", ["ccsr", "uniform"])
def test_a_trace_ends_with_the_output(model: CcsrModel, sampler: Any) -> None:
    """Every visited timestep has an image per run, and the last one's are the restorations, bit by bit."""
    config = SamplingConfig(num_steps=6, sampler=sampler)
    trace = list(
        trace_runs(
            model, photo(8, 12), (32, 48), config, seed=0, key="image", runs=range(3), rows_at_once=1, num_traced=2
        )
    )
    timesteps = {"v1": ccsr_v1_timesteps, "v2": ccsr_v2_timesteps}[model.config.family]
    visited = timesteps(6, config.t_max, config.t_min) if sampler == "ccsr" else [999, 799, 599, 400, 200, 0]
    assert [t for t, _ in trace] == visited
    assert [len(images) for _, images in trace] == [2] * (len(visited) - 1) + [3]
    outputs = restored(model, range(3), config=config, rows_at_once=1)
    np.testing.assert_array_equal(trace[-1][1], outputs)
    assert not np.array_equal(trace[0][1], outputs[:2])


def test_the_global_generator_is_neither_used_nor_moved(model: CcsrModel) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    (one,) = restored(model, [0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert (restored(model, [0])[0] == one).all()


@pytest.mark.parametrize("size", [(36, 52), (33, 47), (9, 70), (40, 40)])
@pytest.mark.parametrize("sampler", ["ccsr", "uniform"])
def test_any_size_comes_back_as_asked(model: CcsrModel, size: tuple[int, int], sampler: Any) -> None:
    lr = photo(max(2, size[0] // 4), max(2, size[1] // 4))
    config = SamplingConfig(num_steps=3, sampler=sampler)
    for image in restore_runs(model, lr, size, config, seed=0, key="x", runs=range(2)):
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8


def test_padding_leaves_a_picture_that_needs_none_alone(model: CcsrModel) -> None:
    """Colour is matched within the picture, not within its padding: a flat LR stays flat in its mean."""
    lr = np.full((9, 13, 3), (200, 90, 30), np.uint8)
    (image,) = restore_runs(model, lr, (36, 52), FAST, seed=0, key="x", runs=[0])
    assert np.abs(image.reshape(-1, 3).mean(0) - (200, 90, 30)).max() < 2


def test_no_runs_give_no_pictures(model: CcsrModel) -> None:
    assert restored(model, []) == []


def test_the_truncation_must_be_ordered() -> None:
    with pytest.raises(ValidationError, match="t_min"):
        SamplingConfig(t_max=0.3, t_min=0.3)


@pytest.fixture
def in_bands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every VAE call goes through bands; the calls are listed."""
    calls: list[str] = []

    def watched(name: str, call: Any) -> Any:
        return lambda *args: [calls.append(name), call(*args)][1]

    for name in ("encode_in_bands", "decode_in_bands"):
        monkeypatch.setattr(seeded_runs, name, watched(name, getattr(seeded_runs, name)))
    monkeypatch.setitem(VAE_BYTES, "cpu", 0)
    return calls


def test_a_vae_in_bands_changes_no_picture(model: CcsrModel, in_bands: list[str]) -> None:
    with pytest.MonkeyPatch.context() as whole:
        whole.setitem(VAE_BYTES, "cpu", 2**40)
        expected = np.stack(restored(model, range(2))).astype(int)
    assert in_bands == []
    difference = np.abs(np.stack(restored(model, range(2))) - expected)
    assert in_bands == ["encode_in_bands", "decode_in_bands", "decode_in_bands"]
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def with_free(patch: pytest.MonkeyPatch, number: int) -> None:
    """Every function that reports free memory returns `number` bytes."""
    memory = psutil.virtual_memory()._replace(available=number)
    patch.setattr(psutil, "virtual_memory", lambda: memory)
    patch.setattr(torch.cuda, "mem_get_info", lambda *_: (number, 2**50))


@pytest.mark.parametrize("spare", [0, -1], ids=["whole", "in bands"])
def test_what_is_free_moves_no_byte(
    model: CcsrModel, in_bands: list[str], monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """Just above and just below what takes the VAE whole; too little memory is an error and nothing else."""
    monkeypatch.setitem(VAE_BYTES, "cpu", WHOLE_PLANES * plane_bytes(model.vae, 32, 48) + spare)
    pictures = []
    for free in (16 * 2**20, 2**50):
        with_free(monkeypatch, free)
        pictures.append(np.stack(restored(model, range(2))).tobytes())
    assert pictures[0] == pictures[1]
    assert bool(in_bands) == (spare < 0)
    with_free(monkeypatch, 2**10)
    with pytest.raises(DataError, match="are free"):
        restored(model, [0])


def test_runs_that_are_decoded_together_count(model: CcsrModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VAE_BYTES, "cpu", 2**40)
    unet = 4 * seeded_runs.UNET_MAPS * model.unet.config.block_out_channels[0] * 32 * 48 // model.factor**2
    needed = seeded_runs.IMAGE_BYTES * 32 * 48 + 3 * (unet + WHOLE_PLANES * plane_bytes(model.vae, 32, 48))
    with_free(monkeypatch, needed)
    assert len(restored(model, range(3), rows_at_once=3)) == 3
    with_free(monkeypatch, needed - 1)
    with pytest.raises(DataError, match="are free"):
        restored(model, range(3), rows_at_once=3)


def test_large_pictures_are_denoised_in_tiles(model: CcsrModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    unet = model.unet.forward
    monkeypatch.setattr(
        model.unet, "forward", lambda x, *args, **kw: [seen.append(tuple(x.shape)), unet(x, *args, **kw)][1]
    )
    config = SamplingConfig(num_steps=4, tile=64)
    whole, wide = (
        restored(model, range(2), size=(48, 64), config=config),
        restored(model, [0], size=(48, 120), config=config),
    )
    assert (np.stack(whole) == np.stack(restored(model, range(2), size=(48, 64)))).all()
    assert {shape for shape in seen if shape[-1] == 16} >= {(2, 4, 12, 16), (1, 4, 12, 16)}
    assert max(shape[-1] for shape in seen) == 16
    assert wide[0].shape == (48, 120, 3)


def test_images_of_one_size_share_a_batch(model: CcsrModel) -> None:
    exact = copy.deepcopy(model).to(dtype=torch.float64)
    images = [
        prepare_image(exact, photo(9, 13, seed), size, FAST, key=f"{seed}")
        for seed, size in enumerate([(36, 52), (34, 50)])
    ]
    assert images[0].mean.shape == images[1].mean.shape
    rows = [(images[1], 1), (images[0], 0), (images[0], 3)]
    together = list(restore_batch(exact, rows, FAST, seed=5))
    assert [picture.shape for picture in together] == [(34, 50, 3), (36, 52, 3), (36, 52, 3)]
    for (image, run), picture in zip(rows, together, strict=True):
        (alone,) = restore_batch(exact, [(image, run)], FAST, seed=5)
        assert (picture == alone).all()


def test_the_lr_is_encoded_once_however_many_runs(model: CcsrModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = model.encode_condition
    monkeypatch.setattr(model, "encode_condition", lambda lr: [calls.append(1), encode(lr)][1])
    assert len(restored(model, range(5), rows_at_once=2)) == 5
    assert calls == [1]


def test_guidance_mixes_two_prompts(model: CcsrModel, monkeypatch: pytest.MonkeyPatch) -> None:
    width = model.prompt.shape[-1]
    monkeypatch.setitem(model.prompts, "sharp", torch.full((1, 1, width), 3.0))
    values = {"num_steps": 4, "prompt": "sharp", "color_fix": "none"}
    pictures = [
        restored(model, [0], config=SamplingConfig(**changes))[0]
        for changes in ({"num_steps": 4, "color_fix": "none"}, values, values | {"guidance": 4.0})
    ]
    assert len({picture.tobytes() for picture in pictures}) == 3
    with pytest.raises(ModelError, match="caches no embedding") as error:
        restored(model, [0], config=SamplingConfig(prompt="blurred"))
    assert "sharp" in error.value.todo


@pytest.mark.parametrize("rule", ["v1", "v1_tiled", "v2"])
def test_published_sizes_come_back_as_asked(model: CcsrModel, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.restore.published_sizes.SHORT_SIDE", 64)
    config = SamplingConfig(num_steps=3, sizes=rule)
    (image,) = restore_runs(model, photo(20, 31), (40, 62), config, seed=0, key="x", runs=[0])
    assert image.shape == (40, 62, 3)


def test_what_does_not_fit_is_refused_with_numbers(model: CcsrModel) -> None:
    with pytest.raises(DataError, match=r"needs about \d+\.\d GiB .*images.*VAE.*UNet.* free"):
        list(restore_runs(model, photo(20, 20), (400_000, 400_000), FAST, seed=0, key="x", runs=[0]))


def test_a_folder_with_bad_files(tmp_path: Path) -> None:
    """One bad file of each kind between good ones: they are named, the others are there, upright, in their colours."""
    save_model(build_model(ModelConfig(family="v2"), 1), tmp_path / "model")
    photos = tmp_path / "in"
    (photos / "deep").mkdir(parents=True)
    picture = Image.fromarray(photo(20, 32))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = Image.Exif()
    turned[274] = 6  # EXIF orientation: rotate by 90 degrees to see it upright
    picture.save(photos / "deep" / "a.jpg", icc_profile=profile, exif=turned)
    picture.save(photos / "same.png")
    picture.save(photos / "same.bmp")
    picture.convert("CMYK").save(photos / "cmyk.jpg")
    picture.crop((0, 0, 15, 20)).save(photos / "small.png")
    picture.save(photos / "moving.webp", save_all=True, append_images=[picture.rotate(90)])
    Image.fromarray(np.zeros((20, 20), np.float32)).save(photos / "deeper.tif")
    data = (photos / "same.png").read_bytes()
    (photos / "cut.png").write_bytes(data[: len(data) // 2])
    config = RestoreConfig(num_runs=2, scale=1.6, sampling=SamplingConfig(num_steps=3))
    arguments = (str(photos), str(tmp_path / "out"), str(tmp_path / "model"), config)
    with pytest.raises(PartialResultError, match="5 of 8 images") as error:
        run_restore(*arguments)
    for name in ("cmyk.jpg", "small.png", "moving.webp", "deeper.tif", "cut.png"):
        assert name in error.value.what
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert written[0] == "runs/00/deep/a.png"
    assert len(written) == 6
    with Image.open(tmp_path / "out" / "runs" / "00" / "deep" / "a.png") as restored_image:
        assert restored_image.size == (32, 52)  # upright; 20 * 1.6, 32 * 1.6 rounded up
        assert restored_image.info["icc_profile"] == profile
        restored_image.load()
    with Image.open(tmp_path / "out" / written[1]) as without:
        assert "icc_profile" not in without.info

    for name in ("cmyk.jpg", "small.png", "moving.webp", "deeper.tif", "cut.png"):
        (photos / name).unlink()
    again = tmp_path / "out" / "runs" / "01" / "deep" / "a.png"
    before = again.read_bytes()
    again.unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert run_restore(*arguments) == 3
    assert again.read_bytes() == before
    assert times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(ConfigError, match="seed"):
        run_restore(*arguments[:3], config.model_copy(update={"seed": 1}))
    (tmp_path / "model" / "unet" / "config.json").unlink()
    again.unlink()
    with pytest.raises(ModelError, match="missing"):
        run_restore(*arguments)


def test_from_s3_to_s3(s3: str, tmp_path: Path) -> None:
    save_model(build_model(ModelConfig(family="v2"), 1), tmp_path / "model")
    upload_folder(tmp_path / "model", f"{s3}/model", last="ccsr.json")
    write_bytes(f"{s3}/in/sub/a.png", encode_png(photo(16, 20)))
    config = RestoreConfig(scale=2, sampling=SamplingConfig(num_steps=3))
    assert run_restore(f"{s3}/in", f"{s3}/out", f"{s3}/model", config) == 1
    assert decode_image(read_bytes(f"{s3}/out/sub/a.png"), where="a").shape == (32, 40, 3)


def picked(device: str, dtype: str) -> tuple[str, str]:
    config = resolved(RestoreConfig.model_validate({"dtype": dtype, "runtime": {"device": device}}))
    return config.runtime.device, config.dtype


def test_auto_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert picked("auto", "auto") == ("cpu", "float32")
    config = RestoreConfig(runtime=RestoreRuntime(device="cuda"))
    with pytest.raises(ConfigError, match="no GPU"):
        run_restore(str(tmp_path), str(tmp_path / "out"), str(tmp_path / "model"), config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert picked("auto", "auto") == ("cuda", "bfloat16")
    assert picked("auto", "float32") == ("cuda", "float32")
    assert picked("cpu", "bfloat16") == ("cpu", "bfloat16")


@pytest.mark.parametrize("ray", [["--ray"], ["--set", "runtime.use_ray=true"]])
@pytest.mark.parametrize("device", [[], ["--device", "auto"], ["--device=cpu", "--set", "runtime.device=auto"]])
def test_auto_on_ray_is_refused_before_anything_starts(ray: list[str], device: list[str], tmp_path: Path) -> None:
    """The driver's hardware says nothing about the actors'; `submit` refuses it too."""
    command = ["restore", "s3://bucket/in", str(tmp_path / "out"), "--model", "m", *ray, *device]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).count("\n") == 2
    assert "--device cuda" in done.exception.todo
    with pytest.raises(ConfigError, match="auto"):
        needs_of(typer.main.get_command(app), command)
    assert not (tmp_path / "out").exists()
