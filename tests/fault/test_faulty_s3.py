"""An S3 server that is busy, drops connections and loses answers, and two drivers at one place on S3."""

from pathlib import Path

import pytest
import s3fs
from faulty_server import faulty_server
from shard_jobs import ShardJob, require_undisturbed, wait

from infra.files import storage
from infra.files.publish import publish_if_absent, put_if_absent
from infra.files.storage import join, list_files, read_bytes
from tests.conftest import S3_SETTINGS


@pytest.mark.parametrize(
    ("fate", "num_parts"), [("busy", 1), ("dropped before", 1), ("dropped after", 1), ("dropped after", 3)]
)
def test_what_is_put_through_a_failed_call_is_there_once(
    fate: str, num_parts: int, s3: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put whose answer was lost is refused when it is tried again; its bytes are nevertheless in place."""
    if num_parts > 1:
        monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    content = bytes(11 << 20 if num_parts > 1 else 1000)
    (tmp_path / "file").write_bytes(content)
    for name, value in S3_SETTINGS.items():
        monkeypatch.setenv(name, value)
    with faulty_server(s3_server, deck=[fate, "passed"]) as server, monkeypatch.context() as patch:
        client = s3fs.S3FileSystem(endpoint_url=server.address, skip_instance_cache=True, use_listings_cache=False)
        patch.setattr(storage, "s3_filesystem", lambda: client)
        publish_if_absent(tmp_path / "file", join(s3, "file"))
        put_if_absent(join(s3, "small"), b"small")
        assert not put_if_absent(join(s3, "small"), b"other")
    assert server.counts["PUT", fate] > 0
    assert num_parts == 1 or server.counts["POST", fate] > 0
    assert list_files(s3) == {join(s3, "file"): len(content), join(s3, "small"): 5}
    assert read_bytes(join(s3, "file")) == content
    assert read_bytes(join(s3, "small")) == b"small"


@pytest.mark.slow
def test_a_faulty_server_changes_nothing_in_the_result(photos: Path, whole: str, s3: str, s3_server: str) -> None:
    with faulty_server(s3_server) as server:
        code, printed = ShardJob(photos, s3, environment={**S3_SETTINGS, "AWS_ENDPOINT_URL": server.address}).run()
    assert code == 0, printed
    for fate in ("busy", "dropped before", "dropped after"):
        assert server.counts["PUT", fate] > 0
    assert sum(count for (_, fate), count in server.counts.items() if fate == "busy") * 6 > server.counts.total()
    require_undisturbed(s3, whole)


@pytest.mark.slow
def test_two_drivers_racing_on_s3_make_one_set(photos: Path, whole: str, s3: str, s3_server: str) -> None:
    environment = {**S3_SETTINGS, "AWS_ENDPOINT_URL": s3_server}
    drivers = [ShardJob(photos, s3, environment=environment).start() for _ in range(2)]
    for driver in drivers:
        code, printed = wait(driver)
        assert code == 0, printed
    require_undisturbed(s3, whole)
