"""How Sphinx builds the documentation: ``sphinx-build -W docs build/docs``."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "dask_zbig"
author = "the dask_zbig developers"
copyright = "the dask_zbig developers"
release = version = version_of("dask_zbig")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["generate.py"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages of tables begin where they like

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"dask_zbig {release}"
html_copy_source = False
html_show_sphinx = False
