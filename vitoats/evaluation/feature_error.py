"""How far the features of an exported file are from those of another, its dense one, on the same images."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.common.finite import finite_outputs
from vitoats.evaluation.exported import Exported
from vitoats.evaluation.fidelity import cosines, relative_error


def feature_errors(
    file: Exported,
    dense: Exported,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """The relative error (``fidelity.relative_error``) and the mean cosine of each output, tokens of an image averaged.

    Args:
        file: the file; its preprocessing is that of the images.
        dense: the file to compare it with.
        batches: images [b, channels, h, w], and labels, which do not matter.
        progress: called with the number of images done.

    Raises:
        InputError: the files give classes, or different features, or there are not two different images.
        RunError: a feature is not finite.
    """
    for each in (file, dense):
        if each.described.get("n_classes"):
            raise InputError(f"{each.path} gives classes, not features: export it with `features`, or compare top-1")
    names, others = ([output.name for output in each.session.get_outputs()] for each in (file, dense))
    if names != others:
        said = f"{file.path} gives {', '.join(names)}, and {dense.path} {', '.join(others)}"
        raise InputError(f"{said}: export both with the same `features`")
    if file.preprocessing != dense.preprocessing:
        raise InputError(f"{file.path} and {dense.path} take images of different sizes or kinds: export both alike")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    exact: dict[str, list[Tensor]] = {name: [] for name in names}
    done = 0
    for images, _ in batches:
        for each, kept in ((file, found), (dense, exact)):
            for name, output in each.run(images).items():
                kept[name].append(
                    finite_outputs(output.mean(dim=1) if output.ndim == 3 else output, f"features of {each.path}")
                )
        done += len(images)
        progress(done)
    if not done:
        raise InputError("there was no image to compute features of: give `images` a folder with readable images")
    errors = {}
    for name in names:
        ours, theirs = (torch.cat(kept[name]).numpy() for kept in (found, exact))
        errors[name] = {
            "relative_error": relative_error(ours, theirs),
            "cosine": float(cosines(ours, theirs).mean()),
        }
    return errors
