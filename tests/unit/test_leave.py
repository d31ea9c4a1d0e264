"""What a pod does before it ends: drivers first, then Ray; nothing else."""

import pytest

from infra.cluster.leave import is_driver, is_node


@pytest.mark.parametrize(
    ("command", "driver", "node"),
    [
        ("/opt/bin/python -m pipelines.cli.main train -c train.yaml", True, False),
        ("/usr/bin/python3 /usr/local/bin/ccsr shard -c shard.yaml", True, False),
        ("/usr/bin/python3.11 /usr/local/bin/ray start --address=head:6379 --block", False, True),
        ("/usr/bin/python3 /usr/local/bin/ray job submit -- ccsr train", False, False),
        ("bash -c ulimit -n 65536; ray start --block", False, False),
        ("/bin/sh -c exec python -m pipelines.cli.main train", False, False),
        ("ray::RayTrainWorker", False, False),
        ("", False, False),
    ],
)
def test_who_is_asked_to_end(command: str, driver: bool, node: bool) -> None:
    assert (is_driver(command.split()), is_node(command.split())) == (driver, node)
