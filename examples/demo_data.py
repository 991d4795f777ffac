"""The demo's text: every documented function, method and class of the Python standard library, as chats.

The user's turn is a signature, the assistant's the first paragraph of its docstring, both read from the sources with
`ast` (nothing is imported). A docstring that occurs twice is kept once: no answer of the evaluation set is trained on.
"""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
MAX_SIGNATURE, MIN_ANSWER, MAX_ANSWER = 300, 12, 400  # characters
EVERY = 20  # every 20th pair is held out for evaluation


def signature(node: ast.AST, path: str) -> str:
    """`def json.dumps(obj, *, skipkeys=False):` or `class json.JSONDecoder(object):`, on one line."""
    if isinstance(node, ast.ClassDef):
        return f"class {path}({', '.join(map(ast.unparse, node.bases))}):".replace("()", "")
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {path}({ast.unparse(node.args)}){returns}:"


def definitions(node: ast.AST, path: str) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of every definition below `node`, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield signature(child, f"{path}.{child.name}"), inspect.cleandoc(ast.get_docstring(child) or "")
            yield from definitions(child, f"{path}.{child.name}")


def pairs(root: Path) -> Iterator[tuple[str, str]]:
    """(signature, first paragraph of the docstring) below `root`, in the order of the files."""
    seen = set()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        for question, docstring in definitions(ast.parse(file.read_bytes()), ".".join(parts).removesuffix(".__init__")):
            answer = " ".join(docstring.split("\n\n")[0].split())
            if answer not in seen and len(question) <= MAX_SIGNATURE and MIN_ANSWER <= len(answer) <= MAX_ANSWER:
                seen.add(answer)
                yield question, answer


def write_chats(folder: Path) -> None:
    """`train.jsonl` and `eval.jsonl` in `folder`, one chat a line."""
    chats = [
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in pairs(Path(sysconfig.get_path("stdlib")))
    ]
    (folder / "eval.jsonl").write_text("\n".join(chats[::EVERY]) + "\n", encoding="utf-8")
    (folder / "train.jsonl").write_text("\n".join(c for i, c in enumerate(chats) if i % EVERY) + "\n", encoding="utf-8")
