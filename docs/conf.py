"""The documentation's build: `make docs`, from the repository's root."""

from __future__ import annotations

import sys
from pathlib import Path

import pml_extras

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "tests")]

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
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks show what they printed at their full size
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes, too
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_custom_sections = [("Statistics for the log", "notes_style")]
nitpicky = False  # PML's and torch's names have no pages here

html_theme = "furo"
html_title = f"pml_extras {version}"
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_copy_source = False
