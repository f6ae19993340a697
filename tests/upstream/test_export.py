"""The export into PML's source tree can be imported, passes its tests and has PML's code style.

The tree is a copy of the installed PML, with stubs of the docs. If the environment variable
PML_CHECKOUT names a clone of PML 2.9, the tree is a copy of that, and PML's tests run too. Package
registries do not have them: PML's source distribution has neither tests nor docs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPORT = ROOT / "upstream" / "export.py"
PML = "pytorch_metric_learning"
# PML's tests of the code that our components use or extend.
PML_TESTS = [
    "tests/losses/test_cross_batch_memory.py",
    "tests/losses/test_losses_without_labels.py",
    "tests/losses/test_multiple_losses.py",
    "tests/losses/test_self_supervised_loss.py",
    "tests/reducers",
    "tests/utils/test_distributed.py",
    "tests/utils/test_module_with_records_and_reducer.py",
]
# Stubs of PML's docs.
DOCS = {
    "losses": """# Losses

## ArcFaceLoss
Angles.

## CrossBatchMemory
??? note "Supported Loss Functions"
    - [CircleLoss](losses.md#circleloss)
    - [ContrastiveLoss](losses.md#contrastiveloss)

## TripletMarginLoss
Triplets.
""",
    "miners": "# Miners\n\n## AngularMiner\nAngles.\n",
    "regularizers": "# Regularizers\n\n## LpRegularizer\nNorms.\n",
}
# Runs unit tests and doctests of the modules named in the arguments, and imports all exports.
RUN_TESTS = f"""
import doctest, importlib, sys, unittest
sys.modules["pml_extras"] = None  # an import of it raises
tests, sources = (names.split(",") for names in sys.argv[1:])
suite = unittest.defaultTestLoader.loadTestsFromNames(tests)
for source in map(importlib.import_module, sources):
    suite.addTests(doctest.DocTestSuite(source))
from {PML} import distillation, evaluation, losses, miners, regularizers
losses.CenterContrastiveLoss, losses.ContextualLoss, losses.ListwiseDistillationLoss
losses.ShardedCenterContrastiveLoss, miners.ContextualSimilarityMiner
regularizers.ClassInterferenceRegularizer, distillation.SelfDistillation
evaluation.ContextualKNN, evaluation.LabelNoiseDetector
result = unittest.TextTestRunner().run(suite)
assert result.testsRun > 40
sys.exit(not result.wasSuccessful())
"""


def copy_pml(root: Path) -> Path:
    """PML's source tree before the export."""
    clone = os.environ.get("PML_CHECKOUT")
    if clone:
        return Path(shutil.copytree(clone, root, ignore=shutil.ignore_patterns(".git")))
    spec = importlib.util.find_spec(PML)
    assert spec is not None
    assert spec.origin is not None
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(spec.origin).parent, root / "src" / PML, ignore=ignore)
    (root / "docs").mkdir()
    for page, text in DOCS.items():
        (root / "docs" / f"{page}.md").write_text(text)
    return root


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that can import the tree, but not this package."""
    environment = os.environ | {
        "PYTHONPATH": str(cwd / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TEST_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, text=True, capture_output=True
    )


def run_checked(*command: str, cwd: Path) -> str:
    result = run(*command, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def module_name(path: str) -> str:
    """The importable name of a source file of the tree."""
    return path.removeprefix("src/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def files_of(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.glob("**/*") if p.is_file()}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> dict[str, bytes]:
    return files_of(copy_pml(tmp_path_factory.mktemp("original") / "tree"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    tree = copy_pml(tmp_path_factory.mktemp("pml") / "tree")
    run_checked(str(EXPORT), str(tree), cwd=tree)
    return tree


@pytest.fixture(scope="module")
def exported(original, tree) -> list[str]:
    """Paths of the new or changed Python files."""
    return sorted(
        path
        for path, content in files_of(tree).items()
        if path.endswith(".py") and original.get(path) != content
    )


def test_a_second_export_changes_nothing(tree):
    before = files_of(tree)
    run_checked(str(EXPORT), str(tree), cwd=tree)
    assert files_of(tree) == before


def test_the_export_can_be_imported_and_passes_tests_and_doctests(original, tree, exported):
    # In a clone, two of PML's own tests are changed too, those of the memories.
    new = [path for path in exported if path not in original]
    tests = [module_name(path) for path in new if Path(path).name.startswith("test_")]
    sources = [module_name(path) for path in exported if path.startswith("src/")]
    assert len(tests) == len(list((ROOT / "upstream" / "tests").glob("**/test_*.py")))
    assert f"{PML}.losses.contextual_loss" in sources
    run_checked("-W", "ignore", "-c", RUN_TESTS, ",".join(tests), ",".join(sources), cwd=tree)
    assert not any("pml_extras" in (tree / path).read_text() for path in exported)


def test_the_export_has_the_code_style_of_pml(tree, exported):
    run_checked("-m", "black", "--check", *exported, cwd=tree)
    run_checked("-m", "isort", "--check", "--profile", "black", *exported, cwd=tree)


def test_only_exports_and_lists_of_supported_losses_of_pml_change(original, tree, exported):
    assert set(original) <= set(files_of(tree))
    changed = {path for path in original if original[path] != (tree / path).read_bytes()}
    source = f"src/{PML}/"
    sources = {path.removeprefix(source) for path in changed if path.startswith(source)}
    assert sources == {
        "losses/__init__.py",
        "losses/cross_batch_memory.py",
        "losses/self_supervised_loss.py",
        "miners/__init__.py",
        "regularizers/__init__.py",
    }


def test_docs_have_one_entry_per_component_in_alphabetical_order(original, tree):
    for page, ours in {
        "losses": [
            "CenterContrastiveLoss",
            "ContextualLoss",
            "ListwiseDistillationLoss",
            "ShardedCenterContrastiveLoss",
        ],
        "miners": ["ContextualSimilarityMiner"],
        "regularizers": ["ClassInterferenceRegularizer"],
    }.items():
        text = (tree / "docs" / f"{page}.md").read_text()
        titles = re.findall(r"(?m)^## (\w+)", text)
        assert all(titles.count(title) == 1 for title in ours)
        theirs = re.findall(r"(?m)^## (\w+)", original[f"docs/{page}.md"].decode())
        assert [title for title in titles if title not in ours] == theirs
        for title in ours:
            before = titles[: titles.index(title)]
            assert all(other.lower() < title.lower() for other in before)
    contextual, contrastive = (
        f"    - [{name}](losses.md#{name.lower()})"
        for name in ("ContextualLoss", "ContrastiveLoss")
    )
    assert f"{contextual}\n{contrastive}" in (tree / "docs" / "losses.md").read_text()


def failing_tests(tree: Path, path: str) -> set[str]:
    """The tests of PML in a file or folder of the tree that fail."""
    where = ["discover", "-s", path, "-t", "."] if (tree / path).is_dir() else [path]
    output = run("-W", "ignore", "-m", "unittest", *where, cwd=tree).stderr
    assert re.search(r"(?m)^Ran [1-9]\d* tests? in", output), output
    return set(re.findall(r"(?m)^(?:FAIL|ERROR): .*", output))


@pytest.mark.skipif("PML_CHECKOUT" not in os.environ, reason="needs a clone of PML")
@pytest.mark.parametrize("path", PML_TESTS)
def test_pml_passes_the_same_tests_before_and_after_the_export(tree, path, tmp_path):
    if not (tree / path).exists():
        pytest.skip("not in this checkout")
    # Some fail before the export: for lack of a GPU, or because the tests are of another version.
    assert failing_tests(tree, path) <= failing_tests(copy_pml(tmp_path / "tree"), path)


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "does not exist"), ("2.8.1", "2.8.1"), ("3.0.0", "3.0.0"), ("", "none")],
)
def test_other_trees_are_rejected(tmp_path, version, message):
    if version is not None:
        package = tmp_path / "src" / PML
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f'__version__ = "{version}"\n' if version else "")
    before = files_of(tmp_path)
    result = run(str(EXPORT), str(tmp_path), cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
    assert files_of(tmp_path) == before
