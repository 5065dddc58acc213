"""``python -m tools.bench``."""

from tools.bench.cli import app

app(prog_name="python -m tools.bench")
