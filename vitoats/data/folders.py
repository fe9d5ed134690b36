"""Finds the images in a folder and their classes, in timm's order and with timm's numbers.

The class of an image is the name of the folder it lies in. Folders without images are no classes. Hidden folders are left out.
Links are followed; a file or folder that can be reached in several ways counts once, by its own name if that is one of them.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import vitoats.common.torchvision_ops  # noqa: F401  (before timm and torchvision)

from timm.utils.misc import natural_key  # isort: skip
from torchvision.datasets.folder import IMG_EXTENSIONS  # isort: skip


@dataclass
class FoundImages:
    """The content of a folder.

    Attributes:
        paths: image files, sorted.
        labels: for each of them the index of its class; empty if there are no class folders.
        classes: class names, sorted so that class2 comes before class10.
        loose: images beside the class folders, in no class.
        others: files that are no images by their name.
        unreachable: links that lead nowhere, and folders that cannot be read.
        again: further links to a file.
        empty: folders without images in them.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    loose: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def find_images(root: Path) -> FoundImages:
    """Lists the images in a folder and the folders below it."""
    walk = _Walk()
    walk.folder(str(root))
    while walk.linked_folders:
        walk.folder(walk.linked_folders.pop(0))
    for link in walk.linked_files:
        walk.file(link, os.path.realpath(link))
    found = walk.found
    found.paths.sort(key=lambda path: (natural_key(path), path))
    inside = [path for path in found.paths if os.path.dirname(path) != str(root)]
    if not inside:
        return found
    found.loose = [path for path in found.paths if os.path.dirname(path) == str(root)]
    found.paths = inside
    names = [os.path.basename(os.path.dirname(path)) for path in inside]
    found.classes = tuple(sorted(set(names), key=lambda name: (natural_key(name), name)))
    number = {name: i for i, name in enumerate(found.classes)}
    found.labels = [number[name] for name in names]
    return found


class _Walk:
    """Visits folders and files once each; links are left for later, so that real names come first."""

    def __init__(self) -> None:
        self.found = FoundImages()
        self.linked_folders: list[str] = []
        self.linked_files: list[str] = []
        self._seen: set[str] = set()  # real paths of folders and image files

    def folder(self, path: str) -> None:
        """Visits a folder and those below it, unless it was visited before."""
        real = os.path.realpath(path)
        if real in self._seen:
            return
        self._seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            self.found.unreachable.append(path)
            return
        images, folders = 0, []
        for entry in entries:
            if os.path.isdir(entry):  # unlike entry.is_dir(), this takes a link to itself
                folders += [] if entry.name.startswith(".") else [entry]
            elif not entry.name.lower().endswith(IMG_EXTENSIONS):
                self.found.others.append(entry.path)
            elif not os.path.isfile(entry):
                self.found.unreachable.append(entry.path)
            elif entry.is_symlink():
                images += 1
                self.linked_files.append(entry.path)
            else:
                images += 1
                self.file(entry.path, os.path.join(real, entry.name))
        if not images and not folders:
            self.found.empty.append(path)
        self.linked_folders += [entry.path for entry in folders if entry.is_symlink()]
        for entry in folders:
            if not entry.is_symlink():
                self.folder(entry.path)

    def file(self, path: str, real: str) -> None:
        """Takes an image file, unless it was taken before."""
        (self.found.again if real in self._seen else self.found.paths).append(path)
        self._seen.add(real)
