"""--report of the commands that measure something."""

import re

from tests.comparison.runs import one_run
from vitoats.cli.compare import main as compare
from vitoats.cli.compress import main as compress
from vitoats.cli.eval_imagenet import main as eval_imagenet


def shown(page):
    """The sections of a page."""
    return re.findall(r'<section id="(\w+)"', page.read_text())


def test_compress_reports_with_the_dense_model_that_it_was_given(succeed, refuse, job, tmp_path):
    page = tmp_path / "page.html"
    succeed(compress, *job, "--report", page)
    assert shown(page) == ["headline", "layers", "weights", "convergence", "attention"]
    assert "add --dense MODEL" not in page.read_text()
    assert "--dry-run" in refuse(compress, *job, "--report", page, "--dry-run")


def test_a_page_that_cannot_be_written_is_refused_before_the_work(refuse, job, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refuse(compress, *job, "--report", tmp_path / "file" / "page.html")
    assert not (tmp_path / "out").exists()


def test_eval_imagenet_reports_what_it_measured(succeed, tiny_folder, image_tree, tmp_path):
    page = tmp_path / "page.html"
    flags = f"--model local-dir:{tiny_folder} --data-dir {image_tree} --threads 1"
    result = succeed(eval_imagenet, *flags.split(), "--report", page)
    assert shown(page) == ["headline"]
    assert f"{result['top1']:.2f} %" in page.read_text()


def test_compare_reports_its_rows(succeed, tiny_folder, image_tree, tmp_path):
    page = tmp_path / "page.html"
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(image_tree)
    result = succeed(compare, *one_run(tiny_folder, data, tmp_path / "out", "--compressions", "0.5", "--report", page))
    assert shown(page)[0] == "headline"
    assert all(row["method"] in page.read_text() for row in result["rows"])
