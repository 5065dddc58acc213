"""Work on a plan: each unit is a process of ``rgbench``, claimed by a lock, so that several workers share a plan.

The lock passes to the unit's process: while one that lost its worker still ends, no other takes its unit. What became
of each unit is kept in ``units.json``, for estimates, for the list of failures and for the time that a study cost.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from rgbench.core.config import read_as
from rgbench.core.errors import RESUMABLE, Interrupted
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.process import StopRequest, end_with_parent
from tools.study.plan import Plan, Unit, plan, seconds_of

FILE = "units.json"
LOCKS = ".units"  # under the folder of runs, with the output of each unit
PROGRAM = (sys.executable, "-m", "rgbench")
STOPPED = (RESUMABLE, 130)  # exit codes of a unit that was stopped and continues
LOOK_SEC = 5.0  # between two looks at what other workers do
MAX_ERROR = 300  # characters


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Record(_Frozen):
    """What became of a unit.

    Attributes:
        status: ``finished`` or ``failed``.
        wall_sec: of all its attempts, interrupted ones included.
        cpu_sec: likewise.
        pays: what its cost depends on.
        command: that ran.
        ended: UTC, ISO 8601.
        error: last line of what a failed unit said.
    """

    status: Literal["finished", "failed", "stopped"]
    wall_sec: float
    cpu_sec: float
    pays: str
    command: str
    ended: str
    error: str = ""


class Records(_Frozen):
    """``units.json``."""

    schema_version: Literal[1] = 1
    units: dict[str, Record] = {}

    @property
    def failed(self) -> list[str]:
        """Names of units that failed."""
        return [name for name, record in self.units.items() if record.status == "failed"]

    def measured(self) -> dict[str, list[float]]:
        """Wall seconds of finished units by what their cost depends on."""
        found: dict[str, list[float]] = {}
        for record in self.units.values():
            if record.status == "finished":
                found.setdefault(record.pays, []).append(record.wall_sec)
        return found


def read_records(folder: Path) -> Records:
    """The records in a folder; none where there is no file.

    Raises:
        UsageError: a file that holds no records.
    """
    path = folder / FILE
    if not path.exists():
        return Records()
    return read_as(Records, read_json(path), f"{path}: no records of units", "remove it")


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[int | None]:
    """A lock that this process and its children hold until the last of them ends; None where another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    is_ours = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            is_ours = False
        yield descriptor if is_ours else None
    finally:
        os.close(descriptor)


def work(units: Sequence[Unit], locks: Path, records: Path, retry: bool, say: Callable[[str], None]) -> Plan:
    """Do units until none is left, beside other workers that do the same.

    Args:
        units: of :func:`tools.study.plan.units_of`.
        locks: folder of locks and outputs.
        records: folder of ``units.json``.
        retry: take units up again that failed before.
        say: prints a line.

    Returns:
        What is done and what failed.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; the running unit has saved its state.
    """
    again = set(read_records(records).failed) if retry else set()
    with StopRequest() as stop:
        while True:
            found = plan(units, set(read_records(records).failed) - again)
            if not found.left:
                return found
            if not _do_one(found.left, units, locks, records, again, stop, say):
                time.sleep(LOOK_SEC)
            if stop.signal is not None:
                words = "Stopped. Finished units are kept; rerun the command to continue."
                raise Interrupted(words, resume_command=shlex.join(sys.argv), exit_code=stop.exit_code)


def _do_one(
    left: Sequence[Unit],
    units: Sequence[Unit],
    locks: Path,
    records: Path,
    again: set[str],
    stop: StopRequest,
    say: Callable[[str], None],
) -> bool:
    """Do the first unit that is ready and that nobody does; whether there was one."""
    waiting = {unit.name for unit in left}
    for unit in left:
        if waiting & set(unit.needs):
            continue
        stem = unit.name.replace(" ", "-")
        with locked(locks / f"{stem}.lock", wait=False) as lock:
            if lock is None or unit.is_done() or unit.name in set(read_records(records).failed) - again:
                continue
            again.discard(unit.name)
            estimate = seconds_of(unit, read_records(records).measured())
            say(f"{unit.name}: begins, about {estimate / 60:.0f} min; {len(left)} units left")
            record = run_unit(unit, locks / f"{stem}.log", lock, stop)
            keep_record(records, unit.name, record)
            say(f"{unit.name}: {record.status} after {record.wall_sec:.0f} s {record.error}".rstrip())
            return True
    return False


def run_unit(unit: Unit, log: Path, lock: int, stop: StopRequest) -> Record:
    """Run a unit's command on one thread; a stop asked of this process is passed on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    with open(log, "ab") as output:
        child = subprocess.Popen(
            [*PROGRAM, *unit.words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock],
            process_group=0,  # Ctrl-C reaches this process, which passes it on
            preexec_fn=end_with_parent,
        )
        code, usage = _wait(child, stop)
    status: Literal["finished", "failed", "stopped"] = "finished"
    error = ""
    if code in STOPPED or stop.signal is not None:
        status = "stopped"
    elif code != 0 or not unit.is_done():
        status, error = "failed", _last_line(log) if code else f"ended well, but not all of it is in {unit.place}"
    return Record(
        status=status,
        wall_sec=round(time.monotonic() - begun, 1),
        cpu_sec=round(usage, 1),
        pays=unit.pays,
        command=shlex.join(["rgbench", *unit.words]),
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        error=error,
    )


def _wait(child: subprocess.Popen[bytes], stop: StopRequest) -> tuple[int, float]:
    """Exit code and CPU seconds of a child; SIGTERM and Ctrl-C go on to it, once."""
    told = False
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage.ru_utime + usage.ru_stime
        if stop.signal is not None and not told:
            child.send_signal(stop.signal)
            told = True
        time.sleep(0.1)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:MAX_ERROR] for line in reversed(lines) if line.strip()), "no output")


def keep_record(folder: Path, name: str, record: Record) -> None:
    """Add a record to ``units.json``; the time of earlier attempts that were stopped is added."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{FILE}.lock", wait=True):
        known = read_records(folder).units
        before = known.get(name)
        if before is not None and before.status == "stopped":
            times = {key: round(getattr(before, key) + getattr(record, key), 1) for key in ("wall_sec", "cpu_sec")}
            record = record.model_copy(update=times)
        whole = Records(units=dict(sorted({**known, name: record}.items())))
        write_json_atomic(folder / FILE, whole.model_dump(mode="json"))


def describe(found: Plan, measured: Mapping[str, Sequence[float]], workers: int) -> list[str]:
    """Lines that say what is done, what failed and what is left, with the time that it takes."""
    lines = [f"{unit.name}: about {seconds_of(unit, measured) / 60:.1f} min" for unit in found.left]
    lines += [f"{unit.name}: failed, or waits for one that did; --retry takes it up again" for unit in found.failed]
    seconds = sum(seconds_of(unit, measured) for unit in found.left)
    counts = f"{len(found.done)} units done, {len(found.left)} left, {len(found.failed)} failed"
    return [*lines, f"{counts}: {seconds / 3600:.1f} h of one thread, {seconds / 3600 / workers:.1f} h with {workers}"]
