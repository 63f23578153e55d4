"""Flax's names against files and trees of transformers 4.57.6's Flax classes: `goldens/make_flax.py`."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import fmodels as fm
from fmodels import layout
from fmodels.dialects import flax
from fmodels.models import FAMILIES, family
from fmodels.weights import Tensor, read_folder, rules

GOLDENS = Path(__file__).parents[1] / "goldens" / "flax"
MODELS = sorted(path.parent.name for path in GOLDENS.glob("*/expected.npz"))
TREES = json.loads((GOLDENS / "trees.json").read_text())
NAMES = [f"{e['config']['architectures'][0]}-{e['config'].get('tie_word_embeddings')}" for e in TREES]
WHOLE = [name for name in MODELS if not name.endswith("sharded")]


def save_all(folder):
    """Writes what `make_flax.py --read` reads back."""
    for name in MODELS:
        size = 1000 if name.endswith("sharded") else "10GB"
        fm.save(*fm.load(GOLDENS / name), Path(folder) / name, format="flax", max_shard_size=size)
    for name, entry in zip(NAMES, TREES, strict=True):
        config = config_of(entry)
        params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), fm.abstract(config))
        if "sinusoids" in params["embed"]:
            params["embed"]["sinusoids"] = fm.models.roformer.angles(config)
        fm.save(params, config, Path(folder) / name, format="flax")


def config_of(entry):
    return family(entry["config"]["model_type"]).config.from_hf(entry["config"])


def tensor(name, array):
    return Tensor.lazy(name, array.dtype, array.shape, lambda: array)


def flat(tree, path=""):
    """Name, joined by "/" -> leaf."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def filled(shapes):
    """Tensors of these shapes, no two numbers of which are equal."""
    count, found = 0, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = tensor(name, np.arange(count, count + size, dtype=np.int32).reshape(shape))
        count += size
    return found


def same(a, b):
    """Whether two dicts have the same tensors, bit by bit."""
    assert sorted(a) == sorted(b)
    for name in a:
        assert (a[name].name, a[name].dtype, a[name].shape) == (name, b[name].dtype, b[name].shape)
        assert a[name].array().tobytes() == b[name].array().tobytes(), name
    return True


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_pytorchs(name):
    params, config = fm.load(GOLDENS / name, dtype="float32")
    expected = np.load(GOLDENS / name / "expected.npz")
    more = {"decoder_tokens": expected["decoder_input_ids"]} if "decoder_input_ids" in expected else {}
    logits = fm.forward(params, config, expected["input_ids"], mask=expected["attention_mask"], **more).logits
    real = ... if more else expected["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(logits)[real], expected["torch"][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WHOLE)
def test_written_file_has_the_bytes_of_the_one_that_was_read(name, tmp_path):
    params, config = fm.load(GOLDENS / name)
    fm.save(params, config, tmp_path, format="flax")
    assert (tmp_path / "flax_model.msgpack").read_bytes() == (GOLDENS / name / "flax_model.msgpack").read_bytes()
    assert fm.load_config(tmp_path) == config


def test_shards(tmp_path):
    golden = GOLDENS / "gpt2_sharded"
    index = json.loads((golden / "flax_model.msgpack.index.json").read_text())
    params, config = fm.load(golden)
    fm.save(params, config, tmp_path, format="flax", max_shard_size=1000)
    ours = json.loads((tmp_path / "flax_model.msgpack.index.json").read_text())
    assert ours["weight_map"].keys() == index["weight_map"].keys()
    assert same(read_folder(tmp_path)[0], read_folder(golden)[0])
    fm.save(params, config, tmp_path, format="flax")
    assert [path.name for path in tmp_path.glob("flax*")] == ["flax_model.msgpack"]


def test_safetensors_that_flax_wrote(tmp_path):
    golden = GOLDENS / "bert"
    tensors, _ = read_folder(golden)
    save_file(
        {name.replace("/", "."): t.array().copy() for name, t in tensors.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "flax"},
    )
    (tmp_path / "config.json").write_bytes((golden / "config.json").read_bytes())
    assert jax.tree.all(jax.tree.map(np.array_equal, fm.load(tmp_path)[0], fm.load(golden)[0]))


@pytest.mark.parametrize("entry", TREES, ids=NAMES)
def test_every_tree_has_our_names_and_shapes(entry):
    """Of each class: nothing is missing or unexpected to the loader, and the way back gives the tree of the class."""
    config = config_of(entry)
    tree = filled(flat(entry["tree"]))
    tensors = flax.read(tree, config)
    layout.plan({name: t.shape for name, t in tensors.items()}, config)
    assert same(flax.write(tensors, config), tree)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_name_of_every_family_has_its_flax_name(name):
    few = {"num_layers": 4} if hasattr(family(name).config, "num_experts") else {}  # there are enough names in those
    for task in family(name).config.ARCHITECTURES:
        config = family(name).config(task=task, **few)
        weights = family(name).weights
        shapes = {n: rules.disk_shape(p.rule, p.sizes(config)) for n, p in weights.places(config).items()}
        computed = {n.replace("@", weights.base_prefix(task)): f for n, f in weights.flax.computed.items()}
        tensors = {
            n: tensor(n, computed[n](config)) if n in computed else Tensor.lazy(n, np.float32, shape, lambda: None)
            for n, shape in shapes.items()
        }
        written = flax.write(tensors, config)
        assert not [n for n in written if "." in n]
        assert list(written) == sorted(written, key=lambda n: n.split("/"))
        back = flax.read(written, config)
        assert {n: t.shape for n, t in back.items()} == shapes


def test_general_rule():
    """Of families that had no Flax class: root-mean-square norms keep `weight`, layer norms have `scale`."""
    for name, norm in {"qwen3": "weight", "gemma3_text": "weight", "phi": "scale", "modernbert": "scale"}.items():
        config = family(name).config()
        names = {n for n, p in family(name).weights.places(config).items() if p.rule.leaves[0].endswith(".scale")}
        written = flax.write(
            {n: Tensor.lazy(n, np.int8, (2,), lambda: None) for n in names if n.endswith("weight")}, config
        )
        assert {n.rpartition("/")[2] for n in written} == {norm}


def test_a_tied_head_that_flax_has_nevertheless():
    entry = next(e for n, e in zip(NAMES, TREES, strict=True) if n == "LlamaForCausalLM-True")
    config, tree = config_of(entry), filled(flat(entry["tree"]))
    tensors = flax.read(tree, config)
    del tensors["lm_head.weight"]
    written = flax.write(tensors, config)
    assert written.keys() == tree.keys()
    table = tree["model/embed_tokens/embedding"].array()
    np.testing.assert_array_equal(written["lm_head/kernel"].array(), table.T)


def test_one_tensor_of_flax_that_pytorch_has_twice():
    entry = next(e for n, e in zip(NAMES, TREES, strict=True) if n == "BertForMaskedLM-False")
    config = config_of(entry)
    tensors = flax.read(filled(flat(entry["tree"])), config)
    read = tensors["cls.predictions.decoder.bias"]  # by PyTorch; the other one is read by nobody
    assert read.array().tobytes() == tensors["cls.predictions.bias"].array().tobytes()
    tensors["cls.predictions.bias"] = tensor("cls.predictions.bias", np.zeros(11, np.int32))
    written = flax.write(tensors, config)["cls/predictions/bias"]
    assert written.array().tobytes() == read.array().tobytes()


def test_tables_that_flax_has_once():
    entry = next(e for n, e in zip(NAMES, TREES, strict=True) if n == "BartForConditionalGeneration-False")
    config = config_of(entry)
    tensors = flax.read(filled(flat(entry["tree"])), config)
    tensors["model.decoder.embed_tokens.weight"] = tensor("x", np.zeros((11, 8), np.int32))
    with pytest.raises(ValueError, match=r"differs from .*, and Flax has one of them"):
        flax.write(tensors, config)["model/shared/embedding"].array()


def test_what_flax_does_not_have():
    config = fm.models.roformer.Config(hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4, embedding_size=6)
    with pytest.raises(ValueError, match="does not have a projection of embeddings"):
        flax.write({}, config)
    config = dataclasses.replace(config, embedding_size=8, max_positions=4)
    table = tensor("encoder.embed_positions.weight", np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="is not the table that"):
        flax.write({table.name: table}, config)


def test_names_that_nobody_knows_stay_and_are_reported(tmp_path):
    golden = GOLDENS / "gpt2"
    config = fm.load_config(golden)
    tensors, _ = read_folder(golden)
    odd = {
        name: tensor(name, np.zeros(2)) for name in ("transformer/h/0/ln_1/kernel", "of/nobody", "transformer.h.0.lora")
    }
    assert odd.keys() <= flax.read(tensors | odd, config).keys()
    assert odd.keys() <= flax.write(flax.read(tensors | odd, config), config).keys()
    with pytest.raises(ValueError, match=r"no rule of gpt2 .* matches 'of/nobody'"):
        layout.plan({n: t.shape for n, t in flax.read(tensors | odd, config).items()}, config)
