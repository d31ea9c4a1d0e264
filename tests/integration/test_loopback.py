"""A Ray that a command starts for itself is not to be reached from the network."""

import subprocess
import sys

import pytest

from tests.integration.conftest import REPOSITORY

SCRIPT = """
import ipaddress, os
import psutil
from infra.process.ray_runtime import ONE_MACHINE, RayConfig, ray_cluster

with ray_cluster(RayConfig(num_cpus=1)):
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    places = [one.laddr for process in ours for one in process.net_connections("inet") if one.status == "LISTEN"]
    addresses = [ipaddress.ip_address(place.ip.removeprefix("::ffff:")) for place in places]
    assert len(addresses) > 4, addresses
    assert all(address.is_loopback for address in addresses), addresses
    assert ONE_MACHINE not in os.environ
"""


@pytest.mark.slow
def test_all_ports_are_on_loopback():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
