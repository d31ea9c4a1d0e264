"""Sharding to Ceph's S3 server, which checks secrets and refuses conditional puts in its own way.

Runs where the server is installed: `apt-get install --no-install-recommends radosgw ceph-osd ceph-mon ceph-common`.
"""

import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import s3fs
from shard_jobs import ShardJob, require_undisturbed

from infra.files import storage
from infra.files.publish import put_if_absent

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason=f"takes Ceph's {', '.join(PROGRAMS)}"),
]
CONFIG = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port}]
mon_data = {folder}/mon
osd_data = {folder}/osd
run_dir = {folder}
admin_socket = {folder}/$name.asok
keyring = {folder}/keyring
log_file =
mon_cluster_log_file =
osd_objectstore = memstore
osd_pool_default_size = 1
osd_pool_default_pg_num = 8
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
osd_crush_chooseleaf_type = 0
"""


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that connects to a server with one user, a bucket `bucket` and nothing on disk."""
    folder = tmp_path_factory.mktemp("ceph")
    (folder / "mon").mkdir()
    (folder / "osd").mkdir()
    fsid, osd, port, s3_port = str(uuid.uuid4()), str(uuid.uuid4()), free_port(), free_port()
    config, keys = folder / "ceph.conf", folder / "keyring"
    config.write_text(CONFIG.format(fsid=fsid, port=port, folder=folder))

    def call(program: str, *arguments: object) -> None:
        subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, timeout=120)

    with ExitStack() as stack:

        def serve(program: str, *arguments: str) -> None:
            with open(folder / f"{program}.log", "w") as log:
                command = [program, "-c", str(config), "-f", *arguments]
                process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{port}]", folder / "monmap")
        call("ceph-authtool", "-C", keys, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "osd.0"):
            call("ceph-authtool", keys, "--gen-key", "-n", name, "--cap", "mon", "allow *", "--cap", "osd", "allow *")
        call("ceph-mon", "-c", config, "--mkfs", "-i", "a", "--monmap", folder / "monmap", "--keyring", keys)
        serve("ceph-mon", "-i", "a")
        call("ceph", "-c", config, "osd", "new", osd)
        call("ceph-osd", "-c", config, "-i", "0", "--mkfs", "--osd-uuid", osd)
        serve("ceph-osd", "-i", "0")
        user = ("--uid", "test", "--display-name", "test", "--access-key", "key", "--secret", "right")
        call("radosgw-admin", "-c", config, "user", "create", *user)
        serve("radosgw", "-n", "client.admin", f"--rgw_frontends=beast endpoint=127.0.0.1:{s3_port}")
        environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "right",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", s3_port)):
            assert time.monotonic() < deadline, (folder / "radosgw.log").read_text()
            time.sleep(0.2)
        yield environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_sharding_to_a_server_that_checks_secrets(
    ceph: dict[str, str], photos: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ceph.items():
        monkeypatch.setenv(name, value)
    client = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    monkeypatch.setattr(storage, "s3_filesystem", lambda: client)
    client.mkdir("bucket")
    code, printed = ShardJob(photos, "s3://bucket/set", environment={"AWS_SECRET_ACCESS_KEY": "wrong"}).run()
    assert code == 5, printed
    assert "Traceback" not in printed
    assert "\n  where: s3://bucket/set/" in printed
    assert "\n  to do: " in printed
    assert not storage.list_files("s3://bucket/set")
    assert put_if_absent("s3://bucket/once", b"first")
    assert not put_if_absent("s3://bucket/once", b"second"), "a conditional put that is refused as EINVAL"
    code, printed = ShardJob(photos, "s3://bucket/set").run()
    assert code == 0, printed
    require_undisturbed("s3://bucket/set", whole)
