"""Files and folders that appear whole or not at all, with real kills, locks, pipes and links."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vitoats.common.errors import InputError, RunError
from vitoats.common.files import atomic_write, hold, remove_beside, whole_folder

ROOT = Path(__file__).parent.parent.parent


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def started(code: str) -> subprocess.Popen:
    """A Python process that has come to print a line."""
    code = "from vitoats.common.files import *\nimport os, time, signal\nfrom pathlib import Path\n" + textwrap.dedent(code)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    return process


def killed(code: str) -> None:
    process = started(code)
    process.send_signal(signal.SIGKILL)
    process.communicate()


# ---- files


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    (tmp_path / "a").write_text("old")
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_file_that_fails_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def fail():
        with atomic_write(tmp_path / "a") as partial:
            partial.write_text("ne")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    killed(f"""
        with atomic_write(Path({str(tmp_path / "a")!r})) as partial:
            partial.write_text("ne")
            print("now", flush=True)
            time.sleep(60)
    """)
    assert names(tmp_path) == [".a.lock", ".a.writing"]
    with atomic_write(tmp_path / "a") as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert names(tmp_path) == ["a"]


def test_a_second_writer_waits_for_the_first(tmp_path):
    process = started(f"""
        with atomic_write(Path({str(tmp_path / "a")!r})) as partial:
            partial.write_text("first")
            print("now", flush=True)
            time.sleep(0.5)
    """)
    with atomic_write(tmp_path / "a") as partial:
        assert (tmp_path / "a").read_text() == "first"
        partial.write_text("second")
    process.communicate()
    assert process.returncode == 0
    assert (tmp_path / "a").read_text() == "second"
    assert names(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("to_file", [False, True])
def test_standard_output_is_written_to_as_it_is(tmp_path, to_file):
    code = """
        import os
        from pathlib import Path
        from vitoats.common.files import atomic_write
        with atomic_write(Path("/dev/stdout")) as path:
            with path.open("a") as file:
                file.write("said\\n")
        os.write(1, b"more\\n")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    if to_file:
        with (tmp_path / "log").open("w") as log:
            subprocess.run(command, cwd=ROOT, check=True, stdout=log)
        said = (tmp_path / "log").read_text()
    else:
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "said" in said or to_file  # (a file is written over from its start, as always)
    assert "more" in said
    assert Path("/dev/stdout").is_symlink()


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    with atomic_write(tmp_path / "pipe") as path:
        path.write_text("through")
    assert reader.communicate()[0] == "through"
    assert (tmp_path / "pipe").is_fifo()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    below = atomic_write(tmp_path / "file" / "a", "give another `output`")
    with pytest.raises(RunError, match=r"cannot be written \(.*\): give another `output`"), below:
        pass
    with pytest.raises(RunError, match="directory"), atomic_write(tmp_path) as path:
        path.write_text("x")


# ---- folders


def write(folder: Path, text: str, overwrite: bool = True) -> None:
    with whole_folder(folder, overwrite) as partial:
        (partial / "a").write_text(text)


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path):
    write(tmp_path / "out", "1")
    write(tmp_path / "out", "2")
    assert (tmp_path / "out/a").read_text() == "2"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_exists_is_replaced_only_if_asked(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "1", overwrite=False)  # it was empty
    with pytest.raises(InputError, match="exists"):
        write(tmp_path / "out", "2", overwrite=False)
    assert (tmp_path / "out/a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/mine").write_text("mine")
    (tmp_path / "out").symlink_to("real")
    write(tmp_path / "out", "1")
    assert (tmp_path / "out/a").read_text() == "1"
    assert (tmp_path / "real/mine").read_text() == "mine"
    assert names(tmp_path) == ["out", "real"]


KILL_AT = {
    "while it writes": (1, "old"),
    "before the old folder goes": (2, "old"),
    "between the old folder and the new one": (3, "old"),
    "before the old folder is deleted": (4, "new"),
    "while the old folder is deleted": (5, "new"),
}


@pytest.mark.parametrize("stop", KILL_AT)
def test_a_kill_at_any_point_loses_no_folder(tmp_path, stop):
    """The kill is real; the point is a call of the operating system."""
    number, expected = KILL_AT[stop]
    write(tmp_path / "out", "old")
    process = subprocess.run(
        [sys.executable, "-c", KILLED_OVERWRITE, str(tmp_path / "out"), str(number)], cwd=ROOT, timeout=60, check=False
    )
    assert process.returncode == -signal.SIGKILL
    with hold(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock", "out"]
        if stop != "while the old folder is deleted":
            assert (tmp_path / "out/a").read_text() == expected
    write(tmp_path / "out", "next")
    assert (tmp_path / "out/a").read_text() == "next"
    assert names(tmp_path) == ["out"]


KILLED_OVERWRITE = """
import os, shutil, signal, sys
from pathlib import Path
from vitoats.common import files

at, die = int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)
rename, rmtree, renames = os.rename, shutil.rmtree, []

def dying_rename(a, b):
    if at == 2:
        die()
    rename(a, b)
    renames.append(b)
    if at == 3 or (at == 4 and len(renames) == 2):
        die()

def dying_rmtree(path, **kwargs):
    if at == 5:
        os.unlink(path / "a")
        die()
    rmtree(path, **kwargs)

os.rename, shutil.rmtree = dying_rename, dying_rmtree
with files.whole_folder(Path(sys.argv[1]), True) as partial:
    (partial / "a").write_text("new")
    if at == 1:
        die()
"""


def test_an_old_folder_is_not_lost_to_another_one_in_its_place(tmp_path):
    write(tmp_path / "out", "old")
    subprocess.run([sys.executable, "-c", KILLED_OVERWRITE, str(tmp_path / "out"), "3"], cwd=ROOT, check=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"\.out\.old"):
        write(tmp_path / "out", "next")
    assert (tmp_path / ".out.old/a").read_text() == "old"
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_an_interruption_between_the_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    rename = os.rename

    def interrupted(a, b):
        if Path(b).name == "out" and Path(a).name == ".out.writing":
            monkeypatch.undo()
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out/a").read_text() == "old"
    assert names(tmp_path) == ["out"]


# ---- places


def test_two_runs_at_once_are_told_so(tmp_path):
    process = started(f"""
        with hold(Path({str(tmp_path / "out")!r})):
            print("now", flush=True)
            time.sleep(60)
    """)
    (tmp_path / ".out.writing").mkdir()
    for attempt in (lambda: write(tmp_path / "out", "mine"), lambda: hold(tmp_path / "out").__enter__()):
        with pytest.raises(InputError, match=f"another run is writing to {tmp_path / 'out'}"):
            attempt()
    assert (tmp_path / ".out.writing").is_dir()  # a living run's
    process.kill()
    process.communicate()
    write(tmp_path / "out", "mine")
    assert names(tmp_path) == ["out"]


def test_children_that_outlive_a_killed_run_do_not_hold_its_place(tmp_path):
    """Processes that read images are forked while the place is held."""
    process = started(f"""
        with hold(Path({str(tmp_path / "out")!r})):
            if os.fork() == 0:
                print("now", flush=True)
                time.sleep(5)
                os._exit(0)
            time.sleep(60)
    """)
    process.kill()
    process.wait()
    with hold(tmp_path / "out"):
        pass
    process.stdout.close()


def test_a_place_that_is_held_may_be_held_again(tmp_path):
    with hold(tmp_path / "out"):
        write(tmp_path / "out", "1")
        with pytest.raises(InputError, match="exists"):
            write(tmp_path / "out", "2", overwrite=False)
        assert names(tmp_path) == [".out.lock", "out"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_a_kill_half_removed_is_out_of_the_way(tmp_path):
    (tmp_path / "out.partial").mkdir()
    for name in "ab":
        (tmp_path / "out.partial" / name).write_text("x")
    killed(f"""
        import shutil
        place = Path({str(tmp_path / "out")!r})

        def die(folder, **_):
            if folder.exists():
                (folder / "a").unlink()
                print("now", flush=True)
                time.sleep(60)

        shutil.rmtree = die
        with hold(place):
            remove_beside(place, place.with_name("out.partial"))
    """)
    assert not (tmp_path / "out.partial").exists()
    with hold(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_renamed_is_removed(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a").write_text("x")

    def another_disk(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", another_disk)
    remove_beside(tmp_path / "out", tmp_path / "kept")
    remove_beside(tmp_path / "out", tmp_path / "kept")
    assert names(tmp_path) == []


def test_what_is_left_of_a_part_goes_with_the_next_writer_of_the_whole(tmp_path):
    write(tmp_path / "out", "1")
    killed(f"""
        out = Path({str(tmp_path / "out")!r})
        with atomic_write(out / "record", part_of=out) as partial:
            partial.write_text("ne")
            print("now", flush=True)
            time.sleep(60)
    """)
    assert names(tmp_path / "out") == ["a"]
    with hold(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    with atomic_write(tmp_path / "out/record", part_of=tmp_path / "out") as partial:
        partial.write_text("new")
    assert names(tmp_path / "out") == ["a", "record"]
