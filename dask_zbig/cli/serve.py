"""``dask-zbig serve``: share one FileStorage among the processes of this host, or of several."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import click

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


_FILE = click.Path(dir_okay=False)


@click.command()
@click.argument("path", type=_FILE)
@click.option("--address", metavar="HOST:PORT", callback=_host_and_port, help="Listen at TCP.")
@click.option("--socket", type=_FILE, help="Listen at a unix socket. [default: private]")
@click.option("--blob-dir", type=click.Path(file_okay=False), help="Where blobs are. [default: PATH.blobs]")
@click.option("--tls-certificate", type=_FILE, help="The server's certificate; needed beyond this host.")
@click.option("--tls-key", type=_FILE, help="Its key. [default: in the certificate's file]")
@click.option("--tls-clients", type=click.Path(), help="Certificates of clients, or of their CA: file or directory.")
@click.option("--tls-key-password", metavar="WHERE", help="env:NAME, file:PATH or command:..., never the password.")
@click.option("--insecure", is_flag=True, help="Listen beyond this host without TLS: whoever connects can run code.")
def serve(
    path: str,
    address: tuple[str, int] | None,
    socket: str | None,
    blob_dir: str | None,
    tls_certificate: str | None,
    tls_key: str | None,
    tls_clients: str | None,
    tls_key_password: str | None,
    insecure: bool,
) -> None:
    """Serve the database in the file PATH, made if missing, until Ctrl-C.

    The URI to open is printed on standard output. Clients of a server with TLS need the options zbig.tls.ca-file,
    zbig.tls.certificate and zbig.tls.key in Dask's configuration.
    """
    from dask_zbig.server import client_uri, server_credentials, short_directory
    from dask_zbig.zeoserver import Server

    if address is not None and socket is not None:
        raise click.UsageError("--address and --socket exclude each other.")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    credentials = server_credentials(tls_certificate, tls_key, tls_clients, tls_key_password)
    with contextlib.ExitStack() as stack:
        where: Address
        if address is not None:
            where = address
        elif socket is not None:
            where = os.path.abspath(socket)
        else:
            where = os.path.join(stack.enter_context(contextlib.closing(short_directory())).path, "zeo")

        def ready(actual: Address) -> None:
            click.echo(f"Serving {path}; stop with Ctrl-C. Clients open:", err=True)
            asked = address[0] if address else ""
            click.echo(client_uri(actual, asked, server.blob_dir, None, credentials is not None))

        server = Server(path, where, blob_dir=blob_dir, credentials=credentials, insecure=insecure, ready=ready)
        server.main()
