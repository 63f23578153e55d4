"""Bad checkpoints, configs and inputs: the error names what is wrong, is one of ours, and no file changes."""

import hashlib
import json
import os
import re
import shutil
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import fmodels as fm

ALLOWED = (ValueError, KeyError, IndexError, TypeError, OSError, NotImplementedError)


def fails(function, *words):
    """`function()` raises an error of an allowed type, from our code, whose message has all the words."""
    with pytest.raises(ALLOWED) as caught:
        function()
    raised_in = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert "/fmodels/" in raised_in, f"raised inside of {raised_in}: {caught.value}"
    assert re.match(r"\w+(\.\w+)*: ", str(caught.value).strip("'\"")), (
        f"does not begin with who complains: {caught.value}"
    )
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def folder(case, tmp_path):
    """A copy of a checkpoint, to be broken."""
    return shutil.copytree(case("gpt2/causal-lm").folder, tmp_path / "m")


def edit_config(folder, *removed, **changes):
    path = folder / "config.json"
    data = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if key not in removed}
    path.write_text(json.dumps(data))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def shard(folder, index):
    """One tensor in its own file, the index as given."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    safetensors.numpy.save_file(tensors, folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


WTE = "transformer.wte.weight"
LN = "transformer.h.1.ln_2.bias"

BROKEN = {
    "unknown key": (lambda f: edit_config(f, attention_sinks=4), ["'attention_sinks'", "4", "config.json"]),
    "two unknown keys": (lambda f: edit_config(f, attention_sinks=4, alibi=True), ["'attention_sinks'", "'alibi'", "2 entries"]),
    "a key away from its default": (lambda f: edit_config(f, add_cross_attention=True), ["add_cross_attention=True", "False"]),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), ["quantization_config"]),
    "unknown activation": (lambda f: edit_config(f, activation_function="swiglu9"), ["'swiglu9'", "gelu_new"]),
    "unknown model_type": (lambda f: edit_config(f, model_type="gpt9"), ["'gpt9'", "albert, bart, bert", "granite, llama"]),
    "no model_type": (lambda f: edit_config(f, "model_type"), ["model_type", "config.json"]),
    "unknown architecture": (lambda f: edit_config(f, architectures=["GPT2ForPoetry"]), ["'GPT2ForPoetry'", "task="]),
    "no architectures": (lambda f: edit_config(f, "architectures"), ["architectures", "task="]),
    "heads do not divide": (lambda f: edit_config(f, n_head=3), ["n_embd=20", "n_head=3"]),
    "no heads": (lambda f: edit_config(f, n_head=0), ["n_head=0"]),
    "text for a number": (lambda f: edit_config(f, n_layer="three"), ["n_layer", "'three'"]),
    "negative size": (lambda f: edit_config(f, n_layer=-1), ["n_layer", "-1"]),
    "layers without end": (lambda f: edit_config(f, n_layer=10**9), ["n_layer=1000000000"]),  # whose names fill the memory
    "a list for a model_type": (lambda f: edit_config(f, model_type=["gpt2"]), ["['gpt2']", "supported"]),
    "text for architectures": (lambda f: edit_config(f, architectures="GPT2LMHeadModel"), ["list of names", "'GPT2LMHeadModel'"]),
    "lists for architectures": (lambda f: edit_config(f, architectures=[["GPT2LMHeadModel"]]), ["list of names"]),
    "broken json": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "json list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json", "JSON object", "list"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "broken generation config": (lambda f: (f / "generation_config.json").write_text("nope"), ["generation_config.json"]),
    "broken modules.json": (lambda f: (f / "modules.json").write_text('[{"a": 1}]'), ["modules.json", "'type'"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", str]),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: (t.pop(WTE), t.pop(LN))), [f"missing '{WTE}'", f"missing '{LN}'"]),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"h.0.attn.rotary.freq": np.ones(3)})), ["'h.0.attn.rotary.freq'", "[3]"],
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({WTE: np.ones((60, 20), np.float32)})),
        [f"'{WTE}'", "[60, 20]", "[61, 20]", "config.json"],
    ),
    "wrong shapes and names at once": (
        lambda f: edit_tensors(f, lambda t: t.update({WTE: np.ones((1, 1), np.float32), "x": np.ones(1)}) or t.pop(LN)),
        [f"'{WTE}'", "'x'", f"missing '{LN}'", "3 tensors"],
    ),
    "twice": (
        lambda f: edit_tensors(f, lambda t: t.update({"wte.weight": t[WTE]})), ["'wte.weight'", f"'{WTE}'", "two names"],
    ),
    "more layers than said": (lambda f: edit_config(f, n_layer=2), ["'transformer.h.2.ln_1.weight'"]),
    "fewer layers than said": (lambda f: edit_config(f, n_layer=4), ["missing 'transformer.h.3.ln_1.weight'"]),
    "float64": (
        lambda f: edit_tensors(f, lambda t: t.update({k: a.astype(np.float64) for k, a in t.items()})), ["float64", 'dtype="float32"'],
    ),
    "truncated": (truncate, ["model.safetensors"]),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"hello" * 99), ["model.safetensors"]),
    "a pipe": (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")), ["model.safetensors", "a pipe"]),
    "missing shard": (lambda f: shard(f, {"x": "model-00002-of-00002.safetensors"}), ["model-00002-of-00002.safetensors"]),
    "shard outside": (lambda f: shard(f, {"x": "../../secret.safetensors"}), ["../../secret.safetensors", "outside"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(name, folder):
    break_it, words = BROKEN[name]
    break_it(folder)
    before = digest(folder)
    fails(lambda: fm.load(folder), *(str(folder) if word is str else word for word in words))
    assert digest(folder) == before


def test_pickle_that_runs_code(case, tmp_path):
    """Covered in depth by tests/weights; here: through `load`, with nothing executed and nothing changed."""
    import pickle

    class Bad:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    folder = shutil.copytree(case("bert/base").folder, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bad()}, folder / "pytorch_model.bin")
    before = digest(folder)
    with pytest.raises(pickle.UnpicklingError, match="exec"):
        fm.load(folder)
    assert digest(folder) == before
    assert not (tmp_path / "owned").exists()


def test_source(tmp_path):
    fails(lambda: fm.load(tmp_path / "nothing"), str(tmp_path / "nothing"))
    fails(lambda: fm.load(tmp_path), "config.json", str(tmp_path))


def test_arguments_of_load(folder):
    fails(lambda: fm.load(folder, layers="piled"), "'piled'", "'stacked'")
    fails(lambda: fm.load(folder, task="poetry"), "'poetry'", "causal-lm")
    fails(lambda: fm.load(folder, task="masked-lm"), "'masked-lm'", "causal-lm")
    fails(lambda: fm.load(folder, dtype="float33"), "float33")
    fails(lambda: fm.load(folder, dtype="int8"), "int8")
    fails(lambda: fm.load(folder, task="token-classification"), "missing 'classifier.weight'", "key=")


def test_save(case, tmp_path):
    loaded = case("gpt2/causal-lm")
    fm.save(loaded.params, loaded.config, tmp_path)
    before = digest(tmp_path)
    broken = fm.tree.remove(loaded.params, "final_norm.bias")
    fails(lambda: fm.save(broken, loaded.config, tmp_path), "missing 'final_norm.bias'")
    fails(lambda: fm.save(loaded.params, loaded.config, tmp_path, format="zip"), "'zip'", "safetensors")
    fails(lambda: fm.save(loaded.params, loaded.config, tmp_path, max_shard_size="a lot"), "a lot")
    fails(lambda: fm.save(loaded.params, loaded.config, tmp_path / "config.json"), "config.json")
    assert digest(tmp_path) == before


TOKENS = np.array([[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (TOKENS[0], {}, ["(b t)", "(3,)"]),
        (TOKENS[None], {}, ["(b t)", "(1, 2, 3)"]),
        (TOKENS.astype(np.float32), {}, ["integers", "float32"]),
        (TOKENS.astype(bool), {}, ["integers", "bool"]),
        (TOKENS[:, :0], {}, ["no tokens", "(2, 0)"]),
        (TOKENS[:0], {}, ["no tokens", "(0, 3)"]),
        (TOKENS + 55, {}, ["tokens", "60 to 65", "0 … 60", "resize_embeddings"]),
        (TOKENS - 6, {}, ["-1"]),
        (np.ones((1, 33), int), {}, ["33 tokens", "32 positions"]),
        (TOKENS, {"mask": np.ones((2, 4))}, ["mask", "(2, 4)", "(2, 3)"]),
        (TOKENS, {"mask": np.ones(3)}, ["mask", "(3,)"]),
        (TOKENS, {"positions": TOKENS + 30}, ["positions", "35 to 40", "0 … 31"]),
        (TOKENS, {"positions": TOKENS.astype(np.float32)}, ["positions", "integers"]),
        ("hello", {}, ["integers"]),
        (None, {}, ["tokens"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2/causal-lm", "bert/base"])
def test_inputs(case, name, tokens, options, words):
    loaded = case(name)
    fails(lambda: fm.forward(loaded.params, loaded.config, tokens, **options), "forward", *words)


def test_inputs_of_some_families(case):
    gpt2, llama, bert = (case(name) for name in ("gpt2/causal-lm", "llama/base", "bert/base"))
    fails(lambda: fm.forward(llama.params, llama.config, TOKENS, token_types=TOKENS), "token types")
    fails(lambda: fm.forward(bert.params, bert.config, TOKENS, token_types=TOKENS), "token_types", "5 to 10", "0 … 2")
    fails(lambda: fm.forward(bert.params, bert.config, TOKENS, cache=fm.init_cache(bert.params, 2, 8)), "causal")
    choice = case("bert/multiple-choice")
    fails(lambda: fm.forward(choice.params, choice.config, TOKENS), "(b n t)", "multiple-choice")
    cache = fm.init_cache(gpt2.params, 2, 4)
    cache = fm.forward(gpt2.params, gpt2.config, TOKENS, cache=cache).cache
    fails(lambda: fm.forward(gpt2.params, gpt2.config, TOKENS, cache=cache), "4 slots", "3 are taken")
    fails(
        lambda: fm.forward(gpt2.params, gpt2.config, TOKENS[:1], cache=fm.init_cache(gpt2.params, 2, 4)),
        "cache",
        "2 rows",
    )


def test_padding_does_not_count_as_length(case):
    """32 real tokens and 4 of padding fit in 32 positions; 33 real ones do not."""
    loaded = case("gpt2/causal-lm")
    tokens, mask = np.full((1, 36), 5), np.ones((1, 36), bool)
    mask[:, :4] = False
    assert np.isfinite(fm.forward(loaded.params, loaded.config, tokens, mask=mask).logits).all()
    mask[:, 3] = True
    fails(lambda: fm.forward(loaded.params, loaded.config, tokens, mask=mask), "33 tokens", "32 positions")


def test_decoding_beyond_the_positions(case):
    loaded = case("gpt2/causal-lm")
    cache = fm.init_cache(loaded.params, 1, 64)
    cache = fm.forward(loaded.params, loaded.config, np.full((1, 30), 5), cache=cache).cache
    fails(
        lambda: fm.forward(loaded.params, loaded.config, np.full((1, 3), 5), cache=cache), "33 tokens", "32 positions"
    )


def test_config_arguments():
    config = fm.models.llama.Config
    fails(lambda: config(num_heads=6, num_kv_heads=4), "num_heads=6", "num_kv_heads=4")
    fails(lambda: config(task="next-sentence"), "'next-sentence'", "causal-lm")
    fails(lambda: config(num_layers=0), "num_layers=0")
    fails(lambda: config(head_dim=7), "head_dim=7")


def test_error_lists_are_short(case):
    """A file of another model gives one readable error, not thousands of lines."""
    tensors = {f"strange.{i}": np.ones(1) for i in range(1000)}
    with pytest.raises(ValueError, match=r"… and \d+ more") as caught:
        fm.from_disk(tensors, case("gpt2/base").config)
    assert len(str(caught.value).splitlines()) < 210


def test_no_check_inside_of_jit(case):
    """Values are not known there: tokens outside of the vocabulary cannot raise, shapes still do."""
    loaded = case("gpt2/causal-lm")
    run = jax.jit(lambda tokens: fm.forward(loaded.params, loaded.config, tokens).logits)
    assert run(jnp.asarray(TOKENS + 55)).shape == (2, 3, 61)
    fails(lambda: run(jnp.zeros((2, 0), jnp.int32)), "no tokens")
