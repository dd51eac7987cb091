"""Passwords and certificates' paths are in nothing that is sent, shown, logged or seen by others."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import pickle

import dask
import dask.config
import numpy as np
import pytest
import transaction
from distributed import Client, LocalCluster

import dask_zbig as dz
from dask_zbig import config, database
from dask_zbig.errors import DatabaseUnavailableError, DatabaseURIError

from tests.certificates import Authority  # isort: skip
from tests.spy import Seen, arguments, everything_in  # isort: skip

SECRET = "open-sesame-street"
KEY_SECRET = "mellon and friend"


def test_a_cluster_over_tls_with_passwords(tmp_path, monkeypatch, caplog):
    """Its workers have certificates and URIs of their own, from their own configuration."""
    caplog.set_level(logging.DEBUG)
    ca = Authority(tmp_path / "ca")
    own = ca.issue("server", host="DNS:localhost").encrypted(KEY_SECRET)
    mine, theirs = ca.issue("mine").encrypted(KEY_SECRET), ca.issue("theirs").encrypted(KEY_SECRET)
    monkeypatch.setenv("ZBIG_TEST_PASSWORD", KEY_SECRET)
    where = {"key-password": "env:ZBIG_TEST_PASSWORD"}
    server = dz.serve(
        tmp_path / "x.fs",
        address=("localhost", 0),
        shared_blob_dir=False,
        tls_certificate=own.certificate,
        tls_key=own.key,
        tls_clients=ca.file,
        tls_key_password=where["key-password"],
    )
    seen = Seen()
    with contextlib.ExitStack() as stack:
        uri = stack.enter_context(server)
        secret_uri = f"{uri}&username=ann&password={SECRET}"
        of_workers = where | {"ca-file": ca.file, "certificate": theirs.certificate, "key": theirs.key}
        of_workers = {f"zbig.tls.{name}": value for name, value in of_workers.items()}
        with dask.config.set(of_workers | {"zbig.database-uris": {uri.partition("?")[0]: secret_uri}}):
            cluster = stack.enter_context(
                LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=60)
            )
        client = stack.enter_context(Client(cluster))
        where |= {"ca-file": ca.file, "certificate": mine.certificate, "key": mine.key}
        stack.enter_context(dask.config.set({f"zbig.tls.{name}": value for name, value in where.items()}))
        db = stack.enter_context(contextlib.closing(dz.open(secret_uri)))
        connection = db.open(transaction.TransactionManager())
        root = connection.root()
        root["A"], root["B"] = A, B = dz.ZBigArray(400_000), dz.ZBigArray(400_000)
        A[:] = np.arange(400_000)
        connection.transaction_manager.commit()
        here = database.location(db)
        assert here.uri is None

        x = dz.from_zbigarray(A, chunks=100_000)  # the workers' configuration tells them where
        y = dz.from_zbigarray(A, chunks=100_000, uri=uri)  # the graph does
        seen.graph(x)
        seen.graph(y)
        assert uri.encode() in seen.bytes
        assert x.sum().compute() == y.sum().compute() == A[:].sum()
        with dz.CommitCoordinator(connection) as save:
            save.store(x * 2, B)
        seen.add(save, save.result)
        assert np.array_equal(B[:], A[:] * 2)
        used = client.run(lambda: __import__("dask").config.get("zbig.tls.certificate"))
        assert set(used.values()) == {theirs.certificate}

        def without_settings():
            answers = []
            for unset in ({"zbig.tls": {}}, {"zbig.tls.key-password": None}, {"zbig.tls.key": None}):
                with dask.config.set(unset):
                    try:
                        dz.open(secret_uri)
                    except dz.DatabaseUnavailableError as error:
                        answers.append(str(error))
            return answers

        for answers in client.run(without_settings).values():  # which do not fall back to plain text
            assert len(answers) == 3
            assert "must be opened with TLS, which is not configured here" in answers[0]
            seen.add(*answers)
        seen.add(db, connection, A, here, pickle.dumps(here), pickle.dumps(A), server, server.uri, db.storage)
        seen.add(*arguments())
        assert b"x.fs" in seen.bytes  # the server's are among them
        seen.add(client.get_worker_logs(), client.get_scheduler_logs(), client.get_versions())
        seen.add(pathlib.Path(server._directory.path, "log").read_bytes())
        connection.close()
    seen.add(*(f"{record.getMessage()} {record.args} {record.exc_info}" for record in caplog.records))
    assert b"dask_zbig" in seen.bytes
    for secret in (SECRET, KEY_SECRET):
        assert secret.encode() not in seen.bytes
    for path in (mine.certificate, mine.key):
        assert path.encode() not in pickle.dumps(x) + pickle.dumps(y)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("zeo://ann:{}@localhost:1?wait_timeout=1", DatabaseUnavailableError),
        ("zeo://localhost:1?wait_timeout=1&username=ann&password={}", DatabaseUnavailableError),
        ("zeo:///no/such/socket?wait_timeout=1&password={}", DatabaseUnavailableError),
        ("zeo://localhost:1?password={}&wait_timeout=soon", DatabaseURIError),
        ("zeo://localhost:1?password={}&tls=maybe", DatabaseURIError),
        ("zeo://localhost:1?password={}&shared_blob_dir=1&blob_dir=/no/such", DatabaseUnavailableError),
        ("nosuch://ann:{}@localhost/x", DatabaseURIError),
        ("postgres://ann:{}@localhost/x", DatabaseURIError),
        (
            "<zeoclient>\n server localhost:1\n username ann\n password {}\n wait off\n colour red\n</zeoclient>",
            DatabaseURIError,
        ),
        (
            "<zodb>\n <zeoclient>\n server /no/such/dir/x\n password {}\n cache-size x\n</zeoclient>\n</zodb>",
            DatabaseURIError,
        ),
        ("<zodb>\n <relstorage>\n password {}\n</relstorage>\n</zodb>", DatabaseURIError),
        ("<zodb>\n <zeoclient>\n server localhost:1\n password {}\n", DatabaseURIError),
        ("%import no.such.package\n<no>\n dsn user='ann' password='{}'\n</no>", DatabaseURIError),
    ],
)
def test_errors_tell_no_passwords(text, kind, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(kind) as info:
        dz.open(text.format(SECRET))
    assert SECRET not in everything_in(info.value)
    assert SECRET not in caplog.text


def test_options_that_cannot_be_read_are_not_shown():
    for name in ("database-uris", "zeo.wait-timeout", "tls.require"):
        with (
            dask.config.set({f"zbig.{name}": f"zeo://localhost:1?password={SECRET}"}),
            pytest.raises(ValueError) as info,
        ):
            config.get(name)
        assert name in str(info.value)
        assert SECRET not in everything_in(info.value)
