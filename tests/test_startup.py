"""What a start must not wait for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import chronicals

# seconds each; datasets is needed by some data sets only, and loads with them
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "pandas", "datasets", "matplotlib", "sklearn")


def test_training_imports_no_compiler_and_no_tables() -> None:
    code = (
        "import sys, torch; from chronicals.train import trainer; from chronicals.train.precision import reproducible\n"
        "with reproducible(0, torch.device('cpu'), deterministic=True):\n"
        "    import transformers; transformers.AutoTokenizer\n"
        f"heavy = set({HEAVY}) & set(sys.modules); assert not heavy, heavy"
    )
    root = str(Path(chronicals.__file__).parents[1])
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
