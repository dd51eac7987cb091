"""Writes the pages of the reference that are made of the code: ``python docs/generate.py``. A test compares them."""

from __future__ import annotations

import inspect
import json
import pathlib
from collections.abc import Iterator

import click

from dask_zbig.cli import main as program
from dask_zbig.config import OPTIONS

HERE = pathlib.Path(__file__).parent / "reference"
_MADE = "<!-- Made by docs/generate.py: do not edit. -->\n"


def settings() -> str:
    """Every setting."""
    lines = [
        "# Settings",
        "",
        _MADE,
        "All settings are part of [Dask's configuration](https://docs.dask.org/en/stable/configuration.html), under",
        "`zbig`: in `~/.config/dask/zbig.yaml` or another of its YAML files, in the environment, or in a program",
        '(`dask.config.set({"zbig.load-timeout": "60 s"})`). Each process has its own: those of workers are set where',
        "the workers run. `dask-zbig config` shows what is in force, `dask-zbig config --yaml` prints all defaults.",
        "",
        "| setting | default | meaning | environment |",
        "|---|---|---|---|",
    ]
    for name, option in OPTIONS.items():
        default = "not set" if option.default is None else f"`{json.dumps(option.default)}`"
        variable = f"DASK_ZBIG__{name.replace('.', '__').replace('-', '_').upper()}"
        lines.append(f"| `zbig.{name}` | {default} | {option.doc} | `{variable}` |")
    lines += [
        "",
        "Times are numbers of seconds or texts as `30 s` and `24 h`; sizes are as `64 KiB`. A value that cannot be",
        "read is an `OptionError` that names the setting.",
        "",
        "## Dask's own settings that matter here",
        "",
        "| setting | what it does here |",
        "|---|---|",
        '| `array.chunk-size` | the size of `chunks="auto"` of `dz.from_zbigarray` |',
        "| `distributed.worker.memory.*` | when workers spill, pause and end; mapped arrays do not count |",
    ]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The help of every command."""
    lines = [
        "# Commands",
        "",
        _MADE,
        "`dask-zbig COMMAND`, or `dask zbig COMMAND`. Errors are one line and an exit status: 1, or 2 for a wrong",
        "usage; `-v` shows where they came from. `--json` prints what a script may read. Completion is set up as",
        "[told here](../howto/moving-data.md#completion-in-bash).",
        "",
    ]
    for name, command in _commands():
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        usage = " ".join(["dask-zbig", name, "[OPTIONS]", *map(_argument, arguments)])
        lines += [f"## {name}", "", f"`{usage}`", "", inspect.cleandoc(command.help or ""), ""]
        lines += ["| option | |", "|---|---|"]
        lines += [_option(p) for p in command.params if isinstance(p, click.Option)]
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    return name if argument.required or argument.metavar else f"[{name}]"


def _option(option: click.Option) -> str:
    value = ""
    if not option.is_flag:
        kind = option.type.name.partition(" ")[0].upper()
        choices = "|".join(map(str, option.type.choices)) if isinstance(option.type, click.Choice) else ""
        value = f" {option.metavar or choices or kind}"
    default = f" [default: {option.default}]" if option.show_default and not option.is_flag else ""
    names = ", ".join(f"`{name}`" for name in option.opts)
    text = f"{option.help or ''}{default}".replace("|", "\\|")
    return f"| {names}{value.replace('|', ' &#124; ')} | {text} |"


def _commands() -> Iterator[tuple[str, click.Command]]:
    group = program.main
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield name, command


PAGES = {"settings.md": settings, "commands.md": commands}


def main() -> None:
    """Write them."""
    for name, text in PAGES.items():
        (HERE / name).write_text(text())


if __name__ == "__main__":
    main()
