"""The import rules of docs/design.md, held on the syntax tree; and that a cold start loads no heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "chronicals"

LEAVES = {"errors", "config", "hub"}
# layer -> the layers it may import, beside itself; every layer but `kernels` may import the leaves too
MAY_IMPORT = {
    "cli": {"commands", "train", "adapters", "optim", "data", "models"},
    "commands": {"train", "integrations", "adapters", "optim", "data", "models", "kernels"},
    "train": {"integrations", "adapters", "optim", "data", "models", "kernels"},
    "integrations": {"models", "kernels"},
    "adapters": {"models", "kernels"},
    "models": {"kernels"},
    "optim": {"kernels"},
    "data": {"kernels"},
    "kernels": set(),
    "errors": set(),
    "config": {"errors"},
    "hub": {"errors"},
}
HEAVY = {"torch", "transformers", "datasets", "triton", "peft", "safetensors", "tokenizers", "huggingface_hub"}
HEAVY |= {"matplotlib", "numpy", "pandas", "pyarrow", "tensorboard", "wandb"}
COLD = {"cli", "config", "errors", "hub", "commands"}
FUSED = "chronicals.kernels.fused"  # its modules import triton at their top; nobody else imports them on import
CUTE = {f"{FUSED}.glu_epilogues"}  # these import quack and cutlass at their top
KERNELS_USE = {"torch", "triton"} | sys.stdlib_module_names


def layer(module: str) -> str | None:
    """`chronicals.data.chat` -> `data`; the config's own modules are one layer; the package itself is none."""
    parts = module.split(".")
    if len(parts) < 2 or parts[1] in {"__version__", "__main__"}:
        return None
    return "config" if parts[1].startswith("config_") else parts[1]


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Every import as (module, line, whether it runs when the module is imported)."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"line {child.lineno}: write imports in full"
                inner = child.module == "chronicals" or child.module.startswith("chronicals.")
                for alias in child.names:
                    yield (f"{child.module}.{alias.name}" if inner else child.module), child.lineno, at_import
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            ):
                yield from walk(child, False)
            else:
                yield from walk(child, at_import)

    yield from walk(tree, True)


def violations(module: str, source: str) -> list[str]:
    """What `source`, the text of `module`, imports against the rules."""
    tree, here, found = ast.parse(source), layer(module), []
    for name, line, at_import in imports(tree):
        top, target = name.split(".")[0], layer(name) if name.startswith("chronicals") else None
        if here is None:
            if (top == "chronicals" or top in HEAVY) and at_import and target != "cli":
                found.append(f"{module}:{line} imports {name} on import; the package loads its parts on first use")
            continue
        if target is not None and target != here:
            allowed = MAY_IMPORT[here] | (set() if here in {"kernels", "errors"} else LEAVES)
            if here in LEAVES:
                allowed = MAY_IMPORT[here]
            if target not in allowed:
                found.append(
                    f"{module}:{line} imports {name}: {here} may import {sorted(allowed) or 'nothing of ours'}"
                )
        fused, lazy = is_fused(module), (top == "flash_attn" and not at_import) or module in CUTE
        if here == "kernels" and top not in KERNELS_USE | {"chronicals"} and not (fused and lazy):
            found.append(f"{module}:{line} imports {name}: kernels use torch, triton and the standard library")
        if top == "triton" and not fused:
            found.append(f"{module}:{line} imports triton: its kernels live in {FUSED}")
        if any(name == cute or name.startswith(f"{cute}.") for cute in CUTE) and at_import:
            found.append(f"{module}:{line} imports {name} at the top: it needs quack, which only Hopper has")
        if is_fused(name) and at_import and not fused:
            found.append(f"{module}:{line} imports {name} at the top: it needs triton, which is not there on a CPU")
        if here in COLD and top in HEAVY and at_import:
            found.append(f"{module}:{line} imports {name} at the top: `chronicals --help` must be quick")
    if here == "data":
        found += [f"{module}:{line} mentions cuda" for line in mentions_of_cuda(tree)]
    return found


def is_fused(name: str) -> bool:
    return name == FUSED or name.startswith(f"{FUSED}.")


def mentions_of_cuda(tree: ast.AST) -> Iterator[int]:
    """Lines with a name, attribute or string of code that says cuda; docstrings may."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        word = getattr(node, "attr", None) or getattr(node, "id", None)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            word = node.value
        if isinstance(word, str) and "cuda" in word.lower():
            yield node.lineno  # type: ignore[attr-defined]


def modules() -> dict[str, Path]:
    files = PACKAGE.rglob("*.py")
    return {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    assert violations(module, modules()[module].read_text(encoding="utf-8")) == []


def test_every_module_belongs_to_a_layer() -> None:
    layers = {layer(module) for module in modules()} - {None}
    assert layers <= set(MAY_IMPORT), "a new layer needs its line in docs/design.md and here"


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("chronicals.data.chat", "from chronicals.models import hf", "data may import"),
        ("chronicals.data.chat", "def f():\n    import chronicals.models.hf", "chat:2 imports chronicals.models.hf"),
        ("chronicals.data.loader", "x.cuda()", "mentions cuda"),
        ("chronicals.data.loader", "x.to('cuda:0')", "mentions cuda"),
        ("chronicals.models.hf", "from chronicals.data.batch import PackedBatch", "models may import"),
        ("chronicals.models.hf", "from chronicals import train", "models may import"),
        ("chronicals.optim.adamw", "from chronicals.models.hf import load_model", "optim may import"),
        ("chronicals.train.step", "from chronicals.commands import verify", "train may import"),
        ("chronicals.integrations.loggers", "from chronicals.train import trainer", "integrations may import"),
        ("chronicals.kernels.rope", "from chronicals.errors import UserError", "nothing of ours"),
        ("chronicals.kernels.rope", "import numpy", "kernels use torch, triton"),
        ("chronicals.kernels.rope", "import triton.language as tl", "live in chronicals.kernels.fused"),
        ("chronicals.kernels.rope", "def f():\n    import triton", "live in chronicals.kernels.fused"),
        ("chronicals.kernels.ops", "from chronicals.kernels.fused import glu", "it needs triton"),
        ("chronicals.optim.adamw", "import chronicals.kernels.fused.adamw", "it needs triton"),
        ("chronicals.kernels.fused.attention", "from flash_attn.cute import interface", "kernels use torch, triton"),
        ("chronicals.kernels.attention", "def f():\n    import flash_attn", "kernels use torch, triton"),
        ("chronicals.hub", "from huggingface_hub import snapshot_download", "must be quick"),
        ("chronicals.commands.verify", "import torch", "must be quick"),
        ("chronicals.config_names", "import torch", "must be quick"),
        ("chronicals.config", "from chronicals.hub import resolve", "config may import"),
        ("chronicals.errors", "import chronicals.config", "nothing of ours"),
        ("chronicals", "from chronicals.train.trainer import Trainer", "on first use"),
    ],
)
def test_the_rules_catch(module: str, source: str, says: str) -> None:
    (found,) = violations(module, source)
    assert says in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("chronicals.cli", "def f():\n    import torch"),
        ("chronicals.commands.verify", "if TYPE_CHECKING:\n    import torch"),
        ("chronicals.kernels.fused.glu", "import triton\nfrom chronicals.kernels.fused import rope"),
        ("chronicals.kernels.fused.attention", "def f():\n    from flash_attn.cute import interface"),
        ("chronicals.kernels.ops", "def f():\n    from chronicals.kernels.fused import glu"),
        ("chronicals.adapters.lora", "from chronicals.models.projection import Projection"),
        ("chronicals.config", "from chronicals.config_yaml import read\nfrom chronicals.errors import UserError"),
        ("chronicals.data.batch", '"""Nothing here touches cuda."""\nfrom chronicals.config import TrainConfig'),
    ],
)
def test_the_rules_allow(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_cold_start_loads_no_heavy_library() -> None:
    cold = sorted(module for module in modules() if layer(module) in COLD)
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code, *cold], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert {"chronicals.cli", "chronicals.config"} <= set(ran.stdout.split())
    assert HEAVY & set(ran.stdout.split()) == set()
