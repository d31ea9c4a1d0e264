"""A phase of the tiny base's pretraining that was stopped resumes as if it had not been."""

import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from benchmarks.pretrain_phase import Phase, rank


def train(out, *stops):
    """The averaged weight after the last of `stops`, each the end of one process."""
    for stop in stops:
        network = nn.Linear(2, 1, bias=False)
        nn.init.ones_(network.weight)

        def loss(update, network=network):
            return {"loss": (network(torch.tensor([[1.0, update % 3]])) - 5).square().mean()}

        phase = Phase("line", {"line": network}, 0.1, out)
        phase.run(stop, 2, loss, lambda network=network: {"first": network.weight[0, 0].item()})
    return network.weight


def logged(out):
    return [json.loads(line) for line in (out / "line.jsonl").read_text().splitlines()]


def test_a_stopped_phase_resumes_exactly(tmp_path):
    (whole := tmp_path / "whole").mkdir()
    (parts := tmp_path / "parts").mkdir()
    assert torch.equal(train(whole, 8), train(parts, 4, 6, 8))
    assert logged(whole) == logged(parts)
    assert [line["update"] for line in logged(whole)] == [0, 2, 4, 6, 8]


def test_the_result_is_the_average_that_was_validated(tmp_path):
    weight = train(tmp_path, 8)
    assert weight[0, 0].item() == pytest.approx(logged(tmp_path)[-1]["first"], abs=1e-5)
    assert torch.equal(train(tmp_path, 8), weight)  # nothing is left to do
    assert not torch.equal(
        Phase("line", {"line": nn.Linear(2, 1, bias=False)}, 0.1, tmp_path).networks["line"].weight, weight
    )


def train_half(others, out):
    """Train as rank 1 of two, or as rank 0 if `others` is None, on every second row of what one process alone sees."""
    group = {"rank": int(others is not None), "world_size": 2, "timeout": timedelta(seconds=120)}
    dist.init_process_group("gloo", init_method=f"file://{out}/store", **group)
    try:
        trained_on(lambda update: [2 * update + rank()], out)
    finally:
        dist.destroy_process_group()


def trained_on(rows_of, out):
    network = nn.Linear(2, 1, bias=False)
    nn.init.ones_(network.weight)

    def loss(update):
        rows = torch.tensor([[1.0, row % 3] for row in rows_of(update)])
        return {"loss": (network(rows) - 5).square().mean()}

    Phase("line", {"line": network}, 0.1, out).run(6, 2, loss, lambda: {"first": network.weight[0, 0].item()})


def test_two_processes_train_as_one_with_both_batches(tmp_path):
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    trained_on(lambda update: [2 * update, 2 * update + 1], one)
    second = torch.multiprocessing.spawn(train_half, (two,), nprocs=1, join=False)
    try:
        train_half(None, two)
    finally:
        assert second.join(), "it raises what rank 1 raised"
    assert [line["first"] for line in logged(two)] == pytest.approx([line["first"] for line in logged(one)], abs=1e-5)
    assert [line["update"] for line in logged(two)] == [0, 2, 4, 6]  # rank 0 alone writes
