"""From folder to tree to folder: bytes, names, dtypes, heads, prefixes; transformers is the judge on both sides."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

import fmodels as fm
from tests import families

GOLDENS = Path(__file__).parent / "goldens"
PLAIN = ["gpt2/causal-lm", "llama/causal-lm/tied-biases", "bert/masked-lm/untied", "bert/pretraining"]


def stored(folder):
    """Name -> (dtype, shape, bytes) of every tensor of a folder, read by the safetensors package or by torch."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    for path in sorted(Path(folder).glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return {n: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for n, t in found.items()}


def transformers_loads(folder, loaded, caplog, *, exact=True):
    """`from_pretrained` on a folder of ours: nothing missing, nothing unexpected, no warning, the same numbers."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        model, info = type(loaded.model).from_pretrained(
            folder, output_loading_info=True, attn_implementation=loaded.attention, dtype="auto", **loaded.case.options
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values()), info
    messages = [record.getMessage() for record in caplog.records]
    # transformers 5 ties T5's head whatever config.json says, finds that it differs, and says so at each load.
    assert not messages if not loaded.case.untie else all("we will NOT tie them" in text for text in messages), messages
    want = loaded.model.state_dict()
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    if exact:
        got = families.reference(model, loaded.inputs("left"))
        chex.assert_trees_all_close(got, loaded.reference("left"), atol=1e-6)
    return model


def test_round_trip(loaded, tmp_path, caplog):
    """`load` then `save` gives the bytes that transformers saved, and a folder that it loads."""
    fm.save(loaded.params, loaded.config, tmp_path)
    assert stored(tmp_path) == stored(loaded.folder)
    transformers_loads(tmp_path, loaded, caplog)
    again, config = fm.load(tmp_path)
    assert dataclasses.replace(config, extra=loaded.config.extra) == loaded.config
    chex.assert_trees_all_equal(again, loaded.params)
    chex.assert_trees_all_equal(fm.load(tmp_path, layers="list")[0], loaded.unstacked)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "options", [{"format": "torch"}, {"max_shard_size": "5KB"}, {"format": "torch", "max_shard_size": "5KB"}], ids=str
)
def test_round_trip_of_formats(case, name, options, tmp_path, caplog):
    loaded = case(name)
    fm.save(loaded.unstacked, loaded.config, tmp_path, **options)
    assert stored(tmp_path) == stored(loaded.folder)
    assert (len(list(tmp_path.glob("*-of-*"))) > 2) == ("max_shard_size" in options)
    transformers_loads(tmp_path, loaded, caplog, exact=False)
    chex.assert_trees_all_equal(fm.load(tmp_path)[0], loaded.params)
    fm.save(loaded.params, loaded.config, tmp_path, format=options.get("format", "safetensors"))  # old shards go
    assert not list(tmp_path.glob("*-of-*"))
    assert stored(tmp_path) == stored(loaded.folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PLAIN[:2])
def test_dtypes_are_kept(case, name, dtype, tmp_path, caplog):
    model = families.build(families.by_name(name)).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    params, config = fm.load(tmp_path / "theirs")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {str(dtype).removeprefix("torch.")}
    fm.save(params, config, tmp_path / "ours")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").dtype == dtype
    loaded = dataclasses.replace(case(name), model=model, folder=tmp_path / "theirs")
    transformers_loads(tmp_path / "ours", loaded, caplog, exact=False)
    wide, _ = fm.load(tmp_path / "theirs", dtype="float32")
    want = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for tensor, array in fm.to_disk(wide, config, tied=True).items():
        assert array.dtype == np.float32
        assert np.array_equal(array, want[tensor])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
@pytest.mark.parametrize("layers", ["list", "stacked"])
def test_load_makes_no_copy(case, layers, tmp_path):
    """Of a file that we wrote, on CPU: leaves lie in the mapped file itself, but where odd sizes push one off 64 bytes."""
    loaded = case("llama/causal-lm")
    fm.save(loaded.params, loaded.config, tmp_path)
    params, _ = fm.load(tmp_path, layers=layers)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        [int(end, 16) for end in line[0].split("-")]
        for line in lines
        if line[-1] == str(tmp_path / "model.safetensors")
    ]
    for name, tensor in loaded.model.state_dict().items():
        assert np.array_equal(fm.to_disk(params, loaded.config)[name], tensor)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params["layers"])]
    inside = [any(start <= pointer < end for start, end in mapped) for pointer in pointers]
    assert sum(inside) >= 0.6 * len(inside)


BASES = [
    ("gpt2/base", "gpt2/causal-lm", {}), ("llama/base", "llama/sequence-classification", families.THREE),
    ("bert/base", "bert/token-classification", families.THREE), ("bert/base", "bert/next-sentence", {}),
    ("bart/base", "bart/question-answering", {}), ("t5/base", "t5/sequence-classification", families.THREE),
    ("gpt2/base", "gpt2/double-heads", {}), ("bert/base/no-pooler", "bert/question-answering", {}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "head", "labels"), BASES, ids=lambda x: x if isinstance(x, str) else "")
def test_head_on_a_base_checkpoint(case, base, head, labels, tmp_path):
    """The prefix is put on; the head is new, drawn from `key`, and everything below is as transformers loads it."""
    loaded, wanted = case(base), families.by_name(head)
    shutil.copytree(loaded.folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | labels))
    if wanted.task not in ("causal-lm",):  # whose head is tied, so that nothing is missing
        with pytest.raises(ValueError, match=r"missing '.*\.weight'(.|\n)*key=jax.random.key"):
            fm.load(tmp_path / "m", task=wanted.task)
    params, config = fm.load(tmp_path / "m", task=wanted.task, key=jax.random.key(0))
    fm.check(params, config)
    other, _ = fm.load(tmp_path / "m", task=wanted.task, key=jax.random.key(1))
    if wanted.task not in ("causal-lm",):
        assert not np.array_equal(params["classifier"]["weight"], other["classifier"]["weight"])
        assert params["classifier"]["weight"].std() == pytest.approx(0.2, rel=0.6)
    fresh = {"classifier": 0} | ({"pooler": 0} if base == "t5/base" else {})  # BERT's pooler is in its base
    chex.assert_trees_all_equal({**params, **fresh}, {**other, **fresh})
    fm.save(params, config, tmp_path / "saved")
    model, info = getattr(transformers, wanted.architecture).from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values()), info
    below = model.base_model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        if name in below:
            assert torch.equal(below[name], tensor)


@pytest.mark.parametrize(
    "name", ["gpt2/causal-lm", "llama/question-answering", "bert/pretraining", "bert/sequence-classification"]
)
def test_base_of_a_head_checkpoint(case, name, tmp_path, caplog):
    """The prefix is taken off, the head is left out with a word, and the hidden states are transformers' own."""
    loaded = case(name)
    params, config = fm.load(loaded.folder, task="base")
    assert config.task == "base"
    assert ("left out" in caplog.text) == (name != "gpt2/causal-lm")
    given = loaded.inputs()
    given.pop("positions")
    hidden = fm.forward(params, config, **given).hidden
    assert np.abs(np.asarray(hidden) - loaded.reference()["hidden_states"][-1]).max() < 1e-5
    fm.save(params, config, tmp_path)
    want = loaded.model.base_model.state_dict()
    assert stored(tmp_path).keys() == want.keys()
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is type(loaded.model.base_model)


def test_task_goes_before_architectures(case):
    folder = case("bert/pretraining").folder
    assert fm.load(folder)[1].task == "pretraining"
    params, config = fm.load(folder, task="masked-lm")
    assert config.task == "masked-lm"
    assert "classifier" not in params
    assert "pooler" not in params
    assert fm.load(folder, task="next-sentence")[1].task == "next-sentence"
    with pytest.raises(ValueError, match="'cat' is not one of"):
        fm.load(folder, task="cat")


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("task", [None, "base", "pretraining"])
def test_old_names(container, task, tmp_path):
    """A BERT of 2018 in a `pytorch_model.bin`: gamma and beta, position_ids, no decoder bias; numbers by transformers 4."""
    want = np.load(GOLDENS / "old_names" / "expected.npz")
    params, config = fm.load(GOLDENS / "old_names" / container, task=task)
    assert config.task == (task or "masked-lm")
    out = fm.forward(params, config, want["tokens"], mask=want["mask"], token_types=want["token_types"])
    fields = {
        None: ["logits", "hidden"],
        "base": ["hidden", "pooled"],
        "pretraining": ["logits", "sequence_logits", "hidden"],
    }
    for field in fields[task]:
        got = np.asarray(getattr(out, field))
        assert (np.abs(got - want[field]) / np.maximum(1, np.abs(want[field]))).max() < 1e-5
    fm.save(params, config, tmp_path)
    model, info = getattr(transformers, config.ARCHITECTURES[config.task]).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "again")  # in the form that was read
    found = stored(tmp_path)
    assert found.keys() == stored(tmp_path / "again").keys()
    assert any(name.endswith("LayerNorm.gamma") for name in found)


def test_tied_head_that_differs_is_loaded_untied(case, tmp_path, caplog):
    """As transformers 5 does when config.json says tied and the file has another head."""
    loaded = case("llama/causal-lm")
    shutil.copytree(loaded.folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    params, config = fm.load(tmp_path / "m")
    assert "untied" in caplog.text
    assert config.tie_word_embeddings is False
    chex.assert_trees_all_equal(params, loaded.params)
    same = safetensors.numpy.load_file(loaded.folder / "model.safetensors")
    same["lm_head.weight"] = same["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(same, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    params, config = fm.load(tmp_path / "m")
    assert config.tie_word_embeddings is True
    assert "lm_head" not in params


def test_t5_whose_head_is_neither_tied_nor_there(case, tmp_path, caplog):
    """Files of version 1.1 say that the head is not tied; where they have none, transformers 5 ties it, unscaled."""
    loaded = case("t5/seq2seq-lm/unscaled")
    shutil.copytree(loaded.folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    data = json.loads(path.read_text()) | {"tie_word_embeddings": False}
    del data["scale_decoder_outputs"]
    path.write_text(json.dumps(data))
    params, config = fm.load(tmp_path / "m")
    assert (config.tie_word_embeddings, config.scale_logits) == (False, False)
    families.assert_equal(
        loaded.forward(params=params, config=config), loaded.reference(), **loaded.masks(), causal=True
    )
    fm.save(params, config, tmp_path / "saved")
    assert stored(tmp_path / "saved") == stored(loaded.folder)
    head = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    head |= {"lm_head.weight": 2 * head["shared.weight"], "encoder.embed_tokens.weight": head["shared.weight"].copy()}
    safetensors.numpy.save_file(head, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    params, config = fm.load(tmp_path / "m")
    assert np.array_equal(params["lm_head"]["weight"], head["lm_head.weight"])
    assert not caplog.records
    head["encoder.embed_tokens.weight"] += 1
    safetensors.numpy.save_file(head, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'encoder.embed_tokens.weight' differs from 'shared.weight'"):
        fm.load(tmp_path / "m")


@pytest.mark.parametrize("name", ["bart/seq2seq-lm", "t5/seq2seq-lm"])
def test_untied_pairs(case, name, tmp_path, caplog):
    """Untied, transformers has a table for each part of BART; all that it needs is written, and goes again."""
    loaded = case(name)
    untied, config = fm.untie(loaded.params, loaded.config)
    fm.check(untied, config)
    fm.save(untied, config, tmp_path)
    model, info = type(loaded.model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert np.array_equal(families.reference(model, loaded.inputs())["logits"], loaded.reference()["logits"])
    again, read = fm.load(tmp_path)
    assert ("decoder.embed.tokens" in fm.tree.flatten(again)) == (name == "bart/seq2seq-lm")
    params, config = fm.tie(again, read)
    assert config == loaded.config
    chex.assert_trees_all_equal(params, loaded.params)


def test_parts_of_an_encoder_decoder_checkpoint(case, caplog):
    """The decoder alone as a language model, the encoder alone; and an encoder that gets a new decoder."""
    loaded = case("bart/seq2seq-lm")
    params, config = fm.load(loaded.folder, task="causal-lm")
    fm.check(params, config)
    assert np.array_equal(params["embed"]["tokens"], loaded.params["embed"]["tokens"])
    assert params.keys() == {"embed", "decoder"}
    whole = case("t5/seq2seq-lm")
    part, config = fm.load(whole.folder, task="encoder")
    given = {n: a for n, a in whole.inputs("left").items() if not n.startswith("decoder_")}
    want = whole.reference("left")["encoder_hidden"]
    error = np.abs(np.asarray(fm.forward(part, config, **given).hidden) - want)
    assert error[given["mask"].astype(bool)].max() < 1e-5
    for layers in ("stacked", "list"):
        more, config = fm.load(case("t5/encoder").folder, task="base", key=jax.random.key(0), layers=layers)
        fm.check(more, config)
        assert fm.tree.is_stacked(more) == (layers == "stacked")


def test_other_files_stay(case, tmp_path):
    loaded = case("gpt2/causal-lm")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("mine")
    fm.save(loaded.params, loaded.config, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} >= {
        "tokenizer.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_state_dicts(loaded):
    """`from_disk` takes a state dict with its tied duplicates; `to_disk(tied=True)` gives all of it back."""
    theirs = {name: tensor.numpy() for name, tensor in loaded.model.state_dict().items()}
    params = fm.from_disk(theirs, loaded.config)
    chex.assert_trees_all_equal(params, loaded.params)
    back = fm.to_disk(params, loaded.config, tied=True, module=True)
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[name], theirs[name]) for name in theirs)


def test_config_json_is_read_back(loaded, tmp_path):
    """Every field survives `to_hf` and transformers' own config class, which knows all keys that we write."""
    data = json.loads(json.dumps(loaded.config.to_hf()))
    assert type(loaded.config).from_hf(data) == loaded.config
    if loaded.case.untie:  # transformers' class reads T5's head as tied, always; the file decides
        loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, tie_word_embeddings=True))
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    assert dataclasses.replace(fm.load_config(tmp_path), extra=()) == dataclasses.replace(loaded.config, extra=())
    written, want = theirs.to_dict(), loaded.model.config.to_dict()
    for key in want.keys() - {"dtype", "transformers_version", "_name_or_path"}:
        assert written[key] == want[key] or (key in ("n_inner", "intermediate_size") and want[key] is None), key


def test_new_head_takes_the_dtype_on_disk(case, tmp_path):
    families.build(families.by_name("llama/base")).to(torch.bfloat16).save_pretrained(tmp_path)
    params, _ = fm.load(tmp_path, task="token-classification", key=jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_buffers_of_old_files(case, tmp_path):
    """A causal mask, say, lies in old files and is read by nothing; in another family such a tensor is unknown."""
    for name, buffers in (
        ("gptj/causal-lm", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neo/causal-lm", ["transformer.h.0.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias"]),
        ("gpt_neox/causal-lm", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("opt/causal-lm", ["decoder.version"]),
        ("xglm/causal-lm", ["model.embed_positions.weights"]),
        ("deepseek_v3/causal-lm", ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight"]),
        ("llama/causal-lm", ["model.layers.0.self_attn.bias"]),
    ):
        row = case(name)
        folder = tmp_path / name
        shutil.copytree(row.folder, folder)
        tensors = safetensors.numpy.load_file(folder / "model.safetensors") | {
            name: np.zeros(1, np.float32) for name in buffers
        }
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if "llama" not in name:
            chex.assert_trees_all_equal(fm.load(folder)[0], row.params)
        else:
            with pytest.raises(ValueError, match=r"no rule of llama .* matches 'model\.layers\.0\.self_attn\.bias'"):
                fm.load(folder)
