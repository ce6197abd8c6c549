"""Strict YAML: plain data of bounded size, no repeated keys; errors give line and column."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, Node

from synco_fast.runtime.errors import ConfigError

__all__ = ["parse_yaml", "read_yaml"]

#: Far above any valid configuration, far below what would take seconds.
_BYTES, _DEPTH, _NODES = 1 << 20, 32, 10_000


def read_yaml(path: Path) -> Any:
    """The content of a configuration file; see `parse_yaml`.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or as `parse_yaml` says.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: cannot read {path} ({getattr(error, 'strerror', None) or error})") from error
    return parse_yaml(text, f"config: {path}")


def parse_yaml(text: str, name: str) -> Any:
    """Plain data from YAML: mappings, lists, text, numbers, booleans and null.

    Args:
        text: At most 1 MiB, 32 levels and 10,000 values, with every alias counted in full.
        name: Start of the message.

    Raises:
        ConfigError: It is not YAML, exceeds a limit, repeats a key, refers to itself, or uses other types.
    """
    if len(text) > _BYTES:
        raise ConfigError(f"{name}: found more than {_BYTES:,} bytes of YAML, expected a configuration")
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{place}: {_one_line(error.problem or error.context).removeprefix('but ')}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(f"{name}, line {line}, column {column}: {error.reason}, expected text") from error


def _one_line(text: str | None) -> str:
    return " ".join((text or "found something that is not YAML").split())


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Count depth and values; an alias counts as all that it stands for."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                self._refuse(event, f"found *{event.anchor} inside &{event.anchor}, expected no alias to itself")
            self._count += self._sizes[id(node)]
        else:
            self._depth += 1
            if self._depth > _DEPTH:
                self._refuse(event, f"found more than {_DEPTH} levels, expected fewer")
            before = self._count
            self._count += 1
            node = super().compose_node(parent, index)
            self._depth -= 1
            self._sizes[id(node)] = self._count - before
        if self._count > _NODES:
            self._refuse(event, f"found more than {_NODES:,} values (aliases counted in full), expected fewer")
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Say where a value is that its tag or its digits do not fit, such as ``!!bool maybe`` or a 13th month."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            self._refuse(node, str(error))
        except (KeyError, IndexError, AttributeError, TypeError):  # of PyYAML's own constructors
            self._refuse(node, f"found no {node.tag.rpartition(':')[2]} behind its tag")

    def flatten_mapping(self, node: MappingNode) -> None:
        """Refuse a repeated key, before merge keys are expanded."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                self._refuse(key_node, f"found {type(key).__name__} as a key, expected a name")
            if key in seen:
                self._refuse(key_node, f"found the key {key!r} a second time, expected it once")
            seen.add(key)
        super().flatten_mapping(node)

    @staticmethod
    def _refuse(where: Any, problem: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


#: YAML 1.1 as PyYAML reads it reads 1e-3 as text, since it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
