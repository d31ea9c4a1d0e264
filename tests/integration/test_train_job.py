"""`ccsr train` as a job: a run is made longer, exported on its way, and names the next stage's start by its id."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from infra.errors import ConfigError
from infra.files.storage import read_json
from tests.training_runs import noise_shards, train_config
from training.models import load_model, model_id
from training.run.checkpoint import complete_checkpoints, load_checkpoint
from training.run.driver import run_train

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]


def test_a_run_is_made_longer_and_its_id_starts_the_next_stage(tmp_path):
    data = noise_shards(tmp_path / "set")
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    runtime = {"checkpoint_every": 1, "export_every": 2}

    def stage1(num_updates: int) -> str:
        config = train_config(data, tmp_path / "one", num_updates=num_updates, tracking=tracking, runtime=runtime)
        return run_train(config)

    place = Path(stage1(2))
    short = model_id(str(place))
    assert stage1(2) == str(place)
    assert model_id(str(place)) == short, "a finished run is not touched"
    assert [path.name for path in (tmp_path / "one" / "exports").iterdir()] == [f"{8:012d}"]
    exported = load_model(tmp_path / "one" / "exports" / f"{8:012d}").controlnet.state_dict()
    assert all((tensor == exported[name]).all() for name, tensor in load_model(place).controlnet.state_dict().items())

    stage1(3)
    assert model_id(str(place)) != short
    assert read_json(str(tmp_path / "one" / "trained.json")) == {"num_updates": 3, "position": 12}
    state = load_checkpoint(complete_checkpoints(str(tmp_path / "one"))[-1])
    trained = load_model(place).controlnet.state_dict()
    assert all((trained[name] == tensor).all() for name, tensor in state.tensors["weights"].items())
    with pytest.raises(ConfigError, match="has done 3 updates, the config ends at 2"):
        stage1(2)

    client = MlflowClient(tracking["uri"])
    (run,) = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id])
    assert run.data.tags["ccsr.num_updates"] == "3"
    changes = {"stage": 2, "init_from": f"runs:/{run.info.run_id}", "tracking": tracking}
    next_stage = train_config(data, tmp_path / "two", num_updates=1, **changes)
    started = load_model(run_train(next_stage)).controlnet.state_dict()
    assert all((trained[name] == tensor).all() for name, tensor in started.items())
    assert read_json(str(tmp_path / "two" / "run.json"))["inputs"]["init_from"] == model_id(str(place))
