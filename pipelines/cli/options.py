"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Option("-c", "--config", help="The run's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a value: a.b=c. May be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, where and how long; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
