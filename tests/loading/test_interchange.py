"""Folders on the Hugging Face Hub, fine-tuned classifiers as training scripts leave them, and the model card."""

import base64
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import vitoats
from tests.conftest import make_tiny
from tests.loading.files import WRAPPINGS, Evil, write_checkpoint
from vitoats.cli import common
from vitoats.cli.compress import main as compress_command
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.model_card import main as model_card
from vitoats.cli.results import read_results
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model
from vitoats.loading.model_card import model_card as written_card

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip

ROOT = Path(__file__).parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def compressed(model: str, images: Path, output: Path, *more: str) -> Path:
    flags = (
        f"--model {model} --data-dir {images} --output {output} --method oats --iterations 3 --nsamples 8 --threads 1 --quiet"
    )
    assert common.run(compress_command, [*flags.split(), *more]) == 0
    return output


def put_on_hub(cache: Path, repo: str, folder: Path, branch: str = "main") -> None:
    """Lays a folder down as huggingface_hub caches one: blobs, and a snapshot of links to them."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / branch).write_text(COMMIT)
    (root / "blobs").mkdir()
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        (root / "blobs" / f"blob{i}").write_bytes(file.read_bytes())
        (root / "snapshots" / COMMIT / file.name).symlink_to(Path("..") / ".." / "blobs" / f"blob{i}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hub, without a network."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture(scope="module")
def folders(tiny_folder, flat_images, tmp_path_factory):
    """The same compressed model in both formats."""
    root = tmp_path_factory.mktemp("folders")
    for form in ("factored", "dense"):
        compressed(f"local-dir:{tiny_folder}", flat_images, root / form, "--format", form)
    return root


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


# ---- the Hub


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_folders_load_from_the_hub(folders, hub, form):
    put_on_hub(hub, "someone/tiny-vit", folders / form)
    expected = vitoats.load(folders / form)(IMAGES)
    assert torch.equal(vitoats.load("hf-hub:someone/tiny-vit")(IMAGES), expected)
    loaded = load_model("hf-hub:someone/tiny-vit")
    assert loaded.name == "hf-hub:someone/tiny-vit"
    assert loaded.weights == "someone/tiny-vit on the Hugging Face Hub"
    assert loaded.about["method"] == "oats"
    assert loaded.preprocessing == load_model(str(folders / form)).preprocessing


def test_a_revision_is_the_one_that_loads(folders, hub):
    put_on_hub(hub, "someone/tiny-vit", folders / "factored", branch="v2")
    assert load_model("hf-hub:someone/tiny-vit@v2").about["format"] == "factored"
    with pytest.raises(InputError, match=r"cannot be fetched.*HF_HUB_OFFLINE"):
        load_model("hf-hub:someone/tiny-vit")


def test_a_plain_timm_repository_is_still_one(tiny_folder, hub):
    put_on_hub(hub, "someone/plain", tiny_folder)
    loaded = load_model("hf-hub:someone/plain")
    assert loaded.about == {}
    assert torch.equal(loaded.model(IMAGES), make_tiny()(IMAGES))


def test_a_copy_that_lacks_a_file_is_one_line(folders, hub):
    put_on_hub(hub, "someone/tiny-vit", folders / "factored")
    next(hub.glob("*/snapshots/*/model.safetensors")).unlink()
    with pytest.raises(InputError, match="no whole compressed model"):
        load_model("hf-hub:someone/tiny-vit")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub that down- and uploads speak to, for folders in ``server.folders`` by repository."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body, path = self.read_body(), self.path.strip("/")
        self.server.asked.append(path)
        commit = re.fullmatch(r"api/models/(\w+/[\w-]+)/commit/main", path)
        if path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self.send(200, json.dumps({"files": files}).encode())
        elif commit:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (self.server.folders[commit[1]] / line["value"]["path"]).write_bytes(content)
            done = {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"http://{self.headers['Host']}/{commit[1]}/commit/{COMMIT}",
            }
            self.send(200, json.dumps(done).encode())
        else:
            self.send(200, b"{}")

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self):
        path, folders = self.path.partition("?")[0].strip("/"), self.server.folders
        self.server.asked.append(path)
        listing = re.fullmatch(r"api/models/(\w+/[\w-]+)/(?:revision|tree)/\w+", path)
        file = re.fullmatch(r"(\w+/[\w-]+)/resolve/\w+/(.+)", path)
        if listing and listing[1] in folders:
            files = sorted(folders[listing[1]].iterdir())
            if "/tree/" in path:
                found = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files]
            else:
                found = {"id": listing[1], "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files]}
            self.send(200, json.dumps(found).encode())
        elif file and file[1] in folders and (folders[file[1]] / file[2]).is_file():
            self.send(200, (folders[file[1]] / file[2]).read_bytes(), {"ETag": f'"{file[2]}"'})
        elif file:
            known = file[1] in folders
            self.send(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        else:
            self.send(200, b"{}")

    def send(self, status, body, headers=()):
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A Hub on this machine; ``env`` is what a process needs to use it."""
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.folders, made.asked = {}, []
    endpoint = f"http://127.0.0.1:{made.server_port}"
    made.env = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.slow
def test_folders_are_fetched_and_then_cached(folders, tiny_folder, tmp_path, server):
    """In processes of their own: the first fetches, the second has no network. A plain timm repository goes the same way."""
    (tmp_path / "factored").mkdir()
    for file in (folders / "factored").iterdir():
        (tmp_path / "factored" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "factored" / "trap.bin").write_bytes(b"not asked for")
    server.folders = {"someone/tiny-vit": tmp_path / "factored", "someone/plain": tiny_folder}
    torch.save(IMAGES, tmp_path / "images.pt")
    code = f"""
import vitoats, torch
images = torch.load("{tmp_path / "images.pt"}")
torch.save([vitoats.load("hf-hub:someone/" + name)(images) for name in ("tiny-vit", "plain")], "{tmp_path / "logits.pt"}")
"""
    online = {**os.environ, **server.env}
    for env in (online, {**online, "HF_HUB_OFFLINE": "1"}):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        factored, plain = torch.load(tmp_path / "logits.pt", weights_only=True)
        assert torch.equal(factored, vitoats.load(folders / "factored")(IMAGES))
        assert torch.equal(plain, make_tiny()(IMAGES))
        (tmp_path / "logits.pt").unlink()
    assert any(path.endswith("tiny-vit/resolve/main/vitoats.json") for path in server.asked)
    assert not any("trap.bin" in path for path in server.asked)


@pytest.mark.slow
def test_a_folder_is_pushed_as_it_is(folders, tmp_path, server):
    """With the Hub's own client, and back."""
    (tmp_path / "pushed").mkdir()
    server.folders = {"someone/tiny-vit": tmp_path / "pushed"}
    code = f"""
import vitoats, huggingface_hub, torch
huggingface_hub.upload_folder(repo_id="someone/tiny-vit", folder_path="{folders / "factored"}", token="hf_none")
images = torch.zeros(1, 3, 32, 32)
assert torch.equal(vitoats.load("hf-hub:someone/tiny-vit")(images), vitoats.load("{folders / "factored"}")(images))
"""
    env = {**os.environ, **server.env}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for file in (folders / "factored").iterdir():
        assert (tmp_path / "pushed" / file.name).read_bytes() == file.read_bytes()


def test_stock_timm_opens_dense_folders_here_and_from_the_hub(folders, tmp_path):
    """In a process of its own, which knows the Hub's cache and that it is offline by environment variables alone."""
    put_on_hub(tmp_path / "hub", "someone/dense", folders / "dense")
    torch.save(IMAGES, tmp_path / "images.pt")
    code = f"""
import vitoats.common.torchvision_ops, sys, timm, torch
images = torch.load("{tmp_path / "images.pt"}")
models = [timm.create_model(name, pretrained=True).eval() for name in ("hf-hub:someone/dense", "local-dir:{folders / "dense"}")]
assert "vitoats.loading" not in sys.modules
torch.save([model(images) for model in models], "{tmp_path / "logits.pt"}")
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
    for logits in torch.load(tmp_path / "logits.pt", weights_only=True):
        assert torch.allclose(logits, vitoats.load(folders / "factored")(IMAGES), atol=1e-5)


@pytest.mark.parametrize("place", ["local-dir", "hub"])
def test_pickles_of_others_are_never_run(tiny_folder, tmp_path, hub, place):
    folder, trap = tmp_path / "evil", tmp_path / "trap"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    torch.save({"head.weight": Evil(trap)}, folder / "pytorch_model.bin")
    put_on_hub(hub, "someone/evil", folder)
    with pytest.raises(InputError, match=r"evil.*pickle"):
        load_model(f"local-dir:{folder}" if place == "local-dir" else "hf-hub:someone/evil")
    assert not trap.exists()


# ---- fine-tuned classifiers


@pytest.mark.parametrize(("wrapping", "ending"), [*((w, ".pth") for w in WRAPPINGS), ("plain", ".safetensors")])
def test_a_fine_tuned_classifier_is_compressed_as_it_is(tiny_folder, flat_images, tmp_path, wrapping, ending):
    """The result is that of the same weights in a timm folder."""
    tuned = make_tiny()
    for parameter in tuned.parameters():
        parameter.data *= 1.1
    save_for_hf(tuned, str(tmp_path / "tuned"), safe_serialization=True)
    file = write_checkpoint(WRAPPINGS[wrapping](tuned.state_dict()), tmp_path / f"w{ending}")
    expected = compressed(f"local-dir:{tmp_path / 'tuned'}", flat_images, tmp_path / "expected")
    found = compressed(f"local-dir:{tiny_folder}", flat_images, tmp_path / "found", "--checkpoint", str(file))
    a, b = (safetensors.torch.load_file(str(folder / "model.safetensors")) for folder in (expected, found))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}),
        ("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    ],
)
def test_the_class_count_comes_from_the_classifier(flat_images, tmp_path, name, arguments):
    """Also where the classifier is called head.fc, as in Swin."""
    base = timm.create_model(name, img_size=32, num_classes=4, **arguments)
    tuned = timm.create_model(name, img_size=32, num_classes=7, **arguments).eval()
    save_for_hf(base, str(tmp_path / "base"), safe_serialization=True)
    file = write_checkpoint(WRAPPINGS["EMA with prefixes"](tuned.state_dict()), tmp_path / "w.pth")
    model = f"local-dir:{tmp_path / 'base'}"
    assert torch.allclose(load_model(model, checkpoint=file).model(IMAGES), tuned(IMAGES), atol=1e-6)
    folder = compressed(model, flat_images, tmp_path / "out", "--checkpoint", str(file))
    assert vitoats.load(folder)(IMAGES).shape == (2, 7)


# ---- the model card


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(("form", "library"), [("factored", "vitoats"), ("dense", "timm")])
def test_the_card_says_what_was_measured(folders, tiny_folder, form, library):
    card = (folders / form / "README.md").read_text()
    about = json.loads((folders / form / "vitoats.json").read_text())
    found = front_matter(card)
    assert (found["library_name"], found["pipeline_tag"]) == (library, "image-classification")
    assert "base_model" not in found  # of a local folder nobody knows where it is from
    assert "license" not in found
    for key, word in (("parameters", "parameters"), ("nonzeros", "non-zeros"), ("bytes", "bytes")):
        assert f"| {word} | {about['counts_before'][key]:,} | {about['counts'][key]:,} |" in card
    assert f"{about['compression']:.2%} of the weights of 12 linear layers" in card
    assert "8 images, of 20 of flat0, seed 42" in card
    assert "iterations 3" in card
    assert f"timm {timm.__version__}" in card
    assert "`head`" in card
    assert "Evaluation" not in card
    assert str(tiny_folder.parent) not in card  # no paths of this machine


def test_the_card_names_the_base_model_where_it_came_from_the_hub(tiny_folder, flat_images, tmp_path, hub):
    folder = tmp_path / "licensed"
    folder.mkdir()
    config = json.loads((tiny_folder / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "apache-2.0"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    put_on_hub(hub, "someone/plain", folder)
    found = front_matter((compressed("hf-hub:someone/plain", flat_images, tmp_path / "out") / "README.md").read_text())
    assert (found["base_model"], found["license"]) == ("someone/plain", "apache-2.0")
    weights = next(hub.glob("*/snapshots/*/model.safetensors"))
    other = compressed("hf-hub:someone/plain", flat_images, tmp_path / "other", "--checkpoint", str(weights))
    assert "base_model" not in front_matter((other / "README.md").read_text())


@pytest.mark.parametrize("name", ["results.json", "results.csv"])
def test_evaluations_are_those_of_results_files(folders, image_tree, tmp_path, capsys, name):
    results, flags = tmp_path / name, ["--data-dir", str(image_tree), "--quiet", "--threads", "1"]
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(folders / "factored"), str(folder)], check=True)
    evaluate = ["--model", str(folder), *flags, "--results-file", str(results)]
    assert common.run(eval_imagenet, evaluate) == 0
    assert common.run(model_card, [str(folder), "--evaluation", str(results)]) == 0
    said, card = read_results(results)[0], (folder / "README.md").read_text()
    assert f"| out | {said['top1']} | {said['top5']} | {said['n_images']} | 32 |" in card
    assert (
        card.replace(card[card.index("## Evaluation") : card.index("## Layers that")], "")
        == (folders / "factored" / "README.md").read_text()
    )
    assert torch.equal(vitoats.load(folder)(IMAGES), vitoats.load(folders / "factored")(IMAGES))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": "x", "compression": 0.5}', None])
def test_what_is_no_evaluation_is_refused(folders, tmp_path, capsys, content):
    results = tmp_path / "results.json"
    if content is not None:
        results.write_text(content)
    before = (folders / "factored" / "README.md").read_text()
    assert common.run(model_card, [str(folders / "factored"), "--evaluation", str(results)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (folders / "factored" / "README.md").read_text() == before


def test_a_card_takes_no_lines_from_others(folders):
    """Names and licenses of a folder may be a stranger's."""
    about = json.loads((folders / "factored" / "vitoats.json").read_text())
    about |= {"model": "x\n# y", "weights": "a/b\nlicense: mine on the Hugging Face Hub", "method": "a\n|b"}
    card = written_card(about, "mit\nbase_model: c/d")
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "\n# y" not in card
    found = front_matter(written_card({**about, "weights": "a/b on the Hugging Face Hub"}, "mit\nbase_model: c/d"))
    assert found["base_model"] == "a/b"
    assert "license" not in found
