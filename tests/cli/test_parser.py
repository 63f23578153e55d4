"""The command line as a whole: help, exit codes, bad checkpoints, and that it leaves its source alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fmodels as fm
from fmodels import cli
from tests.cli.folders import names

ROOT = Path(__file__).parents[2]
TINY = fm.assets.TINY_LLAMA
COMMANDS = "demo info generate convert export verify resize prune push bench".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert f"example: fmodels {command} " in out


def test_no_command(run, capsys):
    code, out, _ = run()
    assert code == 2
    assert all(command in out for command in COMMANDS)
    for argv in (["nonsense"], ["info"], ["convert", "a"], ["generate", "x", "--top-k", "many"]):
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == 2
    capsys.readouterr()


def test_version_and_light_import(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fmodels {fm.__version__}\n"
    # By themselves its modules need the standard library alone; `fmodels` here is a package without its `__init__`.
    code = (
        "import sys, types\n"
        f"fmodels = types.ModuleType('fmodels'); fmodels.__path__ = [{str(ROOT / 'fmodels')!r}]\n"
        "sys.modules['fmodels'] = fmodels\n"
        "from fmodels.cli import main, parser; parser._parser()\n"
        "assert not {'jax', 'numpy', 'torch'} & set(sys.modules)\n"
        "ours = {name for name in sys.modules if name.startswith('fmodels.')}\n"
        "assert all(name.startswith('fmodels.cli') for name in ours), ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_as_a_process(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def process(*args):
        command = [sys.executable, "-m", "fmodels.cli", *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)

    good = process("info", TINY, "--json")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["model_type"] == "llama"
    bad = process("info", tmp_path / "nothing")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("fmodels info: ")
    assert bad.stderr.count("\n") == 1
    shown = process("info", tmp_path / "nothing", "--traceback")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["info", "{}"], ["generate", "{}", "--tokens", "1"], ["convert", "{}", "{}-new"], ["export", "{}", "{}-new"], ["verify", "{}"],
        ["resize", "{}", "{}-new", "70"], ["prune", "{}", "{}-new", "--heads", "0:0,1,2"], ["push", "{}", "me/model"],
    ],
    ids=lambda args: args[0],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["nothing", "empty", "cut", "config"])
def test_bad_checkpoints(run, unchanged, llama, tmp_path, args, kind):
    if kind == "nothing":
        folder, expected = tmp_path / "nothing", "nothing"
    elif kind == "empty":
        folder, expected = tmp_path / "empty", "empty"
        folder.mkdir()
    else:
        folder = llama
        if kind == "cut":
            data = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
            expected = "was cut"
        else:
            data = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(data | {"alibi": True}))
            expected = "alibi"
    if folder.exists():
        unchanged(folder)
    before = names(tmp_path)
    code, out, err = run(*(arg.format(folder) for arg in args))
    assert (code, out) == (2, "")
    assert err.startswith(f"fmodels {args[0]}: ")
    assert expected in err
    assert names(tmp_path) == before
    assert not list(tmp_path.glob(".*"))
