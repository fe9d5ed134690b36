"""Where a loaded model comes from, whether it takes images or text."""

from typing import Any


class Origin:
    """A base of loaded models.

    Attributes:
        name: the name that the model was requested by.
        about: the content of vitoats.json for a model that compress wrote; empty for others.
    """

    name: str
    about: dict[str, Any]

    @property
    def source(self) -> str:
        """The name of the model before compression; equals ``name`` if the model is not compressed."""
        return self.about.get("model", self.name)
