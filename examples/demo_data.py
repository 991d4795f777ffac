"""The demo's text: every documented function, method and class of the Python standard library, as chats.

The user's turn is a signature, the assistant's the first paragraph of its docstring, both read from the sources with `ast` (nothing is
imported). Docstrings that occur twice are kept once, so that no answer of the evaluation set was seen in training.
"""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
}
MAX_SIGNATURE, MIN_ANSWER, MAX_ANSWER = 300, 12, 400  # characters
EVERY = 20  # every 20th pair is held out for evaluation

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def signature(node: Definition, path: str) -> str:
    """`def json.dumps(obj, *, skipkeys=False, ...):` or `class json.JSONDecoder:`, on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {path}({bases}):" if bases else f"class {path}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {path}({ast.unparse(node.args)}){returns}:"


def definitions(node: ast.AST, path: str) -> Iterator[tuple[Definition, str]]:
    """Every definition below `node` in source order, with its dotted path."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child, f"{path}.{child.name}"
            yield from definitions(child, f"{path}.{child.name}")


def pairs(root: Path) -> Iterator[tuple[str, str]]:
    """(signature, first paragraph of the docstring) below `root`, in the order of the file names, each docstring once."""
    seen = set()
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for node, path in definitions(ast.parse(file.read_bytes()), module):
            answer = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
            question = signature(node, path)
            if answer not in seen and len(question) <= MAX_SIGNATURE and MIN_ANSWER <= len(answer) <= MAX_ANSWER:
                seen.add(answer)
                yield question, answer


def write_chats(folder: Path, root: Path = Path(sysconfig.get_path("stdlib"))) -> None:
    """`train.jsonl` and `eval.jsonl` in `folder`, one `messages` row a line."""
    files = {name: (folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in ("train", "eval")}
    for i, (question, answer) in enumerate(pairs(root)):
        row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        print(json.dumps(row), file=files["eval" if i % EVERY == 0 else "train"])
    for file in files.values():
        file.close()
