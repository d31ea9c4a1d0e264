"""`continue_from`: a run that begins with another run's checkpoint, under a config that may differ."""

import re
from typing import Any

from infra.errors import ConfigError, ModelError
from infra.files.storage import join, read_json, short_hash
from infra.mlflow.models import run_tag
from infra.mlflow.server import TrackingConfig
from infra.run import read_run
from training.config import TrainConfig
from training.run.checkpoint import complete_checkpoints, position_of


def continued(config: TrainConfig, init_from: str | None) -> tuple[str, dict[str, Any]]:
    """The checkpoint that `continue_from` names, and its identity. Where it is gone, as run.json recorded it, once the
    run has its own checkpoints. Errors as of `find_checkpoint` and `check_continued`."""
    named = str(config.continue_from)
    try:
        uri = find_checkpoint(named, config.tracking)
    except ModelError:
        recorded = read_run(config.output)["inputs"] if complete_checkpoints(config.output) else {}
        if "continue_from" not in recorded:
            raise
        return named, recorded["continue_from"]
    return uri, check_continued(uri, config, init_from)


def find_checkpoint(uri: str, tracking: TrackingConfig) -> str:
    """The checkpoint that RUN[@POSITION] names: of a run's folder or runs:/ID, without position the newest complete
    one. ModelError where there is none."""
    found = re.fullmatch(r"(.+?)(?:@(\d+))?", uri)
    run, position = found.groups() if found else (uri, None)
    if run.startswith("runs:/"):
        run = run_tag(run, "ccsr.output", tracking)
    present = complete_checkpoints(run)
    wanted = present[-1:] if position is None else [join(run, "checkpoints", f"{int(position):012d}")]
    if not wanted or wanted[0] not in present:
        positions = ", ".join(str(position_of(one)) for one in present)
        raise ModelError(
            f"this run has no complete checkpoint{f' at position {position}' if position else ''}",
            where=join(run, "checkpoints"),
            todo=f"write `continue_from: RUN@POSITION` with one of: {positions}" if present else "check its folder",
        )
    return wanted[0]


def check_continued(uri: str, config: TrainConfig, init_from: str | None) -> dict[str, Any]:
    """The identity of a checkpoint to continue from: its run's fingerprint, its position, its bytes' hash.

    ConfigError where the config cannot continue it: another starting model, stage or networks, a global batch that its
    position is no multiple of, or no update left to do.
    """
    facts = read_json(join(uri, "state.json"))
    before = {**facts.get("config", {}), "init_from": facts.get("init_from")}
    now = {"stage": config.stage, "model": config.model.model_dump(mode="json"), "init_from": init_from}
    wrong = [f"`{name}` is {now[name]}, was {before.get(name)}" for name in now if now[name] != before.get(name)]
    position, batch = facts["position"], config.global_batch_size
    if position % batch:
        wrong.append(f"its position, {position}, is no multiple of global_batch_size, {batch}")
    if position >= config.num_updates * batch:
        wrong.append(f"it has done {position // batch} updates, num_updates is {config.num_updates}")
    if wrong:
        raise ConfigError(
            f"this checkpoint cannot be continued: {'; '.join(wrong)}",
            where=f"continue_from: {uri}",
            todo="keep its stage, model and init_from, and raise num_updates; or give its model as init_from",
        )
    digest = short_hash(join(uri, "complete.json"))
    return {"fingerprint": facts.get("fingerprint"), "position": position, "checkpoint": digest}
