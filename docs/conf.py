"""Sphinx's configuration. Build with `make docs` in the repository's root."""

from __future__ import annotations

import sys
from pathlib import Path

import pml_extras

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pml_extras"
author = "The pml_extras authors"
copyright = author
version = release = pml_extras.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "component_facts",
]
exclude_patterns = ["reranking-tables.md", "_build"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks contain the outputs of `make notebooks`
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types and shapes
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_custom_sections = [("Statistics for the log", "notes_style")]
nitpicky = False  # names of PML and torch cannot be linked

html_theme = "furo"
html_title = f"pml_extras {version}"
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_copy_source = False
