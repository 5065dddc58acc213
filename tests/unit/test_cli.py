"""The command line: fast help, clear errors, right exit codes, nothing overwritten."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rgbench.cli.main import _print_results, app, result_lines
from rgbench.cli.options import ExplainingGroup
from rgbench.cli.show import print_table, what_next
from rgbench.core.errors import ConfigError, Interrupted, RgbenchError, UsageError
from rgbench.core.registry import TABLES
from rgbench.evaluate.results import Generation, Head, ModelResult
from rgbench.metrics.values import Interval, MetricValue, Protocol
from tests.conftest import ROOT, Cli
from tests.history.plausible import write_model

LIBRARIES = "import pydantic, typer.rich_utils; pydantic.BaseModel"
OURS = os.environ | {"PYTHONPATH": str(ROOT)}
VERBS = [
    *("train", "eval", "report", "sample", "verdict", "compare", "check", "probes"),
    *("ls", "show", "doctor", "plan", "validate", "cp", "export", "cache", "merge", "rm", "export-data"),
]


def test_help_names_every_verb(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    assert [verb for verb in VERBS if not re.search(rf"\b{verb}\b", done.stdout)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def verbs() -> Iterator[tuple[str, Any]]:
    """Every verb, those of ``probes`` too, with its command."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        yield name, command
        yield from ((f"{name} {inner}", each) for inner, each in getattr(command, "commands", {}).items())


def test_every_help_has_one_example_that_parses() -> None:
    for name, command in verbs():
        words = shlex.split(command.epilog.removeprefix("Example: rgbench "))
        assert command.epilog.count("Example:") == 1 and " ".join(words).startswith(name), name
        group = hasattr(command, "commands")
        own = command.commands[words[1]] if group else command
        own.make_context(name, words[name.count(" ") + 1 + group :], resilient_parsing=True)
        options = {option for parameter in own.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, name


def test_training_ends_in_what_to_look_at_and_what_to_run(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "lcd-s0"
    (run / "samples").mkdir(parents=True)
    (run / "pipeline").mkdir()
    path = shlex.quote(str(run))
    said = f"Look at: {path}/samples, tensorboard --logdir {path}. Next: rgbench eval {path}".replace(
        f"{path}/samples", f"{run}/samples"
    )
    assert what_next(run) == said.replace(f"{run}/samples, ", ""), "nothing was sampled"
    (run / "samples" / "step-0002.png").touch()
    assert what_next(run) == said
    (run / "pipeline").rmdir()
    for proxy, recipe in (("{clip: null, small: null}", "lrm"), ("{small: {width: 64}}", "dollar")):
        (run / "config.yaml").write_text(f"proxy: {proxy}\n")
        assert what_next(run).endswith(shlex.join(["rgbench", "train", recipe, f"proxy.path={run / 'latent_proxy'}"]))


def cpu_and_output(code: str) -> tuple[float, str]:
    """CPU time of a process, which a busy machine does not change, and what it prints."""
    child = subprocess.Popen([sys.executable, "-c", code], env=OURS, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, code
    return usage.ru_utime + usage.ru_stime, said


def cpu_seconds(code: str) -> float:
    return cpu_and_output(code)[0]


def test_help_takes_no_torch_and_no_time() -> None:
    """0.4 s; on a slow machine, twice what its libraries alone take to be imported there."""
    code = "import sys; sys.argv = ['rgbench', '--help']\nfrom rgbench.cli.main import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    spent = [(cpu_seconds(code), cpu_seconds(LIBRARIES)) for _ in range(5)]
    help_sec, library_sec = map(min, zip(*spent, strict=True))
    assert help_sec <= max(0.4, 2 * library_sec)


TYPOS = [
    "trian",
    "train lrmm",
    "train lrm train.lrr=1",
    "eval --metric fidd",
    "eval no-such-run",
    "eval teacher --protocol coco14",
    "eval teacher --sampler dim",
    "eval teacher --seeds x",
    "eval teacher --prompts absent.txt",
    "sample no-such-run --prompt x",
    "report absent",
    "verdict absent",
    "compare absent",
    "check absent",
    "probes gold absent",
    "report --format mdd",
    "ls recipies",
    "cp lrmm",
    "show lrmm",
    "validate lrmm",
    "doctor lrmm",
    "cache lrmm",
]


def test_a_typo_is_answered_without_torch_and_at_once(tmp_path: Path) -> None:
    """1 s of CPU each; torch and diffusers alone take ten. On a slow machine, four times what the libraries take."""
    library_sec = cpu_seconds(LIBRARIES)
    slow, heavy = {}, {}
    for words in TYPOS:
        code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv = ['rgbench', *{words.split()!r}]\n"
        code += "sys.stderr = open(os.devnull, 'w')\nfrom rgbench.cli.main import main\n"
        code += "try: main()\nexcept SystemExit as end: assert end.code == 2, end.code\n"
        code += (
            "else: raise AssertionError('not refused')\n"
            "print([name for name in ('torch', 'diffusers') if name in sys.modules])"
        )
        spent, said = cpu_and_output(code)
        if said.strip() != "[]":
            heavy[words] = said
        if spent > max(1.0, 4 * library_sec):
            slow[words] = spent
    assert (heavy, slow) == ({}, {})


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rgbench ev", ["eval"]),
        ("rgbench eval --metric fid,hps_", ["fid,hps_jpeg75"]),
        ("rgbench train lrm_", ["lrm_pretrain"]),
        ("rgbench eval lcd", ["lcd-s3"]),
        ("rgbench eval te", ["teacher"]),
        ("rgbench show lcd-", ["lcd-s3"]),
        ("rgbench cp sd15", ["sd15/lcd_lora"]),
    ],
)
def test_names_are_completed_without_torch(tmp_path: Path, line: str, offered: list[str]) -> None:
    (tmp_path / "runs" / "lcd-s3").mkdir(parents=True)
    (tmp_path / "runs" / "lcd-s3" / "run.json").write_text("{}")
    words = line.split()
    environment = {"_RGBENCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['rgbench']\nfrom rgbench.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=OURS | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == offered


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trian"], 2, "trian"),
        (["train"], 2, "recipe"),
        (["train", "lrmm"], 2, "did you mean 'lrm'?"),
        (["train", "lrm", "train.lrr=1"], 2, "command line:train.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        (["train", "lrm", "--steps", "10"], 2, "settings of the recipe are KEY=VALUE, like train.steps=10"),
        (["train", "lrm", "steps=10"], 2, "unknown key 'steps'; did you mean 'train.steps'?"),
        (["train", "lrm", "train.lr=fast"], 2, "command line:train.lr"),
        (["train", "lrm", "--device", "tpu"], 2, "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["eval", "--metric", "fidd"], 2, "did you mean 'fid'?"),
        (["eval", "no-such-run", "--metric", "spectrum"], 2, "no-such-run"),
        (["eval", "teacher", "--metric", ""], 2, "'': an option with no name in it"),
        (["eval", "", "--metric", "hps"], 2, "a target without a name"),
        (["eval", "--metric", "fid", "--prompts", "absent.txt"], 2, "absent.txt"),
        (["report", "absent"], 2, "absent"),
        (["sample", "no-such-run", "--prompt", "a red disc"], 2, "no-such-run"),
        (["show", "lrmm"], 2, "did you mean 'lrm'?"),
        (["cp", "lrmm", "mine.yaml"], 2, "did you mean 'lrm'?"),
        (["validate", "lrmm"], 2, "did you mean 'lrm'?"),
        (["ls", "recipies"], 2, "recipes"),
        (["ls", "results", "--results", "nowhere"], 2, "nowhere: no such folder"),
        (["ls", "runs", "--runs", "nowhere"], 2, "nowhere: no such folder"),
        (["eval", "teacher", "--num", "0"], 2, "greater than or equal to 1"),
        (["eval", "--metric", "all"], 2, "leave out --metric"),
        (["report", "--format", "mdd"], 2, "did you mean 'md'?"),
    ],
)
def test_wrong_usage_is_explained(cli: Cli, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    done = cli(*arguments)
    assert done.returncode == code, done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and "Value error" not in done.stderr
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [], "wrong usage must write nothing"


def test_recipes_are_listed_shown_copied_and_validated(cli: Cli, tmp_path: Path) -> None:
    listed = cli("ls", "recipes").stdout.splitlines()
    rows = [line.split("\t") for line in listed]
    methods = ("dollar", "lcd", "lrm", "lrm_pretrain", "mlcm", "rg_lcd", "tcd")
    kinds = {f"{folder}{kind}": kind for folder in ("", "sd21/") for kind in methods} | {
        "weighted": "weighted",
        "vsd": "vsd",
        "dollar_pretrain": "lrm_pretrain",
        "benchtop-flow/lcd": "lcd",
    }
    kinds |= {f"{folder}/lcd_lora": "lcd" for folder in ("sd15", "sdxl", "sd35", "flux")}
    assert {row[0]: row[1] for row in rows} == kinds
    assert all(row[2] for row in rows)
    text = (ROOT / "recipes" / "lrm.yaml").read_text()
    assert cli("show", "lrm").stdout.strip() == text.strip()
    assert cli("cp", "lrm").stdout == "lrm.yaml\n" and (tmp_path / "lrm.yaml").read_text() == text
    assert cli("cp", "lrm", "my.yaml").returncode == 0
    assert (tmp_path / "my.yaml").read_text() == text
    (tmp_path / "my.yaml").write_text(text + "\n# mine")
    again = cli("cp", "lrm", "my.yaml")
    assert again.returncode == 2 and "not overwritten" in again.stderr
    assert (tmp_path / "my.yaml").read_text().endswith("# mine")
    (tmp_path / "bad.yaml").write_text(text.replace("seed:", "sede:"))
    checked = cli("validate", "lcd", "my.yaml", "bad.yaml")
    assert checked.returncode == 2
    assert checked.stdout.splitlines() == ["lcd: ok (lcd)", "my.yaml: ok (lrm)"]
    assert re.search(r"bad\.yaml:\d+:sede: unknown key 'sede'; did you mean 'seed'\?", checked.stderr)


@pytest.mark.parametrize(("kind", "table"), [("metrics", "metric"), ("probes", "probe"), ("rewards", "reward")])
def test_tables_are_listed(cli: Cli, kind: str, table: str) -> None:
    rows = [line.split("\t") for line in cli("ls", kind).stdout.splitlines()]
    assert list(dict.fromkeys(row[0] for row in rows)) == sorted(TABLES[table])
    if kind != "rewards":
        values = [row[1] for row in rows if row[1]]
        assert len(values) == len(set(values)) > 5 and all(row[-1] for row in rows), "what it is about"


def test_results_are_listed_and_their_values_shown(cli: Cli, tmp_path: Path) -> None:
    for method in ("lcd", "rg_lcd"):
        folder = write_model(tmp_path / "results", method, 3, metrics=("hps", "hfer_db"), num=4, training=(5, 9))
    (first, second) = [line.split("\t") for line in cli("ls", "results").stdout.splitlines()]
    assert first[:2] == ["benchtop", "lcd-s3"] and second[3:] == ["3", "5/9", "2048", "2"]
    rows = {row[0]: row for row in (line.split("\t") for line in cli("show", folder).stdout.splitlines())}
    assert rows.keys() == {"hps", "hfer_db"} and rows["hfer_db"][1] == "HFER gap" and rows["hps"][-1] == "trained on"
    assert re.fullmatch(r"[\d.]+ ± 0\.07", rows["hps"][2])
    assert len(cli("show", tmp_path / "results" / "benchtop").stdout.splitlines()) == 2, "several results: a list"
    missing = cli("show", tmp_path / "nothing")
    assert missing.returncode == 2 and "nor is it a run" in missing.stderr


def test_runs_are_listed_and_shown(cli: Cli, tmp_path: Path) -> None:
    assert cli("ls", "runs").stdout == ""
    run = tmp_path / "runs" / "lcd-s3"
    run.mkdir(parents=True)
    meta = {"schema_version": 1, "method": "lcd", "seed": 3, "status": "interrupted", "step": 7, "steps": 20}
    (run / "run.json").write_text(json.dumps(meta))
    (run / "config.yaml").write_text("kind: lcd\n")
    assert cli("ls", "runs").stdout == "lcd-s3\tlcd\t3\tinterrupted\t7/20\n"
    for name in ("lcd-s3", run):
        shown = cli("show", name).stdout
        assert '"status": "interrupted"' in shown and shown.endswith("kind: lcd\n\n")


def failing(error: BaseException) -> typer.Typer:
    """A command line as ours whose verb raises."""
    other = typer.Typer(cls=ExplainingGroup, pretty_exceptions_enable=False)

    @other.command()
    def fail() -> None:
        raise error

    @other.command()
    def idle() -> None: ...

    return other


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RgbenchError("it broke"), 1, "error: it broke"),
        (UsageError("[bold]no markup[/bold]"), 2, "error: [bold]no markup[/bold]"),
        (ConfigError("bad", path="r.yaml", line=3, key="a.b"), 2, "error: r.yaml:3:a.b: bad"),
        (Interrupted("Stopped.", resume_command="rgbench train lrm"), 75, "Stopped.\nresume with: rgbench train lrm"),
        (Interrupted("Stopped.", resume_command="x", exit_code=130), 130, "resume with: x"),
        (KeyboardInterrupt(), 130, "Stopped."),
        (FileNotFoundError(2, "No such file or directory", "/proc/x"), 1, "/proc/x: No such file or directory; fix"),
        (OSError(28, "No space left on device", "/disk/file"), 1, "/disk/file: No space left on device"),
        (PermissionError(13, "Permission denied", "/disk/file"), 1, "/disk/file: Permission denied"),
    ],
)
def test_errors_become_one_message_and_their_exit_code(error: BaseException, code: int, said: str) -> None:
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == code
    assert said in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == "" and ("error:" in result.stderr) == (code in (1, 2)), "Ctrl-C is no error"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(9, "Bad file descriptor")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == 1
    assert result.exception is error


def test_a_long_message_is_not_broken_into_lines() -> None:
    path = "/very/long" * 40
    result = CliRunner().invoke(failing(UsageError(f"{path}: missing")), ["fail"])
    assert f"{path}: missing" in result.stderr


def test_ctrl_c_at_start_up() -> None:
    code = "import os, signal, typer\nfrom rgbench.cli.options import ExplainingGroup\n"
    code += "app = typer.Typer(cls=ExplainingGroup)\n@app.command()\ndef a(): os.kill(os.getpid(), signal.SIGINT)\n"
    code += "@app.command()\ndef b(): ...\napp(['a'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=OURS,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    assert done.returncode == 130
    assert "Stopped." in done.stderr and "Traceback" not in done.stderr
    assert signal.SIGINT == 2


def test_a_process_of_its_own_explains_itself_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rgbench", "show", "lrmm"],
        cwd=tmp_path,
        env=OURS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no recipe 'lrmm'") and "Traceback" not in done.stderr


def test_version(cli: Cli) -> None:
    assert re.fullmatch(r"rgbench \d+\.\d+\.\d+", cli("--version").stdout.strip())


def test_cuda_that_is_not_there(cli: Cli) -> None:
    import torch

    if not torch.cuda.is_available():
        done = cli("eval", "teacher", "--num", "2", "--metric", "hps", "--device", "cuda")
        assert done.returncode == 2 and "--device cuda" in done.stderr


def made(model: str, *values: MetricValue, step: int = 3) -> ModelResult:
    generation = Generation.of("lcm4", {"sampler": "lcm", "steps": 4, "guidance_scale": 5.0, "model": model})
    head = Head(world="benchtop", model=model, method="lcd", generation=generation, training={"step": step, "steps": 3})
    return ModelResult(head, values, folder=Path("results/benchtop") / model / generation.id)


def value(metric: str, number: float | None, half: float | None = None, **fields: object) -> MetricValue:
    interval = None
    if number is not None and half is not None:
        interval = Interval(low=number - half, high=number + half, level=0.95, method="")
    return MetricValue(metric, Protocol(id=f"{metric}-1", fields={}), number, interval, 8, **fields)  # type: ignore[arg-type]


def test_an_evaluation_ends_with_a_table() -> None:
    hps = value("hps", 79.634, 0.5, in_sample=True)
    hfer = value("hfer_db", -3.4, 0.25, reference="real")
    fd = value("fd_efflite0", 226.0, flags=("n<=d",))
    lines = result_lines(
        [made("lcd-s0", hps, hfer, fd), made("teacher", value("hps", 81.0), value("vendi_efflite0", None))]
    )
    assert [line.split("  ")[0] for line in lines[:6]] == [
        "",
        "-------------",
        "HPS ↑",
        "HFER gap, dB",
        "FD-EffLite0 ↓",
        "Vendi",
    ]
    assert re.split(" {2,}", lines[0].strip()) == ["lcd-s0 (lcm, 4 steps, g 5)", "teacher (lcm, 4 steps, g 5)"]
    assert "79.63† ± 0.50" in lines[2] and lines[2].endswith("81.00") and "-3.40 ± 0.25" in lines[3]
    assert lines[5].endswith("—") and lines[6] == "†: the model was trained on this reward"
    assert lines[7].startswith("FD-EffLite0: n<=d, no more images than features") and len(lines) == 8
    wide = result_lines([made(f"lcd-s{i}", hps, step=i) for i in range(4)])
    assert len(wide) == 7 and wide[0].split() == ["HPS", "↑"] and wide[3].startswith("lcd-s1 @ 1 (lcm")


@pytest.mark.parametrize(("width", "shown"), [(80, ["name", "unit", "about"]), (30, ["name", "about"])])
def test_a_narrow_terminal_does_without_columns_and_cuts_no_text(
    width: int, shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "25")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(("name", "unit", "about"), [("recall", "a long unit", "x" * 40 if width == 30 else "y")], ("unit",))
    head, *rest = capsys.readouterr().out.split("\n")[1:]
    assert head.split() == shown and "…" not in "".join(rest)
    assert sum(line.count("x") for line in rest) == (40 if width == 30 else 0)


def test_paths_go_into_a_pipe_and_the_table_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    results = [made("lcd-s0", value("hps", 79.5))]
    _print_results(results, paths=False)
    shown = capsys.readouterr()
    assert shown.out == f"{results[0].folder}/result.json\n" and "79.50" in shown.err
