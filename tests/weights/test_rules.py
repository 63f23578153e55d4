"""The layout map: several leaves in one tensor, and two maps of one family."""

import chex
import numpy as np
import pytest
import safetensors.numpy

import fmodels as fm
from fmodels.weights import rules
from fmodels.weights.rules import Rule
from tests.test_load_save import stored

LEAVES = ("layers.attention.query.weight", "layers.attention.key.weight", "layers.attention.value.weight")
SIZE = {"h": 6, "g": 2, "k": 5, "d": 3}


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("within", [None, "g"])
def test_leaves_side_by_side(within, along):
    """One after the other, or, as in Falcon, the queries of each key-value head with its key and its value."""
    layouts = ("(h k) d", "(g k) d", "(g k) d") if along == 0 else ("d (h k)", "d (g k)", "d (g k)")
    rule = Rule("qkv", LEAVES, layouts, along=along, within=within)
    shape = rules.disk_shape(rule, SIZE)
    assert shape == ((50, 3) if along == 0 else (3, 50))
    tensor = np.arange(150).reshape(shape)
    leaves = rules.from_disk(rule, tensor, SIZE)
    assert [leaves[leaf].shape for leaf in LEAVES] == [(6, 5, 3), (2, 5, 3), (2, 5, 3)]
    rows = tensor if along == 0 else tensor.T
    heads = rows.reshape(10, 5, 3)
    want = [range(6), [6, 7], [8, 9]] if within is None else [[0, 1, 2, 5, 6, 7], [3, 8], [4, 9]]
    for leaf, places in zip(LEAVES, want, strict=True):
        assert np.array_equal(leaves[leaf], heads[list(places)])
    assert np.array_equal(rules.to_disk(rule, leaves, np.concatenate), tensor)


def test_files_with_the_names_of_the_module(case, tmp_path):
    """transformers saves GPT-NeoX's head under another name than its module has; a file of either kind is written again."""
    loaded = case("gpt_neox/causal-lm")
    assert {"embed_out.weight"} == stored(loaded.folder).keys() - loaded.model.state_dict().keys()
    tensors = {name: tensor.numpy() for name, tensor in loaded.model.state_dict().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((loaded.folder / "config.json").read_bytes())
    params, config = fm.load(tmp_path)
    chex.assert_trees_all_equal(params, loaded.params)
    assert config == loaded.config
    fm.save(params, config, tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path)
    assert "embed_out.weight" in fm.disk_names(loaded.config)
    assert "lm_head.weight" in fm.disk_names(loaded.config, module=True)
    assert fm.load(tmp_path, task="base")[1].module_names
