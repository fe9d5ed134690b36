"""YAML of settings, in bounded time and memory, whoever wrote it: every value is the text it is, so 2:4 stays 2:4."""

from typing import Any, BinaryIO

import yaml

MAX_BYTES = 32_768  # PyYAML takes up to two seconds for as many
MAX_DEPTH = 3  # a mapping and its values are 2; a list as a value is refused by name later


class SettingsLoader(yaml.BaseLoader):
    """A BaseLoader (every scalar stays text) without aliases and depth. Never yaml.CBaseLoader: it would skip this method."""

    depth = 0  # of the node at work

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node, unless it is an alias, has an anchor, lies too deep or holds a zero character."""
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
        """A mapping whose keys differ: the last of two would win in silence."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r:.50} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return node


def load_settings(file: BinaryIO) -> Any:
    """What a YAML file holds, all scalars as text; None if it is empty.

    Raises:
        ValueError: it is too long, no YAML, or holds what settings need not; the message is one line.
    """
    text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
    try:
        return yaml.load(text, Loader=SettingsLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: of escapes and versions out of range
        where = getattr(error, "problem_mark", None)
        said = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise ValueError(f"line {where.line + 1}: {said}" if where else said) from None
