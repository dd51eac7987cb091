"""``dask-zbig``: finds the command, imports its module only, and shows our errors without a traceback."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import click

from dask_zbig.errors import ZBigError

__all__ = ["main"]

_COMMANDS = ("demo", "gc", "serve")  # each is a function in a module, both of its name


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _COMMANDS if importlib.util.find_spec(f"dask_zbig.cli.{name}") is not None]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(importlib.import_module(f"dask_zbig.cli.{name}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZBigError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(package_name="dask_zbig")
def main() -> None:
    """Transactional NumPy arrays bigger than RAM and disk, in ZODB."""


if __name__ == "__main__":
    main()
