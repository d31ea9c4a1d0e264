"""A phase of the tiny base's pretraining that was stopped resumes as if it had not been."""

import json

import pytest
import torch
from torch import nn

from benchmarks.pretrain_phase import Phase


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
