"""YAML files of which the line of every value is known. No message repeats a value: it may be a key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import ComposerError
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from gallama.errors import InvalidConfig

_QUOTED_TEXT = re.compile(r"'[^']{2,}'|\"[^\"]{2,}\"")

Lines = Mapping[tuple[str | int, ...], int]
"""The line, from 1, of every key and list item by its path; () is the whole file."""


def read_yaml(path: Path, what: str) -> tuple[Any, Lines]:
    """The content of a file, None for an empty one, and its lines.

    Args:
        what: the kind of file, as in "config file".

    Raises:
        InvalidConfig: it cannot be read, or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = _parser().load(text)
        return content, {(): 1, **_lines_below((), _parser().compose(text))}
    except OSError as error:
        raise InvalidConfig(f"The {what} {path} cannot be read: {error.strerror}.") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidConfig(f"{path}, line {line}: this is not valid YAML: {_explain(error)}") from None
    except UnicodeDecodeError:
        raise InvalidConfig(f"{path}: this is not valid YAML: it is not UTF-8 text") from None
    except (YAMLError, ValueError, TypeError, RecursionError):
        raise InvalidConfig(
            f"{path}: this is not valid YAML: it holds a value or nesting that cannot be read"
        ) from None


def line_of(path: Sequence[str | int], lines: Lines) -> int:
    """The line of a value; one without a line of its own has its parent's."""
    ancestors = (tuple(path[:end]) for end in range(len(path), -1, -1))
    return next(lines[ancestor] for ancestor in ancestors if ancestor in lines)


def _parser() -> YAML:
    parser = YAML(typ="safe", pure=True)
    parser.composer.warn_double_anchors = False  # the warning would quote whole lines
    return parser


def _explain(error: MarkedYAMLError) -> str:
    """The problem in words that quote nothing but single signs: the library's quote whole values."""
    if isinstance(error, DuplicateKeyError):
        return "found duplicate key"
    if isinstance(error, ConstructorError):
        return "found a tag that means nothing; put text that begins with ! in quotes"
    if isinstance(error, ComposerError):
        return (
            "found an alias that means nothing, or a second document; put text that begins with * in quotes"
        )
    return _QUOTED_TEXT.sub("'…'", str(error.problem))


def _lines_below(path: tuple[str | int, ...], node: Node) -> dict[tuple[str | int, ...], int]:
    lines: dict[tuple[str | int, ...], int] = {}
    for key, key_node, value_node in _children(node):
        lines[(*path, key)] = key_node.start_mark.line + 1
        lines |= _lines_below((*path, key), value_node)
    return lines


def _children(node: Node) -> list[tuple[str | int, Node, Node]]:
    if isinstance(node, MappingNode):
        return [(key.value, key, value) for key, value in node.value]
    if isinstance(node, SequenceNode):
        return [(index, item, item) for index, item in enumerate(node.value)]
    return []
