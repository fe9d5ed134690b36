"""The model card of a compressed folder: README.md with front matter for the Hugging Face Hub.

Every number in it is a measurement, from vitoats.json or from the results file of an evaluation.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vitoats.format.counts import COUNTED, DEFINITIONS
from vitoats.loading.names import ON_HUB

TRANSFORMERS_USE = {
    "dense": "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER")  # or OWNER/NAME',
    "factored": 'import vitoats\n\nmodel = vitoats.load("FOLDER")  # or hf-hub:OWNER/NAME; it generates as usual',
}
EVALUATION_COLUMNS = ("model", "top1", "top5", "n_images", "img_size", "crop_pct", "interpolation")


def model_card(about: Mapping[str, Any], license: str | None, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """Writes the card.

    Args:
        about: the content of vitoats.json; missing entries are left out of the card.
        license: license of the weights that timm names; weights from a file may have another one.
        evaluations: JSON lines of eval_imagenet.

    Returns:
        Markdown.
    """
    source = _published(str(about.get("model", "a timm model")))
    sections = [_front_matter(about, license), f"# {source}, compressed\n\n{_summary(about, source)}", _use(about)]
    sections += [_counts(about), _making(about), _evaluation(evaluations), _dense_layers(about.get("skipped", []))]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(about: Mapping[str, Any], license: str | None) -> str:
    library = _library(about)
    task = "image-classification" if about.get("n_classes") else "image-feature-extraction"
    lines = [
        f"library_name: {library if about['format'] == 'dense' else 'vitoats'}",
        f"pipeline_tag: {'text-generation' if library == 'transformers' else task}",
        "tags:",
        *(f"- {tag}" for tag in (library, "vitoats", "sparse", "low-rank")),
    ]
    weights = str(about.get("weights", ""))
    repository = weights.removesuffix(ON_HUB)
    if weights.endswith(ON_HUB) and re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        lines.append(f"base_model: {repository}")
        lines += [f"license: {license}"] if license and re.fullmatch(r"[\w.+-]+", license) else []
    return "\n".join(("---", *lines, "---"))


def _summary(about: Mapping[str, Any], source: str) -> str:
    version = about["versions"]["vitoats"]
    if "compression" not in about or "method" not in about:
        return f"{source}, compressed with vitoats {version}."
    what = f"{len(about['layers'])} linear layers" if "layers" in about else f"{len(about['modules'])} attentions and MLPs"
    removed = f"{about['compression']:.2%} of the weights of {what} are removed"
    if about.get("weight_type") == "int8":
        removed += ", the others are int8"
    return f"{source}, compressed with vitoats {version} by the method {about['method']}: {removed}, without training."


def _library(about: Mapping[str, Any]) -> str:
    """The library that opens the dense model."""
    return "transformers" if about.get("kind") == "causal language model" else "timm"


def _use(about: Mapping[str, Any]) -> str:
    if _library(about) == "transformers":
        return f"## Use\n\n```python\n{TRANSFORMERS_USE[about['format']]}\n```"
    dense = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:OWNER/NAME'
    factored = 'import vitoats\n\nmodel = vitoats.load("FOLDER")  # or hf-hub:OWNER/NAME'
    return f"## Use\n\n```python\n{dense if about['format'] == 'dense' else factored}\n```"


def _counts(about: Mapping[str, Any]) -> str:
    before, after = about.get("counts_before"), about["counts"]
    rows = [
        [word, *(f"{counts[key]:,}" for counts in (before, after) if counts)]
        for word, key in zip(DEFINITIONS, COUNTED, strict=True)
    ]
    header = ["", "before", "compressed"] if before else ["", "compressed"]
    definitions = "\n".join(f"* {word}: {meaning}" for word, meaning in DEFINITIONS.items())
    return f"## Size\n\n{_table(header, rows)}\n\n{definitions}"


def _making(about: Mapping[str, Any]) -> str:
    rows = [["weights", _published(str(about["weights"]))]] if "weights" in about else []
    if "config" in about:
        settings = ", ".join(f"{key} {value}" for key, value in (about["config"] | about.get("recipe", {})).items())
        rows += [["method", about["method"]], ["settings", settings]]
    if "calibration" in about:
        calibration = about["calibration"]
    if "windows" in about.get("calibration", {}):
        names = ", ".join(name.partition(":")[2] or name for name in calibration["windows"])
        text = (
            f"{about['n_images']} windows of {about['preprocessing']['seq_len']} tokens, of {names}, seed {calibration['seed']}"
        )
        rows.append(["calibration", text])
    elif "calibration" in about:
        sources = calibration["images"]
        images = f"{about['n_images']} images, of {sources['own']} of {Path(calibration['data']).name}"
        mixed = "".join(f" and as many {name} ones" for name in sources if name != "own")
        rows.append(["calibration", f"{images}{mixed}, seed {calibration['seed']}"])
    if "feature_error" in about:
        errors = ", ".join(f"{error:.3f} ({name})" for name, error in about["feature_error"].items())
        rows.append(["relative error of the features on held-out images", errors])
    rows.append(["preprocessing", ", ".join(f"{key} {value}" for key, value in about["preprocessing"].items())])
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())])
    return f"## How it was made\n\n{_table(['', ''], rows)}"


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return ""
    rows = [
        [_published(str(line[key])) if key == "model" else str(line.get(key, "")) for key in EVALUATION_COLUMNS]
        for line in evaluations
    ]
    told = "top1 and top5 in percent, measured with tools/eval_imagenet.py"
    return f"## Evaluation\n\n{told}.\n\n{_table(EVALUATION_COLUMNS, rows)}"


def _dense_layers(skipped: Sequence[Sequence[str]]) -> str:
    by_reason = groupby(sorted(skipped, key=lambda item: item[1]), key=lambda item: item[1])
    lines = [f"* {reason}: {', '.join(f'`{name}`' for name, _ in items)}" for reason, items in by_reason]
    return "## Layers that stay dense\n\n" + "\n".join(lines) if lines else ""


def _published(name: str) -> str:
    """A model's name on one line, without paths of the local machine."""
    name, prefix = " ".join(name.split()), "local-dir:"
    return Path(name.removeprefix(prefix)).name if name.startswith((prefix, "/", ".")) else name


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in line)} |" for line in lines)
