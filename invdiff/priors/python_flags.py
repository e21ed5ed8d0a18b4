"""Options from a Python file of settings (ml_collections), read as text: its assignments are parsed, never executed."""

import ast
from typing import Any

# Parts of a training that say nothing of the network or of the noise, and repeat names of those that do.
OTHER = {"optim", "optimizer", "sampling", "eval", "evaluate", "evaluation", "optimizer_kwargs", "loss_kwargs"} | {
    *("dataset_kwargs", "data_loader_kwargs", "augment_kwargs", "callbacks", "trainer")
}


def parse_python(text: str) -> dict[str, Any]:
    """Plain values that a file assigns to names with a dot, by their last name: ``model.nf = 128`` is ``nf``.

    Functions are looked into; names that stand for a section (``model = config.model``) are followed, and so are names
    of plain values. What belongs to another part than network, data and training is left out.

    Raises:
        ValueError: no Python, an assignment to a section that is no plain value or depends on a condition, or none.
    """
    found: dict[str, Any] = {}
    known: dict[str, Any] = {}
    sections: dict[str, str] = {}
    for node in _assignments(ast.parse(text).body):
        names = [path for target in node.targets if (path := _path(target))]
        plain, value = _value(node.value, known)
        source = _path(node.value)
        title = next((p[-1] for p in names if len(p) > 1), source[-1] if len(source) > 1 else "")
        for path in names:
            if len(path) == 1:
                known.pop(path[0], None)
                if plain:
                    known[path[0]] = value
                elif title:
                    sections[path[0]] = title
                continue
            section = sections.get(path[-2], path[-2])
            if plain and section not in OTHER:
                found[path[-1]] = value
            elif section in ("model", "data", "training"):
                raise ValueError(f"line {node.lineno} gives {'.'.join(path)} no plain value")
    if not found:
        raise ValueError("assigns no options")
    return found


def _assignments(body: list[ast.stmt]):
    """Assignments in the order of the text, also in functions; those under a condition or in a loop are refused."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield node
        elif isinstance(node, ast.FunctionDef):
            yield from _assignments(node.body)
        elif isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.AugAssign):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Assign | ast.AugAssign)]
            targets = [t for n in inner for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
            if any(len(_path(target)) > 1 for target in targets):
                raise ValueError(f"line {node.lineno} assigns options under a condition; write them out")


def _path(node: ast.AST) -> tuple[str, ...]:
    """``a.b.c`` as its names, or nothing."""
    if isinstance(node, ast.Attribute):
        return (*before, node.attr) if (before := _path(node.value)) else ()
    return (node.id,) if isinstance(node, ast.Name) else ()


def _value(node: ast.expr, known: dict[str, Any]) -> tuple[bool, Any]:
    """Whether an expression is a plain value, and the value."""
    if isinstance(node, ast.Name):
        return node.id in known, known.get(node.id)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return False, None
    return True, list(value) if isinstance(value, tuple) else value
