"""The worker's end of a process reward: images on stdin, scores on stdout.

The Python of another environment runs it as ``python -I -u runner.py``; rgbench never imports it. Every message is a
frame: two big-endian uint32, the lengths of header and payload, then a JSON object in UTF-8, then the payload.

    to the worker:    start  {worker, file, folder, path, device, options, look}
                      score  {shape, prompts} + images, uint8 (B, H, W, 3) or float32 (B, 3, H, W), little-endian
    from the worker:  ready  {protocol, name, python, code_sha256, versions, contract}
                      failed {what, message, install}
                      scored {done} once per score; scores {} + B float64, little-endian

Whatever the scorer prints goes to stderr, which rgbench keeps in a log. The worker ends when its stdin does.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import queue
import struct
import sys
import threading
from importlib import metadata

PROTOCOL = 1
HEAD = struct.Struct(">II")
ALWAYS = ("numpy", "pillow", "torch", "torchvision", "transformers")  # change the scores of nearly all models
TAKES = ("uint8", "float32")


class Pipe:
    """Frames over two file descriptors of our own, so that no print can get between them."""

    def __init__(self):
        self.input, self.output = os.dup(0), os.dup(1)
        os.dup2(2, 1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self.frames: queue.Queue = queue.Queue()
        # Reads while the scorer computes, and so notices at once when the process at the other end is gone.
        threading.Thread(target=self._read_on, daemon=True).start()

    def _read_on(self):
        while True:
            header, payload = HEAD.unpack(self._exactly(HEAD.size))
            self.frames.put((json.loads(self._exactly(header).decode("utf-8")), self._exactly(payload)))

    def _exactly(self, size):
        data, filled = bytearray(size), 0
        while filled < size:
            part = os.read(self.input, min(size - filled, 1 << 20))
            if not part:
                os._exit(0)
            data[filled : filled + len(part)] = part
            filled += len(part)
        return data

    def send(self, header, payload=b""):
        text = json.dumps(header, allow_nan=False).encode("utf-8")
        data = memoryview(HEAD.pack(len(text), len(payload)) + text + payload)
        while data:
            data = data[os.write(self.output, data) :]


def find(start):
    """The scorer's module: a file, or a module that this environment has."""
    if start["file"] is None:
        return importlib.import_module(start["worker"])
    if start["folder"] is not None:
        sys.path.append(start["folder"])
    name = "scorer_" + start["worker"]  # hpsv3.py is not the package hpsv3
    spec = importlib.util.spec_from_file_location(name, start["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def versions(module):
    """Installed versions of the packages that change its scores; None for one that it names and is missing."""
    found: dict[str, str | None] = {}
    for name in (*ALWAYS, *getattr(module, "PACKAGES", ())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in ALWAYS:
                found[name] = None
    return found


def sha256_file(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def describe(start, module):
    return {
        "type": "ready",
        "protocol": PROTOCOL,
        "name": start["worker"],
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "code_sha256": sha256_file(inspect.getsourcefile(module)),
        "versions": versions(module),
    }


def check(contract):
    """The scorer's contract.

    Raises:
        ValueError: it lacks what tells its scores from another's.
    """
    for key in ("weights_sha256", "antialias"):
        if key not in contract:
            raise ValueError(f"the scorer's contract lacks {key!r}")
    if contract.get("takes") not in TAKES:
        raise ValueError(f"the scorer's contract says takes: {contract.get('takes')!r}; known: {', '.join(TAKES)}")
    return contract


def load(pipe, start):
    """Load the scorer and report it ready, or report what is missing; None where there is nothing to serve."""
    install = None
    try:
        module = find(start)
        install = getattr(module, "INSTALL", None)
        if start["look"]:
            pipe.send(dict(describe(start, module), contract=None, install=install))
            return None
        given = {"device": start["device"], **start["options"]}
        if start["path"] is not None:
            given["path"] = start["path"]
        try:
            inspect.signature(module.load).bind(**given)
        except TypeError as error:
            pipe.send({"type": "failed", "what": "options", "message": str(error), "install": install})
            return None
        scorer = module.load(**given)
        import numpy  # noqa: F401 - what scorers are given
    except ImportError as error:
        sys.excepthook(*sys.exc_info())
        pipe.send({"type": "failed", "what": "import", "message": str(error), "install": install})
        return None
    pipe.send(dict(describe(start, module), contract=check(dict(scorer.contract))))
    return scorer


def serve(pipe, scorer):
    """Answer requests until stdin ends."""
    import numpy

    dtype = numpy.dtype(scorer.contract["takes"]).newbyteorder("<")
    while True:
        request, payload = pipe.frames.get()
        images = numpy.frombuffer(payload, dtype).reshape(request["shape"])
        prompts = request["prompts"]
        scores = []
        for score in scorer(images, prompts):
            scores.append(float(score))
            pipe.send({"type": "scored", "done": len(scores)})
        if len(scores) != len(prompts):
            raise ValueError(f"the scorer gave {len(scores)} scores for {len(prompts)} images")
        pipe.send({"type": "scores"}, struct.pack(f"<{len(scores)}d", *scores))


def main():
    pipe = Pipe()
    start, _ = pipe.frames.get()
    scorer = load(pipe, start)
    if scorer is not None:
        serve(pipe, scorer)


if __name__ == "__main__":
    main()
