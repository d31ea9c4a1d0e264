"""Two drivers write one output at once: both end well, and the set is that of one."""

from pathlib import Path

from shard_jobs import ShardJob, num_records, require_undisturbed, wait, wait_until, writing_workers


def test_two_drivers_racing_on_one_folder_make_one_set(photos: Path, whole: str, address: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    first = ShardJob(photos, output, address).start()
    wait_until(first, lambda: num_records(output) >= 1)
    # Held in the middle of its work until the second driver has overtaken it, so that they surely meet.
    held = wait_until(first, writing_workers)[0]
    held.suspend()
    before = num_records(output)
    second = ShardJob(photos, output, address).start()
    wait_until(second, lambda: num_records(output) >= before + 3)
    held.resume()
    for driver in (first, second):
        code, printed = wait(driver)
        assert code == 0, printed
    require_undisturbed(output, whole)
