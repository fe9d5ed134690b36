"""Uploading a folder: what a dry run lists, what is refused, and that the token is never printed."""

import pytest

from vitoats.cli.compress import main as compress
from vitoats.cli.push import main

TOKEN = "hf_" + "secret" * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder, flat_images):
    from vitoats.cli import common

    path = tmp_path_factory.mktemp("push") / "small"
    argv = [
        "--model",
        f"local-dir:{tiny_folder}",
        "--data-dir",
        flat_images,
        "--method",
        "wanda",
        "--nsamples",
        16,
        "--output",
        path,
    ]
    assert common.run(compress, [str(a) for a in (*argv, "--nsamples", 16, "--quiet")]) == 0
    common.log.handlers.clear()
    (path / "notes.txt").write_text("mine")
    return path


def test_a_dry_run_lists_the_files_that_would_be_uploaded(folder, succeed):
    found = succeed(main, folder, "owner/name", "--dry-run")
    assert found["files"] == ["README.md", "config.json", "model.safetensors", "vitoats.json"]
    assert found["uploaded"] is False


def test_without_a_network_the_token_is_not_printed(folder, call, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, out, err = call(main, folder, "owner/name", "--private")
    assert status == 1
    assert "the Hub" in err
    assert TOKEN not in out + err


@pytest.mark.parametrize("name", ["name", "a/b/c", "owner/na me", "owner/..", "--"])
def test_a_name_that_is_none_of_the_hubs_is_refused(folder, refuse, name):
    refuse(main, folder, name, "--dry-run")


def test_another_folder_is_refused(tmp_path, refuse):
    assert "vitoats.json" in refuse(main, tmp_path, "owner/name", "--dry-run")
