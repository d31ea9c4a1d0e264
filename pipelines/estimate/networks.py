"""`ccsr estimate`: the parameters of the networks of a config or a preset."""

from collections.abc import Sequence

from infra.display.table import Table
from training.config import TrainConfig


def networks_table(config: TrainConfig) -> Table:
    """The parameters of the networks that a train config has, and which of them it trains."""
    from training.run.cost.parameters import discriminator_table, parameter_table, regulariser_row

    stage = "stage2" if config.stage == 2 else "stage1"
    rows = [
        row
        for row in parameter_table(config.model.preset, config.model.family)
        if not str(row["name"]).startswith("v1 only") and (row["name"] != "feature wrapping" or config.stage == 2)
    ]
    table = Table(("part", "parameters", "trained"), f"{config.model.preset}, {config.model.family}: networks")
    for row in rows:
        table.add(row["name"], row["parameters"], "yes" if row[stage] else "")
    table.add("a model directory", _total(rows), "")
    table.add(f"trained by this config (stage {config.stage})", _total([row for row in rows if row[stage]]), "")
    if config.learns_images:
        patch, *dino = discriminator_table(config.decoder_loss.discriminator_width)
        critics = [patch] if config.decoder_loss.discriminator == "patch" else dino
        for row in critics if config.vsd is None else [regulariser_row(config.model.preset)]:
            trained = row["stage1"] or row["stage2"]
            table.add(str(row["name"]).partition(": ")[2], row["parameters"], "yes" if trained else "")
    return table


def model_tables(preset: str) -> list[Table]:
    """The parameters of CCSR's networks and of the discriminators, counted on modules without memory."""
    from training.run.cost.parameters import PAPER_MILLIONS, discriminator_table, parameter_table

    rows = parameter_table(preset)
    table = Table(("part", "parameters", "trained in"), f"{preset}: networks")
    others = Table(table.columns, "discriminators")
    for one, listed in ((table, rows), (others, discriminator_table())):
        for row in listed:
            stages = (name for name, key in (("stages 0, 1", "stage1"), ("stage 2", "stage2")) if row[key])
            one.add(row["name"], row["parameters"], ", ".join(stages))
    shared = [row for row in rows if not str(row["name"]).startswith("v1 only")]
    table.add("a model directory", _total(shared), "")
    if preset == "tiny":
        return [table]
    table.add(f"CCSR v1 as published (paper: {PAPER_MILLIONS} M)", _total(rows), "")
    return [table, others]


def _total(rows: Sequence[dict[str, str | int | bool]]) -> int:
    return sum(int(row["parameters"]) for row in rows)
