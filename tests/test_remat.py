"""`forward(remat=True)`: the same outputs and gradients with less memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fmodels as fm
from tests.interop.wrapped import GPT2


@pytest.mark.parametrize("form", ["stacked", "list"])
def test_gradients_are_the_same_with_less_memory(form):
    params, tokens = fm.init(GPT2, jax.random.key(0)), np.arange(32).reshape(2, 16) % 11
    params = params if form == "stacked" else fm.unstack_layers(params)
    found, memory, layers = [], [], []
    for remat in (False, True):

        def loss(params, remat=remat):
            out = fm.forward(params, GPT2, tokens, remat=remat, attentions=True, hidden_states=True)
            return jax.nn.logsumexp(out.logits, -1).sum() + (out.attentions**2).sum() + (out.hidden_states**2).sum()

        program = jax.jit(jax.value_and_grad(loss)).lower(params)
        layers.append(str(jax.make_jaxpr(loss)(params)).count(" remat"))
        compiled = program.compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        found.append(compiled(params))
    assert layers == [0, 1 if form == "stacked" else GPT2.num_layers]
    if form == "stacked":  # XLA merges on a CPU what was to be computed again, if it is not inside of a loop
        assert memory[1] < memory[0], memory
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_encoders_and_decoders_and_routers(case):
    for name in ("t5/seq2seq-lm", "mixtral/causal-lm"):
        row = case(name)
        given = row.inputs()
        moe = {"router_logits": True} if name.startswith("mixtral") else {}

        def loss(params, remat, row=row, given=given, moe=moe):
            out = fm.forward(params, row.config, **given, **moe, remat=remat)
            routed = 0.0 if out.router_logits is None else (out.router_logits**2).sum()
            return jax.nn.logsumexp(out.logits, -1).sum() + routed

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        a, b = gradient(row.params, False), gradient(row.params, True)
        for path, leaf in fm.tree.flatten(a).items():
            np.testing.assert_allclose(leaf, fm.tree.get(b, path), atol=1e-5, rtol=1e-5, err_msg=f"{name}: {path}")


def test_a_cache_is_refused():
    params = fm.init(GPT2, jax.random.key(0))
    cache = fm.init_cache(params, 1, 4)
    with pytest.raises(ValueError, match="remat saves memory of gradients"):
        fm.forward(params, GPT2, np.ones((1, 2), int), cache=cache, remat=True)
