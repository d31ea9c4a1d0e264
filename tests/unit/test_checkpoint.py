"""Checkpoints: what is saved comes back bit for bit, what is not complete or not intact is never taken for it."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from infra import ModelError
from infra.files import publish
from infra.files.publish import write_bytes
from infra.files.storage import join, list_files, read_bytes, remove, sha256_file
from training.run.checkpoint import (
    TrainingState,
    best_checkpoint,
    check_tensors,
    complete_checkpoints,
    load_checkpoint,
    load_newest,
    module_state,
    remove_checkpoint,
    restore_module,
    save_checkpoint,
)


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return join(request.getfixturevalue("s3"), "run") if request.param == "s3" else str(tmp_path / "run")


def state(position: int) -> TrainingState:
    generator = torch.Generator().manual_seed(position)
    weights = {"a.weight": torch.randn(3, 5, generator=generator), "b": torch.randn((), generator=generator)}
    moments = {"exp_avg.a.weight": torch.randn(5, 3, generator=generator).t()}  # not contiguous
    return TrainingState({"position": position, "num_updates": position // 8}, {"weights": weights, "moments": moments})


def assert_equal(one: TrainingState, other: TrainingState) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[name].keys()
        assert all(torch.equal(tensor, other.tensors[name][key]) for key, tensor in tensors.items())
    assert {key: other.facts[key] for key in one.facts} == one.facts


def test_what_is_saved_comes_back(output: str) -> None:
    assert complete_checkpoints(output) == []
    place = save_checkpoint(output, state(16), keep=2)
    assert complete_checkpoints(output) == [place]
    assert_equal(state(16), load_checkpoint(place))


def test_the_newest_are_kept_in_order(output: str) -> None:
    for position in (8, 16, 1000, 24_000_000):
        newest = save_checkpoint(output, state(position), keep=2)
    kept = complete_checkpoints(output)
    assert [load_checkpoint(place).facts["position"] for place in kept] == [1000, 24_000_000]
    assert kept[-1] == newest
    assert {file.rsplit("/", 1)[0] for file in list_files(output)} == set(kept), "nothing of the others is left"


def test_what_else_lies_in_a_kept_checkpoint_stays_and_goes_with_it(output: str) -> None:
    extra = join(save_checkpoint(output, state(8), keep=2), "model", "vae", "config.json")
    write_bytes(extra, b"{}")
    save_checkpoint(output, state(16), keep=2)
    assert read_bytes(extra) == b"{}"
    save_checkpoint(output, state(24), keep=2)
    assert extra not in list_files(output)


def test_a_half_written_one_is_not_taken_and_goes_with_the_next(output: str) -> None:
    first = save_checkpoint(output, state(8), keep=3)
    killed = save_checkpoint(output, state(16), keep=3)
    remove(join(killed, "complete.json"))  # as if the process had died just before
    assert complete_checkpoints(output) == [first]
    with pytest.raises(ModelError, match="not complete"):
        load_checkpoint(killed)
    last = save_checkpoint(output, state(24), keep=3)
    assert complete_checkpoints(output) == [first, last]
    assert not list_files(killed)


def test_one_that_was_half_written_is_made_again_at_the_same_position(output: str) -> None:
    place = save_checkpoint(output, state(16), keep=1)
    remove(join(place, "complete.json"))
    other = state(16)
    other.tensors["weights"]["b"] += 1
    other.facts["git_commit"] = "another"
    assert save_checkpoint(output, other, keep=1) == place
    assert_equal(other, load_checkpoint(place))


def test_saving_at_a_position_again_replaces_the_damaged_one(output: str) -> None:
    place = save_checkpoint(output, state(16), keep=1)
    write_bytes(join(place, "weights.safetensors"), b"damaged")
    save_checkpoint(output, state(16), keep=1)
    assert_equal(state(16), load_checkpoint(place))


def test_removal_takes_the_mark_of_completeness_first(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save_checkpoint(output, state(8), keep=1)
    removed: list[str] = []
    monkeypatch.setattr("training.run.checkpoint.remove", removed.append)
    remove_checkpoint(place)
    assert removed[0] == join(place, "complete.json")
    assert set(removed) == set(list_files(place))


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors"])
def test_a_damaged_file_is_told(output: str, name: str) -> None:
    place = save_checkpoint(output, state(8), keep=1)
    data = bytearray(read_bytes(join(place, name)))
    data[-1] ^= 1
    write_bytes(join(place, name), bytes(data))
    with pytest.raises(ModelError, match=f"{name} is damaged"):
        load_checkpoint(place)


def test_other_formats_and_missing_files_are_told(tmp_path: Path) -> None:
    place = Path(save_checkpoint(str(tmp_path), state(8), keep=1))
    hashes = json.loads((place / "complete.json").read_text())
    other = json.dumps({**json.loads((place / "state.json").read_text()), "format": "other-9"}).encode()
    (place / "state.json").write_bytes(other)
    with pytest.raises(ModelError, match=r"state\.json is damaged"):
        load_checkpoint(str(place))
    (place / "complete.json").write_text(json.dumps({**hashes, "state.json": hashlib.sha256(other).hexdigest()}))
    with pytest.raises(ModelError, match="unknown checkpoint format 'other-9'"):
        load_checkpoint(str(place))
    (place / "moments.safetensors").unlink()
    with pytest.raises(ModelError, match=r"moments\.safetensors is missing"):
        load_checkpoint(str(place))


def test_damaged_ones_are_passed_over_and_removed_once_a_later_one_stands(output: str) -> None:
    places = [save_checkpoint(output, state(position), keep=3) for position in (8, 16, 24)]
    write_bytes(join(places[2], "weights.safetensors"), b"damaged")
    remove(join(places[1], "moments.safetensors"))
    told: list[str] = []
    found = load_newest(output, told.append)
    assert found is not None
    assert (found.place, found.damaged) == (places[0], [places[2], places[1]])
    assert_equal(state(8), found.state)
    assert [place in line for place, line in zip(reversed(places), told, strict=False)] == [True, True]
    assert complete_checkpoints(output) == places, "what this node cannot read another one may"
    between = save_checkpoint(output, state(20), keep=2, damaged=found.damaged)
    assert complete_checkpoints(output) == [places[0], between, places[2]]
    again = save_checkpoint(output, state(24), keep=2, damaged=found.damaged)
    assert complete_checkpoints(output) == [between, again]
    assert_equal(state(24), load_checkpoint(again))


def test_where_all_are_damaged_nothing_is_removed(output: str) -> None:
    place = save_checkpoint(output, state(8), keep=2)
    write_bytes(join(place, "complete.json"), b"{")
    for _ in range(2):
        with pytest.raises(ModelError, match="every checkpoint of this run is damaged"):
            load_newest(output, lambda text: None)
    assert complete_checkpoints(output) == [place]


def test_one_corrupted_read_is_read_again(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save_checkpoint(output, state(8), keep=2)
    wrong = iter(["0" * 64])
    monkeypatch.setattr("training.run.checkpoint.sha256_file", lambda path: next(wrong, None) or sha256_file(path))
    told: list[str] = []
    found = load_newest(output, told.append)
    assert found is not None
    assert_equal(state(8), found.state)
    assert (found.place, found.damaged, told) == (place, [], [])
    assert next(wrong, "read") == "read"


def test_a_node_downloads_a_checkpoint_once(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 0 reads it first and keeps the copy for the others."""
    place, fetched = save_checkpoint(s3, state(8), keep=2), []
    real = publish.download_file
    monkeypatch.setattr(publish, "download_file", lambda uri, target: (fetched.append(uri), real(uri, target)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ExitStack() as copies:
        newest = load_newest(s3, print, copies)
        assert newest is not None
        assert_equal(newest.state, load_checkpoint(place))
        assert len(fetched) == len(list_files(place))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_best_by_the_rule_is_kept(output: str) -> None:
    for position, std in {8: 0.3, 16: 0.1, 24: 0.2}.items():
        one = state(position)
        one.facts["validation"] = {"psnr_y": position, "l_std": std}
        save_checkpoint(output, one, keep=1, best_by="l_std")
    places = complete_checkpoints(output)
    assert [load_checkpoint(place).facts["position"] for place in places] == [16, 24]
    assert best_checkpoint(output, (), "l_std") == places[0]
    assert best_checkpoint(output) == places[1]
    assert best_checkpoint(output, (), "lpips") is best_checkpoint(output, (), None) is None


def test_the_best_validated_one_is_kept_beside_the_newest(output: str) -> None:
    scores = {8: 20.0, 16: 25.0, 24: 24.0, 32: None, 40: 25.0, 48: 22.0}
    kept: dict[int, list[int]] = {}
    for position, score in scores.items():
        one = state(position)
        if score is not None:
            one.facts["validation"] = {"psnr_y": score, "l_std": 0.1}
        save_checkpoint(output, one, keep=1)
        kept[position] = [load_checkpoint(place).facts["position"] for place in complete_checkpoints(output)]
    assert kept == {8: [8], 16: [16], 24: [16, 24], 32: [16, 32], 40: [16, 40], 48: [16, 48]}
    assert best_checkpoint(output) == complete_checkpoints(output)[0]


@pytest.mark.parametrize("group", ["weights", "moments", "discriminator"])
def test_a_checkpoint_that_is_not_finite_is_not_saved_and_pushes_nothing_out(output: str, group: str) -> None:
    good = save_checkpoint(output, state(8), keep=1)
    bad = state(16)
    bad.tensors["discriminator"] = {"weights.main": torch.ones(3)}
    name, tensor = next(iter(bad.tensors[group].items()))
    tensor[..., 2] = float("nan")
    with pytest.raises(ModelError, match=f"{group}: tensor {name} is not finite after update 2"):
        save_checkpoint(output, bad, keep=1)
    assert complete_checkpoints(output) == [good]


def test_no_pickle_is_in_a_checkpoint(tmp_path: Path) -> None:
    place = Path(save_checkpoint(str(tmp_path), state(8), keep=1))
    assert {path.suffix for path in place.iterdir()} == {".json", ".safetensors"}


def test_a_checkpoint_of_another_model_names_the_first_difference() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    found = dict(module.named_parameters())
    check_tensors("here", found, module)
    for change, message in (
        ({"1.bias": None}, "tensor 1.bias is only in the model"),
        ({"2.bias": torch.zeros(2)}, "tensor 2.bias is only in the checkpoint"),
        ({"0.weight": torch.zeros(3, 4)}, r"tensor 0.weight is \(3, 4\), the model's is \(4, 3\)"),
    ):
        changed = {key: tensor for key, tensor in {**found, **change}.items() if tensor is not None}
        with pytest.raises(ModelError, match=message) as caught:
            check_tensors("here", changed, module)
        assert caught.value.where == "here"


@pytest.mark.parametrize(("statistics", "fused"), [(True, False), (False, False), (False, True)])
def test_a_module_goes_on_from_its_state_as_if_never_stopped(statistics: bool, fused: bool) -> None:
    """From one that kept running statistics too, as PatchGAN did in earlier versions."""

    def made(running: bool = statistics) -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4, track_running_stats=running)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 1, 3))
        return module, torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused)

    def steps(module: nn.Module, optimizer: torch.optim.AdamW, numbers: range) -> None:
        for number in numbers:
            image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
            module(image).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, optimizer = made()
    steps(straight, optimizer, range(6))
    stopped, optimizer = made(running=True)
    steps(stopped, optimizer, range(3))
    saved = module_state(stopped, optimizer)
    resumed, optimizer = made()
    restore_module(resumed, optimizer, saved, num_updates=3)
    steps(resumed, optimizer, range(3, 6))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
