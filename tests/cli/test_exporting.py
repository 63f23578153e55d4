"""`fmodels export`: what the printed lines give in a fresh process, against transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import fmodels as fm
from tests.cli.folders import names

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ALONE = (
    'import sys; sys.modules.update(dict.fromkeys(["jax", "jaxlib", "fmodels", "interop"]))  # importing one raises\n'
)
CALLS = {
    "jax": (
        "out = exported.forward(exported.params, given['tokens'], mask=given['mask'])\n"
        "found = {'logits': out.logits, 'tokens': exported.generate(exported.params, **given).tokens}\n"
    ),
    "tensorflow": (
        "given = {name: tf.constant(value) for name, value in given.items()}\n"
        "found = {n: loaded.signatures[s](**given)[n] for n, s in (('logits', 'serving_default'), ('tokens', 'generate'))}\n"
    ),
}


def process(lines, folder, *, alone):
    """Runs the printed lines, and then the programs on the rows of `given.npz`."""
    code = (ALONE if alone else "") + "\n".join(lines)
    code += "\nimport numpy as np\ngiven = dict(np.load('given.npz'))\n" + CALLS["tensorflow" if alone else "jax"]
    code += "np.savez('found.npz', **{name: np.asarray(value) for name, value in found.items()})"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"  # most of the time compiles
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": HERE, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "found.npz")), done.stdout


@pytest.mark.parametrize(("name", "to"), [("llama/causal-lm", "jax"), ("gpt2/causal-lm", "tensorflow")])
def test_export(run, case, tmp_path, unchanged, name, to):
    loaded = case(name)
    code, out, _ = run(
        "export", unchanged(loaded.folder), tmp_path / "served", "--to", to, "--generate", "--max-new-tokens", 4
    )
    assert code == 0, out
    assert f"{tmp_path / 'served'}: " in out
    assert "tokens (b t) int32, mask (b t) bool" in out
    assert "4 new tokens at most" in out
    lines = [line.strip() for line in out.partition("to run it:\n")[2].splitlines()]
    given = {n: loaded.inputs("left")[n].astype(np.int32) for n in ("tokens", "mask")}
    np.savez(tmp_path / "given.npz", **given)
    found, printed = process(lines, tmp_path, alone=to == "tensorflow")
    assert printed  # by the lines themselves
    real = given["mask"] == 1
    np.testing.assert_allclose(found["logits"][real], loaded.reference("left")["logits"][real], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        want = loaded.model.generate(
            torch.tensor(given["tokens"]).long(), attention_mask=torch.tensor(given["mask"]), max_new_tokens=4, do_sample=False
        )  # fmt: skip
    np.testing.assert_array_equal(found["tokens"], want.numpy())


def test_export_as_json(run, case, llama, tmp_path):
    """Other inputs and options; the lines run."""
    how = ["--inputs", "tokens,mask,token_types", "--gradient", "--platforms", "cpu", "--layers", "stacked", "--json"]
    code, out, _ = run("export", case("bert/masked-lm").folder, tmp_path / "bert", *how)
    result = json.loads(out)
    assert code == 0
    assert result["programs"] == {
        "forward": {
            "inputs": {"tokens": ["b t", "int32"], "mask": ["b t", "bool"], "token_types": ["b t", "int32"]},
            "limits": {"t": 32},
        }
    }
    assert result["platforms"] == ["cpu"]
    assert names(tmp_path / "bert") == sorted(result["files"])
    lines = result["run"]
    how = [
        "--generate",
        "--max-new-tokens",
        3,
        "--sample",
        "--top-k",
        7,
        "--per-call",
        "seed,temperature",
        "--dtype",
        "bfloat16",
    ]
    code, out, err = run("export", llama, tmp_path / "served", *how, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["programs"]["generate"]["defaults"] == {"seed": None, "temperature": 1.0}
    assert {"tokenizer_config.json", "README.md"} <= set(result["copied"])
    exported = fm.load_exported(tmp_path / "served")
    assert exported.params["embed"]["tokens"].dtype == "bfloat16"
    assert exported.generate(exported.params, [[5, 6]], seed=1).tokens.shape == (1, 5)
    exec("\n".join(lines), {})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "onnx"], "jax2onnx 0.17 does not convert these models for any batch and length; use"),
        (["--to", "keras"], "--to 'keras': expected jax or tensorflow"),
        (["--top-k", "3"], "options of generation change nothing without it; add --generate"),
        (["--greedy"], "add --generate"),
        (["--to", "tensorflow", "--gradient"], "--platforms and --gradient are for --to jax"),
        (["--platforms", "cpu,abacus"], "platforms are any of cpu, cuda, tpu, rocm; got cpu, abacus"),
        (["--inputs", "tokens,labels"], "inputs are tokens and any of mask"),
        (
            ["--generate", "--option", "penalty_alpha=0.6", "--option", "top_k=4"],
            "only greedy decoding, sampling and beams",
        ),
        (["--generate", "--temperature", "0.5"], "add --sample"),
        (["--dtype", "int8"], "expected a floating dtype"),
    ],
)
def test_export_bad_input(run, unchanged, case, tmp_path, args, message):
    code, out, err = run("export", unchanged(case("llama/causal-lm").folder), tmp_path / "new", *args)
    assert (code, out) == (2, "")
    assert err.startswith("fmodels export: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_export_without_tensorflow(run, case, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    code, _, err = run("export", case("llama/causal-lm").folder, tmp_path / "new", "--to", "tensorflow")
    assert (code, "pip install 'fmodels[tensorflow]'" in err) == (2, True)


def test_export_of_quantised_weights(run, tmp_path):
    folder = f"{HERE}/tests/goldens/quantized/nf4"
    code, _, err = run("export", folder, tmp_path / "new", "--to", "tensorflow")
    assert (code, "add --dequantize" in err) == (2, True)
    params, config = fm.load(folder, dtype="float32")
    want = fm.forward(params, config, [[5, 6, 7]]).logits
    for name, options in {"arrays": ["--dequantize"], "blocks": []}.items():
        assert run("export", folder, tmp_path / name, "--dtype", "float32", *options)[0] == 0
        exported = fm.load_exported(tmp_path / name)
        assert (exported.config.quantization is None) == bool(options)
        np.testing.assert_allclose(exported.forward(exported.params, [[5, 6, 7]]).logits, want, atol=1e-5)
