"""``dask-zbig serve``: share one FileStorage among the processes of this host."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import click

from dask_zbig import uris

if TYPE_CHECKING:
    from dask_zbig.uris import Address

__all__ = ["serve"]


def _host_and_port(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, int] | None:
    if value is None:
        return None
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdecimal():
        raise click.BadParameter(f"{value!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


@click.command()
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("--address", metavar="HOST:PORT", callback=_host_and_port, help="Listen at TCP, loopback only.")
@click.option("--socket", type=click.Path(dir_okay=False), help="Listen at a unix socket. [default: private]")
@click.option("--blob-dir", type=click.Path(file_okay=False), help="Where blobs are. [default: PATH.blobs]")
def serve(path: str, address: tuple[str, int] | None, socket: str | None, blob_dir: str | None) -> None:
    """Serve the database in the file PATH, made if missing, until Ctrl-C.

    The URI to open is printed on standard output.
    """
    from dask_zbig.server import short_directory
    from dask_zbig.zeoserver import Server

    if address is not None and socket is not None:
        raise click.UsageError("--address and --socket exclude each other.")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with contextlib.ExitStack() as stack:
        where: Address
        if address is not None:
            where = address
        elif socket is not None:
            where = os.path.abspath(socket)
        else:
            where = os.path.join(stack.enter_context(contextlib.closing(short_directory())).path, "zeo")

        def ready(actual: Address) -> None:
            click.echo(f"Serving {path}; stop with Ctrl-C. Clients on this host open:", err=True)
            click.echo(uris.zeo_uri(actual, blob_dir=server.blob_dir, shared_blob_dir="true"))

        server = Server(path, where, blob_dir=blob_dir, ready=ready)
        server.main()
