"""YAML of settings: values stay text, and what nobody needs in settings is refused in one line."""

import io
import itertools
import random
import tracemalloc

import pytest

from vitoats.cli.settings_yaml import MAX_BYTES, load_settings

LETTERS = "abcdefghi"
NINE_OF_THE_LAST = [f"&{c} [{','.join(['*' + last] * 9)}]" for last, c in itertools.pairwise(LETTERS)]  # billions in all
LAUGHS = "head: [&a [x], " + ", ".join(NINE_OF_THE_LAST) + "]\n"
LAUGHS2 = "a: &a [x]\n" + "".join(f"{nine[1]}: {nine}\n" for nine in NINE_OF_THE_LAST)


def load(text):
    return load_settings(io.BytesIO(text if isinstance(text, bytes) else text.encode()))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("pattern: 2:4", {"pattern": "2:4"}),
        (
            "a: 1e-4\nb: on\nc: no\nd: 2024-01-02\ne: 010\nf: ~\ng: null\nh: 0x1F\ni: .inf",
            {"a": "1e-4", "b": "on", "c": "no", "d": "2024-01-02", "e": "010", "f": "~", "g": "null", "h": "0x1F", "i": ".inf"},
        ),
        ("a:", {"a": ""}),
        ("", None),
        ("# note", None),
        ("a: [1, 2]", {"a": ["1", "2"]}),
        ("a: {b: c}", {"a": {"b": "c"}}),
        ("- a", ["a"]),
        ("0.5", "0.5"),
        ("\ufeffa: 1", {"a": "1"}),
        ("a: é".encode("utf-16"), {"a": "é"}),
        ("a: 'x & *y'", {"a": "x & *y"}),
        ("a: !!python/object/apply:os.system ['x']", {"a": ["x"]}),
        ("<<: b", {"<<": "b"}),
    ],
)
def test_values_stay_text(text, want):
    assert load(text) == want


BAD = {
    "laughs in one value": LAUGHS,
    "laughs over keys": LAUGHS2,
    "anchor only": "a: &x 1",
    "anchor on the root": "&x\na: 1",
    "anchor on a key": "&x a: 1",
    "itself": "a: &a [*a]",
    "unknown alias": "a: *b",
    "merge": "a: &a {b: c}\nd: {<<: *a}",
    "10000 [": "head: " + "[" * 10_000,
    "10000 [ closed": "[" * 10_000 + "]" * 10_000,
    "10000 {": "{" * 10_000,
    "10000 -": "- " * 10_000,
    "10000 ?": "? " * 10_000,
    "lines of [": "[\n" * 10_000,
    "blocks": "".join(" " * i + "a:\n" for i in range(200)),
    "escape": 'a: "\\U00110000"',
    "escape 2": 'a: "\\UFFFFFFFF"',
    "version": "%YAML 1." + "9" * 5000 + "\n---\na: 1",
    "same key twice": "a: 1\nb: 2\na: 3",
    "zero": 'a: "\\0"',
    "zero in a key": '"\\0": 1',
    "zero raw": b"a: \0",
    "two documents": "a: 1\n---\nb: 2",
    "open": "a: [b",
    "tab": "a:\n\tb: 1",
    "binary": b"\xff\xd8\xff\x00",
    "list as key": "? [a]\n: b",
    "mapping as key": "? {a: b}\n: c",
    "long handle": "a: !" + "x" * 30_000 + "!y b",
    "tag": "a: !<> b",
    "directive": "%TAG ! x",
    "long": "a: " + "x" * MAX_BYTES,
    "random": random.Random(0).randbytes(5000),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_settings_need_not_is_one_line_in_bounded_memory(kind):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"\w") as caught:
        load(BAD[kind])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(caught.value) is ValueError
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300
    assert peak < 20e6


def test_an_endless_file_is_not_read_to_its_end():
    with open("/dev/zero", "rb") as file, pytest.raises(ValueError, match="longer"):
        load_settings(file)


def test_random_text_is_settings_or_one_line():
    rng = random.Random(1)
    alphabet = [
        "a",
        ":",
        " ",
        "\n",
        "-",
        "[",
        "]",
        "{",
        "}",
        "&a",
        "*a",
        "!",
        "!!str",
        "|",
        ">",
        "'",
        '"',
        "\\",
        "U00110000",
        "%YAML 1.1\n",
        "---\n",
        "...",
        "?",
        ",",
        "#",
        "\t",
        "\0",
        "é",
        "9",
        "<<",
    ]
    for _ in range(4000):
        said = ""
        try:
            load("".join(rng.choices(alphabet, k=rng.randrange(1, 40))))
        except ValueError as error:
            said = str(error)
        assert len(said.splitlines()) <= 1, said
