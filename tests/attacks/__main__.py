"""Attacks the long commands on tiny models: kills, full disks, two runs into one output.

    python -m tests.attacks
    python -m tests.attacks --commands budgets compare --kills 200 --disks 50 --pairs 20 --seed 1

Kills: SIGKILL at random moments and before random changes of the file system, up to three times in a row; then the same command
goes on. Disks: a file system in memory of random size, which then grows, and the same command goes on. Pairs: two runs of a
command start at random distances. In the end the output has the bytes of an undisturbed run and nothing else is left, or the
run was refused. Changes are those that Python makes (sys.addaudithook); kills at random moments hit what libraries write, too.
Every process is a copy of this one, which has loaded the code.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.attacks.commands import COMMANDS, Command, load_code, write_inputs
from tests.attacks.places import Disk, differences, half_written, result
from tests.attacks.processes import Ended, Process

REFUSED = ("another run is writing to", "exists")


class Attacks:
    """Attacks on one command."""

    def __init__(self, command: Command, root: Path, disk: Disk, seed: int):
        self.command, self.root, self.disk, self.place = command, root, disk, disk.place
        self.random = random.Random(seed)
        self._begin()
        self.before = result(self.place)
        start = time.monotonic()
        ended = self._process().ended()
        self.seconds = time.monotonic() - start
        assert ended.status == 0, ended.err
        self.changes, self.peak, self.whole = ended.changes, ended.peak, result(self.place)

    def _begin(self) -> None:
        self.disk.empty()
        if self.command.before:
            argv = self.command.argv(self.root / "inputs", self.place, self.command.before)
            assert Process(self.command.command, argv, self.place, self.root / "notes").ended().status == 0

    def _process(self, *more: str, kill_before: int = 0) -> Process:
        argv = [*self.command.argv(self.root / "inputs", self.place), *more]
        return Process(self.command.command, argv, self.place, self.root / "notes", kill_before)

    def kills(self, number: int) -> Iterator[str]:
        """Two of three kills are before changes, all different if there are as many."""
        counts = range(1, self.changes + 1)
        moments = self.random.sample(counts, min(len(counts), number - number // 3)) + [0] * (number // 3)
        for moment in moments:
            yield from self._killed(moment)

    def _killed(self, moment: int) -> Iterator[str]:
        self._begin()
        attack, goes_on = [], ()
        for _ in range(self.random.choice((1, 1, 2, 3))):
            process = self._process(*goes_on, kill_before=moment)
            if moment:
                attack.append(f"before change {moment}")
            else:
                seconds = self.random.uniform(0, self.seconds)
                time.sleep(seconds)
                process.kill()
                attack.append(f"after {seconds:.3f} s")
            ended = process.ended()
            words = f"killed {', '.join(attack)}"
            if ended.status != -9 and (problem := self._wrong_end(ended)):
                yield f"{words}: {problem}"
                return
            if halves := list(half_written(self.command, result(self.place), self.whole, self.before)):
                yield f"{words}: half-written {halves}"
            goes_on, moment = self.command.goes_on, self.random.randint(1, self.changes) if moment else 0
        yield from (f"{words}: {problem}" for problem in self._goes_on())

    def disks(self, number: int) -> Iterator[str]:
        """A disk that is full at random points."""
        for _ in range(number):
            self._begin()
            used = sum(path.stat().st_blocks * 512 for path in self.place.rglob("*"))
            size = self.random.randint(used + 4096, max(used + 4097, self.peak)) // 4096 * 4096
            self.disk.resize(str(size))
            ended = self._process().ended()
            words = f"a disk of {size} bytes"
            if problem := self._wrong_end(ended, full=True):
                yield f"{words}: {problem}"
            if halves := list(half_written(self.command, result(self.place), self.whole, self.before)):
                yield f"{words}: half-written {halves}"
            self.disk.resize("512m")
            yield from (f"{words}: {problem}" for problem in self._goes_on(caches=False))

    def pairs(self, number: int) -> Iterator[str]:
        """Two runs at once; the second begins within the time that one takes."""
        for _ in range(number):
            self._begin()
            first, seconds = self._process(), self.random.uniform(0, self.seconds)
            time.sleep(seconds)
            second = self._process(*self.command.goes_on)
            ends = [first.ended(), second.ended()]
            words = f"two runs, {seconds:.3f} s apart"
            yield from (f"{words}: {problem}" for ended in ends if (problem := self._wrong_end(ended)))
            if all(ended.status for ended in ends):
                yield f"{words}: both were refused: {[ended.last for ended in ends]}"
            yield from (f"{words}: {problem}" for problem in differences(result(self.place), self.whole))

    def _goes_on(self, caches: bool = True) -> Iterator[str]:
        ended = self._process(*self.command.goes_on).ended()
        if problem := self._wrong_end(ended):
            yield problem
        yield from differences(result(self.place), self.whole, caches)

    def _wrong_end(self, ended: Ended, full: bool = False) -> str:
        """What is wrong with how a run ended: it may end well or be refused; on a full disk it may fail, too."""
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        if ended.status == 0 and not errors:
            json.loads(ended.out.splitlines()[-1])
            return ""
        if errors == [ended.last] and "Traceback" not in ended.err:
            if ended.status == 2 and not ended.out and any(words in ended.last for words in REFUSED):
                return ""
            if full and ended.status == 1 and ("space" in ended.last or "failed: " in ended.last):
                return ""
        return f"exit status {ended.status}: {' | '.join(ended.err.splitlines()[-6:])}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__.splitlines()[0])
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME")
    for name, default in (("kills", 20), ("disks", 10), ("pairs", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the disk goes then, too
    load_code()
    mounts = os.geteuid() == 0
    found = 0
    root = Path(tempfile.mkdtemp(prefix="vitoats-attacks-"))
    (root / "notes").mkdir()
    if os.fork() == 0:  # no thread of torch may be in this process, which is copied
        write_inputs(root / "inputs")
        os._exit(0)
    assert os.wait()[1] == 0
    disk = Disk(root / "place", mounts)
    try:
        for name in args.commands:
            start = time.monotonic()
            attacks = Attacks(COMMANDS[name], root, disk, args.seed)
            kinds = {"kills": args.kills, "disks": args.disks if mounts else 0, "pairs": args.pairs}
            problems = [line for kind, number in kinds.items() for line in getattr(attacks, kind)(number)]
            found += len(problems)
            done = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
            print(f"{name}: {attacks.changes} changes; {done}: {len(problems)} problems ({time.monotonic() - start:.0f} s)")
            print(*(f"  {line}" for line in problems), sep="\n", end="\n" * bool(problems), flush=True)
    finally:
        disk.close()
        shutil.rmtree(root)
    if not mounts:
        print("no full disks: only root can mount a small one")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
