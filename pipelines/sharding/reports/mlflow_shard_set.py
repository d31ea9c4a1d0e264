"""A shard set as a run of MLflow: dataset id, counts, quarantine by reason, data card and contact sheet."""

from collections import Counter
from typing import Any

from infra.config import parameters
from infra.errors import ClusterError, line_of
from infra.files.storage import join, name_of, read_bytes
from infra.mlflow.server import tracking_uri
from infra.mlflow.tracking import link, track
from infra.shards.manifest import Manifest
from pipelines.sharding.config import ShardConfig

FILES = "DATA_CARD.md", "contact_sheet.jpg"


def log_shard_set(config: ShardConfig, manifest: Manifest, run: dict[str, Any], rate: float | None) -> None:
    """Log a finished set and its `rate` in samples per second, if it was made just now; again on the same run if it was
    logged before. ClusterError where the server is away, saying how to send it later."""
    if config.tracking is None:
        return
    counts = {"samples": manifest.num_samples, "quarantined": len(manifest.quarantined)}
    counts |= Counter(f"quarantined/{one['reason']}" for one in manifest.quarantined)
    counts |= {f"dropped/{reason}": count for reason, count in manifest.facts.get("dropped", {}).items()}
    if config.dedupe is not None:
        counts["dropped/near_duplicates"] = manifest.facts["near_duplicates"]
    speed = {"speed/samples_per_second": rate} if rate else {}
    tags = {"ccsr.dataset_id": manifest.dataset_id}
    try:
        with track(config.tracking, run, tags, output=config.output, parameters=parameters(config)) as tracker:
            tracker.dataset(name_of(config.output), manifest.dataset_id, config.output, "sharding")
            tracker.metrics(counts | speed)
            own = tracker.client.get_run(tracker.run_id)
            tracker.note(
                f"{manifest.num_samples:,} samples, {counts['quarantined']} quarantined; dataset {manifest.dataset_id}",
                f"{' and '.join(link(own, file) for file in FILES)} show what is in it.",
                f"Output: `{config.output}`",
            )
            for file in FILES:
                tracker.file(file, read_bytes(join(config.output, file)))
    except ClusterError as error:
        raise ClusterError(
            f"the shard set is complete, but MLflow did not take it ({line_of(error)})",
            where=f"{config.output} to {tracking_uri(config.tracking)}",
            todo="when the server answers, run the same command again: nothing is made anew",
        ) from error
