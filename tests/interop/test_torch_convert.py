"""`to_torch` and `from_torch`: the bits themselves, whose memory they are, and what is refused."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fmodels as fm
from interop import torch as it
from tests.interop.test_transformers import assert_equal

FOUR = ["gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm", "llama/causal-lm/tied-biases"]
FLOATS = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip_is_bit_exact_and_without_a_copy(case, name, dtype):
    row = case(name)
    stacked = jax.tree.map(lambda a: a.astype(dtype), row.params)
    for params in (stacked, fm.unstack_layers(stacked)):
        tensors = it.to_torch(params, row.config)
        memory = [(a.unsafe_buffer_pointer(), a.unsafe_buffer_pointer() + a.nbytes) for a in jax.tree.leaves(params)]
        copied = {name for name, t in tensors.items() if not any(start <= t.data_ptr() < end for start, end in memory)}
        assert copied == set(it.copied_tensors(row.config))
        assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
        back = it.from_torch(tensors, row.config)
        assert_equal(back, stacked)
        again = it.to_torch(back, row.config)
        assert all(bits(again[name]) == bits(tensor) for name, tensor in tensors.items())
        repeated = set(fm.disk_names(row.config, tied=True)) - set(fm.disk_names(row.config))
        assert len({id(t) for t in tensors.values()}) == len(tensors) - len(repeated)


def test_special_values_survive(case):
    row = case("gpt2/causal-lm")
    odd = np.array([0x7FC1, 0xFFC2, 0x7F80, 0xFF80, 0x8000, 0x0001], np.uint16)  # NaNs, infinities, -0, a subnormal
    params = fm.cast(row.params, "bfloat16")
    table = np.asarray(params["embed"]["tokens"]).copy()
    table.view(np.uint16)[0, : odd.size] = odd
    params = fm.tree.update(params, {"embed.tokens": jnp.asarray(table)})
    assert_equal(it.from_torch(it.to_torch(params, row.config), row.config), params)


def test_from_torch_shares_no_memory(case):
    row = case("gpt2/causal-lm")
    theirs = copy.deepcopy(row.model)
    params = it.from_torch(theirs, row.config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.fill_(0)
    assert_equal(params, row.params)
    single = {
        name: t.clone().requires_grad_() for name, t in row.model.state_dict().items() if name != "lm_head.weight"
    }
    assert_equal(it.from_torch(single, row.config), row.params)


def test_arrays_of_numpy_that_are_read_only_are_copied(case):
    row = case("llama/causal-lm/tied-biases")
    params = jax.tree.map(np.asarray, row.params)  # views of jax arrays, which nobody may write to
    for tensor in it.to_torch(params, row.config).values():
        tensor.zero_()
    assert params["embed"]["tokens"].any()


def test_buffers_that_nothing_reads_are_accepted(case):
    row = case("gpt2/causal-lm")
    state = it.to_torch(row.params, row.config)
    for i in range(row.config.num_layers):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4, dtype=torch.float64)
    assert_equal(it.from_torch(state, row.config), row.params)


def test_from_torch_names_what_is_wrong(case):
    row = case("gpt2/causal-lm")
    config, state = row.config, it.to_torch(row.params, row.config)
    norm = "transformer.ln_f.bias"
    with pytest.raises(TypeError, match="state_dict"):
        it.from_torch([1], config)
    with pytest.raises(TypeError, match="'x'"):
        it.from_torch({**state, "x": np.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"transformer\.unknown"):
        it.from_torch({**state, "transformer.unknown": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"missing 'transformer\.ln_f\.bias'"):
        it.from_torch({name: t for name, t in state.items() if name != norm}, config)
    with pytest.raises(ValueError, match=r"'transformer\.ln_f\.bias' has shape"):
        it.from_torch({**state, norm: torch.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"ties 'lm_head\.weight'"):
        it.from_torch({**state, "lm_head.weight": state["lm_head.weight"] + 1}, config)
    with pytest.raises(ValueError, match="64 bits"):
        it.from_torch({name: t.double() for name, t in state.items()}, config)
    with pytest.raises(ValueError, match="meta"):
        it.from_torch({name: t.to("meta") for name, t in state.items()}, config)
    with pytest.raises(TypeError, match="sparse"):
        it.from_torch({**state, norm: state[norm].to_sparse()}, config)


def test_to_torch_names_what_is_wrong(case):
    row = case("gpt2/causal-lm")
    with pytest.raises(ValueError, match=r"embed\.tokens"):
        it.to_torch(row.params, dataclasses.replace(row.config, vocab_size=5))
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda p: it.to_torch(p, row.config))(row.params)
    with pytest.raises(TypeError, match="int4"):
        it.to_torch(
            fm.tree.update(row.params, {"embed.tokens": row.params["embed"]["tokens"].astype("int4")}), row.config
        )
