"""The long commands, on tiny models. Each has a place for all that it writes, which is empty before it runs."""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import make_tiny, write_image
from tests.language_models import PROSE, save_folder

import timm.models  # isort: skip

VISION = "--model local-dir:{inputs}/vision --data-dir {inputs}/images --nsamples 16 --batch-size 8 --threads 1 --quiet"
LANGUAGE = "--model local-dir:{inputs}/language --data-dir {inputs}/a.txt --nsamples 16 --seq-len 16 --threads 1 --quiet"


@dataclass(frozen=True)
class Command:
    """A long command.

    Attributes:
        command: its name.
        flags: its flags, with {inputs} and {place} for the folders of what it reads and writes.
        goes_on: flags with which an interrupted run goes on.
        before: flags of a run that was there before, whose result this one replaces.
        grows: the names, as patterns, of results that a failed run may leave with some rows only.
    """

    command: str
    flags: str
    goes_on: tuple[str, ...] = ()
    before: str = ""
    grows: tuple[str, ...] = ()

    def argv(self, inputs: Path, place: Path, flags: str = "") -> list[str]:
        return (flags or self.flags).format(inputs=inputs, place=place).split()


COMMANDS = {
    "budgets": Command("compress", f"{VISION} --compression 0.5 --iterations 2 --output {{place}}/out", ("--resume",)),
    "overwrite": Command(
        "compress",
        f"{VISION} --method oats --iterations 2 --overwrite --output {{place}}/out",
        ("--resume",),
        before=f"{VISION} --method wanda --output {{place}}/out",
    ),
    "structural": Command("compress", f"{VISION} --method numerical --weights int8 --output {{place}}/out", ("--resume",)),
    "language": Command("compress", f"{LANGUAGE} --iterations 2 --output {{place}}/out", ("--resume",)),
    "probe": Command(
        "train_linear_probe",
        "--model local-dir:{inputs}/vision --data-dir {inputs}/images --batch-size 1 --workers 0 --solver lbfgs --threads 1 "
        "--quiet --cache {place}/features --output {place}/head.safetensors",
    ),
    "perplexity": Command(
        "eval_perplexity",
        "--model local-dir:{inputs}/language --against local-dir:{inputs}/other --data-dir {inputs}/a.txt --context 16 "
        "--max-tokens 200 --batch-size 2 --threads 1 --quiet --results-file {place}/perplexity.json",
    ),
    "compare": Command(
        "compare",
        "--model local-dir:{inputs}/shallow --data-dir {inputs}/images --methods wanda,oats --compressions 0.5 --patterns own "
        "--options=oats:iterations=2 --nsamples 16 --num-samples 8 --batch-size 8 --threads 1 --quiet --output {place}/table",
        grows=("table/*.csv", "table/results.json", "table/accuracy_*"),
    ),
    "compare_lm": Command(
        "compare_lm",
        f"{LANGUAGE} --tests {{inputs}}/b.txt --test-tokens 100 --methods oats 4-bit --compressions 50 --iterations 2 "
        "--output {place}/table.jsonl",
        grows=("table.jsonl",),
    ),
}


def write_inputs(folder: Path) -> None:
    """Writes the models, images and texts that the commands read."""
    for i in range(32):
        write_image(folder / "images" / ("train" if i < 24 else "val") / f"class{i % 4}" / f"{i:02}.png", i)
    for name, depth in (("vision", 3), ("shallow", 1)):
        timm.models.save_for_hf(make_tiny(depth), str(folder / name), safe_serialization=True)
    save_folder(folder / "language")
    save_folder(folder / "other", hidden_size=16)
    for name, text in (("a", PROSE), ("b", PROSE[::-1])):
        (folder / f"{name}.txt").write_text(text)


def load_code() -> None:
    """Imports what the commands import, so that processes which begin as copies of this one start at once."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import vitoats

    for module in pkgutil.walk_packages(vitoats.__path__, "vitoats."):
        if not module.name.endswith(("__main__", "libvitoats_ops")):
            importlib.import_module(module.name)
