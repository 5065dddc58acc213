"""Rewards in another Python environment: a worker process there scores the images that it is sent.

A :class:`ProcessReward` keeps the reward contract without gradient: it can be an LRM's expert or a held-out judge.
:mod:`rgbench.rewards.workers.runner` is the worker's end and documents the protocol. A worker has its own session, so
that Ctrl-C reaches rgbench alone, and it ends with its stdin, so that none outlives rgbench.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.core.io import parse_json, user_cache
from rgbench.core.process import BUSY_SPINS, IDLE_SPINS

if TYPE_CHECKING:
    from torch import Tensor  # `rgbench doctor` looks at an environment without torch

WORKERS = (
    "hpsv2",
    "hpsv3",
    "imagereward",
    "vqascore",
)  # scorers that come with rgbench, files of rgbench.rewards.workers
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
RUNNER = Path(__file__).with_name("workers") / "runner.py"
PROTOCOL = 1
HEAD = struct.Struct(">II")
MAX_BYTES = 1 << 20  # of an answer's header, and of its scores
LOOK_TIMEOUT_SEC = 120.0
GRACE_SEC = 2.0
KEPT_LOGS = 20
LOG_LINES = 8  # shown in a message
MAX_LOG_BYTES = 8 << 20
# Variables that make a process one rank of several, or change its imports.
NOT_PASSED = re.compile(
    r"(RANK|LOCAL_RANK|GROUP_RANK|ROLE_\w+|(LOCAL_|GROUP_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|ACCELERATE_\w+"
    r"|PYTHON\w+|__PYVENV_LAUNCHER__)"
)


class _Ready(BaseModel):
    """What a worker says when it can score; ``contract`` is null where it was only looked at."""

    name: str
    protocol: int
    python: str
    code_sha256: str
    versions: dict[str, str | None]
    contract: _Contract | None
    install: str | None = None


class _Contract(BaseModel):
    """A scorer's contract; further keys are part of its fingerprint."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    takes: Literal["uint8", "float32"]
    weights_sha256: str | None
    antialias: bool | None
    logit_scale: float | None = None


class _Failed(BaseModel):
    """Why a worker cannot score."""

    what: Literal["options", "import"]
    message: str
    install: str | None = None


class ProcessReward:
    """Scores by a worker process.

    Args:
        worker: running.
        ready: its ``ready`` header.
        options: arguments of its ``load``, which change its scores.

    Attributes:
        logit_scale: factor from score to the logit of a preference, where the scorer knows it.
    """

    differentiable = False

    def __init__(self, worker: Worker, ready: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        contract = dict(ready["contract"])
        self.worker, self.name = worker, str(ready["name"])
        self.logit_scale: float | None = contract.pop("logit_scale", None)
        self.takes: str = contract["takes"]
        self._fingerprint = {
            **contract,
            "name": self.name,
            "kind": "process",
            "protocol": ready["protocol"],
            "code_sha256": ready["code_sha256"],
            "python": ready["python"],
            "versions": ready["versions"],
            "options": dict(options),
        }

    @classmethod
    def load(
        cls,
        python: str,
        worker: str,
        *,
        path: str | None = None,
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        timeout: float = 600.0,
        key: str = "reward",
    ) -> ProcessReward:
        """Start a worker and wait until it can score.

        Args:
            python: interpreter of the other environment.
            worker: a name in :data:`WORKERS`, a .py file, or a module of that environment.
            path: weights; None for where the scorer itself looks.
            options: further arguments of the scorer's ``load``.
            device: torch device of the worker.
            timeout: seconds without another score after which the worker is stopped.
            key: of the recipe's section, for messages.

        Raises:
            UsageError: no such interpreter or scorer, a package missing there, arguments that the scorer does not
                take, or a worker that ended before it could score; with its last lines.
        """
        scorer = find_scorer(worker, key)
        process = Worker(python, scorer["worker"], key, timeout)
        place = {"path": path and str(Path(path).expanduser().absolute()), "device": device}
        ready = _start(process, {**scorer, **place, "options": dict(options or {}), "look": False}, key)
        return cls(process, ready, options or {})

    def fingerprint(self) -> dict[str, Any]:
        """The scorer's contract, code and options, and the versions in its environment."""
        return self._fingerprint

    def close(self) -> None:
        """End the worker; it ends with this process at the latest."""
        self.worker.close()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], on their device, float32 at least.

        A scorer of 8-bit images gets the nearest, as a lossless file of the image would hold them.

        Raises:
            UsageError: the images require a gradient.
            RgbenchError: the worker ended or hangs.
        """
        import torch

        if torch.is_grad_enabled() and images.requires_grad:
            raise UsageError(f"reward {self.name}: runs in another process and gives no gradient; kind: lrm needs none")
        pixels = images.detach().float().cpu()
        if self.takes == "uint8":
            pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        array = pixels.contiguous().numpy()
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        values = self.worker.score(array.shape, list(prompts), data)
        dtype = torch.promote_types(images.dtype, torch.float32)
        scores = torch.tensor(values, dtype=dtype, device=images.device)
        return scores.masked_fill(~images.detach().isfinite().flatten(1).all(1), float("nan"))


def look(python: str, worker: str, key: str = "reward") -> str:
    """The versions that an environment has of what a scorer needs, in words; loads no weights.

    Raises:
        UsageError: no such interpreter or scorer, or a package is missing; with the command that installs it.
    """
    scorer = find_scorer(worker, key)
    process = Worker(python, scorer["worker"], key, LOOK_TIMEOUT_SEC)
    try:
        ready = _start(process, {**scorer, "options": {}, "look": True, "path": None, "device": "cpu"}, key)
    finally:
        process.close()
    versions = ready["versions"]
    package = scorer_module(worker).PACKAGES[0] if worker in WORKERS else None
    if package and versions[package] is None:
        raise UsageError(_missing(process, f"no package {package}", ready["install"], key))
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join([f"{process.python}: Python {ready['python']}", *installed])


def find_scorer(worker: str, key: str) -> dict[str, Any]:
    """Name, file and import folder of a scorer, as the runner's ``start`` takes them; a module has no file.

    Raises:
        UsageError: no such file, and no name of a module.
    """
    if worker in WORKERS:
        return {"worker": worker, "file": str(scorer_module(worker).__file__), "folder": None}
    if worker.endswith(".py"):
        file = Path(worker).expanduser().absolute()
        if not file.is_file():
            raise UsageError(f"{key}.worker {worker}: no such file")
        return {"worker": file.stem, "file": str(file), "folder": str(file.parent)}
    if not MODULE.fullmatch(worker):
        raise UsageError(f"{key}.worker {worker[:80]!r}: no .py file and no module; {suggest(worker, WORKERS)}")
    return {"worker": worker, "file": None, "folder": None}


def scorer_module(name: str) -> Any:
    """The module of a scorer that comes with rgbench; its ``INSTALL`` makes the environment."""
    return import_module(f"rgbench.rewards.workers.{name}")


def _start(process: Worker, settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Have a worker load its scorer; its ``ready`` header.

    Args:
        process: the worker.
        settings: fields of the runner's ``start``.
        key: of the recipe's section, for messages.

    Raises:
        UsageError: it cannot; with the reason.
    """
    header = process.start(dict(settings))
    if header["type"] == "ready":
        return header
    process.close()
    if header["what"] == "options":
        raise UsageError(f"{key}.options: {process.name} does not take them: {header['message']}")
    known = "" if settings["file"] else f"; {suggest(settings['worker'], WORKERS)}"
    raise UsageError(_missing(process, header["message"], header["install"], key) + known)


def _missing(process: Worker, what: str, install: str | None, key: str) -> str:
    place = f"{process.python} -m"
    if Path(process.python).parent == Path(sys.executable).parent:
        place = "in another environment than rgbench's own, which its pins would break:"
    command = "" if install is None else f"; install it with: {place} {install}"
    return f"{key}.python {process.python}: {process.name} cannot be imported there: {what}{command}"


class Worker:
    """A worker process, and the frames to and from it.

    Args:
        python: interpreter of the other environment.
        name: of the scorer, for messages and the log.
        key: of the recipe's section that names the interpreter, for messages.
        timeout: seconds without another score after which it is stopped.

    Attributes:
        log: file of what the worker prints.

    Raises:
        UsageError: no such interpreter.
    """

    def __init__(self, python: str, name: str, key: str, timeout: float) -> None:
        self.python, self.name, self.timeout = os.path.expanduser(python), name, timeout
        self.log = _new_log(name)
        environment = {k: v for k, v in os.environ.items() if not NOT_PASSED.fullmatch(k)}
        for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.setdefault(offline, "1")  # rgbench downloads nothing
        if environment.get("GOMP_SPINCOUNT") == str(IDLE_SPINS):
            environment["GOMP_SPINCOUNT"] = str(BUSY_SPINS)  # worker and run compute in turn on the same cores
        try:
            with open(self.log, "ab") as log:  # so that it can be cut while it is written
                self._process = subprocess.Popen(
                    [self.python, "-I", "-u", str(RUNNER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    bufsize=0,
                    start_new_session=True,
                )
        except OSError as error:
            raise UsageError(
                f"{key}.python {python}: cannot be started ({error.strerror}); give the Python of the worker's "
                "environment, such as /path/to/venv/bin/python"
            ) from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._finalizer = weakref.finalize(self, _end, self._process, os.getpid())
        self._ready = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Have it load its scorer.

        Args:
            settings: fields of the runner's ``start``.

        Returns:
            The ``ready`` or ``failed`` header.

        Raises:
            UsageError: it ended, gave no sign of life, or speaks another protocol.
        """
        try:
            self._send({"type": "start", **settings})
            header, _ = self._receive()
        except RgbenchError as error:
            self.close()
            raise UsageError(str(error)) from error
        except BaseException:  # Ctrl-C
            self.close()
            raise
        spoken = header.get("protocol", PROTOCOL)
        if spoken != PROTOCOL:
            self.close()
            raise UsageError(f"{self.name}: the worker speaks protocol {spoken!r:.40}, not {PROTOCOL}")
        try:
            kinds: dict[Any, type[BaseModel]] = {"ready": _Ready, "failed": _Failed}
            kinds[header["type"]].model_validate(header)
        except (KeyError, TypeError, ValidationError) as error:
            self.close()
            raise UsageError(str(self._strange())) from error
        self._ready = True
        return header

    def score(self, shape: tuple[int, ...], prompts: list[str], pixels: bytes) -> list[float]:
        """Scores of images.

        Args:
            shape: of the array in ``pixels``.
            prompts: as many as images.
            pixels: of the type that the scorer takes, little-endian.

        Raises:
            RgbenchError: the worker ended, or made no progress in time.
        """
        if not self._finalizer.alive:
            raise RgbenchError(f"{self.name}: the worker has ended already; see {self.log}")
        try:
            if _is_ready(self._from, select.POLLIN, 0) and os.read(self._from, 1):
                raise RgbenchError(f"{self.name}: the worker answered before it was asked; see {self.log}")
            self._send({"type": "score", "shape": list(shape), "prompts": prompts}, pixels)
            header, payload = self._receive()
            for done in range(1, len(prompts) + 2):  # of one score too many the worker itself says why
                if header["type"] != "scored":
                    break
                if header.get("done") != done:
                    raise self._strange()
                header, payload = self._receive()
        except BaseException:  # a second Ctrl-C too: what is under way would be taken for the next answer
            self.close()
            raise
        if header["type"] != "scores" or len(payload) != 8 * len(prompts):
            self.close()
            raise RgbenchError(f"{self.name}: the worker answered with {header['type']!r}; see {self.log}")
        return list(struct.unpack(f"<{len(prompts)}d", payload))

    def close(self) -> None:
        """End the process; it is gone on return."""
        self._finalizer()

    def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        text = json.dumps(header, allow_nan=False).encode()
        data = memoryview(HEAD.pack(len(text), len(payload)) + text + payload)
        end = time.monotonic() + self.timeout
        while data:
            self._wait(self._to, select.POLLOUT, end)
            try:
                data = data[os.write(self._to, data) :]
            except BrokenPipeError:
                raise self._ended() from None

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        """One frame, which must be whole in time: bytes that drip are no progress."""
        end = time.monotonic() + self.timeout
        length, size = HEAD.unpack(self._exactly(HEAD.size, end))
        if max(length, size) > MAX_BYTES:
            raise self._strange()
        try:
            header = parse_json(self._exactly(length, end))
        except (ValueError, RecursionError) as error:
            raise self._strange() from error
        if not isinstance(header, dict) or "type" not in header:
            raise self._strange()
        if self.log.stat().st_size > MAX_LOG_BYTES:
            os.truncate(self.log, 0)
        return header, self._exactly(size, end)

    def _strange(self) -> RgbenchError:
        return RgbenchError(f"{self.name}: {self.python} does not answer as a worker does; see {self.log}")

    def _exactly(self, size: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._from, select.POLLIN, end)
            part = os.read(self._from, size - len(data))
            if not part:
                raise self._ended()
            data += part
        return bytes(data)

    def _wait(self, descriptor: int, event: int, end: float) -> None:
        """Wait until a pipe can be read or written, at most to a time."""
        if not _is_ready(descriptor, event, end - time.monotonic()):
            self.close()
            raise RgbenchError(
                f"{self.name}: the worker made no progress for {self.timeout:g} seconds and was ended; raise timeout "
                f"if it needs longer{self._last_lines()}"
            )

    def _ended(self) -> RgbenchError:
        """The error for a worker that is gone."""
        code = _exit_code(self._process, GRACE_SEC)
        self.close()
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        when = "while scoring" if self._ready else "before it could score"
        return RgbenchError(f"{self.name}: the worker {how} {when}{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        shown = ":\n  " + "\n  ".join(line[:400] for line in lines) if lines else "; it printed nothing"
        return f"{shown}\nall that it printed: {shlex.quote(str(self.log))}"


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Close its stdin, at which it ends; kill it and what it started. No process and no zombie is left."""
    if os.getpid() != owner:  # a fork's exit is not the end of what its parent started
        return
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    if process.returncode is None:
        _exit_code(process, GRACE_SEC)
        with suppress(ProcessLookupError, PermissionError):  # what it started may have outlived it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _exit_code(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Exit code of a process that ends in time, negative for a signal. It keeps its id, and so its group's."""
    end = time.monotonic() + timeout
    while True:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


def _is_ready(descriptor: int, event: int, timeout: float) -> bool:
    """Whether a pipe can be read or written within a time, in seconds."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(max(timeout, 0) * 1000))


def _new_log(name: str) -> Path:
    """A file of its own in the cache; the newest ones are kept."""
    folder = user_cache("workers")
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(folder.glob("*.log"), key=lambda file: file.name)
    for file in old[: max(len(old) - KEPT_LOGS + 1, 0)]:
        file.unlink(missing_ok=True)
    stem = re.sub(r"[^\w.-]", "_", name)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**9:09d}-{os.getpid()}-{stem}.log"
