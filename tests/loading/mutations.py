"""Damages files as strangers might: wrong values and sizes, names that are paths, flipped bits, cut ends, what is no file.

Each function takes a ``random.Random``, so that a seed names a case.
"""

import copy
import io
import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

from tests.runtime import fuzz_native

NUMBERS = [0, 1, 2, 3, 7, 64, -1, -8, 1.5, 0.0, -0.5, 1e-9, 1e308, 2**31, 2**32, 2**62, 2**63, 10**18, 10**30, 10**400]
PATHS = [
    "../x", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "~/x", "file:///etc/passwd", "a/../../b",
    "./method.py:evil", "hf-hub:a/b", "local-dir:/", "https://127.0.0.1:9/x", "os.system", "builtins.eval", "con", "x\\y",
]  # fmt: skip
TEXTS = ["", "x", "64", "NaN", "blocks.0", "blocks.0.attn", "weight", "\x1b[31m", "\x00", "é" * 300, "a" * 5000, "\ud800"]
SHAPES: list[Any] = [[], {}, [[]], [1], [0, 0], [[48, 2]], [[-1, 1]], [None], {"a": 1}, [0] * 5000, [10**18, 10**18]]
VALUES = [None, True, False, *NUMBERS, *TEXTS, *PATHS, *SHAPES, "NAN", "INFINITY", "MINUS", "DEEP", "DIGITS"]
RAW = {"NAN": "NaN", "INFINITY": "1e999", "MINUS": "-Infinity", "DEEP": "[" * 9000 + "]" * 9000, "DIGITS": "9" * 5000}
KEYS = [
    "x", "", "depth", "pretrained", "url", "num_heads", "blocks.0.mlp", "__metadata__", "auto_map", "_name_or_path",
    "model_type", "quantization_config", "torch_dtype", *PATHS[:3],
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to each value inside a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def json_text(text: str, rng: random.Random) -> str:
    """Replaces, removes, renames, doubles or adds a value, or changes a character."""
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["", "{", "]", '"', "9", "e9", "\\", "\x00", ","]) + text[at + rng.randrange(2) :]
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        found = [p for p in places(value) if p]
        if not found:
            break
        *parents, last = rng.choice(found)
        inside = value
        for key in parents:
            inside = inside[key]
        way = rng.random()
        if way < 0.5:
            inside[last] = copy.deepcopy(rng.choice(VALUES))
        elif way < 0.65:
            inside[last] = nearby(inside[last], value, found, rng)
        elif way < 0.8:
            del inside[last]
        elif isinstance(inside, list):
            inside.append(inside[last])
        elif way < 0.9:
            inside[rng.choice(KEYS)] = inside.pop(last)
        else:
            inside[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
    changed = json.dumps(value)
    for word, raw in RAW.items():
        changed = changed.replace(f'"{word}"', raw)
    if rng.random() < 0.05 and changed.startswith("{") and len(changed) > 2:  # a key twice
        key = rng.choice([*value]) if isinstance(value, dict) and value else "x"
        changed = f"{{{json.dumps(key)}: {json.dumps(rng.choice(NUMBERS[:5]))}, {changed[1:]}"
    return changed


def nearby(value: Any, whole: Any, found: list[tuple], rng: random.Random) -> Any:
    """A value of the right kind: a number beside the one that stands there, or what stands elsewhere in the file."""
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.7:
        return rng.choice([value + 1, value - 1, -value, 2 * value, value * 10**18, value // 2, 0.5])
    for key in rng.choice(found):
        whole = whole[key]
    return json.loads(json.dumps(whole))


def raw_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips bits, replaces, cuts or adds bytes, anywhere or near the beginning."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        if not changed:
            break
        at = rng.randrange(min(len(changed), rng.choice([16, 200, 10**9])))
        way = rng.random()
        if way < 0.4:
            changed[at] ^= 1 << rng.randrange(8)
        elif way < 0.7:
            changed[at] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
        elif way < 0.8:
            del changed[at : at + rng.choice([1, 8, 1000])]
        elif way < 0.9:
            changed[at:at] = rng.randbytes(rng.choice([1, 8, 1000]))
        else:
            del changed[at:]
    return bytes(changed)


def tensors(content: bytes, rng: random.Random) -> bytes:
    """Changes the header of a safetensors file as JSON, or bytes of its length, its header or its tensors."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.6:
        header = json_text(content[8 : 8 + size].decode(), rng).encode(errors="surrogatepass")
        length = rng.choice([len(header)] * 9 + [rng.choice([0, 1, len(header) + 1, 2**24, 2**31, 2**63, 2**64 - 1])])
        return length.to_bytes(8, "little") + header + content[8 + size :]
    if rng.random() < 0.3:  # a number that is none, of any width
        changed = bytearray(content)
        pattern = rng.choice([b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x7c", b"\xff\xff\xff\xff", b"\x00" * 64])
        at = 8 + size + rng.randrange(max(1, len(content) - 8 - size)) // 4 * 4
        changed[at : at + len(pattern)] = pattern
        return bytes(changed)
    return raw_bytes(content, rng)


def pickled(content: bytes, rng: random.Random) -> bytes:
    """Changes bytes of a .pth as they stand, or of one of the files that it packs."""
    if rng.random() < 0.3 or not zipfile.is_zipfile(io.BytesIO(content)):
        return raw_bytes(content, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as packed, zipfile.ZipFile(made, "w") as again:
        chosen = rng.choice([n for n in packed.namelist() if n.endswith(".pkl")] * 5 + packed.namelist())
        for name in packed.namelist():
            inside = packed.read(name)
            again.writestr(name, raw_bytes(inside, rng) if name == chosen else inside)
    return made.getvalue()


def lines(text: str, rng: random.Random) -> str:
    """Changes one line of JSON lines."""
    changed = text.splitlines()
    at = rng.randrange(len(changed))
    changed[at] = json_text(changed[at], rng)
    return "\n".join(changed) + "\n"


def words(text: str, rng: random.Random) -> str:
    """Changes words of a text such as YAML or a table."""
    for _ in range(rng.choice([1, 2, 5])):
        at, length = rng.randrange(len(text) + 1), rng.choice([0, 1, 10])
        put = [
            str(rng.choice(NUMBERS)),
            rng.choice(TEXTS + PATHS),
            "\n",
            ",",
            ":",
            '"',
            "[" * 500,
            "&a [*a]",
            "!!python/x",
        ]
        text = text[:at] + rng.choice(put) + text[at + length :]
    return text


def onnx_file(content: bytes, rng: random.Random) -> bytes:
    """Changes a node, a constant or the metadata of an ONNX file, says that constants are elsewhere, or changes bytes."""
    way = rng.random()
    if way < 0.3:
        return raw_bytes(content, rng)
    model = onnx.load_model_from_string(content)
    if way < 0.4:
        for prop in model.metadata_props:
            prop.value = json_text(prop.value, rng).encode(errors="replace").decode()
    elif way < 0.5:
        constant = rng.choice(list(model.graph.initializer))
        constant.ClearField("raw_data")
        constant.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", rng.choice(PATHS)), ("offset", str(rng.choice(NUMBERS))), ("length", "64")):
            constant.external_data.add(key=key, value=value)
    else:  # those of the native library's own nodes mostly: a view of the model with one node
        nodes = [node for node in model.graph.node if node.domain] * 4 + list(model.graph.node)
        graph = SimpleNamespace(node=[rng.choice(nodes)], initializer=model.graph.initializer)
        graph.input, graph.output = model.graph.input, model.graph.output
        view = SimpleNamespace(graph=graph, opset_import=model.opset_import)
        for _ in range(rng.choice((1, 1, 2, 3))):
            rng.choice(fuzz_native.MUTATIONS)(view, rng)
    return model.SerializeToString()


OF_ENDINGS = {
    ".json": json_text, ".jsonl": lines, ".csv": words, ".yaml": words,
    ".safetensors": tensors, ".pth": pickled, ".bin": pickled, ".onnx": onnx_file,
}  # fmt: skip


def file(path: Path, rng: random.Random) -> None:
    """Damages a file in place: its content by its ending, or what it is."""
    if rng.random() < 0.04:
        replace(path, rng)
        return
    content = path.read_bytes()
    change = OF_ENDINGS.get(path.suffix, raw_bytes)
    if change in (json_text, lines, words):
        made = change(content.decode(), rng).encode(errors="surrogatepass")  # type: ignore[operator]
    else:
        made = change(content, rng)  # type: ignore[operator]
    path.write_bytes(made)


def replace(path: Path, rng: random.Random) -> None:
    """Puts something else in a file's place: nothing, a folder, a pipe, a device, or another file of the folder."""
    others = sorted(each for each in path.parent.iterdir() if each != path)
    path.unlink()
    way = rng.choice(["gone", "empty", "folder", "pipe", "device", "dangling", "loop", "other"])
    if way == "empty":
        path.touch()
    elif way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way != "gone":
        other = rng.choice(others) if others else Path("/dev/null")
        path.symlink_to({"device": Path("/dev/zero"), "dangling": Path("nowhere"), "loop": path, "other": other}[way])
