"""--output, --overwrite and --resume: nothing half-written, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import heed_ctrl_c, write_image
from tests.jobs import same, small_job, weights, without
from vitoats.cli import compress as compress_command
from vitoats.cli.compress import main as compress

ROOT = Path(__file__).parent.parent.parent
FILES = ["README.md", "config.json", "model.safetensors", "run.json", "run.log", "vitoats.json"]


# ---- --output, --overwrite, --resume


def test_an_output_that_exists_is_kept(succeed, refuse, job, tmp_path):
    succeed(compress, *job)
    before = weights(tmp_path / "out")
    assert "--overwrite" in refuse(compress, *job, "--seed", "5")
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "out").items())
    succeed(compress, *job, "--seed", "5", "--overwrite")
    assert not all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "out").items())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_touch_what_compress_did_not_write(refuse, job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "not written by compress" in refuse(compress, *job, "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_overwrite_keeps_the_old_folder_when_the_run_fails(succeed, refuse, job, tmp_path):
    succeed(compress, *job)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    refuse(compress, *job, "--overwrite", "--pattern", "2:5")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_folder_is_used(succeed, job, tmp_path):
    (tmp_path / "out").mkdir()
    succeed(compress, *job)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES


def test_all_files_can_be_read_by_those_who_can_read_one(plain):
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in plain.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_output_folders_are_made_on_the_way(succeed, job, tmp_path):
    succeed(compress, *job, "--output", tmp_path / "a" / "b" / "out")
    assert sorted(p.name for p in (tmp_path / "a" / "b" / "out").iterdir()) == FILES


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_that_is_a_file(refuse, job, tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    assert "--output" in refuse(compress, *job, *["--overwrite"] * overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_below_a_file(call, job, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, out, err = call(compress, *job, "--quiet", "--output", tmp_path / "file" / "out")
    assert status in (1, 2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "--output" in err


def test_resume_without_an_interrupted_run_just_starts(succeed, job, tmp_path):
    succeed(compress, *job, "--resume")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def stopped_after_first_block(flags, sent=signal.SIGINT):
    """Sends a signal to a real process when it has finished a block: exit status, stdout, stderr."""
    flags = list(map(str, flags))
    output = Path(flags[flags.index("--output") + 1])
    process = subprocess.Popen(
        [sys.executable, "tools/compress.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    for _ in range(6000):
        if (output.with_name(output.name + ".partial") / "block_0.safetensors").is_file():
            break
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def interrupted(tiny_folder, flat_images, tmp_path_factory):
    """A real process that got a Ctrl-C after its first block: its flags, its folder, and how it ended."""
    root = tmp_path_factory.mktemp("interrupted")
    slow = [*small_job(tiny_folder, flat_images, root / "out"), "--solver", "exact", "--iterations", "200"]
    return slow, root, stopped_after_first_block(slow)


@pytest.fixture
def left(interrupted, tmp_path):
    """A copy of what the interrupted run left, as tmp_path/out.partial, and the flags that go on with it."""
    slow, root, _ = interrupted
    shutil.copytree(root / "out.partial", tmp_path / "out.partial")
    return [*slow, "--output", tmp_path / "out"]


def test_ctrl_c_is_one_line_and_leaves_no_output(interrupted):
    _, root, (status, out, err) = interrupted
    assert (status, out) == (130, ""), err
    assert "Traceback" not in err
    assert "--resume" in err
    assert err.splitlines()[-1] == "error: interrupted"
    assert [p.name for p in root.iterdir()] == ["out.partial"]


def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(left, succeed, tmp_path):
    succeed(compress, *left, "--resume")
    succeed(compress, *left, "--output", tmp_path / "whole")
    assert same(tmp_path / "out", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # not by accident, and not with another run's blocks
        ([], "--resume"),
        (["--resume", "--rank-ratio", "0.3"], "settings"),
        (["--resume", "--seed", "1"], "settings"),
        (["--resume", "--fused-qkv"], "settings"),
        (["--resume", "--data-dir", "IMAGES"], "images"),
        (["--resume", "--img-size", "48"], "settings"),
    ],
)
def test_blocks_of_another_run_are_not_mixed_in(left, refuse, image_tree, tmp_path, flags, said):
    flags = [str(image_tree) if f == "IMAGES" else f for f in flags]
    assert said in refuse(compress, *left, *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


def test_a_damaged_state_is_made_anew(left, call, succeed, tmp_path):
    (tmp_path / "out.partial" / "state.json").write_bytes(b"{")
    status, _, err = call(compress, *left, "--resume")
    assert status == 0
    assert "state.json is damaged" in err
    succeed(compress, *left, "--output", tmp_path / "whole")
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_damaged_block_is_made_anew(left, call, succeed, tmp_path):
    (tmp_path / "out.partial" / "block_0.safetensors").write_bytes(b"{")
    status, _, err = call(compress, *left, "--resume")
    assert status == 0
    assert "block 0 is made anew" in err
    succeed(compress, *left, "--output", tmp_path / "whole")
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("which", ["own", "general"])
def test_images_that_were_replaced_are_not_mixed_in(tiny_folder, refuse, succeed, tmp_path, which):
    """Other images under the same names, of which there are as many."""
    for i in range(16):
        write_image(tmp_path / "own" / f"{i}.png", i)
        write_image(tmp_path / "general" / f"{i}.png", 100 + i)
    flags = [*small_job(tiny_folder, tmp_path / "own", tmp_path / "out"), "--general-images", tmp_path / "general"]
    flags += ["--calibration-mix", "general"]
    stopped_after_first_block(flags)
    for i in range(16):
        write_image(tmp_path / which / f"{i}.png", 200 + i)
    assert "other images" in refuse(compress, *flags, "--resume")
    for i in range(16):
        write_image(tmp_path / which / f"{i}.png", i if which == "own" else 100 + i)
    succeed(compress, *flags, "--resume")


# ---- kills, closed terminals, full disks, and two runs at once


def test_a_closed_terminal_ends_a_run_as_ctrl_c_does(tiny_folder, flat_images, tmp_path):
    flags = small_job(tiny_folder, flat_images, tmp_path / "out")
    status, out, err = stopped_after_first_block([*flags, "--solver", "exact", "--iterations", "200"], signal.SIGHUP)
    assert (status, out) == (130, ""), err
    assert err.splitlines()[-1] == "error: interrupted"
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


def test_two_runs_at_once_into_one_folder(refuse, tiny_folder, flat_images, tmp_path):
    flags = [*small_job(tiny_folder, flat_images, tmp_path / "out"), "--solver", "exact", "--iterations", "20000"]
    first = subprocess.Popen(
        [sys.executable, "tools/compress.py", *flags, "--quiet"], cwd=ROOT, stderr=subprocess.DEVNULL, preexec_fn=heed_ctrl_c
    )
    while not (tmp_path / "out.partial").is_dir():
        assert first.poll() is None
        time.sleep(0.01)
    for more in ([], ["--resume"], ["--overwrite"], ["--method", "magnitude"]):
        assert f"another run is writing to {tmp_path / 'out'}" in refuse(compress, *without(flags, "--method"), *more)
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    first.wait()
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_while_it_saved_is_cleared_away(succeed, job, tmp_path):
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".out.lock").touch()
    succeed(compress, *job)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_a_killed_overwrite_took_away_comes_back(succeed, refuse, job, tmp_path):
    succeed(compress, *job)
    before = weights(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.writing").mkdir()
    assert "--overwrite" in refuse(compress, *job)
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "out").items())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def complete(succeed, job, tmp_path, monkeypatch):
    """What a run leaves that was killed after its folder was there: the weights in it."""
    with monkeypatch.context() as patch:
        patch.setattr(compress_command, "remove_beside", lambda *_: None)
        succeed(compress, *job)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial"]
    return weights(tmp_path / "out")


def test_a_run_that_was_killed_after_its_folder_was_there_is_finished(complete, call, job, refuse, tmp_path):
    assert "--overwrite" in refuse(compress, *job)
    status, out, err = call(compress, *job, "--resume")
    assert status == 0, err
    assert "is finished already" in err
    assert json.loads(out.splitlines()[-1])["n_layers"] == 12
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert all(torch.equal(v, complete[k]) for k, v in weights(tmp_path / "out").items())


@pytest.mark.parametrize("change", ["settings", "output", "blocks"])
def test_another_folder_is_not_taken_for_a_finished_run(complete, refuse, succeed, job, tmp_path, change):
    more = ["--rank-ratio", "0.3"] if change == "settings" else []
    if change == "output":  # from a run on other images
        shutil.rmtree(tmp_path / "out")
        succeed(compress, *job, "--seed", "5", "--output", tmp_path / "other")
        (tmp_path / "other").rename(tmp_path / "out")
    if change == "blocks":
        (tmp_path / "out.partial" / "block_2.safetensors").write_bytes(b"")
    before = (tmp_path / "out" / "vitoats.json").read_bytes()
    said = refuse(compress, *job, "--resume", *more, warnings=True)
    assert ("settings" if change == "settings" else "--overwrite") in said
    assert (tmp_path / "out" / "vitoats.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_was_full_at_the_start_leaves_nothing_in_the_way(call, succeed, job, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        status, out, err = call(compress, *job, "--output", disk / "out")
        assert (status, out) == (1, "")
        assert "space" in err.splitlines()[-1]
        assert [p.name for p in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        succeed(compress, *job, "--output", disk / "out")
        assert [p.name for p in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
