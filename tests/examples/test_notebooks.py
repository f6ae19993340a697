"""The notebooks run with small parameters, and are committed with their outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
# Per notebook: the replacement of the cell tagged "parameters", and a check appended at the end.
RUNS = {
    "first_steps": (
        "EPOCHS = 1",
        "assert score(after)[1] > score(before)[1] + 0.1; assert len(results) == 6",
    ),
    "noisy_labels": (
        "EPOCHS = 2; SEEDS = 2; LEVELS = (0.3,)",
        "assert min(scores['drop issues while training']) > max(scores['wrong labels'])\n"
        "noisy_labels = add_label_noise(0.3); detector = LabelNoiseDetector(noisy_labels)\n"
        "train(images, noisy_labels, detector)\n"
        "count, precision, recall = evaluate(detector, noisy_labels != true_labels)\n"
        "assert precision > 0.95 and recall > 0.7",
    ),
    "choosing": (
        "TRIALS = 2; SEEDS = 2; STEPS = 20",
        "assert all(len(r) == 2 and r.min() > 0.5 for r in results.values())",
    ),
}


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", ())


@pytest.mark.parametrize("name", RUNS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    notebook = nbformat.read(RECIPES / f"{name}.ipynb", 4)
    parameters, check = RUNS[name]
    (cell,) = filter(is_parameters, notebook.cells)
    assert {line.split(" = ")[0] for line in cell.source.splitlines()} == {
        part.split(" = ")[0].strip() for part in parameters.split(";")
    }
    cell.source = parameters
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    monkeypatch.setenv("PYTHONPATH", str(RECIPES))  # for digits.py
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_committed_with_outputs(path):
    assert path.stem in RUNS
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
