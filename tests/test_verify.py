"""The certificate: good checkpoints pass, and each way to spoil one is found where it is."""

import dataclasses
import functools
import json
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers

import fmodels as fm
from fmodels import checkpoint, runs
from fmodels.bytewise import canonical_names, count_not_finite
from fmodels.certificate import Comparison
from fmodels.verify import FRAMEWORKS, departure, verify
from fmodels.weights import Tensor, read_folder, write_folder

QUICK = {"frameworks": (), "gradients": False}


def copy(source, target, **edits):
    """A copy of a checkpoint; `edits`: name of a tensor -> function of its array, or None to leave it out."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = {name: tensor.array().copy() for name, tensor in read_folder(source)[0].items()}
    for name, edit in edits.items():
        array = tensors.pop(name)
        if edit is not None:
            tensors[name] = edit(array)
    lazy = {n: Tensor.lazy(n, a.dtype, a.shape, lambda a=a: a) for n, a in tensors.items()}
    write_folder(target, lazy)
    return target


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def by_name(certificate, name):
    return next(c for c in certificate.comparisons if c.name == name)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def swap_rope_pairing(weight, size):
    """Rows of each head as if pairs were neighbours instead of halves."""
    halves = weight.reshape(-1, 2, size // 2, weight.shape[1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3).reshape(weight.shape))


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("llama/causal-lm", True),
        ("gpt2/sequence-classification", True),
        ("bert/pretraining", False),
        ("bert/multiple-choice", False),
        ("bert/question-answering", False),
        ("gpt2/double-heads", False),
        ("bart/seq2seq-lm", True),
        ("t5/sequence-classification", False),
        ("mt5/question-answering", False),
    ],
)
def test_transformers_agrees(case, name, gradients):
    loaded = case(name)
    before = snapshot(loaded.folder)
    certificate = verify(loaded.folder, frameworks=["transformers"], gradients=gradients)
    assert certificate.ok, certificate.to_table()
    assert [c.status for c in certificate.comparisons] == ["pass", "not asked for", "not asked for", "pass"]
    found = by_name(certificate, "transformers")
    assert found.note == "read the folder by itself"
    depth = 2 if loaded.case.pair else 3  # of the decoder
    assert list(found.places)[: depth + 1] == ["embeddings", "layer 0", "layer 1", "layer 2"][: depth + 1]
    assert "logits" in found.places
    trained = set(fm.to_disk(loaded.params, loaded.config)) - {"final_logits_bias"}  # a buffer
    assert set(found.gradients) == (trained if gradients else set())
    assert snapshot(loaded.folder) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow")
def test_all_frameworks(case):
    certificate = verify(case("llama/causal-lm/tied-biases").folder)
    assert certificate.ok, certificate.to_table()
    assert [c.status for c in certificate.comparisons] == ["pass"] * 4
    assert all(c.gradients for c in certificate.comparisons)
    assert list(by_name(certificate, "PyTorch wrapper").places) == [
        "embeddings",
        "layer 0",
        "layer 1",
        "layer 2",
        "logits",
    ]
    tensorflow = by_name(certificate, "TensorFlow wrapper")
    assert list(tensorflow.places) == ["layer 2", "logits"]
    assert "no inner layers" in tensorflow.note
    data = json.loads(certificate.to_json())
    assert data["ok"] is True
    assert data["versions"]["transformers"] == transformers.__version__
    assert {len(t["sha256"]) for t in data["tensors"]} == {64}


def test_framework_not_installed(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    certificate = verify(case("llama/base").folder, gradients=False, frameworks=["tensorflow"])
    found = by_name(certificate, "TensorFlow wrapper")
    assert (found.status, certificate.ok) == ("not installed", True)
    assert "TensorFlow wrapper: not installed" in certificate.to_table()
    assert certificate.versions["tensorflow"] is None


def test_wrong_eps_in_the_way_we_compute_is_found_against_transformers(case, tmp_path, monkeypatch):
    """transformers reads config.json by itself, so a key that we misread is seen."""
    loaded = case("llama/causal-lm")
    kind = type(loaded.config)
    read = kind.from_hf.__func__
    monkeypatch.setattr(
        kind, "from_hf", classmethod(lambda cls, data, **o: dataclasses.replace(read(cls, data, **o), norm_eps=1e-3))
    )
    certificate = verify(loaded.folder, frameworks=["transformers"], gradients=False)
    assert not certificate.ok
    assert by_name(certificate, "transformers").first == "layer 0"
    assert "the first place that departs from its bound is layer 0" in certificate.failures[0]


def test_two_formats_of_one_model(case, tmp_path):
    loaded = case("bert/masked-lm")
    fm.save(loaded.params, loaded.config, tmp_path / "b", format="torch")
    certificate = verify(loaded.folder, tmp_path / "b", **QUICK)
    assert certificate.ok, certificate.to_table()
    assert {tensor.other for tensor in certificate.tensors} == {"equal"}
    assert by_name(certificate, "B").status == "pass"


def test_old_names_buffers_and_repeats(case, tmp_path):
    """A file without the base model's prefix, with a buffer and the tied head, is the same model."""
    loaded = case("gpt2/causal-lm")
    tensors = {
        n.removeprefix("transformer."): np.asarray(a) for n, a in fm.to_disk(loaded.params, loaded.config).items()
    }
    tensors |= {"lm_head.weight": tensors["wte.weight"], "h.0.attn.bias": np.ones((1, 1, 4, 4), bool)}
    shutil.copytree(loaded.folder, tmp_path / "old")
    write_folder(tmp_path / "old", {n: Tensor.lazy(n, a.dtype, a.shape, lambda a=a: a) for n, a in tensors.items()})
    certificate = verify(tmp_path / "old", loaded.folder, **QUICK)
    assert certificate.ok, certificate.to_table()
    outcome = {tensor.name: tensor.saved for tensor in certificate.tensors}
    assert outcome["wte.weight"] == "equal"
    assert outcome["lm_head.weight"] == "repeats wte.weight, written once"
    assert outcome["h.0.attn.bias"].startswith("buffer")


def test_swapped_rope_pairing(case, tmp_path):
    loaded = case("llama/causal-lm")
    names = [f"model.layers.1.self_attn.{p}_proj.weight" for p in "qk"]
    swap = functools.partial(swap_rope_pairing, size=loaded.config.head_dim)
    other = copy(loaded.folder, tmp_path / "b", **dict.fromkeys(names, swap))
    certificate = verify(loaded.folder, other, **QUICK)
    assert by_name(certificate, "B").first == "layer 1"
    differing = [tensor.name for tensor in certificate.tensors if tensor.other != "equal"]
    assert sorted(differing) == sorted(names)
    assert all(tensor.difference > 0 for tensor in certificate.tensors if tensor.name in names)
    assert not verify(loaded.folder, other, outputs_only=True, **QUICK).ok


def test_changed_eps(case, tmp_path):
    loaded = case("llama/causal-lm")
    other = edit_config(copy(loaded.folder, tmp_path / "b"), rms_norm_eps=1e-3)
    certificate = verify(loaded.folder, other, **QUICK)
    assert {tensor.other for tensor in certificate.tensors} == {"equal"}
    assert certificate.failures[0].startswith("B: the first place that departs from its bound is layer 0, by ")
    assert len(certificate.failures) == 1


def test_missing_bias(case, tmp_path):
    loaded = case("llama/causal-lm/tied-biases")
    name = "model.layers.2.mlp.down_proj.bias"
    certificate = verify(loaded.folder, copy(loaded.folder, tmp_path / "b", **{name: None}), **QUICK)
    assert f"B: tensor {name!r} is missing" in certificate.failures
    found = by_name(certificate, "B")
    assert (found.status, name in found.note) == ("fail", True)
    backwards = verify(
        edit_config(copy(loaded.folder, tmp_path / "c"), architectures=["LlamaModel"]),
        loaded.folder,
        task="base",
        **QUICK,
    )
    assert backwards.ok


def test_zeroed_bias_and_unexpected_tensor(case, tmp_path):
    loaded = case("bert/base/no-pooler")
    name = "encoder.layer.2.output.dense.bias"
    certificate = verify(loaded.folder, copy(loaded.folder, tmp_path / "b", **{name: np.zeros_like}), **QUICK)
    assert by_name(certificate, "B").first == "layer 2"
    pooled = case("bert/base")
    certificate = verify(loaded.folder, pooled.folder, **QUICK)
    assert sorted(certificate.unexpected) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert "B: tensor 'pooler.dense.bias' is not in A" in certificate.failures


def test_not_finite(case, tmp_path):
    def spoil(array):
        array[0, :2] = np.nan, np.inf
        return array

    loaded = case("llama/causal-lm")
    name = "model.layers.1.mlp.up_proj.weight"
    bad = copy(loaded.folder, tmp_path / "bad", **{name: spoil})
    certificate = verify(bad)
    assert certificate.failures == (f"tensor {name!r} has 1 NaN and 1 infinite values",)
    assert {c.status for c in certificate.comparisons} == {"not possible"}
    assert f"{name}  float32" in certificate.to_table()
    backwards = verify(loaded.folder, bad, **QUICK)
    assert f"B: tensor {name!r} has 1 NaN and 1 infinite values" in backwards.failures
    json.loads(certificate.to_json(), parse_constant=pytest.fail)


def test_dtypes(case, tmp_path):
    loaded = case("llama/causal-lm")
    fm.save(fm.cast(loaded.params, "bfloat16"), loaded.config, tmp_path / "half")
    certificate = verify(loaded.folder, tmp_path / "half", **QUICK)
    assert not certificate.ok
    assert all(tensor.other.startswith("is rounded to bfloat16, by up to ") for tensor in certificate.tensors)
    fm.save(fm.load(tmp_path / "half", dtype="float32")[0], loaded.config, tmp_path / "wide")
    certificate = verify(tmp_path / "half", tmp_path / "wide", **QUICK)
    assert certificate.ok, certificate.to_table()
    assert {tensor.other for tensor in certificate.tensors} == {"equal values in float32"}
    assert "weights of bfloat16 were cast to float32 before anything was computed, exactly" in certificate.notes


def test_masked_and_pruned(case, tmp_path):
    loaded = case("llama/causal-lm")
    heads = {0: [0, 1, 2], 2: [0, 3]}
    fm.save(fm.mask_heads(loaded.params, loaded.config, heads), loaded.config, tmp_path / "masked")
    fm.save(*fm.prune_heads(loaded.params, loaded.config, heads), tmp_path / "pruned")
    certificate = verify(tmp_path / "masked", tmp_path / "pruned", outputs_only=True, **QUICK)
    assert certificate.ok, certificate.to_table()
    assert any("has shape" in note for note in certificate.notes)
    strict = verify(tmp_path / "masked", tmp_path / "pruned", **QUICK)
    assert not strict.ok
    assert by_name(strict, "B").status == "pass"
    alone = verify(tmp_path / "pruned", gradients=False, frameworks=["transformers"])
    assert [c.status for c in alone.comparisons[:1] + alone.comparisons[-1:]] == ["not possible"] * 2
    assert alone.ok


def test_a_wrapper_that_raises_is_a_failure(case, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no luck")

    monkeypatch.setitem(runs.RUNNERS, "torch", broken)
    certificate = verify(case("llama/base").folder, frameworks=["torch"], gradients=False)
    assert certificate.failures == ("PyTorch wrapper: RuntimeError: no luck",)


def test_wrong_gradient(case, monkeypatch):
    def twisted(params, config, folder, given, *, gradients):
        result = runs.run_jax(params, config, given, gradients=gradients)
        result.gradients["model.layers.1.mlp.up_proj.weight"] = (
            result.gradients["model.layers.1.mlp.up_proj.weight"] * 1.01
        )
        return result

    monkeypatch.setitem(runs.RUNNERS, "torch", twisted)
    certificate = verify(case("llama/causal-lm").folder, frameworks=["torch"])
    assert by_name(certificate, "PyTorch wrapper").first == "gradient of model.layers.1.mlp.up_proj.weight"
    assert "gradient of model.layers.1.mlp.up_proj.weight departs" in certificate.failures[0]


def test_save_that_changes_a_tensor(case, monkeypatch):
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda p, c, f: save(fm.tree.update(p, {"final_norm.scale": p["final_norm"]["scale"] + 1}), c, f),
    )
    certificate = verify(case("llama/causal-lm").folder, **QUICK)
    assert certificate.failures == ("load and save: tensor 'model.norm.weight' differs",)


def test_bad_input(tmp_path, case):
    with pytest.raises(ValueError, match="unknown frameworks"):
        verify(case("llama/base").folder, frameworks=["jax"])
    with pytest.raises(OSError, match="does not exist"):
        verify(case("llama/base").folder, tmp_path / "nothing")


def test_is_deterministic(case):
    folder = case("gpt2/base").folder
    assert verify(folder, seed=3, **QUICK).to_json() == verify(folder, seed=3, **QUICK).to_json()


def test_parts():
    assert count_not_finite(np.array([1, 2])) == (0, 0)
    assert count_not_finite(np.array([np.nan, 1], ml_dtypes.float8_e4m3fn)) == (1, 0)
    assert np.isnan(departure(np.array([np.nan]), np.array([1.0]), np.array([True])))
    assert Comparison("x", "pass").places == {}
    assert FRAMEWORKS == ("torch", "tensorflow", "transformers")
    names = canonical_names(
        ["cls.predictions.bias"], fm.models.bert.Config(task="masked-lm", tie_word_embeddings=False)
    )
    assert names["cls.predictions.bias"].canonical == "cls.predictions.decoder.bias"
    assert jax.devices()
