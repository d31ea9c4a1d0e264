"""Captions as prompts in training: drawn by position, embedded by the base's text tower, each row under its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from photos import make_shard_set
from test_captions import make_source
from test_source_containers import write_tars
from test_sources import config_of
from torch import Tensor

from infra import ConfigError, DataError, ModelError, noise_for
from infra.config import fingerprint_of, result_part
from infra.files.weights import ENVIRONMENT
from infra.shards.manifest import Manifest
from infra.shards.tars import open_set
from tests.small_networks import save_text_tower, smaller_tiny
from tests.training_runs import train_config
from training.config import TrainConfig
from training.convert.text import TextTower
from training.data.batches import Batch, updates
from training.data.samples import SampleReader, check_stored
from training.models import CcsrModel, build_model
from training.models.networks import seeded_init
from training.run.cost.requirements import step_cost
from training.run.step.stages import build_stage


@pytest.fixture
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextTower:
    """A small text tower where sd21-base is looked for."""
    base = tmp_path / "weights" / "sd21-base"
    base.mkdir(parents=True)
    with seeded_init(4):
        save_text_tower(base)
    (base / "tokenizer" / "special_tokens_map.json").write_text("{}")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "weights"))
    return TextTower(base)


def model_of(config: TrainConfig, tower: TextTower) -> CcsrModel:
    model = build_model(config.model, seed=2)
    model.prompts = {"": tower("")}
    with seeded_init(5):
        for network in model.networks.values():  # a fresh ControlNet and LoRA add nothing
            for parameter in network.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    return model


def captioned(folder: Path, **changes: Any) -> Manifest:
    source = make_source("folder", folder / "in", ["a boat", "two birds", ""]) | {"path": str(folder / "in")}
    return make_shard_set(config_of({"name": "s", **source}, output=folder / "set", degradation="bicubic", **changes))


def test_prompts_are_dropped_by_position_alone(tmp_path: Path) -> None:
    manifest = captioned(tmp_path)
    captions = dict(zip((entry.key for entry in manifest.entries), ["a boat", "two birds", ""], strict=True))

    def prompts(rate: float, world_size: int = 1) -> dict[int, tuple[str, str]]:
        config = train_config(manifest.uri, tmp_path, num_updates=40, prompt="caption", prompt_drop_rate=rate)
        found = {}
        for rank in range(world_size):
            stream = updates(SampleReader([manifest], config), config, start=0, rank=rank, world_size=world_size)
            for batch in (batch for batches in stream for batch in batches):
                found |= dict(zip(batch.positions, zip(batch.keys, batch.prompts, strict=True), strict=True))
        return found

    every, some = prompts(0), prompts(0.25)
    assert all(text == captions[key] for key, text in every.values())
    dropped = [position for position, (_, text) in some.items() if text != every[position][1]]
    assert 0.15 < len(dropped) / sum(bool(text) for _, text in every.values()) < 0.35
    assert all(some[position][1] == "" for position in dropped)
    assert prompts(0.25, world_size=2) == some
    config = train_config(manifest.uri, tmp_path, num_updates=1)
    (batch, _) = next(updates(SampleReader([manifest], config), config, start=0, rank=0, world_size=1))
    assert batch.prompts == ()


def test_foreign_tars_have_captions_too(tmp_path: Path) -> None:
    write_tars(tmp_path / "made", 1)
    manifest = open_set(str(tmp_path / "made" / "00000.tar"), str(tmp_path / "cache"))
    changes = {"degradation": "bicubic", "prompt": "caption", "prompt_drop_rate": 0}
    config = train_config(manifest.uri, tmp_path, num_updates=1, **changes)
    assert manifest.num_captions == 5
    assert SampleReader([manifest], config)(0).prompt == "a photo"


def test_a_caption_that_is_not_utf_8_ends_the_run_with_its_key(tmp_path: Path) -> None:
    make_source("webdataset", tmp_path / "in", [b"\xff"] * 3)
    manifest = open_set(str(tmp_path / "in" / "0.tar"), str(tmp_path / "cache"))
    changes = {"degradation": "bicubic", "prompt": "caption", "prompt_drop_rate": 0}
    config = train_config(manifest.uri, tmp_path, num_updates=1, **changes)
    with pytest.raises(DataError, match="the caption is not UTF-8") as caught:
        SampleReader([manifest], config)(0)
    assert caught.value.where.startswith(f"{manifest.uri}/{tmp_path}/in/0.tar: ")


def loss_of(config: TrainConfig, model: CcsrModel, *prompts: str) -> dict[str, Tensor]:
    images = noise_for(0, [("a",), ("b",)], "cpu", torch.float32)((2, 3, 32, 32)).sigmoid()
    batch = Batch(["a", "b"], [0, 1], images, images.flip(-1), prompts=prompts)
    stage = build_stage(model, config)
    terms = stage(batch, update=0)
    return {name: term.detach() for name, term in terms.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"family": "v2"}},
        {"model": {"family": "v2"}, "runtime": {"join_passes": True}},
        {"model": {"family": "stablesr"}},
        {"stage": 2, "model": {"family": "v1"}, "num_steps": 6},
    ],
)
def test_each_row_is_under_its_own_prompt(changes: dict[str, Any], tower: TextTower) -> None:
    """A batch of two equals what each row gives beside the other one's prompt."""
    config = train_config("d", "o", num_updates=1, prompt="caption", **changes)
    model = model_of(config, tower)
    empty = loss_of(config.model_copy(update={"prompt": "empty"}), model)
    assert loss_of(config, model, "", "")["loss"] == pytest.approx(empty["loss"].item())
    texts = ("boat", "bird")
    losses = {(one, two): loss_of(config, model, one, two) for one in texts for two in texts}
    name = next(name for name in losses[texts] if name in ("l_diff", "reconstruction"))
    values = {pair: terms[name].item() for pair, terms in losses.items()}
    assert len(set(values.values())) == 4
    mixed = values["boat", "boat"] + values["bird", "bird"] - values["boat", "bird"]
    assert mixed == pytest.approx(values["bird", "boat"], rel=1e-5)


def test_distillation_takes_captions_too(tower: TextTower) -> None:
    with smaller_tiny():
        loss = {"reconstruction": "l2", "perceptual": "none", "divide_by_batch": False}
        changes = {"model": {"family": "onestep"}, "vsd": {}, "decoder_loss": loss, "prompt": "caption"}
        config = train_config("d", "o", num_updates=1, **changes)
        model = model_of(config, tower)
        terms = {text: loss_of(config, model, text, text) for text in ("boat", "bird", "")}
        for name in ("vsd", "reconstruction"):
            assert len({term[name].item() for term in terms.values()}) == 3, name


def test_a_text_is_embedded_once_and_by_itself(tower: TextTower) -> None:
    assert tower("boat") is tower("boat")
    assert not torch.equal(tower("boat"), tower("bird"))
    assert tower("").shape == (1, 7, 16)


def test_a_tower_that_moves_makes_its_embeddings_anew(tower: TextTower) -> None:
    """The empty prompt is embedded on the CPU, before the first batch brings the device."""
    assert tower("").device == tower("boat").device == torch.device("cpu")
    tower.to("meta")
    assert tower("").device == tower("boat").device == torch.device("meta")


def test_models_without_the_tower_are_refused(
    tower: TextTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with smaller_tiny():
        config = train_config("d", "o", num_updates=1, prompt="caption")
        with pytest.raises(ModelError, match="does not make this model's empty prompt") as caught:
            build_stage(build_model(config.model, 2), config)
        assert caught.value.where == "prompt: caption"
        other = model_of(config, tower)
        other.prompts[""] = other.prompts[""] + 0.1
        with pytest.raises(ModelError, match="does not make this model's empty prompt"):
            build_stage(other, config)
        monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "nothing"))
        with pytest.raises(ModelError, match="sd21-base is not there"):
            build_stage(model_of(config, tower), config)
        assert step_cost(config).num_trained, "an estimate needs no tower"


def test_the_fields_are_refused_where_they_change_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`prompt_drop_rate` has no effect with prompt: empty"):
        train_config("d", "o", num_updates=1, prompt_drop_rate=0.2)
    latents = {"stage": 2, "model": {"family": "stablesr"}, "inputs": "latents"}
    latents |= {"num_steps": 45, "decoder_loss": {"gan_weight": 0.1}}
    with pytest.raises(ConfigError, match="`prompt` has no effect in stage 2 of family stablesr"):
        train_config("d", "o", num_updates=1, prompt="caption", runtime={}, **latents)
    with pytest.raises(ConfigError, match=r"takes the place of vsd\.prompt"):
        train_config("d", "o", num_updates=1, prompt="caption", model={"family": "onestep"}, vsd={"prompt": "x"})
    plain = train_config("d", "o", num_updates=1)
    assert "prompt" not in result_part(plain)
    assert "prompt_drop_rate" not in result_part(plain), "fingerprints without captions are as they were"
    fingerprints = {
        fingerprint_of(result_part(train_config("d", "o", num_updates=1, **changes)))
        for changes in ({}, {"prompt": "caption"}, {"prompt": "caption", "prompt_drop_rate": 0.2})
    }
    assert len(fingerprints) == 3
    bare = make_shard_set(
        config_of({"kind": "folder", "name": "s", "path": str(captioned_folder(tmp_path))}, output=tmp_path / "bare")
    )
    with pytest.raises(ConfigError, match="these shards hold no captions"):
        check_stored(train_config("d", "o", num_updates=1, prompt="caption"), [bare], "")
    check_stored(train_config("d", "o", num_updates=1, prompt="caption"), [bare, captioned(tmp_path)], "")


def captioned_folder(folder: Path) -> Path:
    make_source("folder", folder / "in")
    return folder / "in"
