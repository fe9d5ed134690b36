"""The flag --report of several commands: a page about what they have just done."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common

if TYPE_CHECKING:
    from vitoats.loading.source import ModelSource


def check(path: Path | None) -> None:
    """Refuses --report of other commands before they start, if the page could not be written.

    Raises:
        InputError: the file cannot be written.
        ModuleNotFoundError: a package of the extra report is missing.
    """
    if path is not None:
        import vitoats.report.page.page  # noqa: F401  (its packages may be missing)
        from vitoats.common.outputs import check_output_file

        check_output_file(path, overwrite=True)


def after(
    args: Namespace,
    paths: Sequence[Path],
    result: dict[str, Any] | None = None,
    dense: "ModelSource | None" = None,
    data: str | None = None,
) -> None:
    """Writes the page of --report, if that is given, about what a command has just done.

    Args:
        args: the command's flags.
        paths: the folders that it wrote or read.
        result: its JSON line, where that is in no file.
        dense: the model before compression, if it is known.
        data: images or text.
    """
    if args.report is None:
        return
    from vitoats.report.page.make import Report, write_report
    from vitoats.report.page.sources import results_of

    found = results_of(Path("this run"), result)
    report = Report(paths=paths, output=args.report, results=[found] if found else [], dense=dense, data=data)
    with common.Bars(args.quiet) as progress:
        write_report(report, progress)
    common.log.info("report: %s", args.report)
