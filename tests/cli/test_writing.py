"""The commands that make new checkpoints, and push: what they write, print and refuse."""

import json
import shutil

import pytest

import fmodels as fm
from fmodels.bytewise import same_bytes
from tests.cli.folders import arrays, names
from tests.loopback_hub import LoopbackHub, Repo

TINY = fm.assets.TINY_LLAMA


def test_convert(run, unchanged, llama, tmp_path):
    code, out, _ = run("convert", unchanged(llama), tmp_path / "a" / "new", "--to", "torch", "--json")
    result = json.loads(out)
    want = arrays(llama)
    assert code == 0
    assert (result["tensors"], result["cast"], result["left_out"], len(result["sha256"])) == (len(want), 0, [], 64)
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
    assert f"cast to bfloat16: {len(want)} tensors" in out
    assert len(list((tmp_path / "half").glob("model-0*.safetensors"))) > 1
    assert all(a.dtype.name == "bfloat16" for a in arrays(tmp_path / "half").values())
    assert not list(tmp_path.rglob(".*ing*"))


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
        ([tmp_path / "new", "--dtype", "int8"], "expected a floating dtype"),
        ([tmp_path / "new", "--dtype", "floaty"], "expected a floating dtype"),
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


def test_what_a_killed_command_left(run, llama, tmp_path):
    left = tmp_path / ".new.saving-0a1b2c3d" / "new"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")
    before = set(tmp_path.iterdir()) - {left.parent}
    assert run("prune", llama, tmp_path / "new", "--heads", "0:0,1,2")[0] == 0
    assert set(tmp_path.iterdir()) == before | {tmp_path / "new"}


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
