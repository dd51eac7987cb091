"""The options under ``zbig`` in Dask's configuration."""

from __future__ import annotations

import dask.config
import pytest

from dask_zbig import config


def test_config():
    assert config.get("load-timeout") == 30.0
    assert config.get("scratch-directory") is None
    assert config.get("database-uris") == {}
    with dask.config.set({"zbig.inline-limit": "1 MiB", "zbig.lease-seconds": "1h", "zbig.load_timeout": 5}):
        assert config.get("inline-limit") == 1 << 20
        assert config.get("lease-seconds") == 3600.0
        assert config.get("load-timeout") == 5.0
    for value in ("soon", 0, -1):
        with (
            dask.config.set({"zbig.load-timeout": value}),
            pytest.raises(ValueError, match=r"zbig\.load-timeout"),
        ):
            config.get("load-timeout")
    with pytest.raises(KeyError):
        config.get("nosuch")
