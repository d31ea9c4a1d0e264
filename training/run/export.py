"""The model that a run starts from, and the model directories that it writes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from infra.errors import ModelError
from infra.files.publish import shared_copy, temporary_folder, write_bytes
from infra.files.storage import exists, join, list_files, read_json
from training.config import TrainConfig
from training.models import CcsrModel, build_model, export_trained, fetch_model, publish_model, save_model
from training.run.checkpoint import Newest, best_checkpoint, load_checkpoint, load_newest, position_of

RAW = "model_raw"


def initial_model(config: TrainConfig) -> CcsrModel:
    """The fp32 model that training starts from. ModelError if the directory's networks are not the config's."""
    if not config.init_from:
        return _prepared(build_model(config.model, config.seed), config)
    model = fetch_model(config.init_from)
    if model.config != config.model:
        raise ModelError(
            f"the model there is {model.config.model_dump()}, the config asks for {config.model.model_dump()}",
            where=config.init_from,
            todo="set `model` to what the directory holds, or start from another one",
        )
    return _prepared(model, config)


def _prepared(model: CcsrModel, config: TrainConfig) -> CcsrModel:
    if config.stage == 2:
        model.prepare_stage2(config.seed)
    return model


def last_checkpoint(config: TrainConfig) -> Newest | None:
    """The checkpoint of a finished run, if it is intact."""
    newest = load_newest(config.output, lambda text: print(f"warning: {text}", file=sys.stderr))
    return newest if newest and newest.state.facts["num_updates"] == config.num_updates else None


def export_run(config: TrainConfig, last: Newest | None, model_uri: str) -> None:
    """OUT/model from the last checkpoint, OUT/best where some were validated, OUT/model_raw with `runtime.export_raw`;
    trained.json says of which update."""
    if last is None:
        raise ModelError(
            f"the checkpoint after {config.num_updates} updates is gone or damaged",
            where=join(config.output, "checkpoints"),
            todo="run the same command again: it resumes from the one before",
        )
    place, state, damaged = last
    best = best_checkpoint(config.output, damaged, config.best_by)
    if best is not None:
        weights = (state if best == place else load_checkpoint(best)).model_weights
        write_model(config, weights, join(config.output, "best"))
    if config.runtime.export_raw:
        write_model(config, state.tensors["weights"], join(config.output, RAW))
    write_model(config, state.model_weights, model_uri)
    record = {name: state.facts[name] for name in ("num_updates", "position")}
    write_bytes(join(config.output, "trained.json"), json.dumps(record).encode())


def exported_models(config: TrainConfig) -> dict[int, str]:
    """Position -> model directory of an output; of several at one position the one that stays longest."""
    output, suffix = config.output, "/ccsr.json"
    exports = [file.removesuffix(suffix) for file in list_files(join(output, "exports")) if file.endswith(suffix)]
    models = {position_of(place): place for place in exports}
    record, best = join(output, "trained.json"), best_checkpoint(output, (), config.best_by)
    if exists(record):
        models.setdefault(read_json(record)["position"], join(output, "model"))
    if best and exists(join(output, f"best{suffix}")):
        models.setdefault(position_of(best), join(output, "best"))
    return models


def write_model(config: TrainConfig, weights: dict[str, Any], uri: str) -> None:
    """The starting model with `weights` in place of the trained part, as a model directory that replaces one there."""
    facts = config.model.facts
    part, subparts = (facts.decoder, facts.decoder_parts) if config.stage == 2 else (facts.adapter, ())
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in weights.items()}
    with temporary_folder("model") as folder, _base(config, part, folder) as base:
        export_trained(base, part, subparts, own, folder / "model")
        publish_model(folder / "model", uri)


@contextmanager
def _base(config: TrainConfig, part: str, folder: Path) -> Iterator[Path]:
    """A model directory that an export changes: the one that training began with; its networks written to `folder`
    where they were random, or the stage has added `part`."""
    with shared_copy(config.init_from, "ccsr.json") if config.init_from else nullcontext(folder) as base:
        if not (base / part).is_dir():
            base = folder / "initial"
            save_model(initial_model(config), base)
        yield base
