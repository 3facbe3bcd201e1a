"""Kill -9 a build at random moments, over and over, and show that nothing was lost and nothing was left half done.

    uv run python benchmarks/kill_build.py --shared ../shared/data --work /tmp/kill --kills 20 [--neighbour]

Two builds take turns for one OUT: the recipe as it is, and the same with --max-tokens 256 --overflow truncate. The
first finds no OUT, each later one replaces the other with --force; after every third finished build OUT is removed.
Each round starts where the last kill left cache and folders; if a round is to be killed while rendering and nothing is
left to render, the cache is emptied first. A round aims at one phase (a build left alone has shown how long they are),
waits until the disk shows that it has begun, then for a random part of it. What the disk shows after the kill is
logged:

    starting     no unit begun by this start
    rendering    units begun, no split yet
    writing      .OUT.partial holds a split, no manifest
    publishing   .OUT.partial holds its manifest, or OUT has changed, or the old OUT stands aside as .OUT.old

What an earlier kill left there does not count. With --neighbour another build, for an OUT of its own, uses the same
cache at the same time: it must succeed, to the byte, whatever happens to the one that is killed.

After each kill no process of the build may be left (within --patience seconds), and OUT must be what it was, or the
complete new build, to the byte; or, where the old one stood aside, it must be put back by the next start. At last a
build left alone with that cache equals one made with an empty cache: every file but report.json, by SHA-256.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from build import build_command
from build_growth import processes_of_session
from build_sides import add_inputs

from chatdata.build.run import MARK
from chatdata.disk import file_sha256

VARIANTS = ([], ["--max-tokens", "256", "--overflow", "truncate"])
PHASES = ("starting", "rendering", "writing", "publishing")
AIMS = {"starting": 1, "rendering": 5, "writing": 2, "publishing": 2}  # how often each is aimed at


@dataclass
class Place:
    """The folders of a build, and what was there before it was started."""

    out: Path
    units: Path
    known_units: set[str] = field(default_factory=set)
    known_out: int | None = None
    stale: set[str] = field(default_factory=set)  # names that earlier kills left, until this start has removed them

    @property
    def partial(self) -> Path:
        return self.out.parent / f".{self.out.name}.partial"

    @property
    def old(self) -> Path:
        return self.out.parent / f".{self.out.name}.old"

    def look(self) -> None:
        """Remember what is there: phases are told by what is new."""
        self.known_units, self.known_out, self.stale = names_in(self.units), inode(self.out), self.beside()

    def beside(self) -> set[str]:
        """What there is of the partial build's content, and "old" for an old build that stands aside."""
        return names_in(self.partial) | ({"old"} if self.old.exists() else set())

    def phase(self) -> str:
        there = self.beside()
        self.stale &= there
        new = there - self.stale
        if new & {"manifest.json", "old"} or inode(self.out) not in (self.known_out, None):
            return "publishing"
        if "train" in new:
            return "writing"
        return "rendering" if names_in(self.units) - self.known_units else "starting"


def names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def hashes(build: Path) -> dict[str, str]:
    """File → SHA-256, of all but report.json, whose times differ from run to run, and the mark of a kill just before
    or after the rename, which the next start removes."""
    others = ("report.json", MARK)
    files = sorted(path for path in build.rglob("*") if path.is_file() and path.name not in others)
    return {str(path.relative_to(build)): file_sha256(path) for path in files}


def start(command: list[str], cache: Path, output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CHATDATA_CACHE": str(cache)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache.parent / "bytecode")}
    with output.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def build_alone(arguments: argparse.Namespace, place: Place, cache: Path, *options: str) -> dict[str, float]:
    """A build that nobody kills. Returns how many seconds each phase took. Exits if it fails."""
    place.look()
    output = cache.parent / "alone.log"
    process = start(command_of(arguments, place.out, *options), cache, output)
    began, end = {"starting": time.perf_counter()}, 0.0
    while process.poll() is None:
        began.setdefault(phase := place.phase(), time.perf_counter())
        if phase != "publishing" or place.beside():
            end = time.perf_counter()  # of the last moment with anything beside OUT; then the process only ends
        time.sleep(0.001)
    if process.returncode:
        sys.exit(f"a build that was left alone failed: {output.read_text()[-500:]}")
    durations = {}
    for name in reversed(PHASES):
        begin = began.get(name, end)
        durations[name], end = end - begin, begin
    return durations


def command_of(arguments: argparse.Namespace, out: Path, *options: str) -> list[str]:
    return build_command(arguments, out, "--workers", str(arguments.workers), "--engine", arguments.engine, *options)


def kill_at(process: subprocess.Popen[bytes], place: Place, aim: str, wait_s: float) -> str | None:
    """Kill the build `wait_s` after the phase `aim` has begun. Returns the phase on disk, None if it had ended."""
    poll_s = 0.0005 if aim == "publishing" else 0.005
    while process.poll() is None and PHASES.index(place.phase()) < PHASES.index(aim):
        time.sleep(poll_s)
    time.sleep(wait_s)
    if process.poll() is not None:
        return None
    process.kill()  # the command alone, as a user or the kernel does: its workers must see to themselves
    process.wait()
    return place.phase()


def wait_for_end(session: int, patience_s: float) -> float | None:
    """Seconds until no process of the session was left; None if some were after `patience_s`, which are then killed."""
    started = time.perf_counter()
    while left := list(processes_of_session(session)):
        if time.perf_counter() - started > patience_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return None
        time.sleep(0.01)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--neighbour", action="store_true", help="another build uses the cache at the same time")
    parser.add_argument("--seed", type=int, default=0)
    # two agents of Ray, which do no work, end a minute after their driver was killed
    parser.add_argument("--patience", type=float, help="seconds a process may outlive it (default: 10, with ray 90)")
    parser.add_argument("--work", type=Path, help="folder for cache and builds (default: a temporary one)")
    arguments = parser.parse_args()
    arguments.patience = arguments.patience or (90 if arguments.engine == "ray" else 10)
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chatdata-kill-", dir=arguments.work) as folder:
        sys.exit(run(arguments, Path(folder)))


def run(arguments: argparse.Namespace, folder: Path) -> int:
    draw, cache, log = random.Random(arguments.seed), folder / "cache", folder / "build.log"
    place = Place(folder / "out", cache / "units")
    references = []
    alone_cache = folder / "cache-alone"
    alone = Place(folder / "alone", alone_cache / "units")
    for variant, force in zip(VARIANTS, ([], ["--force"]), strict=True):
        shutil.rmtree(alone_cache, ignore_errors=True)
        alone_cache.mkdir()
        durations = build_alone(arguments, alone, alone_cache, *variant, *force)
        references.append(hashes(alone.out))
    num_units = len(names_in(alone.units))
    shutil.rmtree(alone_cache)
    shutil.rmtree(alone.out)
    assert references[0] != references[1]
    print("a build left alone: " + ", ".join(f"{name} {durations[name]:.2f} s" for name in PHASES), flush=True)

    phases: Counter[str] = Counter()
    faults: list[str] = []
    variant = builds = 0
    stood_aside = False

    def fault(text: str) -> None:
        faults.append(f"kill {phases.total()}: {text}")
        print(f"  FAULT {text}", flush=True)

    while phases.total() < arguments.kills:
        (aim,) = draw.choices(list(AIMS), list(AIMS.values()))
        complete = [name for name in names_in(place.units) if name.endswith(".arrow")]
        pruned = aim == "rendering" and len(complete) >= num_units
        if pruned:
            shutil.rmtree(place.units)
        before = hashes(place.out) if place.out.exists() else None
        force = ["--force"] if before is not None or stood_aside else []
        place.look()
        process = start(command_of(arguments, place.out, *VARIANTS[variant], *force), cache, log)
        other = folder / "neighbour"
        if arguments.neighbour:  # which may already have been rendering for a moment, or begin later
            neighbour = start(command_of(arguments, other, *VARIANTS[1 - variant]), cache, folder / "neighbour.log")
        part = 1 - len(complete) / num_units if aim == "rendering" and not pruned else 1
        phase = kill_at(process, place, aim, draw.uniform(0, durations[aim] * part))
        outlived_s = wait_for_end(process.pid, arguments.patience)
        if outlived_s is None:
            fault(f"processes of the build were left {arguments.patience} s after it ended; killed now")

        if arguments.neighbour:
            if neighbour.wait():
                fault(f"the neighbour failed: {(folder / 'neighbour.log').read_text().strip().splitlines()[-1]}")
            elif hashes(other) != references[1 - variant]:
                fault("the neighbour is not the build made alone")
            shutil.rmtree(other, ignore_errors=True)
        after = hashes(place.out) if place.out.exists() else None
        if phase is None and process.returncode:
            fault(f"a start failed: {log.read_text().strip().splitlines()[-1]}")
            for left in (place.partial, place.old):  # what a user is told to do, so that the rounds go on
                shutil.rmtree(left, ignore_errors=True)
            continue
        if stood_aside and phase != "starting" and before is None and after is None and not place.old.exists():
            fault("the old build that stood aside is gone")
        stood_aside = after is None and place.old.exists() and hashes(place.old) in references
        if after == references[variant] != before or phase is None:
            state = "the new build"
            if after != references[variant]:
                fault("a build that ended by itself is not the one made alone")
            variant, builds = 1 - variant, builds + 1
        elif after is None:
            state = "absent, the old build stands aside" if stood_aside else "absent"
            if before is not None and not stood_aside:
                fault("OUT was there before the kill and is gone")
        else:
            state = "the old build"
            if after not in references:
                fault("OUT is no complete build")
        if phase is None:
            print(f"ended by itself (aimed at {aim}), OUT: {state}", flush=True)
        else:
            phases[phase] += 1
            gone = "some left" if outlived_s is None else f"all processes gone after {outlived_s:.2f} s"
            leftover = [path.name for path in (place.partial, place.old) if path.exists()]
            print(
                f"kill {phases.total():>2} {phase:<10} {'--force' if force else '':<7} units "
                f"{len([n for n in names_in(place.units) if n.endswith('.arrow')]):>3}/{num_units}, OUT: {state}; "
                f"{gone}; beside it: {', '.join(leftover) or 'nothing'}",
                flush=True,
            )
        if builds and builds % 3 == 0 and state == "the new build":  # so that some rounds find no OUT
            shutil.rmtree(place.out)
            shutil.rmtree(place.old, ignore_errors=True)

    force = ["--force"] if place.out.exists() or stood_aside else []
    process = start(command_of(arguments, place.out, *VARIANTS[variant], *force), cache, log)
    if process.wait():
        fault(f"the last start failed: {log.read_text().strip().splitlines()[-1]}")
    elif hashes(place.out) != references[variant]:
        fault("the last build is not the one made alone")
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".out"))
    if left:
        fault(f"left beside OUT at the end: {', '.join(left)}")
    abandoned = [name for name in names_in(place.units) if name.endswith(".tmp")]
    at_work = phases.total() - phases["starting"]
    print(f"{phases.total()} kills ({dict(phases)}), {at_work} of them while rendering, writing or publishing;")
    print(f"{builds} builds were finished between them; {len(abandoned)} unfinished units lie in the cache")
    if at_work < 0.75 * phases.total():
        fault("fewer than three quarters of the kills fell at work: another --seed")
    if faults:
        print(f"{len(faults)} faults:", *faults, sep="\n  ")
        return 1
    print(f"{len(references[variant])} files of the last build equal those of one left alone, by SHA-256")
    return 0


if __name__ == "__main__":
    main()
