"""Python commands that start in milliseconds: forks of one process that has the imports already.

``python`` and ``rgbench`` in the server's folder hand their arguments, folder, environment and standard streams to it,
pass signals on, and end as their fork ends. What no fork can be for them, like ``python -m pip``, is a real process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

# Their imports are those of nearly all commands. Nothing is computed before a fork: torch starts no thread.
PRELOADED = ("rgbench.cli.main", "rgbench.train.train", "rgbench.evaluate.evaluate", "rgbench.report.report")
FORKED_MODULES = ("rgbench", "tensorboard", "tests")
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class ForkServer:
    """The server and its programs, in a folder that may come first on ``PATH``.

    Args:
        folder: a new folder for programs and socket.
        environment: of the server; commands bring their own, but what imports read of it is settled here.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.path = folder / "socket"
        write_programs(folder, [sys.executable, "-I", "-S", __file__, "ask", str(self.path)])
        quiet = ["-W", "ignore:This process:DeprecationWarning"]  # jemalloc, which has a thread, can be forked
        command = [sys.executable, *quiet, "-m", "tests.fork_server", "serve", str(self.path)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self.process.stdout and self.process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End the server; commands have ended."""
        self.process.terminate()
        self.process.communicate()


def never_wait_for_the_disk() -> None:
    """Make ``os.fsync`` free in this process: no test cuts the power, and what a killed process wrote is still read."""
    os.fsync = os.fstat  # which refuses what is no open file as well


def write_programs(folder: Path, python: list[str]) -> None:
    """Write ``python``, ``rgbench`` and ``tensorboard``, given how python is started."""
    for name, module in (("python", ()), ("rgbench", ("-m", "rgbench")), ("tensorboard", ("-m", "tensorboard.main"))):
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec {shlex.join([*python, *module])} "$@"\n')
        file.chmod(0o755)


def ask(path: str, argv: list[str]) -> None:
    """Run ``python ARGV`` in a fork of the server at ``path``, or else in place of this process."""
    forked = argv[:1] in (["-"], ["-c"]) or (argv[:1] == ["-m"] and argv[1].partition(".")[0] in FORKED_MODULES)
    if not forked:
        os.execv(sys.executable, [sys.executable, *argv])
    request = {"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ), "group": os.getpgrp()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"?"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile()
        pid = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        code = int(answers.readline())
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(path: str) -> list[str]:
    """Import, say so, and return only in forks: what is to be run there."""
    from importlib import import_module

    from rgbench.core.process import end_with_parent, tune_process

    end_with_parent()
    never_wait_for_the_disk()
    tune_process()
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path = [entry for entry in sys.path[1:] if entry not in own]
    sys.path, libraries = [*own, *sys.path], sys.path
    for module in PRELOADED:
        import_module(module)
    sys.path = libraries
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            break
        client.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_with_parent()
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    request = json.loads(client.makefile("rb").readline())
    alive, held = os.pipe()  # the child's end closes its copy of the second, as the client's end closes the socket
    if child := os.fork():
        os.close(held)
        for stream in streams:
            os.close(stream)
        attend(client, child, alive)
    client.close()
    os.close(alive)
    end_with_parent()
    become(request, streams)
    return request["argv"]


def attend(client: socket.socket, child: int, alive: int) -> None:
    """Tell the client of the child, and kill the child when the client ends first."""
    with contextlib.suppress(BrokenPipeError):
        client.sendall(b"%d\n" % child)
    if alive not in select.select([client, alive], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.sendall(b"%d\n" % code)
    os._exit(0)


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Take on a client's process group, streams, folder, environment and paths."""
    import importlib

    with contextlib.suppress(OSError):  # of another session
        os.setpgid(0, request["group"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = open(number, "w" if number else "r", buffering=1 if number == 2 else -1, closefd=False)  # noqa: SIM115
        setattr(sys, name, file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    own = request["environment"].get("PYTHONPATH", "")
    sys.path[:0] = [os.path.abspath(entry) for entry in own.split(os.pathsep) if entry]
    importlib.invalidate_caches()


def finish(argv: list[str]) -> None:
    """Run ``python ARGV`` and end as Python ends, without taking a gigabyte of modules apart."""
    import atexit
    import threading

    code: object = 0
    try:
        run(argv)
    except SystemExit as left:
        code = left.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:  # noqa: BLE001  (as the interpreter does)
        sys.excepthook(type(error), error, error.__traceback__)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(argv: list[str]) -> None:
    """``python ARGV`` in this process."""
    import runpy
    import types

    how, *rest = argv
    if how == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    source = sys.stdin.read() if how == "-" else rest.pop(0)
    sys.argv = [how, *rest]
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(source, "<stdin>" if how == "-" else "<string>", "exec"), main.__dict__)  # noqa: S102


if __name__ == "__main__":
    role, path, *argv = sys.argv[1:]
    if role == "ask":
        ask(path, argv)
    finish(serve(path))
