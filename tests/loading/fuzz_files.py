"""Opens damaged files, thousands in one process: python -m tests.loading.fuzz_files CASES SEED [KIND ...]

    python -m tests.loading.fuzz_files 100000 1         all kinds, half an hour
    python -m tests.loading.fuzz_files 1 4711 timm      the case that a finding names

Each case damages one file of a sound folder (``tests.loading.mutations``) and opens the folder as a command does. It must load,
and then run, or end in InputError or RunError with one short line; files that vitoats keeps for itself must be made anew. What
else comes out is a finding: a crash, another error, more than ``SECONDS`` of processor time, more than ``MEGABYTES`` of memory,
or anything opened for writing, started or contacted. Every finding is printed; the last line counts the cases.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before timm and transformers)
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from tests.loading import hostile, mutations
from vitoats import api
from vitoats.allocation.cost import CostTable
from vitoats.allocation.sensitivity import RATES, read_sensitivities
from vitoats.cli.config_file import first_look
from vitoats.cli.results import read_results
from vitoats.common import cache
from vitoats.common.errors import InputError, RunError
from vitoats.comparison import language
from vitoats.compression.resume import BlockStore
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.exported import open_exported
from vitoats.evaluation.store import RowStore
from vitoats.export.onnx_file import export_onnx
from vitoats.format.layers import compressed_layers
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.head_files import HeadFile, attach_head, save_head
from vitoats.loading.language_models import load_language_model
from vitoats.loading.load import load_model
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.models.heads import HeadInfo
from vitoats.report.page.sources import read_sources

from timm.models import save_for_hf  # isort: skip

SECONDS, MEGABYTES = 20, 700
PATIENCE = 300  # seconds of waiting for what never comes, such as a pipe; those in which others stop this process do not count
IMAGES = torch.zeros(1, 3, 32, 32)


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        make: writes a sound one.
        open: opens it; gives what a sound and a repaired one must both give, or None if a damaged one may be another.
        files: patterns of the files to damage.
        writes: whether opening may write into the folder.
    """

    make: Callable[[Path], Any]
    open: Callable[[Path], Any]
    files: tuple[str, ...] = ("*",)
    writes: bool = False


# ---- folders of models


def tiny(depth: int = 1) -> Any:
    model = make_tiny(depth)
    model._model_args["depth"] = depth
    return model


def compressed(path: Path, int8: bool = False) -> None:
    """A tiny compressed backbone with a head; without a checksum, which would end most loads early."""
    model = tiny()
    model.reset_classifier(0)
    report = compress_in_place(model, torch.randn(4, 3, 32, 32), job_of("oats", OATSConfig(iterations=2), int8=int8))
    save_checkpoint(LoadedModel("tiny", model, Preprocessing(32), "random weights"), path, report.to_dict())
    without_checksum(path)
    save_head(path / "head.safetensors", torch.randn(3, 96), torch.randn(3), HeadInfo("tiny", 32, classes=("a", "b", "c")))


def pruned(path: Path) -> None:
    folder = path.parent / "dense"
    save_for_hf(tiny(), str(folder), safe_serialization=True)
    config = {"method": "numerical", "compression": 0.5, "nsamples": 8}
    api.compress(f"local-dir:{folder}", torch.randn(8, 3, 32, 32), **config).save(path)
    without_checksum(path)


def without_checksum(path: Path) -> None:
    about = json.loads((path / "vitoats.json").read_text())
    del about["tensors_sha256"]
    (path / "vitoats.json").write_text(json.dumps(about))


def transformers_vision(path: Path) -> None:
    from tests.loading.test_foreign import SMALL, saved

    saved("Dinov2ForImageClassification", "Dinov2Config", path, **SMALL | {"num_hidden_layers": 1, "num_labels": 5})
    size = {"do_center_crop": True, "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    numbers = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True}
    (path / "preprocessor_config.json").write_text(json.dumps(size | numbers))


def transformers_text(path: Path) -> None:
    from tests.language_models import save_folder

    save_folder(path, num_hidden_layers=1)
    content = safetensors.torch.load_file(str(path / "model.safetensors"))
    (path / "model.safetensors").unlink()
    names = sorted(content)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        safetensors.torch.save_file({name: content[name] for name in held}, str(path / file), {"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def compressed_text(path: Path) -> None:
    from tests.language_models import PROSE, make_model, make_tokenizer

    settings = {"seq_len": 16, "nsamples": 8, "iterations": 2, "compression": 0.5, "method": "oats"}
    model = make_model("llama", num_hidden_layers=1)
    api.compress(model, [PROSE], tokenizer=make_tokenizer(), **settings).save(path)
    without_checksum(path)


def run_vision(name: str, **settings: Any) -> None:
    """Loads and runs it, if it runs, on an image of the size that it says; one that is large takes long without being wrong."""
    loaded = load_model(name, **settings)
    assert all(p.device.type == "cpu" for p in loaded.model.parameters())
    shape = loaded.inputs.shape(1)
    if np.prod(shape) < 10**6:
        with torch.inference_mode():
            loaded.model(torch.zeros(shape))


def run_text(name: str, from_disk: str | None = None) -> None:
    loaded = load_language_model(name, 8, from_disk)
    tokens = torch.zeros(1, min(8, loaded.preprocessing.seq_len), dtype=torch.long)
    with torch.inference_mode():
        loaded.model(tokens)


# ---- files of weights


def head_files(path: Path) -> None:
    path.mkdir()
    save_head(path / "ours.safetensors", torch.randn(3, 96), torch.randn(3), HeadInfo("tiny", 32, classes=("a", "b", "c")))
    torch.save({"weight": torch.randn(3, 96), "bias": torch.randn(3)}, path / "theirs.pth")
    many = {f"classifier_{n}_blocks_avgpool_{a}_lr_0_1": (n + a) * 48 for n in (1, 4) for a in (True, False)}
    state = {f"linear_classifiers.classifiers_dict.{name}.linear.weight": torch.randn(3, d) for name, d in many.items()}
    torch.save({"model": state, "epoch": 3}, path / "all.pth")


def open_heads(path: Path) -> None:
    backbone = tiny()
    backbone.reset_classifier(0)
    problems: list[Exception] = []
    for file in sorted(path.iterdir()):
        name = "classifier_1_blocks_avgpool_True" if file.name == "all.pth" else None
        try:
            attach_head(backbone, HeadFile(file, name=name), source="tiny", img_size=32)
        except InputError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def checkpoints(path: Path) -> None:
    save_for_hf(tiny(), str(path), safe_serialization=True)
    state = tiny().state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}, path / "one.pth")
    safetensors.torch.save_file(state, str(path / "two.safetensors"))
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")


def open_checkpoints(path: Path) -> None:
    architecture = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    for file in ("one.pth", "two.safetensors"):
        with contextlib.suppress(InputError):
            run_vision("vit_tiny_patch16_224", checkpoint=path / file, model_kwargs=architecture)
    run_vision(f"local-dir:{path}")


# ---- what vitoats keeps for itself: whatever is done to it, the result is the same

SENSITIVITIES = [{"name": f"l{i}", "parameters": 64, "errors": [0.1] * len(RATES), "without_rank": None} for i in range(3)]
SIZES = [(f"l{i}", 64) for i in range(3)]
FEATURES = {"x": torch.arange(6.0).view(2, 3), "y": torch.arange(2)}
SETTINGS, ROW, ARRAYS = {"model": "m", "seed": 0}, {"top1": 50.0, "name": "x"}, {"hits": np.arange(3)}


def kept(path: Path) -> None:
    path.mkdir()
    open_kept(path)


def open_kept(path: Path) -> str:
    """A measurement and features as the cache keeps them."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(path)):
        found = cache.cached("k", lambda values: read_sensitivities(values, SIZES, False), lambda: SENSITIVITIES)
    features = cache.cached_tensors(path / "f.safetensors", lambda: FEATURES)
    return f"{found} {features}"


def blocks(path: Path) -> None:
    compress_in_place(tiny(2), torch.ones(4, 3, 32, 32), job_of("oats", OATSConfig(iterations=2)), state=BlockStore(path, "k"))


def open_blocks(path: Path) -> str:
    """A run that goes on with finished blocks; or refuses another run's."""
    model = tiny(2)
    store = BlockStore(path, "k", resume=True)
    compress_in_place(model, torch.ones(4, 3, 32, 32), job_of("oats", OATSConfig(iterations=2)), state=store)
    return str(sum(float(layer.weight.double().sum()) for layer in compressed_layers(model).values()))


def comparison(path: Path) -> None:
    RowStore(path, SETTINGS).save("dense", {}, ROW, ARRAYS)


def open_comparison(path: Path) -> str:
    found = RowStore(path, SETTINGS).load("dense", {})
    return f"{ROW, ARRAYS}" if found is None else f"{found}"


# ---- files that commands read


def results(path: Path) -> None:
    path.mkdir()
    rows = [{"method": "oats", "top1": 50.0, "compression": 0.5}, {"method": "dense", "top1": 51.0, "file": "a.onnx"}]
    (path / "r.json").write_text(json.dumps({"model": "m", "threads": 2, "rows": rows}))
    (path / "l.jsonl").write_text("".join(json.dumps({**row, "key": "k", "measured_on": "t"}) + "\n" for row in rows))
    (path / "t.csv").write_text('method,top1,list\noats,50.0,"[1, 2]"\ndense,51.0,\n')
    (path / "c.yaml").write_text("model: m\ncompression: 0.5\npattern: '2:4'\nquiet: true\n")
    shape = {"n": 8, "k": 8, "blocks": 1, "tokens": 4, "layers": 1, "dense_ms": 1.0, "dense_int8_ms": 1.0}
    rates = [{"zeros": z, "rank": 0, "sparse_ms": 0.5, "sparse_int8_ms": 0.5} for z in (50, 80)]
    about = {"processor": "p", "threads": 1, "batch": 1, "dense_ms": 3.0, "rest_ms": 1.0, "rest_int8_ms": 1.0}
    (path / "costs.json").write_text(json.dumps({**about, "rows": [shape | rate for rate in rates]}))


def open_results(path: Path) -> None:
    opens: list[Callable[[], Any]] = [
        lambda: read_sources([path / "r.json"]),
        lambda: read_sources([path / "t.csv"]),
        lambda: read_sources([path]),
        lambda: read_results(path / "t.csv"),
        lambda: read_results(path / "r.json"),
        lambda: language._read(path / "l.jsonl"),
        lambda: first_look(["--config", str(path / "c.yaml")], complain=True),
        lambda: CostTable.read(path / "costs.json"),
    ]
    problems: list[Exception] = []
    for each in opens:
        try:
            each()
        except InputError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def onnx_files(path: Path) -> None:
    compressed(path.parent / "float")
    compressed(path.parent / "int8", int8=True)
    path.mkdir()
    for form in ("float", "int8"):
        export_onnx(load_model(str(path.parent / form)), path / f"{form}.onnx")


def open_onnx(path: Path) -> None:
    """ONNX Runtime's own errors while it runs a file are its own words."""
    for file in sorted(path.iterdir()):
        opened = open_exported(str(file), 1)
        with contextlib.suppress(Exception):
            opened.run(IMAGES)


KINDS = {
    "compressed": Kind(compressed, lambda p: run_vision(str(p)), ("*.json", "*.safetensors")),
    "int8": Kind(lambda p: compressed(p, int8=True), lambda p: run_vision(str(p)), ("*.json", "model.safetensors")),
    "pruned": Kind(pruned, lambda p: run_vision(str(p)), ("*.json", "model.safetensors")),
    "timm": Kind(lambda p: save_for_hf(tiny(), str(p), safe_serialization=True), lambda p: run_vision(f"local-dir:{p}")),
    "transformers vision": Kind(transformers_vision, lambda p: run_vision(f"local-dir:{p}")),
    "transformers text": Kind(transformers_text, lambda p: run_text(f"local-dir:{p}")),
    "text on disk": Kind(transformers_text, lambda p: run_text(f"local-dir:{p}", "cpu"), ("config.json", "model*")),
    "compressed text": Kind(compressed_text, lambda p: run_text(str(p)), ("config.json", "vitoats.json", "*.safetensors")),
    "heads": Kind(head_files, open_heads),
    "checkpoints": Kind(checkpoints, open_checkpoints),
    "kept": Kind(kept, open_kept, ("vitoats/k.json", "f.safetensors"), writes=True),
    "blocks": Kind(blocks, open_blocks, writes=True),
    "comparison": Kind(comparison, open_comparison, ("comparison.json", "rows/*"), writes=True),
    "results": Kind(results, open_results),
    "onnx": Kind(onnx_files, open_onnx),
}


class TooLongError(BaseException):
    """A case took too long; no handler of errors catches it."""


class Fuzzer:
    """A sound folder of one kind, which is damaged and opened again and again."""

    def __init__(self, kind: str, scratch: Path):
        torch.manual_seed(0)
        self.kind, self.name = KINDS[kind], kind
        self.sound, self.folder = scratch / kind.replace(" ", "_") / "sound", scratch / kind.replace(" ", "_") / "folder"
        self.sound.parent.mkdir(parents=True)
        self.kind.make(self.sound)
        self.files = sorted({p.relative_to(self.sound) for g in self.kind.files for p in self.sound.glob(g) if p.is_file()})
        self._restore()
        self.expected = self.kind.open(self.folder)  # which also imports what is imported late

    def case(self, seed: int) -> str:
        """Opens one damaged folder: "loaded", or the name of the error; what is a finding raises AssertionError."""
        rng = random.Random(f"{self.name} {seed}")
        self._restore()
        mutations.file(self.folder / rng.choice(self.files), rng)
        forget_peak()
        before, start = peak(), time.process_time()
        message, ended, found = "", "loaded", None
        try:
            with limits(), quiet():
                hostile.SEEN = []
                found = self.kind.open(self.folder)
        except (InputError, RunError) as error:
            message, ended = str(error), type(error).__name__
        except (Exception, TooLongError) as error:
            trace = "".join(traceback.format_tb(error.__traceback__)[-3:])
            ended, message = "finding", f"{type(error).__name__}: {error!s:.300}\n{trace}"
        seen, hostile.SEEN = hostile.SEEN or [], None
        problems = [message] if ended == "finding" else []
        if ended != "finding" and not (message.isprintable() and len(message) < 1500):
            problems.append(f"the message is not one short line: {message[:300]!r}")
        if ended == "loaded" and found != self.expected:
            problems.append(f"another result: {found!s:.300}")
        if peak() - before > MEGABYTES:
            problems.append(f"{peak() - before} MB of memory")
        if time.process_time() - start > SECONDS:
            problems.append(f"{time.process_time() - start:.0f} seconds")
        problems += [f"it did {what}" for what in seen if not self.kind.writes]
        assert not problems, f"{self.name}, seed {seed}: " + "; ".join(problems)
        return ended

    def _restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.sound, self.folder)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends what computes or waits for too long."""

    ticks = 0

    def stop(*_: Any) -> None:
        raise TooLongError("it computed for too long")

    def tick(*_: Any) -> None:
        nonlocal ticks
        ticks += 1
        if ticks > PATIENCE:
            raise TooLongError("it waited for too long")

    old = {signal.SIGPROF: signal.signal(signal.SIGPROF, stop), signal.SIGALRM: signal.signal(signal.SIGALRM, tick)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in old.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines, thousands of which say nothing."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def forget_peak() -> None:
    """Lets the most memory so far be the memory now, where the system allows that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    return hostile._most_memory()


def work(at: Any, cases: int, seed: int, kinds: list[str], results: Any) -> None:
    """Opens the damaged folders from number ``at.value`` on, and sends the kind of each and how it ended.

    It ends after one that took too long, because what was stopped may have left torch in another state.
    """
    torch.set_num_threads(1)
    sys.addaudithook(hostile.watch)
    with tempfile.TemporaryDirectory() as scratch:
        fuzzers = [Fuzzer(kind, Path(scratch)) for kind in kinds]
        stopped = False
        while at.value < cases and not stopped:
            i = at.value
            fuzzer = fuzzers[i % len(fuzzers)]
            try:
                results.send((fuzzer.name, fuzzer.case(seed + i // len(fuzzers))))
            except AssertionError as finding:
                results.send((fuzzer.name, "finding"))
                print(finding, flush=True)
                stopped = TooLongError.__name__ in str(finding)
            at.value = i + 1


def main(cases: int, seed: int, kinds: list[str]) -> None:
    spawn = multiprocessing.get_context("spawn")
    at, start = spawn.Value("q", 0), time.monotonic()
    ended: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    while at.value < cases:
        results, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=work, args=(at, cases, seed, kinds, sender))
        process.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while True:
                kind, how = results.recv()
                ended[kind][how] += 1
                if (done := sum(counts.total() for counts in ended.values())) % 1000 == 0:
                    print(f"{done} cases, {done / (time.monotonic() - start):.1f} a second", flush=True)
        process.join()
        if process.exitcode:
            kind = kinds[at.value % len(kinds)]
            ended[kind]["crash"] += 1
            print(f"{kind}, seed {seed + at.value // len(kinds)}: the process ended with {process.exitcode}", flush=True)
            at.value += 1
    for kind, counts in ended.items():
        print(kind, dict(counts))
    findings = sum(counts["finding"] + counts["crash"] for counts in ended.values())
    print(f"{cases} cases in {time.monotonic() - start:.0f} seconds, {findings} findings")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(KINDS))
