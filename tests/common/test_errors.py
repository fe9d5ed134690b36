"""What users see of an error is one line, whatever names it quotes from a file."""

import pytest

from vitoats.common.errors import InputError, RunError


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_message_has_no_control_characters(kind):
    message = str(kind("no tensor \x1b[2J\x7f\n\ud800é: give `head` another"))
    assert message == "no tensor ?[2J???é: give `head` another"
    assert kind("give `head` another").field == "head"
