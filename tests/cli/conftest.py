"""What the tests of all commands use: a way to run one, and a folder to run it on."""

import shutil
from pathlib import Path

import pytest

from fmodels import cli
from tests.cli.folders import snapshot


@pytest.fixture
def run(capsys):
    """`run("info", folder, …) -> (code, stdout, stderr)`."""

    def call(*args):
        code = cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def unchanged():
    """Checks at the end of a test that the folders it was given hold the same bytes."""
    seen = {}

    def remember(folder):
        seen[Path(folder)] = snapshot(folder)
        return Path(folder)

    yield remember
    for folder, before in seen.items():
        assert snapshot(folder) == before


@pytest.fixture
def llama(case, tmp_path):
    """A small checkpoint with a tokenizer, and further files that a conversion must treat rightly."""
    folder = tmp_path / "llama"
    shutil.copytree(case("llama/causal-lm").folder, folder)
    for name, content in {
        "tokenizer_config.json": b"{}", "README.md": b"hello", "1_Pooling/config.json": b"{}", "onnx/model.onnx": b"o",
        "onnx/config.json": b"c", "pytorch_model.bin.index.json": b"{}", "training_args.bin": b"t", ".git/config": b"g",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
