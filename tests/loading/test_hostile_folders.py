"""A folder from a stranger is data: loading it writes nothing, contacts nobody, runs nothing, and takes no more than its file.

Each folder loads in a process that watches itself (``tests.loading.hostile``), beside a web server that counts requests and
stands for the Hub as well.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from tests.loading.files import Evil
from tests.loading.test_interchange import put_on_hub
from vitoats.data.transforms import Preprocessing
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server():
    """A web server on this machine that answers everything, and notes what it was asked."""

    class Anything(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"chosen")

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Anything)
    made.asked, made.url = [], f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny compressed model."""
    model = make_tiny()
    report = compress_in_place(model, torch.randn(8, 3, 32, 32), job_of("oats", OATSConfig(iterations=2)))
    path = tmp_path_factory.mktemp("hostile") / "compressed"
    save_checkpoint(LoadedModel("tiny", model, Preprocessing(32), "random weights"), path, report.to_dict())
    return path


def load(names: list[str], home: Path, server, **env: str) -> list[dict]:
    """Loads models in a process of their own, whose home and caches are ``home``."""
    environment = {
        **os.environ,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "hf"),
        "TORCH_HOME": str(home / "torch"),
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
        "PYTHONDONTWRITEBYTECODE": "1",
        **env,
    }
    command = [sys.executable, "-m", "tests.loading.hostile", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def edited(source: Path, target: Path, config=None, about=None) -> Path:
    """A copy of a folder whose config.json and vitoats.json went through the functions."""
    shutil.copytree(source, target)
    for file, edit in (("config.json", config), ("vitoats.json", about)):
        if edit is not None:
            values = json.loads((target / file).read_text())
            edit(values)
            (target / file).write_text(json.dumps(values))
    return target


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ---- what config.json may ask for


def with_args(**arguments):
    return lambda config: config["model_args"].update(arguments)


def with_cfg(**values):
    return lambda config: config["pretrained_cfg"].update(values)


OVERLAY = {"url": "URL/x.pth", "file": "", "source": ""}
REFUSED = {
    "weights from a URL": with_args(pretrained=True, cache_dir="DROP", pretrained_cfg_overlay=OVERLAY),
    "weights from a URL, by default": with_args(pretrained_cfg_overlay=OVERLAY),
    "weights from the Hub": with_args(pretrained=True, pretrained_cfg_overlay={"source": "hf-hub", "hf_hub_id": "a/b"}),
    "foreign weights from a URL": with_args(pretrained=True, pretrained_cfg_overlay={**OVERLAY, "custom_load": True}),
    "another configuration": with_args(pretrained=True, pretrained_cfg={"url": "URL/x.pth", "input_size": [3, 32, 32]}),
    "the default weights": with_args(pretrained=True),
    "a pickle": with_args(checkpoint_path="PICKLE"),
    "a cache": with_args(cache_dir="DROP"),
    "custom_load": with_args(custom_load=True),
    "a device": with_args(device="cuda"),
    "a type": with_args(dtype="float64"),
    "pruning by a file": with_args(pruned=True),
    "features": with_args(features_only=True),
    "no strictness": with_args(pretrained_strict=False),
    "an argument that nobody knows": with_args(nonsense=1),
    "an object": with_args(norm_layer={"a": 1}),
    "a class": with_args(norm_layer="os.system"),
    "a path": with_args(act_layer="../../x"),
    "an architecture on the Hub": lambda c: c.update(architecture="hf-hub:a/b"),
    "an architecture in a folder": lambda c: c.update(architecture="local-dir:FOLDER"),
    "an architecture with a tag": lambda c: c.update(architecture="vit_tiny_patch16_224.augreg_in21k"),
    "an architecture that is a list": lambda c: c.update(architecture=["vit_tiny_patch16_224"]),
    "control characters": lambda c: c.update(architecture="vit\x1b[2J"),
}
HARMLESS = {  # said, but not followed
    "a URL in pretrained_cfg": with_cfg(url="URL/x.pth", file="", source="", custom_load=True, hf_hub_id=""),
    "a Hub repository in pretrained_cfg": with_cfg(hf_hub_id="a/b", source="hf-hub", hf_hub_filename="x.bin"),
    "a file in pretrained_cfg": with_cfg(file="PICKLE", source=""),
    "weights in pretrained_cfg": with_cfg(state_dict={"a": 1}),
    "code": lambda c: c.update(auto_map={"AutoModel": "model.Model"}, trust_remote_code=True),
}


@pytest.fixture(scope="module")
def ended(folder, tiny_folder, tmp_path_factory, server):
    """How each hostile folder ended, by (kind, form): forms are ours, timm's, and timm's with a classic pickle beside."""
    root, home = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("home")
    torch.save({"a": Evil(root / "pickle was run")}, root / "evil.pth")
    drop = root / "drop"
    names = {}
    for kind, edit in {**REFUSED, **HARMLESS}.items():
        for form, source in (("", folder), ("local-dir:", tiny_folder)):
            target = edited(source, root / f"{len(names)}", config=edit)
            text = (target / "config.json").read_text()
            for placeholder, value in (("URL", server.url), ("DROP", drop), ("PICKLE", root / "evil.pth"), ("FOLDER", folder)):
                text = text.replace(placeholder, str(value))
            (target / "config.json").write_text(text)
            (target / "model.py").write_text("raise SystemExit('code was run')")
            names[kind, form] = f"{form}{target}"
    before = files(root)
    found = load(list(names.values()), home, server)
    assert files(root) == before
    assert files(home) == {}
    assert server.asked == []
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("form", ["", "local-dir:"])
@pytest.mark.parametrize("kind", [*REFUSED, *HARMLESS])
def test_a_configuration_is_not_followed_out_of_its_folder(ended, kind, form):
    found = ended[kind, form]
    assert found["seen"] == []
    if kind in HARMLESS:
        assert found["ended"] == "loaded"
    else:
        assert found["ended"].startswith("InputError: "), found["ended"]
        assert len(found["ended"].splitlines()) == 1
        assert "\x1b" not in found["ended"]


def test_a_repository_on_the_hub_is_read_in_the_same_way(folder, tiny_folder, tmp_path, server):
    """From the cache, where the Hub's client may write locks; nobody is contacted."""
    asked = len(server.asked)
    for repo, source in (("someone/ours", folder), ("someone/timm", tiny_folder)):
        for i, edit in enumerate((REFUSED["weights from a URL"], HARMLESS["a URL in pretrained_cfg"])):
            put_on_hub(tmp_path / "home" / "hf" / "hub", f"{repo}{i}", edited(source, tmp_path / f"{repo}{i}", config=edit))
    names = [f"hf-hub:someone/{name}{i}" for name in ("ours", "timm") for i in (0, 1)]
    found = load(names, tmp_path / "home", server, HF_HUB_OFFLINE="1")
    assert [line["ended"][:10] for line in found] == ["InputError", "loaded", "InputError", "loaded"]
    assert not any(seen.startswith(("socket", "urllib", "subprocess")) for line in found for seen in line["seen"])
    assert not (ROOT / "DROP").exists()
    assert len(server.asked) == asked


# ---- what a small folder may ask for in memory and time


def rows(blocks):
    return lambda about: about["row_blocks"].update({"blocks.0.attn.qkv": blocks})


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


LARGE = {
    "ranks": {"about": rows([[64, 2_500_000]] * 3)},
    "rows": {"about": rows([[2_500_000, 1]] * 3)},
    "many row blocks": {"about": rows([[0, 0]] * 1_000_000)},
    "many layers": {"about": lambda a: a["row_blocks"].update({f"blocks.{i}": [[1, 1]] for i in range(200_000)})},
    "width": {"config": with_args(embed_dim=16_386)},
    "width without end": {"config": with_args(embed_dim=10**12)},
    "depth": {"config": with_args(depth=10**9)},
    "depth that an argument may have": {"config": with_args(depth=60_000)},
    "MLP ratio": {"config": with_args(mlp_ratio=1e6)},
    "image size": {"config": with_args(img_size=[32_000, 32_000])},
    "image size in pretrained_cfg": {
        "config": lambda c: (c["model_args"].pop("img_size"), c["pretrained_cfg"].update(input_size=[3, 32_000, 32_000]))
    },
    "classes": {"config": with_args(num_classes=10**9)},
    "classes at the top": {"config": lambda c: (c["model_args"].pop("num_classes"), c.update(num_classes=10**9))},
    "n_classes": {"about": lambda a: a.update(n_classes=10**15)},
    "giant": {"config": lambda c: c.update(architecture="vit_giant_patch14_dinov2", model_args={})},
    "giant, resized": {"config": lambda c: c.update(architecture="vit_giant_patch14_dinov2", model_args={"depth": 3})},
    "windows": {
        "config": lambda c: c.update(
            architecture="swin_tiny_patch4_window7_224", model_args={"img_size": 4096, "window_size": 512, "embed_dim": 24}
        )
    },
    "rotary": {"config": lambda c: c.update(architecture="eva02_tiny_patch14_224", model_args={"img_size": 4004})},
    "neurons that are not kept": {
        "config": with_args(mlp_ratio=60_000),
        "about": lambda a: a.update(kept_units={f"blocks.{i}.mlp": 192 for i in range(3)}),
    },
    "kept units": {"about": lambda a: a.update(kept_units={"blocks.0.attn": 10**12})},
    "preprocessing": {"about": lambda a: a["preprocessing"].update(img_size=10**6)},
    "crop": {"about": lambda a: a["preprocessing"].update(crop_pct=1e-9)},
    "a long name": {"about": lambda a: a.update(model="x" * 2**25)},
    "a name of digits": {"about": lambda a: a.update(format_version=10**4000)},
    "nested lists": {"file": write("vitoats.json", b"[" * 10**6)},
    "nested objects": {"file": write("config.json", b'{"a":' * 500 + b"1" + b"}" * 500)},
    "a long configuration": {"file": write("config.json", b'{"a": "' + b"x" * 2**25 + b'"}')},
    "a header without end": {"file": write("model.safetensors", header(b"{}", 2**63))},
    "a large header": {"file": write("model.safetensors", header(b" " * 2**25))},
    "a tensor beyond the file": {
        "file": write("model.safetensors", header(b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'))
    },
    "an empty tensor of many rows": {
        "file": write("model.safetensors", header(b'{"a":{"dtype":"F32","shape":[1000000000000,0],"data_offsets":[0,0]}}'))
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory, server):
    root, home = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("home")
    names = [str(folder)]
    for i, edits in enumerate(LARGE.values()):
        target = edited(folder, root / str(i), edits.get("config"), edits.get("about"))
        edits.get("file", lambda _: None)(target)
        names.append(str(target))
    return dict(zip(["plain", *LARGE], load(names, home, server), strict=True))


@pytest.mark.parametrize("kind", LARGE)
def test_a_small_folder_takes_little_memory_and_time(measured, kind):
    """One process loads them all, so its peak only grows: what is allowed is what all of them take together."""
    found, plain = measured[kind], measured["plain"]
    if kind != "n_classes":
        assert found["ended"].startswith("InputError: "), found["ended"]
        assert len(found["ended"]) < 1000
    assert plain["ended"] == "loaded"
    assert found["peak"] < plain["peak"] + 1000
    assert found["seconds"] < 60


def test_large_timm_folders_are_refused_as_well(tiny_folder, tmp_path, server):
    names = []
    for i, kind in enumerate(("width", "depth", "depth that an argument may have", "giant", "windows", "image size")):
        names.append(f"local-dir:{edited(tiny_folder, tmp_path / str(i), config=LARGE[kind]['config'])}")
    for found in load([f"local-dir:{tiny_folder}", *names], tmp_path / "home", server)[1:]:
        assert found["ended"].startswith("InputError: "), found
        assert found["peak"] < 2500
        assert found["seconds"] < 60


def test_pickles_that_unpack_to_far_more_are_refused(tiny_folder, tmp_path, server):
    """A zip whose entries are compressed, and one number that stands for a whole tensor."""
    names = []
    for i, kind in enumerate(("packed", "expanded")):
        target = tmp_path / str(i)
        target.mkdir()
        shutil.copy(tiny_folder / "config.json", target)
        state = make_tiny().state_dict()
        state["head.weight"] = torch.zeros(10**8) if kind == "packed" else torch.zeros(1).expand(10**9, 48)
        torch.save(state, tmp_path / "plain.bin")
        if kind == "packed":
            with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(target / "pytorch_model.bin", "w") as packed:
                for entry in plain.infolist():
                    packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
        else:
            shutil.copy(tmp_path / "plain.bin", target / "pytorch_model.bin")
        names.append(f"local-dir:{target}")
    for found, said in zip(load(names, tmp_path / "home", server), ("is packed", "of another shape"), strict=True):
        assert found["ended"].startswith("InputError: "), found
        assert said in found["ended"]
        assert found["peak"] < 1500


# ---- files that are no files


@pytest.mark.parametrize("name", ["vitoats.json", "config.json", "model.safetensors", "head.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder", "dangling link"])
def test_what_is_no_file_is_refused_at_once(folder, tmp_path, name, kind):
    """A pipe would keep the reader waiting for ever."""
    from vitoats.common.errors import InputError
    from vitoats.loading.load import load_model

    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    (target / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(target / name)
    elif kind == "folder":
        (target / name).mkdir()
    else:
        (target / name).symlink_to("/dev/zero" if kind == "link to a device" else tmp_path / "nowhere")
    if name == "head.safetensors":  # not there
        assert load_model(str(target)).n_classes == 4
        return
    with pytest.raises(InputError):
        load_model(str(target))


def test_links_within_reach_are_followed_as_the_hub_lays_them(folder, tmp_path):
    from vitoats.loading.load import load_model

    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert load_model(str(tmp_path / "links")).n_classes == 4


def test_the_watch_sees_what_it_should(tmp_path, server):
    """Otherwise the tests above would prove nothing."""
    code = """
import sys, urllib.request, socket
from tests.loading import hostile
sys.addaudithook(hostile.watch)
hostile.SEEN = []
open(sys.argv[1] + "/x", "w").close()
urllib.request.urlopen(sys.argv[2]).read()
seen, hostile.SEEN = hostile.SEEN, None
assert any(s.startswith("open") for s in seen) and any(s.startswith("socket.connect") for s in seen), seen
"""
    env = {**os.environ, "NO_PROXY": "*"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), server.url], check=True, cwd=ROOT, env=env)
    assert server.asked.pop() == "/"
