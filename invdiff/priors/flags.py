"""Options of a foreign training, read from text and never executed: JSON, plain YAML, flags, or Python settings."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from invdiff.errors import PriorError
from invdiff.files import read_text, show
from invdiff.priors.python_flags import OTHER, parse_python

_MOST_BYTES = 1_000_000
_STEPS = ("diffusion_steps", "num_diffusion_timesteps", "num_train_timesteps", "steps")
_SCHEDULES = ("noise_schedule", "beta_schedule")
_LINE = re.compile(r"^(\s*)([A-Za-z_][\w.-]*)\s*:\s*(.*)$")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "": ""}
_WORDS |= {"null": None, "none": None, "~": None}


def read_flags(path: str | Path) -> dict[str, Any]:
    """All options of a file by their last name; sections are joined.

    Plain YAML is ``name: value`` in lines, sections by indentation, lists in brackets or lines with a dash; nothing
    else of the language is read, and no tag, anchor or object is ever built.

    Raises:
        PriorError: not readable, none of the three forms, or one name with two values in different sections.
    """
    path = Path(path)
    try:
        text = read_text(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise PriorError(f"{show(path)}: cannot be read ({str(error)[:80]}); give a JSON or YAML file") from None
    try:
        found = parse_python(text) if path.suffix.lower() == ".py" else parse_flags(text)
        return {name: truth(value) for name, value in found.items()}
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        why = " ".join(str(error).split())[:160]
        raise PriorError(f"{show(path)}: {why}; give JSON, plain 'name: value' lines, or '--name value'") from None


def parse_flags(text: str) -> dict[str, Any]:
    """See :func:`read_flags`.

    Raises:
        ValueError: the text has none of the three forms, or contradicts itself.
    """
    start = text.lstrip()
    if start.startswith("{"):
        return _joined(json.loads(text).items())
    lines = [line for line in text.splitlines() if line.strip() not in ("", "---") and line.lstrip()[0] != "#"]
    if lines and not _LINE.match(lines[0]) and re.search(r"(^|\s)--\w", text):
        return _command_line(text)
    return _yaml(text)


def _joined(pairs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if isinstance(value, dict) and name in OTHER:
            continue
        inner = _joined(value.items()) if isinstance(value, dict) else {name: value}
        for key, item in inner.items():
            if key in found and found[key] != item:
                raise ValueError(f"'{key}' is both {found[key]!r} and {item!r} in different sections")
            found[key] = item
    return found


def _command_line(text: str) -> dict[str, Any]:
    words = [w for w in shlex.split(text.replace("\\\n", " "), comments=True) if "=" not in w or w.startswith("--")]
    found: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = _value(value) if equals else True if following.startswith("--") else _value(following)
    if not found:
        raise ValueError("holds no options")
    return found


def _yaml(text: str) -> dict[str, Any]:
    pairs: list[tuple[str, Any]] = []
    left_out: int | None = None  # indentation of a section of no interest
    for number, raw in enumerate(text.splitlines(), 1):
        line = _without_comment(raw).rstrip()
        indent = len(line) - len(line.lstrip())
        if not line or line == "---" or (left_out is not None and indent > left_out):
            continue
        left_out = indent if line.strip().removesuffix(":") in OTHER and line.endswith(":") else None
        if (item := line.lstrip()).startswith("- ") and pairs:
            name, before = pairs[-1]
            pairs[-1] = name, [*(before if isinstance(before, list) else []), _value(item[2:])]
        elif match := _LINE.match(line):
            pairs.append((match[2], _value(match[3])))
        else:
            raise ValueError(f"line {number} is not 'name: value'")
    if not pairs:
        raise ValueError("holds no options")
    return _joined((name, value) for name, value in pairs if value != "" or name == "channel_mult")


def _without_comment(line: str) -> str:
    quote = ""
    for k, c in enumerate(line):
        if c in "\"'":
            quote = "" if c == quote else quote or c
        elif c == "#" and not quote and (k == 0 or line[k - 1].isspace()):
            return line[:k]
    return line


def _value(text: str) -> Any:
    """Number, truth value, None, list in brackets, or text without its quotes."""
    text = text.strip()
    if text[:1] in ("[", "(") and text[-1:] in ("]", ")"):
        return [_value(part) for part in text[1:-1].split(",") if part.strip()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text[:1] in ("&", "*", "!", "|", ">", "{", "%", "@", "`"):
        raise ValueError(f"'{text[:20]}' is beyond plain values")
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    return number(text)


def truth(value: Any) -> Any:
    """A truth value, or none, that was written as a text, ``"False"`` say, which Python would take for true; else the
    value."""
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value


def number(text: str) -> int | float | str:
    """A whole number, else a real one, else the text as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def numbers(value: Any) -> list[float]:
    """``"32,16,8"``, ``[32, 16, 8]`` or ``16`` as numbers; empty for nothing.

    Raises:
        PriorError: something else.
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return [float(p) for p in parts if p not in ("", None)]
    except (TypeError, ValueError):
        raise PriorError(f"'{value}' should be numbers, e.g. 32,16,8; correct the configuration") from None


def betas_of(flags: dict[str, Any]) -> str | tuple[float, ...] | None:
    """``betas`` of a configuration: the name of a table, or the table itself, which goes before a name elsewhere.

    A pair of numbers is no table but an optimizer's (decay of its moments); it counts as none.

    Raises:
        PriorError: something else, a table of another length than the configuration says, or two names.
    """
    betas = flags.get("betas")
    if betas is None:
        return None
    if isinstance(betas, str):
        other = next((str(flags[name]) for name in _SCHEDULES if name in flags and flags[name] != betas), None)
        if other is not None:
            raise PriorError(f"the configuration says betas '{betas}' and noise schedule '{other}': keep one of them")
        return betas
    if not isinstance(betas, list | tuple) or len(betas) < 2:
        raise PriorError(f"betas {str(betas)[:40]} of the configuration: give the name of a table, or all its numbers")
    table = tuple(numbers(betas))
    if len(table) == 2:
        return None
    told = next((flags[name] for name in _STEPS if flags.get(name) not in (None, "")), len(table))
    if numbers(told) != [len(table)]:
        raise PriorError(f"the configuration has {len(table)} betas and says {told} steps: is it that of another file?")
    return table
