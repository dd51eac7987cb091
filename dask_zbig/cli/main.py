"""``dask-zbig``: finds the command, imports its module only, and shows errors as one line, without a traceback."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import keyword
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import click
from ZODB.POSException import POSError

from dask_zbig.errors import ZBigError

__all__ = ["main"]

#: Each is a function in a module, both of its name; of a name that Python reserves, with "_" after it.
_COMMANDS = ("check", "compact", "config", "demo", "export", "gc", "import", "info", "ls", "pack", "serve")
_VERBOSE = "dask_zbig.verbose"


def _identifier(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


def _be_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSE] = True


def _verbose_option() -> click.Option:
    """The same for the group and for each command, so that it may stand anywhere."""
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_be_verbose,
        help="Show where an error came from.",
    )


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [n for n in _COMMANDS if importlib.util.find_spec(f"dask_zbig.cli.{_identifier(n)}") is not None]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"dask_zbig.cli.{_identifier(name)}")
        command: click.Command = getattr(module, _identifier(name))
        if not any("--verbose" in p.opts for p in command.params):
            command.params.append(_verbose_option())
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with contextlib.nullcontext() if ctx.meta.get(_VERBOSE) else _quiet():
                return super().invoke(ctx)
        except (ZBigError, POSError, OSError, click.ClickException) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # `| head`: click ends quietly
            if ctx.meta.get(_VERBOSE):
                traceback.print_exc()
            if isinstance(error, click.ClickException):
                raise
            raise click.ClickException(_one_line(error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries log, of an error that is told in one line, goes nowhere unless a command configures logging."""
    last, logging.lastResort = logging.lastResort, None
    raising, logging.raiseExceptions = logging.raiseExceptions, False  # (else it would say that it has no handler)
    try:
        yield
    finally:
        logging.lastResort, logging.raiseExceptions = last, raising


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, ZBigError):
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, ZBigError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())


_EPILOG = """\b
URI is a path, a URI such as `dask-zbig serve` prints, or ZConfig text.
Completion of commands and options, for bash, zsh or fish:
  eval "$(_DASK_ZBIG_COMPLETE=bash_source dask-zbig)"
"""


@click.group(
    name="zbig",
    cls=_Group,
    params=[_verbose_option()],
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="dask_zbig")
def main() -> None:
    """Transactional NumPy arrays bigger than RAM and disk, in ZODB."""


if __name__ == "__main__":
    main()
