"""Writes our components into a checkout of pytorch-metric-learning (PML) 2.9, as PML lays them out.

    python upstream/export.py CHECKOUT

Sources get relative imports, packages their exports, and tests and docs entries go where PML keeps
its own. Doing it again changes nothing. Needs black and isort, in whose style PML is written.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import black
import isort

HERE = Path(__file__).parent
OURS, THEIRS = "pml_extras", "pytorch_metric_learning"

# Where our modules go; a package's modules go with it. The mathematics goes under `utils`, where
# PML keeps what its classes are made of. `evaluation` is what PML 3 calls the place for retrieval.
PLACES = {
    "_component": "utils.component",
    "functional": "utils.functional",
    "losses": "losses",
    "regularizers": "regularizers",
    "miners": "miners",
    "distillation": "distillation",
    "inference": "evaluation",
    "label_noise": "evaluation",
}
# Subclasses of PML's wrappers: there, PML's own classes are edited instead.
LEFT_OUT = {"losses.wrappers"}
# The lists of supported losses: (file, line, the line before which it goes wherever that is).
EDITS = [
    (f"src/{THEIRS}/losses/cross_batch_memory.py", '"ContextualLoss",', '"ContrastiveLoss",'),
    (f"src/{THEIRS}/losses/self_supervised_loss.py", '"ContextualLoss",', '"ContrastiveLoss",'),
    (
        "tests/losses/test_self_supervised_loss.py",  # it wants all that are supported
        "losses.ContextualLoss(),",
        "losses.ContrastiveLoss(),",
    ),
    (
        "docs/losses.md",
        "- [ContextualLoss](losses.md#contextualloss)",
        "- [ContrastiveLoss](losses.md#contrastiveloss)",
    ),
]

ISORT = isort.Config(profile="black", known_first_party=[THEIRS])


def export(checkout: Path) -> None:
    """Write everything into the checkout."""
    package = checkout / "src" / THEIRS
    check_version(package)
    ours = HERE.parent / OURS
    for path in sorted(ours.glob("**/*.py")):
        module = ".".join(path.relative_to(ours).with_suffix("").parts)
        if module not in LEFT_OUT and module != "__init__":
            write_module(module, path.read_text(), package)
    for path in sorted((HERE / "tests").glob("**/*.py")):
        target = checkout / path.relative_to(HERE)
        if path.name != "__init__.py" or not target.exists():  # PML's own packages stay
            write(target, path.read_text())
    # Source distributions have neither tests nor docs.
    for name, line, before in EDITS:
        if (checkout / name).exists():
            insert_line(checkout / name, line, before)
    for path in sorted((HERE / "docs").glob("*.md")):
        if (checkout / "docs" / path.name).exists():
            write_sections(checkout / "docs" / path.name, path.read_text())


def check_version(package: Path) -> None:
    init = package / "__init__.py"
    if not init.exists():
        raise SystemExit(f"{package} does not exist: give the root of a checkout of PML 2.9")
    version = re.search(r'__version__ = "(.*)"', init.read_text())
    if version is None or not version[1].startswith("2.9."):
        found = version[1] if version else "none"
        raise SystemExit(f"the checkout must be of PML 2.9, and its version is {found}")


def write_module(module: str, source: str, package: Path) -> None:
    target = their_module(module)
    path = package / Path(*target.split(".")).with_suffix(".py")
    if path.name == "__init__.py":
        theirs = path.read_text() if path.exists() else ""
        write(path, theirs + exports(module, source))
    else:
        write(path, with_their_imports(source, module, target, package))


def exports(module: str, source: str) -> str:
    """The import statements of a package, which are its exports."""
    return "".join(
        ast.unparse(node) + "\n"
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        and f"{module.removesuffix('.__init__')}.{node.module}" not in LEFT_OUT
    )


def their_module(module: str) -> str:
    """Where one of our modules goes, both without the name of the package."""
    place = max((p for p in PLACES if f"{module}.".startswith(f"{p}.")), key=len)
    return PLACES[place] + module.removeprefix(place)


def with_their_imports(source: str, module: str, target: str, package: Path) -> str:
    """The source with relative imports in PML's layout, and PML's names in its docstrings."""
    lines = source.splitlines(keepends=True)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        name = absolute_name(node, module)
        if name is not None:
            assert node.end_lineno is not None
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [
                f"{indent}{line}\n" for line in relative_imports(name, node.names, target, package)
            ]
    return re.sub(
        rf"\b{OURS}\.(\w[\w.]*\w)",
        lambda match: f"{THEIRS}.{their_module(match[1])}",
        "".join(lines),
    )


def absolute_name(node: ast.ImportFrom, module: str) -> str | None:
    """What an import of ours is from, in PML's layout without the package's name; None if else."""
    name = node.module or ""
    if node.level:
        parts = module.split(".")[: -node.level]
        return their_module(".".join([*parts, name]))
    return name.removeprefix(f"{THEIRS}.") if name.startswith(f"{THEIRS}.") else None


def relative_imports(name: str, names: list[ast.alias], target: str, package: Path) -> list[str]:
    """Import statements for names from a module or package, as written in the module `target`."""
    here = target.split(".")[:-1]
    if name.split(".") != here:
        return [f"from {relative(name, here)} import {', '.join(map(ast.unparse, names))}"]
    # From a package into itself: from the modules, since the package is not complete by then.
    init = ast.parse((package / Path(*here) / "__init__.py").read_text())
    origin = {
        alias.name: node.module
        for node in init.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return [f"from .{origin[alias.name]} import {ast.unparse(alias)}" for alias in names]


def relative(name: str, here: list[str]) -> str:
    """How a module in the package `here` calls the module `name`."""
    parts = name.split(".")
    common = 0
    while common < min(len(parts) - 1, len(here)) and parts[common] == here[common]:
        common += 1
    return "." * (len(here) - common + 1) + ".".join(parts[common:])


def insert_line(path: Path, line: str, before: str) -> None:
    text = path.read_text()
    if line not in text:
        path.write_text(re.sub(rf"(?m)^( *){re.escape(before)}$", rf"\1{line}\n\g<0>", text))


def write_sections(path: Path, entries: str) -> None:
    """Put each section of `entries` where its title belongs in the alphabet, instead of the old."""
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
    """Write a source file in black's and isort's style."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(black.format_str(isort.code(source, config=ISORT), mode=black.Mode()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    export(Path(sys.argv[1]))
