"""The command line: every subcommand, what it prints, its exit code, and that it leaves its source alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fmodels as fm
from fmodels import cli, demo
from fmodels.bytewise import same_bytes
from fmodels.text import read_tokenizer, size
from fmodels.weights import Tensor, read_folder, write_folder
from tests.loopback_hub import LoopbackHub, Repo

ROOT = Path(__file__).parents[1]
TINY = fm.assets.TINY_LLAMA
COMMANDS = "demo info generate convert verify resize prune push bench".split()


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


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def arrays(folder):
    return {name: tensor.array() for name, tensor in read_folder(folder)[0].items()}


# --- the frame --------------------------------------------------------------------------------------------------------


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
    # By itself the module needs the standard library alone.
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cli', {str(ROOT / 'fmodels' / 'cli.py')!r})\n"
        "cli = importlib.util.module_from_spec(spec); spec.loader.exec_module(cli); cli._parser()\n"
        "assert not {'jax', 'numpy', 'fmodels', 'torch'} & set(sys.modules)"
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
        ["info", "{}"], ["generate", "{}", "--tokens", "1"], ["convert", "{}", "{}-new"], ["verify", "{}"],
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


# --- looking and running ----------------------------------------------------------------------------------------------


def test_info(run, case):
    loaded = case("llama/causal-lm")
    code, out, _ = run("info", loaded.folder, "--json", "--tensors")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"] == loaded.model.num_parameters() == fm.num_parameters(loaded.params)
    assert facts["parameters_without_embeddings"] == fm.num_parameters(loaded.params, exclude_embeddings=True)
    assert facts["bytes"] == fm.memory_footprint(loaded.params)
    assert facts["bytes_by_dtype"] == {"float32": facts["bytes"]}
    assert (facts["task"], facts["num_kv_heads"], facts["head_dim"]) == ("causal-lm", 2, loaded.config.head_dim)
    assert {row["name"] for row in facts["tensor_table"]} == set(loaded.model.state_dict())
    assert facts["generation"]["eos_token_id"] == 2
    code, out, _ = run("info", loaded.folder, "--tensors")
    width = loaded.config.hidden_size
    assert re.search(rf"model\.norm\.weight +float32 +\[{width}\] +{4 * width} B", out)
    _, out, _ = run("info", TINY)
    assert re.search(r"parameters +3,\d\d\d,\d\d\d\n", out)


def test_info_reads_no_weights(run, case, monkeypatch):
    def refuse(*args):
        raise AssertionError

    folder = case("bert/masked-lm").folder
    monkeypatch.setattr(Tensor, "array", refuse)
    monkeypatch.setattr(Tensor, "read_into", refuse)
    assert run("info", folder)[0] == 0


def test_info_of_pruned_heads_and_pooling(run, case, tmp_path):
    loaded = case("bert/base")
    fm.save(*fm.prune_heads(loaded.params, loaded.config, {1: [0, 2]}), tmp_path / "pruned")
    (tmp_path / "pruned" / "modules.json").write_text(
        json.dumps(
            [
                {"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "1_P", "type": "s.models.Pooling"},
            ]
        )
    )
    (tmp_path / "pruned" / "1_P").mkdir()
    (tmp_path / "pruned" / "1_P" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    _, out, _ = run("info", tmp_path / "pruned", "--json")
    facts = json.loads(out)
    assert facts["pruned_heads"] == {"1": [0, 2]}
    assert facts["parameters"] < loaded.model.num_parameters()
    assert facts["pooling"] == "mean"


def test_generate_text(run):
    prompt = "def read(self"
    code, out, err = run("generate", TINY, prompt, "--max-new-tokens", 6)
    assert (code, err) == (0, "")
    tokenizer = read_tokenizer(TINY)
    code, json_out, _ = run("generate", TINY, prompt, "import os\nimport", "--max-new-tokens", 6, "--json")
    both = json.loads(json_out)
    ids = tokenizer.encode(prompt).ids
    assert out == tokenizer.decode(ids + both[0]["new_tokens"]) + "\n"
    assert both[0]["prompt"] == prompt
    assert both[0]["prompt_tokens"] == ids
    assert both[0]["text"] == tokenizer.decode(both[0]["new_tokens"])
    assert len(both[1]["logprobs"]) == len(both[1]["new_tokens"])
    _, out, _ = run("generate", TINY, prompt, "import os\nimport", "--max-new-tokens", 6)
    assert out.startswith(f"[0] {prompt}")


def test_generate_tokens(run, case):
    folder = case("gpt2/causal-lm").folder
    code, out, _ = run("generate", folder, "--tokens", "5,6,7", "--max-new-tokens", 4)
    assert code == 0
    assert re.fullmatch(r"5,6,7(,\d+){1,4}\n", out)
    new = [int(token) for token in out.strip().split(",")[3:]]
    _, out, _ = run("generate", folder, "--tokens", "5,6,7", "--tokens", "9", "--max-new-tokens", 4, "--json")
    assert json.loads(out)[0]["new_tokens"] == new
    sampling = [
        "--sample",
        "--temperature",
        2,
        "--top-k",
        0,
        "--top-p",
        0.99,
        "--min-p",
        0.01,
        "--repetition-penalty",
        1.1,
    ]
    call = ["generate", folder, "--tokens", "5,6,7", "--tokens", "9,8", *sampling, "--max-new-tokens", 4]
    texts = [run(*call, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "one of the two"),
        (["text"], "no tokenizer.json"),
        (["--tokens", "1,x"], "integers between commas"),
        (["--tokens", "1,61"], "outside of the vocabulary"),
        (["--tokens", "1", "--temperature", "0.5"], "add --sample"),
        (["--tokens", "1", "--sample", "--temperature", "0"], "above 0"),
        (["--tokens", "1", "--max-new-tokens", "0"], "at least 1"),
        (["--tokens", "1", "--max-new-tokens", "99"], "positions"),
    ],
)
def test_generate_bad_input(run, case, args, message):
    code, out, err = run("generate", case("gpt2/causal-lm").folder, *args)
    assert (code, out) == (2, "")
    assert message in err


def test_generate_with_an_encoder_or_a_broken_tokenizer(run, case, llama):
    code, _, err = run("generate", case("bert/masked-lm").folder, "--tokens", "5")
    assert (code, "causal" in err) == (2, True)
    (llama / "tokenizer.json").write_text("{")
    code, _, err = run("generate", llama, "text")
    assert (code, "tokenizer.json" in err) == (2, True)


def test_verify(run, case, tmp_path, unchanged):
    loaded = case("gpt2/causal-lm")
    folder = unchanged(loaded.folder)
    code, out, _ = run("verify", folder, "--frameworks", "none", "--no-gradients", "--tensors")
    assert code == 0
    assert "conversion certificate  PASS" in out
    assert "PyTorch wrapper: not asked for" in out
    assert out.count("  equal\n") == len(read_folder(folder)[0])
    fm.save(fm.mask_heads(loaded.params, loaded.config, {0: [1]}), loaded.config, tmp_path / "masked")
    fm.save(*fm.prune_heads(loaded.params, loaded.config, {0: [1]}), tmp_path / "pruned")
    pair = [tmp_path / "masked", tmp_path / "pruned", "--frameworks", "none", "--no-gradients", "--json"]
    code, out, _ = run("verify", *pair)
    assert (code, json.loads(out)["ok"]) == (1, False)
    code, out, _ = run("verify", *pair, "--outputs-only")
    assert (code, json.loads(out)["ok"]) == (0, True)
    code, _, err = run("verify", folder, "--frameworks", "jax,keras")
    assert (code, "unknown frameworks ['jax', 'keras']" in err) == (2, True)


def test_verify_names_a_tensor_with_nan(run, llama, unchanged):
    tensors = {name: array.copy() for name, array in arrays(llama).items()}
    tensors["model.layers.2.mlp.down_proj.weight"][3, 3] = np.nan
    write_folder(llama, {n: Tensor.lazy(n, a.dtype, a.shape, lambda a=a: a) for n, a in tensors.items()})
    code, out, _ = run("verify", unchanged(llama))
    assert code == 1
    assert "FAILED: tensor 'model.layers.2.mlp.down_proj.weight' has 1 NaN and 0 infinite values" in out


# --- new checkpoints --------------------------------------------------------------------------------------------------


def test_convert(run, unchanged, llama, tmp_path):
    code, out, _ = run("convert", unchanged(llama), tmp_path / "a" / "new", "--to", "torch", "--json")
    result = json.loads(out)
    want = arrays(llama)
    assert code == 0
    assert (result["equal_bytes"], result["equal_to_cast"], result["left_out"]) == (len(want), 0, [])
    assert names(tmp_path / "a" / "new") == [
        "1_Pooling/config.json", "README.md", "config.json", "generation_config.json", "onnx/config.json",
        "pytorch_model.bin", "tokenizer_config.json",
    ]  # fmt: skip
    got = arrays(tmp_path / "a" / "new")
    assert got.keys() == want.keys()
    assert all(same_bytes(got[name], want[name]) for name in want)
    code, out, _ = run(
        "convert", tmp_path / "a" / "new", tmp_path / "half", "--dtype", "bfloat16", "--max-shard-size", "8kB"
    )
    assert code == 0
    assert f"{len(want)} equal to the cast to bfloat16" in out
    assert len(list((tmp_path / "half").glob("model-0*.safetensors"))) > 1
    assert all(a.dtype.name == "bfloat16" for a in arrays(tmp_path / "half").values())
    assert not list(tmp_path.rglob(".*writing*"))


def test_convert_keeps_modules_of_sentence_transformers(run, case, tmp_path):
    folder = tmp_path / "from"
    shutil.copytree(case("bert/base").folder, folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    (folder / "modules.json").write_text(
        json.dumps([{"path": p, "type": f"sentence_transformers.models.{t}"} for p, t in kinds])
    )
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors"):
        (folder / name).parent.mkdir()
        (folder / name).write_text('{"pooling_mode_mean_tokens": true}')
    assert run("convert", folder, tmp_path / "to")[0] == 0
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"} < set(names(tmp_path / "to"))


def test_convert_leaves_out_what_a_task_has_not(run, case, tmp_path):
    code, out, _ = run("convert", case("bert/pretraining").folder, tmp_path / "base", "--task", "base", "--json")
    result = json.loads(out)
    assert code == 0
    assert "cls.seq_relationship.bias (other head)" in result["left_out"]
    assert fm.load(tmp_path / "base")[1].task == "base"


def test_convert_bad_input(run, unchanged, llama, tmp_path):
    unchanged(llama)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for dest in (llama, llama / "inside", tmp_path, llama / ".." / "llama"):
        code, _, err = run("convert", llama, dest)
        assert (code, "different folders" in err) == (2, True)
    for args, message in [
        ([tmp_path / "full"], "not an empty folder"),
        ([tmp_path / "new", "--dtype", "int8"], "not a floating dtype"),
        ([tmp_path / "new", "--dtype", "floaty"], "not a floating dtype"),
        ([tmp_path / "new", "--max-shard-size", "huge"], "huge"),
        ([tmp_path / "new", "--task", "masked-lm"], "task 'masked-lm'"),
    ]:
        code, out, err = run("convert", llama, *args)
        assert (code, out) == (2, "")
        assert message in err
    assert names(tmp_path / "full") == ["x"]
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_convert_refuses_values_that_a_dtype_lacks(run, case, tmp_path):
    loaded = case("llama/causal-lm")
    big = fm.tree.update(loaded.params, {"final_norm.scale": loaded.params["final_norm"]["scale"] * 1e6})
    fm.save(big, loaded.config, tmp_path / "big")
    code, _, err = run("convert", tmp_path / "big", tmp_path / "half", "--dtype", "float16")
    assert (code, "'model.norm.weight' has values that float16 cannot hold" in err) == (2, True)
    assert not (tmp_path / "half").exists()


def test_resize(run, unchanged, llama, tmp_path):
    code, out, _ = run("resize", unchanged(llama), tmp_path / "a", "--pad-to-multiple-of", 64, "--json")
    assert code == 0
    assert json.loads(out) | {"copied": 0} == {
        "source": str(llama), "dest": str(tmp_path / "a"), "old_size": 61, "new_size": 64, "rows_kept": 61, "copied": 0,
    }  # fmt: skip
    assert fm.load(tmp_path / "a")[1].vocab_size == 64
    assert (tmp_path / "a" / "README.md").read_text() == "hello"
    code, out, _ = run("resize", llama, tmp_path / "b", 50, "--to", "torch")
    assert (code, "vocabulary 61 -> 50, 50 rows kept" in out) == (0, True)
    for seed, other in ((1, 2), (1, 1)):
        tables = []
        for number in (seed, other):
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            assert run("resize", llama, tmp_path / "c", 80, "--init", "normal", "--seed", number)[0] == 0
            tables.append(arrays(tmp_path / "c")["model.embed_tokens.weight"].copy())
        assert same_bytes(*tables) == (seed == other)
    for args in (["0"], [], ["70", "--pad-to-multiple-of", "0"]):
        assert run("resize", llama, tmp_path / "d", *args)[0] == 2
    assert not (tmp_path / "d").exists()


def test_prune(run, unchanged, llama, tmp_path):
    code, out, _ = run("prune", unchanged(llama), tmp_path / "a", "--heads", "0:0,1,2; 2:1,4", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["heads"] == {"0": [0, 1, 2], "2": [1, 4]}
    assert result["parameters_after"] < result["parameters_before"]
    assert fm.load(tmp_path / "a")[1].pruned_heads == ((0, (0, 1, 2)), (2, (1, 4)))
    code, out, _ = run("prune", llama, tmp_path / "b", "--heads", "0:0,1,2; 2:1,4", "--mask")
    assert (code, "silenced layer 0: 0, 1, 2; layer 2: 1, 4" in out) == (0, True)
    pair = [tmp_path / "a", tmp_path / "b", "--outputs-only", "--frameworks", "none", "--no-gradients"]
    assert run("verify", *pair)[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--heads", "0:"], "expected layer:head,head"),
        (["--heads", "0;1"], "expected layer:head,head"),
        (["--heads", "a:1"], "expected layer:head,head"),
        (["--heads", "0:1;0:2"], "twice"),
        (["--heads", ""], "empty"),
        (["--heads", "9:1"], "9"),
        (["--heads", "0:6"], "6"),
        (["--heads", "0:0,1,2,3,4,5"], "layer 0"),
        (["--heads", "0:0"], "group"),
        (["--count", "1"], "--text"),
        ([], "--heads"),
        (["--heads", "0:0", "--count", "1"], "--count"),
        (["--count", "1", "--text", "/no/such/file"], "/no/such/file"),
    ],
)
def test_prune_bad_input(run, unchanged, llama, tmp_path, args, message):
    code, out, err = run("prune", unchanged(llama), tmp_path / "new", *args)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "new").exists()


def test_prune_by_importance(run, tmp_path):
    (tmp_path / "text").write_text((TINY.parent / "heldout.txt").read_text()[:3000])
    args = ["--count", 4, "--text", tmp_path / "text", "--length", 64, "--json"]
    code, out, _ = run("prune", TINY, tmp_path / "new", *args)
    result = json.loads(out)
    assert code == 0
    assert sum(map(len, result["heads"].values())) == 4
    assert result["bits_per_byte"]["before"] != result["bits_per_byte"]["after"]
    (tmp_path / "text").write_text("")
    code, _, err = run("prune", TINY, tmp_path / "other", *args)
    assert (code, "at least two are needed" in err) == (2, True)


def test_prune_by_importance_needs_a_language_model(run, case, tmp_path):
    code, _, err = run("prune", case("bert/base").folder, tmp_path / "new", "--count", 1, "--text", __file__)
    assert (code, "causal language model" in err) == (2, True)


def test_push(run, llama, unchanged, monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        hub.repos["me/model"] = Repo({})
        shutil.rmtree(llama / ".git")
        code, out, _ = run("push", unchanged(llama), "me/model", "--message", "hello", "--json")
        assert code == 0
        assert json.loads(out)["url"].startswith(hub.url)
        _, files = hub.repos["me/model"].find("main")
        assert files["model.safetensors"] == (llama / "model.safetensors").read_bytes()
        code, out, _ = run("convert", "me/model", tmp_path / "back")
        assert code == 0
        code, _, err = run("info", "me/nothing")
        assert (code, "no such repository" in err) == (2, True)
    code, _, err = run("push", tmp_path / "nothing", "me/model")
    assert (code, "is none" in err) == (2, True)


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow")
def test_demo(run, tmp_path, unchanged):
    unchanged(TINY)
    code, out, _ = run("demo", "--out", tmp_path / "out")
    assert code == 0, out
    parts = "layers.attention.query.weight|greedy:|bits per byte|removed 8 of 32 heads|PyTorch: |TensorFlow: "
    for text in (*parts.split("|"), "conversion certificate  PASS", "everything that must be exact is exact"):
        assert text in out
    assert fm.load(tmp_path / "out")[1] == fm.load(TINY)[1]
    code, _, err = run("demo", "--out", tmp_path / "out")
    assert (code, "not an empty folder" in err) == (2, True)


def test_demo_without_frameworks(capsys, monkeypatch):
    for name in ("torch", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, None)
    params, config = fm.load(TINY)
    good, back = demo._convert(params, config)
    assert good
    assert back is params
    out = capsys.readouterr().out
    assert "PyTorch: not installed: pip install 'fmodels[torch]'" in out
    assert "TensorFlow: not installed: pip install 'fmodels[tensorflow]'" in out


def test_sizes():
    assert [size(n) for n in (0, 1_000, 999_999, 1_000_000, 5 * 10**15)] == [
        "0 B",
        "1.0 kB",
        "1000.0 kB",
        "1.0 MB",
        "5.0 PB",
    ]
