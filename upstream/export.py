"""Writes our components into a checkout of pytorch-metric-learning (PML) 2.9, in PML's layout.

    python upstream/export.py CHECKOUT

Source files get relative imports, packages get exports, and tests and docs entries are added to
those of PML. A second run changes nothing. Needs black and isort, because PML is formatted with
them.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import black
import isort

HERE = Path(__file__).parent
PACKAGE, PML = "pml_extras", "pytorch_metric_learning"

# From our modules and packages to those of PML. The functions go to `utils`, where PML keeps the
# helpers of its classes. `evaluation` is the name that PML 3 has for tools of retrieval.
MODULES = {
    "_checks": "utils.component_checks",
    "_component": "utils.component",
    "functional": "utils.functional",
    "losses": "losses",
    "regularizers": "regularizers",
    "miners": "miners",
    "distillation": "distillation",
    "inference": "evaluation",
    "label_noise": "evaluation",
}
# Not exported: subclasses of PML's wrappers, because EDITS changes the wrappers themselves.
EXCLUDED = {"losses.wrappers"}
# Additions to lists of supported losses: (file, new line, existing line that it is put before).
EDITS = [
    (f"src/{PML}/losses/cross_batch_memory.py", '"ContextualLoss",', '"ContrastiveLoss",'),
    (f"src/{PML}/losses/self_supervised_loss.py", '"ContextualLoss",', '"ContrastiveLoss",'),
    # These tests run all supported losses.
    *(
        (f"tests/losses/{name}.py", "losses.ContextualLoss(),", "losses.ContrastiveLoss(),")
        for name in ("test_cross_batch_memory", "test_self_supervised_loss")
    ),
    (
        "docs/losses.md",
        "- [ContextualLoss](losses.md#contextualloss)",
        "- [ContrastiveLoss](losses.md#contrastiveloss)",
    ),
]

ISORT = isort.Config(profile="black", known_first_party=[PML])


def export(checkout: Path) -> None:
    """Write all components, tests and docs entries into the checkout."""
    pml_root = checkout / "src" / PML
    check_version(pml_root)
    root = HERE.parent / PACKAGE
    for path in sorted(root.glob("**/*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if module not in EXCLUDED and module != "__init__":
            write_module(module, path.read_text(), pml_root)
    for path in sorted((HERE / "tests").glob("**/*.py")):
        target = checkout / path.relative_to(HERE)
        if path.name != "__init__.py" or not target.exists():  # keep PML's __init__.py
            write(target, path.read_text())
    # PML's source distribution has neither tests nor docs.
    for name, new_line, existing_line in EDITS:
        if (checkout / name).exists():
            insert_line(checkout / name, new_line, existing_line)
    for path in sorted((HERE / "docs").glob("*.md")):
        if (checkout / "docs" / path.name).exists():
            merge_sections(checkout / "docs" / path.name, path.read_text())


def check_version(pml_root: Path) -> None:
    """Exit with a message if the checkout is not PML 2.9."""
    init = pml_root / "__init__.py"
    if not init.exists():
        raise SystemExit(f"{pml_root} does not exist: give the root of a checkout of PML 2.9")
    version = re.search(r'__version__ = "(.*)"', init.read_text())
    if version is None or not version[1].startswith("2.9."):
        actual = version[1] if version else "none"
        raise SystemExit(f"the checkout must be of PML 2.9, and its version is {actual}")


def write_module(module: str, source: str, pml_root: Path) -> None:
    """Write one of our modules, or add the exports of one of our packages."""
    target = pml_module(module)
    path = pml_root / Path(*target.split(".")).with_suffix(".py")
    if path.name == "__init__.py":
        existing = path.read_text() if path.exists() else ""
        write(path, existing + exports(module, source))
    else:
        write(path, with_pml_imports(source, module, target, pml_root))


def exports(module: str, source: str) -> str:
    """The import statements of a package. These are its exports."""
    return "".join(
        ast.unparse(node) + "\n"
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        and f"{module.removesuffix('.__init__')}.{node.module}" not in EXCLUDED
    )


def pml_module(module: str) -> str:
    """The name in PML of one of our modules. Names are relative to the two packages."""
    prefix = max((p for p in MODULES if f"{module}.".startswith(f"{p}.")), key=len)
    return MODULES[prefix] + module.removeprefix(prefix)


def with_pml_imports(source: str, module: str, target: str, pml_root: Path) -> str:
    """The source with relative imports of PML's modules, and PML's module names in docstrings."""
    lines = source.splitlines(keepends=True)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        statements = pml_imports(node, module, target, pml_root)
        if statements:
            assert node.end_lineno is not None
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{s}\n" for s in statements]
    return re.sub(
        rf"\b{PACKAGE}\.(\w[\w.]*\w)",
        lambda match: f"{PML}.{pml_module(match[1])}",
        "".join(lines),
    )


def pml_imports(node: ast.ImportFrom, module: str, target: str, pml_root: Path) -> list[str]:
    """The statements in PML's module ``target`` for an import in our ``module``; [] to keep it."""
    name = node.module or ""
    if node.level and not name:  # from .. import module
        package = target.split(".")[:-1]
        places = [(pml_module(a.name).rsplit(".", 1), a.asname or a.name) for a in node.names]
        return [
            f"from {relative_name(parent, package)} import {leaf} as {alias}"
            for (parent, leaf), alias in places
        ]
    if node.level:
        parts = module.split(".")[: -node.level]
        return relative_imports(pml_module(".".join([*parts, name])), node.names, target, pml_root)
    if name.startswith(f"{PML}."):
        return relative_imports(name.removeprefix(f"{PML}."), node.names, target, pml_root)
    return []


def relative_imports(name: str, names: list[ast.alias], target: str, pml_root: Path) -> list[str]:
    """Statements in the module ``target`` that import names from the module or package ``name``."""
    package = target.split(".")[:-1]
    if name.split(".") != package:
        return [f"from {relative_name(name, package)} import {', '.join(map(ast.unparse, names))}"]
    # Within a package, import from its modules: the package itself is not imported completely yet.
    init = ast.parse((pml_root / Path(*package) / "__init__.py").read_text())
    origin = {
        alias.name: node.module
        for node in init.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return [f"from .{origin[alias.name]} import {ast.unparse(alias)}" for alias in names]


def relative_name(name: str, package: list[str]) -> str:
    """The relative name of the module ``name``, in a module of ``package``."""
    parts = name.split(".")
    common = 0
    while common < min(len(parts) - 1, len(package)) and parts[common] == package[common]:
        common += 1
    return "." * (len(package) - common + 1) + ".".join(parts[common:])


def insert_line(path: Path, new_line: str, existing_line: str) -> None:
    """Put a line before an existing one, with its indentation, unless the file has it already."""
    text = path.read_text()
    if new_line not in text:
        pattern = rf"(?m)^( *){re.escape(existing_line)}$"
        path.write_text(re.sub(pattern, rf"\1{new_line}\n\g<0>", text))


def merge_sections(path: Path, entries: str) -> None:
    """Insert each section in alphabetical order, or replace the section of the same title."""
    sections = re.split(r"(?m)^(?=## )", path.read_text())
    for entry in re.split(r"(?m)^(?=## )", entries)[1:]:
        title = entry.splitlines()[0]
        sections = [s for s in sections if s.splitlines()[0] != title]
        later = (
            i for i, s in enumerate(sections) if s.startswith("## ") and s.lower() > title.lower()
        )
        index = next(later, len(sections))
        sections.insert(index, entry)
    path.write_text("\n\n\n".join(s.rstrip("\n") for s in sections) + "\n")


def write(path: Path, source: str) -> None:
    """Write a source file, formatted with black and isort."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(black.format_str(isort.code(source, config=ISORT), mode=black.Mode()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    export(Path(sys.argv[1]))
