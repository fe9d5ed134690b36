"""Reads untrusted YAML settings in bounded time and memory; every value stays text, so that 2:4 stays 2:4."""

from typing import Any, BinaryIO

import yaml

MAX_BYTES = 32_768  # PyYAML takes up to two seconds for this many
MAX_DEPTH = 3  # a mapping and its values are 2; lists as values are refused later, with the name of the setting


class SettingsLoader(yaml.BaseLoader):
    """A BaseLoader (scalars stay text) that refuses aliases and deep nesting; CBaseLoader would bypass these methods."""

    depth = 0  # of the current node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes a node; refuses aliases, anchors, deep nesting and null characters."""
        event: Any = self.peek_event()
        refused = None
        if event.anchor is not None:
            refused = "anchors and aliases (& and *) have no place here"
        elif self.depth == MAX_DEPTH:
            refused = "this is nested too deep"
        elif "\0" in getattr(event, "value", ""):
            refused = "a value holds a zero character"
        if refused:
            raise yaml.MarkedYAMLError(problem=refused, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Composes a mapping; refuses duplicate keys, the last of which would silently win."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r:.50} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return node


def load_settings(file: BinaryIO) -> Any:
    """The content of a YAML file, with all scalars as text; None if the file is empty.

    Raises:
        ValueError: the file is too long, not YAML, or uses features that are not allowed; the message is one line.
    """
    text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
    try:
        return yaml.load(text, Loader=SettingsLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two for escapes and versions out of range
        where = getattr(error, "problem_mark", None)
        said = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise ValueError(f"line {where.line + 1}: {said}" if where else said) from None
