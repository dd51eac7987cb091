"""``dask-zbig config``: every setting, its value, its default, what it means, and how to set it."""

from __future__ import annotations

import json
from typing import Any

import click
import dask.config

from dask_zbig import uris
from dask_zbig.cli.common import as_json_option
from dask_zbig.config import OPTIONS, defaults_yaml, get
from dask_zbig.errors import OptionError

__all__ = ["config"]


@click.command()
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the defaults as a file for ~/.config/dask/zbig.yaml.")
@as_json_option
def config(as_yaml: bool, as_json: bool) -> None:
    """List all settings: their values here and now, their defaults, and what they mean.

    They are part of Dask's configuration, under `zbig`: set them in ~/.config/dask/zbig.yaml, in the environment
    (DASK_ZBIG__LOAD_TIMEOUT=60), or in a program (dask.config.set). Passwords in URIs are not shown.

    Exit status: 1 if a value cannot be read.
    """
    if as_yaml:
        click.echo(defaults_yaml(), nl=False)
        return
    rows = [_row(name) for name in OPTIONS]
    click.echo(json.dumps(rows) if as_json else "\n\n".join(map(_text, rows)))
    if any(row["error"] for row in rows):
        raise click.exceptions.Exit(1)


def _row(name: str) -> dict[str, Any]:
    option = OPTIONS[name]
    value, error = dask.config.get(f"zbig.{name}", default=option.default), None
    try:
        get(name)  # type: ignore[call-overload]
    except OptionError as problem:
        error = str(problem)
    return {
        "name": f"zbig.{name}",
        "value": _masked(name, value),
        "default": option.default,
        "changed": value != option.default,
        "meaning": option.doc,
        "environment": f"DASK_ZBIG__{name.replace('.', '__').replace('-', '_').upper()}",
        "error": error,
    }


def _masked(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _masked(name, text) for key, text in value.items()}
    if not isinstance(value, str):
        return value
    if "password" in name and value.partition(":")[0] not in ("env", "file", "command"):
        return "***"  # it should say where the password is; it may be one
    return uris.mask(value)


def _text(row: dict[str, Any]) -> str:
    shown = "not set" if row["value"] is None else row["value"]
    default = "" if not row["changed"] else f"  (default: {'not set' if row['default'] is None else row['default']})"
    lines = [f"{row['name']}: {shown}{default}", f"    {row['meaning']}", f"    {row['environment']}"]
    if row["error"]:
        lines.append(f"    ERROR: {row['error']}")
    return "\n".join(lines)
