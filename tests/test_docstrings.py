"""Docstrings begin with a verb, or with the noun that a value is; so a reader of one line knows what it is about."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "service", "training", "client", "cluster", "tests")
NEVER_FIRST = {"Of", "What"}
NEVER_FIRST_OF_FUNCTIONS = NEVER_FIRST | {"Whether", "How", "Why", "Which", "Where", "Who", "Those"}


def texts(module: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a function's) of each docstring, those below attributes and constants included."""
    for node in ast.walk(module):
        body = getattr(node, "body", [])
        for number, statement in enumerate(body if isinstance(body, list) else []):
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not number
                yield statement.lineno, value.value, is_function and not _is_property(node)


def _is_property(node: ast.AST) -> bool:
    return any(getattr(decorator, "id", "").endswith("property") for decorator in getattr(node, "decorator_list", []))


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_begin_with_a_verb_or_a_noun(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for line, text, is_function in texts(ast.parse(path.read_text())):
            first = text.split(maxsplit=1)[0].rstrip(",") if text.strip() else ""
            if first in (NEVER_FIRST_OF_FUNCTIONS if is_function else NEVER_FIRST):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
