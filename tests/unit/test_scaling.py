"""The scaling model by hand: what an update is spent on, and which loss the table names."""

import pytest
from test_train_estimate import config

from pipelines.estimate.scaling import Limits, Parts, scaling_table, update_seconds
from pipelines.estimate.training import Assumed, estimate_training
from training.run.cost.requirements import StepCost

LIMITS = Limits(
    ranks_per_node=4,
    link_bytes_per_second=100.0,
    node_bytes_per_second=10.0,
    hop_seconds=0.0,
    storage_requests_per_second=8.0,
    storage_bytes_per_second=1e9,
    host_bytes_per_second=50.0,
)


def test_an_update_by_hand() -> None:
    parts = Parts(sample_seconds=1.0, gradient_bytes=40.0, checkpoint_bytes=100.0, checkpoint_every=10)
    found = update_seconds(parts, LIMITS, 1, 16)
    assert found == {"compute": 16, "exchange": 0, "degradation": 0, "storage": 0, "checkpoints": pytest.approx(0.2)}
    found = update_seconds(parts, LIMITS, 8, 16)
    # Two rings: of four in a node, of two nodes; 16 reads take the two seconds that the computation takes.
    assert (found["compute"], found["exchange"]) == (2, pytest.approx(2 * 0.75 * 40 / 100 + 2 * 0.5 * 40 / 10))
    assert found["storage"] == 0
    assert update_seconds(parts, LIMITS, 16, 160)["storage"] == pytest.approx(20 - 10 - 0.6 - 2 * 0.75 * 4)


def test_zero_2_exchanges_after_each_micro_batch_of_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(sample_seconds=1.0, gradient_bytes=100.0, exchange_every=4)
    one_exchange = 2 * 0.5 * 100 / 100
    assert [update_seconds(parts, LIMITS, 2, size)["exchange"] for size in (8, 16, 36)] == [
        one_exchange, 2 * one_exchange, 5 * one_exchange
    ]  # fmt: skip
    monkeypatch.setattr("training.run.cost.requirements.step_cost", lambda config: StepCost(10**9, 50, 4e12, 400))
    monkeypatch.setattr("training.run.cost.requirements.ingest_seconds", lambda config: 0.0)

    def speeds(stage: int) -> list[float]:
        settings = config(global_batch_size=64, precision="bf16", runtime={"num_workers": 2, "zero_stage": stage})
        (first,) = estimate_training(settings, Assumed("A100", mfu=0.5), [])
        return [row[2].value for row in scaling_table(settings, first, [2, 16]).rows]

    (two, sixteen, grown), (of_zero_1, same, _) = speeds(2), speeds(1)
    assert two < of_zero_1
    assert sixteen == same, "a micro-batch a GPU: one exchange under either"
    assert grown < 8 * two


@pytest.mark.parametrize(("cpus", "wait"), [(1, 3.0), (2, 1.0), (4, 0.0)])
def test_degradation_shows_only_where_it_is_slower_than_the_gpu(cpus: int, wait: float) -> None:
    parts = Parts(sample_seconds=0.5, gradient_bytes=0, ingest_seconds=2.0, ingest_cpus=cpus)
    assert update_seconds(parts, LIMITS, 1, 2)["degradation"] == wait


def test_ranks_share_cores() -> None:
    parts = Parts(sample_seconds=1.0, gradient_bytes=10.0, fixed_seconds=0.5)

    def seconds(num_ranks: int) -> float:
        limits = Limits(ranks_per_node=num_ranks, link_bytes_per_second=20.0, cores=2, hop_seconds=0.0)
        return sum(update_seconds(parts, limits, num_ranks, 8).values())

    one, two, four = map(seconds, (1, 2, 4))
    assert (one, two, four) == (8.5, pytest.approx(4.5 + 0.5), pytest.approx(2 * (2.5 + 0.75)))


def test_the_table_names_the_largest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run.cost.requirements.step_cost", lambda config: StepCost(10**8, 50, 4e12, 400))
    monkeypatch.setattr("training.run.cost.requirements.ingest_seconds", lambda config: 0.02)
    settings = config(global_batch_size=96, precision="bf16", runtime={"num_workers": 4, "ingest_cpus": 1})
    (first,) = estimate_training(settings, Assumed("A100", mfu=0.5), [])
    rows = scaling_table(settings, first, [8, 256]).rows
    names = [[getattr(value, "value", value) for value in row] for row in rows]
    assert [(row[0], row[1]) for row in names] == [(8, 96), (8, 192), (256, 96), (256, 6144)]
    assert names[0][4].startswith("degradation")
    assert names[0][6].startswith("runtime.ingest_cpus: 2,")  # 0.02 s times 1.46, at 39 samples/s
    assert names[2][4:] == ["96 samples cannot be shared by 256", None, "global_batch_size: 6144"]
    assert names[3][3] < names[3][5] <= 1
