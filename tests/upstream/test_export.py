"""What is written into PML's source tree imports, passes its tests and is in PML's style there.

The tree is a copy of the installed PML, which is all that package registries have: PML's source
distribution has neither tests nor docs. With PML_CHECKOUT set to a clone of PML 2.9, it is a copy
of that, and PML's own tests run as well.
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
# PML's own tests of what our components have to do with.
PML_TESTS = [
    "tests/losses/test_cross_batch_memory.py",
    "tests/losses/test_losses_without_labels.py",
    "tests/losses/test_multiple_losses.py",
    "tests/losses/test_self_supervised_loss.py",
    "tests/reducers",
    "tests/utils/test_distributed.py",
    "tests/utils/test_module_with_records_and_reducer.py",
]
# What stands for PML's docs.
PAGES = {
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
RUN_ALL = f"""
import doctest, importlib, sys, unittest
sys.modules["pml_extras"] = None  # so that an import of it raises
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


def bare_tree(root: Path) -> Path:
    clone = os.environ.get("PML_CHECKOUT")
    if clone:
        return Path(shutil.copytree(clone, root, ignore=shutil.ignore_patterns(".git")))
    spec = importlib.util.find_spec(PML)
    assert spec is not None
    assert spec.origin is not None
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(spec.origin).parent, root / "src" / PML, ignore=ignore)
    (root / "docs").mkdir()
    for page, text in PAGES.items():
        (root / "docs" / f"{page}.md").write_text(text)
    return root


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which sees the tree and not us."""
    environment = os.environ | {
        "PYTHONPATH": str(cwd / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TEST_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, text=True, capture_output=True
    )


def succeeds(*command: str, cwd: Path) -> str:
    result = run(*command, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def module(name: str) -> str:
    """How Python calls a source file of the tree."""
    return name.removeprefix("src/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.glob("**/*") if p.is_file()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, bytes]:
    return contents(bare_tree(tmp_path_factory.mktemp("bare") / "tree"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    tree = bare_tree(tmp_path_factory.mktemp("pml") / "tree")
    succeeds(str(EXPORT), str(tree), cwd=tree)
    return tree


@pytest.fixture(scope="module")
def written(bare, tree) -> list[str]:
    """The sources that are new or changed."""
    return sorted(
        name
        for name, content in contents(tree).items()
        if name.endswith(".py") and bare.get(name) != content
    )


def test_twice_is_once(tree):
    before = contents(tree)
    succeeds(str(EXPORT), str(tree), cwd=tree)
    assert contents(tree) == before


def test_it_imports_and_passes_its_tests_and_examples_there(tree, written):
    tests = [module(name) for name in written if Path(name).name.startswith("test_")]
    sources = [module(name) for name in written if name.startswith("src/")]
    assert len(tests) == len(list((ROOT / "upstream" / "tests").glob("**/test_*.py")))
    assert f"{PML}.losses.contextual_loss" in sources
    succeeds("-W", "ignore", "-c", RUN_ALL, ",".join(tests), ",".join(sources), cwd=tree)
    assert not any("pml_extras" in (tree / name).read_text() for name in written)


def test_it_is_in_the_style_of_pml(tree, written):
    succeeds("-m", "black", "--check", *written, cwd=tree)
    succeeds("-m", "isort", "--check", "--profile", "black", *written, cwd=tree)


def test_pml_is_left_as_it_was(bare, tree, written):
    assert set(bare) <= set(contents(tree))
    changed = {name for name in bare if bare[name] != (tree / name).read_bytes()}
    source = f"src/{PML}/"
    sources = {name.removeprefix(source) for name in changed if name.startswith(source)}
    assert sources == {
        "losses/__init__.py",
        "losses/cross_batch_memory.py",
        "losses/self_supervised_loss.py",
        "miners/__init__.py",
        "regularizers/__init__.py",
    }


def test_docs_have_an_entry_each_in_the_order_of_the_alphabet(bare, tree):
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
        theirs = re.findall(r"(?m)^## (\w+)", bare[f"docs/{page}.md"].decode())
        assert [title for title in titles if title not in ours] == theirs
        for title in ours:
            before = titles[: titles.index(title)]
            assert all(other.lower() < title.lower() for other in before)
    contextual, contrastive = (
        f"    - [{name}](losses.md#{name.lower()})"
        for name in ("ContextualLoss", "ContrastiveLoss")
    )
    assert f"{contextual}\n{contrastive}" in (tree / "docs" / "losses.md").read_text()


@pytest.mark.skipif("PML_CHECKOUT" not in os.environ, reason="registries have no tests of PML")
@pytest.mark.parametrize("path", PML_TESTS)
def test_pml_passes_its_own_tests(tree, path):
    # Those that PML cannot pass on a CPU by itself fail here as well.
    if not (tree / path).exists():
        pytest.skip("not in this checkout")
    if (tree / path).is_dir():
        succeeds("-W", "ignore", "-m", "unittest", "discover", "-s", path, "-t", ".", cwd=tree)
    else:
        succeeds("-W", "ignore", "-m", "unittest", path, cwd=tree)


@pytest.mark.parametrize(
    ("version", "complaint"),
    [(None, "does not exist"), ("2.8.1", "2.8.1"), ("3.0.0", "3.0.0"), ("", "none")],
)
def test_refuses_other_trees(tmp_path, version, complaint):
    if version is not None:
        package = tmp_path / "src" / PML
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f'__version__ = "{version}"\n' if version else "")
    before = contents(tmp_path)
    result = run(str(EXPORT), str(tmp_path), cwd=tmp_path)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert contents(tmp_path) == before
