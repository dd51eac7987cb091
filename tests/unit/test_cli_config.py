"""``dask-zbig config``, and ``zbig.yaml``."""

from __future__ import annotations

import importlib.resources
import json
import os
import subprocess
import sys

import dask.config
import yaml
from click.testing import CliRunner

from dask_zbig import config
from dask_zbig.cli.main import main


def run(*args):
    return CliRunner().invoke(main, ["config", *args])


def test_the_file_of_defaults_is_made_of_the_options():
    file = importlib.resources.files("dask_zbig") / "zbig.yaml"
    expected = config.defaults_yaml()
    assert file.read_text() == expected, "make it anew: dask-zbig config --yaml > dask_zbig/zbig.yaml"
    assert run("--yaml").stdout == expected
    read = yaml.safe_load(expected)
    for name, option in config.OPTIONS.items():
        value = read["zbig"]
        for part in name.split("."):
            value = value[part]
        assert value == option.default
        assert " ".join(option.doc.split())[:60] in " ".join(expected.replace("#", " ").split())


def test_the_defaults_are_registered_with_dask():
    code = "import dask, dask_zbig.config, json; print(json.dumps([dask.config.get('zbig'), dask.config.defaults[-1]]))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DASK_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    here, default = json.loads(done.stdout)
    assert here == default["zbig"] == yaml.safe_load(config.defaults_yaml())["zbig"]


def test_every_option_is_listed():
    rows = {row["name"]: row for row in json.loads(run("--json").stdout)}
    assert list(rows) == [f"zbig.{name}" for name in config.OPTIONS]
    assert rows["zbig.zeo.wait-timeout"]["environment"] == "DASK_ZBIG__ZEO__WAIT_TIMEOUT"
    text = run().stdout
    for name, option in config.OPTIONS.items():
        assert f"zbig.{name}: " in text
        assert option.doc in text


def test_the_environment_is_what_it_says():
    rows = json.loads(run("--json").stdout)
    values = {"zbig.load-timeout": "7 s", "zbig.inline-limit": "1 MiB", "zbig.zeo.wait-timeout": "5"}
    environment = dict(os.environ, **{r["environment"]: values[r["name"]] for r in rows if r["name"] in values})
    code = "from dask_zbig.config import get; print(get('load-timeout'), get('inline-limit'), get('zeo.wait-timeout'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["7.0", "1048576", "5.0"]


def test_what_was_changed_and_what_is_wrong():
    with dask.config.set({"zbig.load-timeout": "5 s", "zbig.inline-limit": "much"}):
        result = run()
    assert result.exit_code == 1
    assert "zbig.load-timeout: 5 s  (default: 30 s)" in result.stdout
    assert "ERROR: the option zbig.inline-limit" in result.stdout
    assert run().exit_code == 0


def test_no_secrets_are_shown():
    uris = {"a": "zeo://db:8100?username=ann&password=sesame"}
    with dask.config.set({"zbig.database-uris": uris, "zbig.tls.key-password": "hunter2"}):
        for result in (run(), run("--json")):
            assert "password=***" in result.stdout
            assert "sesame" not in result.output
            assert "hunter2" not in result.output
