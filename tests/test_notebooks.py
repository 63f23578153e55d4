"""The notebook runs offline from top to bottom, and the training script trains and resumes."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_quickstart_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "notebooks" / "01_quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)


@pytest.mark.slow
def test_training_script_trains_and_resumes(tmp_path):
    """Three steps, then two more from the checkpoint, give a folder that loads and generates; another run starts with it."""
    import fmodels as fm

    out = tmp_path / "model"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def train(steps: int, *others: str, out: Path = out) -> str:
        command = [
            sys.executable,
            "notebooks/train_tiny_llama.py",
            "--small",
            "--steps",
            str(steps),
            "--out",
            str(out),
            *others,
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    train(3)
    assert "resum" in train(5).lower()
    params, config = fm.load(out)
    assert fm.generate(params, config, [[5, 6]], max_new_tokens=2).tokens.shape == (1, 4)
    assert (out / "curve.png").stat().st_size > 1000
    assert (out / "tokenizer.json").exists()
    train(6, "--start", str(out), "--copies", out=tmp_path / "copies")
    again, _ = fm.load(tmp_path / "copies")
    assert fm.num_parameters(again) == fm.num_parameters(params)
    assert (tmp_path / "copies" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    card = (tmp_path / "copies" / "README.md").read_text()
    assert "| before: steps | 5 of 2 × 16 tokens |" in card
    assert "but it copies" in card
