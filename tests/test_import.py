from __future__ import annotations

import subprocess
import sys


def test_import_is_light():
    heavy = "{'torch', 'numpy', 'faiss', 'sklearn', 'matplotlib', 'pytorch_metric_learning'}"
    code = f"import sys, pml_extras; print({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
