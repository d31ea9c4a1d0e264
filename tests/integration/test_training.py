"""The training loop over real DeepSpeed engines: a resumed run is the run, whatever the ZeRO stage."""

import shutil
from functools import partial

import pytest
import torch
from mlflow.tracking import MlflowClient

from infra.config import load_yaml, parse_config
from infra.manifest import Manifest
from tests.small_networks import seeded_lpips, small_dino
from training.checkpoint import complete_checkpoints, load_checkpoint
from training.config import TrainConfig
from training.train import initial_model


class Losses:
    """Takes the place of rank 0's MLflow run."""

    def __init__(self):
        self.values = []

    def metrics(self, values, step):
        self.values.append(values["loss"])


@pytest.fixture(scope="module")
def process_group():
    import deepspeed

    from training.loop import skip_compiled_collectives

    patch = pytest.MonkeyPatch()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    for name, value in (alone | {"DS_ACCELERATOR": "cpu"}).items():
        patch.setenv(name, value)
    skip_compiled_collectives()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.distributed.destroy_process_group()
    patch.undo()


def small_run(
    demo, output, *, stage, num_updates, zero_stage, global_batch_size=4, num_steps=6, changes=()
) -> list[float]:
    """Losses of the updates that this call did, on the demo's shards."""
    from training.loop import WorkerContext, train

    values = load_yaml(f"configs/demo/train_stage{stage}.yaml") | {
        "output": str(output),
        "data": [str(demo.out / "shards" / "train")],
        "init_from": str(demo.out / "stage1" / "model") if stage == 2 else None,
        "global_batch_size": global_batch_size,
        "num_updates": num_updates,
        "num_steps": num_steps,
        "runtime": {"micro_batch_size": 2, "zero_stage": zero_stage, "checkpoint_every": 2, "keep_checkpoints": 2},
    }
    values |= dict(changes)
    config = parse_config(values, TrainConfig, where="test")
    losses = Losses()
    manifests = [Manifest.load(uri) for uri in config.data]
    train(config, manifests, initial_model(config), WorkerContext(0, 1, "cpu", {}, tracker=losses))
    return losses.values


@pytest.mark.parametrize(("stage", "zero_stage"), [(1, 0), (1, 2), (2, 1)])
def test_resumed_equals_uninterrupted_bit_by_bit(demo, process_group, tmp_path, stage, zero_stage):
    whole = small_run(demo, tmp_path / "whole", stage=stage, num_updates=4, zero_stage=zero_stage)
    parts = small_run(demo, tmp_path / "parts", stage=stage, num_updates=2, zero_stage=zero_stage)
    parts += small_run(demo, tmp_path / "parts", stage=stage, num_updates=4, zero_stage=zero_stage)
    assert parts == whole
    assert len(set(whole)) == 4
    assert_equal_ends(tmp_path)


def test_v2s_decoder_with_dino_and_lpips_resumes_bit_by_bit(demo, process_group, tmp_path, monkeypatch):
    """The heads' spectral norms are part of the state; LPIPS and GAN come in at the third update."""
    monkeypatch.setattr("training.steps.load_dino", small_dino)
    monkeypatch.setattr("training.steps.load_lpips", seeded_lpips)
    loss = {"reconstruction": "l2", "perceptual": "lpips", "discriminator": "dino", "gan_weight": 0.05}
    loss |= {"adaptive": False, "divide_by_batch": False, "perceptual_start_update": 2, "gan_start_update": 2}
    changes = {"init_from": None, "model": {"preset": "tiny", "family": "v2"}, "decoder_loss": loss}
    changes |= {"start_from": "lr", "optimizer": {"learning_rate": 1e-3, "clip_norm": 1.0}}
    run = partial(small_run, demo, stage=2, zero_stage=1, num_steps=1, changes=changes)
    whole = run(tmp_path / "whole", num_updates=4)
    assert run(tmp_path / "parts", num_updates=2) + run(tmp_path / "parts", num_updates=4) == whole
    assert len(set(whole)) == 4
    assert_equal_ends(tmp_path)


def assert_equal_ends(tmp_path) -> None:
    ends = [load_checkpoint(complete_checkpoints(str(tmp_path / name))[-1]).tensors for name in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys()
    for file in ends[0]:
        assert all(torch.equal(ends[0][file][name], ends[1][file][name]) for name in ends[0][file]), file


def test_a_checkpoint_goes_on_under_another_zero_stage(demo, process_group, tmp_path):
    whole = small_run(demo, tmp_path / "a", stage=1, num_updates=4, zero_stage=1)
    parts = small_run(demo, tmp_path / "b", stage=1, num_updates=2, zero_stage=1)
    parts += small_run(demo, tmp_path / "b", stage=1, num_updates=4, zero_stage=0)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_an_incomplete_checkpoint_is_passed_over(demo, process_group, tmp_path):
    whole = small_run(demo, tmp_path / "a", stage=1, num_updates=4, zero_stage=1)
    newest = complete_checkpoints(str(tmp_path / "a"))[-1]
    shutil.rmtree(tmp_path / "a" / "model", ignore_errors=True)
    (tmp_path / "a" / "checkpoints" / newest.rsplit("/", 1)[-1] / "complete.json").unlink()
    assert small_run(demo, tmp_path / "a", stage=1, num_updates=4, zero_stage=1) == whole[2:]


def test_two_workers_train_on_the_same_batches_as_one(demo, process_group, tmp_path):
    """The demo ran on two gloo workers; one process gives the same losses."""
    client = MlflowClient(f"sqlite:///{demo.out}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ccsr-demo").experiment_id], "tags.`ccsr.stage` = '1'")
    two = [point.value for point in client.get_metric_history(runs[0].info.run_id, "loss")][:3]
    from training.loop import WorkerContext, train

    values = load_yaml("configs/demo/train_stage1.yaml") | {"output": str(tmp_path), "num_updates": 3}
    values |= {"data": [str(demo.out / "shards" / "train")], "runtime": {"micro_batch_size": 4}}
    config = parse_config(values, TrainConfig, where="test")
    one = Losses()
    manifests = [Manifest.load(uri) for uri in config.data]
    train(config, manifests, initial_model(config), WorkerContext(0, 1, "cpu", {}, tracker=one))
    assert one.values == pytest.approx(two, rel=1e-5)
