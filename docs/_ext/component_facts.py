"""The directive `{component} NAME`: a table of the facts in _data/components.json.

The facts come from the components and from the table in tests/conformance. `make facts` updates
the file, and a test checks that it is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FILE = Path(__file__).parents[1] / "_data" / "components.json"


class ComponentFacts(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(FILE))
        name = self.arguments[0]
        facts = json.loads(FILE.read_text()).get(name)
        if facts is None:
            raise self.error(f"{FILE.name} has no component {name}")
        return [table(facts)]


def table(facts: dict[str, str]) -> nodes.table:
    rows = nodes.tbody()
    for cells in facts.items():
        rows += nodes.row("", *(nodes.entry("", nodes.paragraph(text=cell)) for cell in cells))
    widths = [nodes.colspec(colwidth=width) for width in (60, 40)]
    return nodes.table("", nodes.tgroup("", *widths, rows, cols=2))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("component", ComponentFacts)
    return {"parallel_read_safe": True}
