"""The commands that look at checkpoints and run them: what they print, their exit codes."""

import json
import re
import sys

import numpy as np
import pytest

import fmodels as fm
from fmodels import demo
from fmodels.text import read_tokenizer, size
from fmodels.weights import Tensor, read_folder, write_folder
from tests.cli.folders import arrays

TINY = fm.assets.TINY_LLAMA


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow")
def test_demo(run, tmp_path, unchanged):
    unchanged(TINY)
    code, out, _ = run("demo", "--out", tmp_path / "out")
    assert code == 0, out
    parts = "layers.attention.query.weight|greedy:|bits per byte|removed 4 of 32 heads|PyTorch: |TensorFlow: "
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
