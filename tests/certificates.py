"""Certificates for tests, made by openssl(1), and servers and clients that have them."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from dataclasses import dataclass

import dask.config
import pytest

import dask_zbig as dz

_NEW = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(*arguments, **options):
    """Run it; the test is skipped where there is none."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Certificate:
    """The files of a certificate and its key."""

    certificate: str
    key: str

    def encrypted(self, password):
        """The same with a password on the key."""
        key = self.key + ".encrypted"
        openssl("ec", "-in", self.key, "-aes256", "-passout", "stdin", "-out", key, input=password + "\n")
        return Certificate(self.certificate, key)


class Authority:
    """Whoever signs certificates; all files are in a directory of its own."""

    def __init__(self, directory):
        self.directory = str(directory)
        os.makedirs(self.directory)
        self.file = self._path("ca.pem")
        self._key = self._path("ca.key")
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        openssl(*_NEW, "-x509", "-subj", "/CN=a CA", *usage, "-days", "9", "-keyout", self._key, "-out", self.file)

    def _path(self, name):
        return os.path.join(self.directory, name)

    def issue(self, name, *, host=None, days=9):
        """A certificate for a client, or for a server on a host ("DNS:..." or "IP:...")."""
        made = Certificate(self._path(name + ".pem"), self._path(name + ".key"))
        request, extensions = self._path(name + ".csr"), self._path(name + ".ext")
        lines = ["basicConstraints=critical,CA:FALSE", "subjectKeyIdentifier=hash", "authorityKeyIdentifier=keyid"]
        lines += [f"subjectAltName={host}", "extendedKeyUsage=serverAuth"] if host else ["extendedKeyUsage=clientAuth"]
        with open(extensions, "w") as file:
            file.write("\n".join(lines))
        openssl(*_NEW, "-subj", f"/CN={name}", "-keyout", made.key, "-out", request)
        signed = ("-CA", self.file, "-CAkey", self._key, "-days", str(days), "-extfile", extensions)
        openssl("x509", "-req", "-in", request, *signed, "-out", made.certificate)
        return made

    def revoke(self, certificate):
        """A file with this CA's certificate and a list of revoked ones."""
        config, index, out = self._path("ca.conf"), self._path("index"), self._path("with-crl.pem")
        with open(index, "w"):
            pass
        with open(config, "w") as file:
            file.write(f"[ca]\ndefault_ca=it\n[it]\ndatabase={index}\ndefault_md=sha256\ndefault_crl_days=9\n")
        ours = ("ca", "-config", config, "-cert", self.file, "-keyfile", self._key)
        openssl(*ours, "-revoke", certificate.certificate)
        revoked = openssl(*ours, "-gencrl")
        with open(self.file) as ca, open(out, "w") as file:
            file.write(ca.read() + revoked)
        return out


class Hosts:
    """A CA, and certificates for everybody."""

    def __init__(self, directory):
        self.ca = Authority(directory / "ca")
        self.other = Authority(directory / "other")
        self.server = self.ca.issue("server", host="DNS:localhost")
        self.client = self.ca.issue("client")
        self.worker = self.ca.issue("worker")


def serve(path, hosts, certificate=None, clients=None, address=("localhost", 0), **options):
    own = certificate or hosts.server
    theirs = clients or hosts.ca.file
    return dz.serve(
        path, address=address, tls_certificate=own.certificate, tls_key=own.key, tls_clients=theirs, **options
    )


def as_client(certificate, ca, **more):
    """The configuration of a client."""
    options = {"ca-file": ca.file, "certificate": certificate.certificate, "key": certificate.key, **more}
    # whoever waits for the server instead of finding out what is wrong takes longer than a test may
    return dask.config.set(
        {f"zbig.tls.{name}": value for name, value in options.items()} | {"zbig.zeo.wait-timeout": 600}
    )


def log_of(server):
    return pathlib.Path(server._directory.path, "log").read_text()
