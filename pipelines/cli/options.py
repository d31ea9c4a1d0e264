"""Options that several commands share."""

from typing import Annotated

import typer

from infra.locations import location

ConfigFile = Annotated[str, typer.Option("-c", "--config", parser=location, help="The run's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a value: a.b=c. May be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
