"""`interop.torch` against transformers on PyTorch: numbers, gradients, optimizers, generation, and the bits themselves."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import fmodels as fm
from interop import torch as it
from interop.transformers import to_transformers
from tests.interop.test_transformers import BERT, CASES, GPT2, LLAMA, assert_equal, inputs_of, name_of, random_params, reference

GPT2_LM = fm.models.gpt2.Config(**GPT2, task="causal-lm")
LLAMA_LM = fm.models.llama.Config(**LLAMA, task="causal-lm")
LLAMA_TIED = fm.models.llama.Config(**LLAMA, task="causal-lm", tie_word_embeddings=True)
BERT_MLM = fm.models.bert.Config(**BERT, task="masked-lm")
THREE = [GPT2_LM, LLAMA_LM, BERT_MLM]
FLOATS = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def loss_of(values, mask):
    """A scalar that depends on every output at every real token, each with its own weight."""
    total = 0
    for name in sorted(values):
        value = values[name].float()
        weight = torch.linspace(-1, 1, value.numel()).reshape(value.shape).cos()
        if value.shape[: mask.ndim] == mask.shape:
            weight = weight * mask.reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
        total = total + (value * weight).sum() / value.numel() ** 0.5
    return total


def outputs(out, names):
    return {name: getattr(out, name) for name in names}


# --- numbers and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_logits_and_gradients_equal_transformers(config):
    params = random_params(config)
    real, ours = to_transformers(params, config, attn_implementation="eager"), it.TorchModel(params, config)
    tokens, mask = inputs_of(config)
    want = reference(real, tokens, mask)
    got = outputs(ours(tokens, mask=mask), want)
    for name, value in want.items():
        keep = mask.bool() if value.shape[: mask.ndim] == mask.shape else slice(None)
        torch.testing.assert_close(got[name][keep], value[keep], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    loss_of(want, mask).backward()
    loss_of(got, mask).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in real.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        found = gradients[name] if gradient is not None else None
        if gradient is None:  # transformers' graph does not reach it; jax's derivative is zero
            assert gradients[name] is None or not gradients[name].any()
        else:
            torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("config", THREE, ids=name_of)
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 1e-3)])
def test_optimizer_steps_equal_transformers(config, make):
    params = random_params(config)
    real, ours = to_transformers(params, config, attn_implementation="eager"), it.TorchModel(params, config)
    tokens, mask = inputs_of(config)
    losses = {}
    for model, run in ((real, lambda: reference(real, tokens, mask)["logits"]), (ours, lambda: ours(tokens, mask).logits)):
        optimizer = make(model.parameters())
        losses[model] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(run()[mask.bool()], tokens[mask.bool()])
            loss.backward()
            optimizer.step()
            losses[model].append(loss.item())
    assert losses[ours][0] > losses[ours][1] > losses[ours][2]
    np.testing.assert_allclose(losses[ours], losses[real], rtol=1e-4)
    # AdamW divides by the gradient's own size: a key bias, whose gradient is rounding noise, may go either way.
    expected = dict(real.named_parameters())
    noisy = ("key.bias", "c_attn.bias")
    for name, parameter in ours.named_parameters():
        if not name.endswith(noisy):
            torch.testing.assert_close(parameter, expected[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_accumulate_and_frozen_parameters_get_none():
    ours = it.TorchModel(random_params(GPT2_LM), GPT2_LM)
    tokens, mask = inputs_of(GPT2_LM)
    frozen = {"transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"}
    ours(tokens, mask).logits.square().mean().backward()
    once = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours(tokens, mask).logits.square().mean().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])
    ours.zero_grad()
    for name, p in ours.named_parameters():
        p.requires_grad_(name not in frozen)
    ours(tokens, mask).logits.square().mean().backward()
    assert {name for name, p in ours.named_parameters() if p.grad is None} == frozen
    torch.testing.assert_close(ours.transformer.ln_f.weight.grad, once["transformer.ln_f.weight"])
    assert ours.num_parameters(only_trainable=True) == sum(p.numel() for n, p in ours.named_parameters() if n not in frozen)
    ours.requires_grad_(False)
    assert not ours(tokens, mask).logits.requires_grad


def test_graph_around_the_model_and_backward_twice():
    ours = it.TorchModel(random_params(GPT2_LM), GPT2_LM)
    tokens, _ = inputs_of(GPT2_LM)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    out = ours(tokens)
    loss = (scale * out.logits.relu()).sum()
    loss.backward(retain_graph=True)
    first = ours.lm_head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, 2 * first)
    assert scale.grad is not None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_change_in_place_before_backward_is_noticed():
    ours = it.TorchModel(random_params(GPT2_LM), GPT2_LM)
    tokens, _ = inputs_of(GPT2_LM)
    loss = ours(tokens).logits.sum()
    with torch.no_grad():
        ours.transformer.wte.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_changes_in_place_are_seen_and_outputs_stay():
    ours = it.TorchModel(random_params(LLAMA_LM), LLAMA_LM).eval()
    tokens, _ = inputs_of(LLAMA_LM)
    with torch.no_grad():
        before = ours(tokens).logits
        kept = before.clone()
        ours.lm_head.weight.mul_(2)
        after = ours(tokens).logits
    torch.testing.assert_close(after, 2 * kept)
    assert torch.equal(before, kept)


def test_functional_call_and_hidden_states():
    ours = it.TorchModel(random_params(LLAMA_LM), LLAMA_LM)
    tokens, mask = inputs_of(LLAMA_LM)
    doubled = {"lm_head.weight": 2 * ours.lm_head.weight}
    out = torch.func.functional_call(ours, doubled, (tokens, mask), {"hidden_states": True})
    plain = ours(tokens, mask)
    torch.testing.assert_close(out.logits, 2 * plain.logits)
    assert out.hidden_states.shape == (3, *tokens.shape, 16)
    torch.testing.assert_close(out.hidden_states[-1], plain.last_hidden_state)
    out.logits.sum().backward()
    assert ours.lm_head.weight.grad is not None


def test_names_of_transformers_for_the_inputs():
    config = fm.models.bert.Config(**BERT, task="sequence-classification")
    params = random_params(config)
    real, ours = to_transformers(params, config, attn_implementation="eager").eval(), it.TorchModel(params, config)
    tokens, mask = inputs_of(config)
    kwargs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "token_type_ids": tokens % 2,
        "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens).flip(1),
    }
    with torch.no_grad():
        out = ours(**kwargs)
        torch.testing.assert_close(out.logits, real(**kwargs).logits, atol=1e-5, rtol=1e-5)
        base = real.bert(**kwargs)
        torch.testing.assert_close(out.pooler_output, base.pooler_output, atol=1e-5, rtol=1e-5)
        same = ours(tokens, mask.bool(), kwargs["position_ids"], kwargs["token_type_ids"].int())
        assert torch.equal(same.logits, out.logits)
        assert torch.equal(ours(**{**kwargs, "attention_mask": mask.float()}).logits, out.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours = it.TorchModel(random_params(GPT2_LM), GPT2_LM)
    tokens, mask = inputs_of(GPT2_LM)
    want = ours(tokens, mask).logits.detach()
    ours.to(dtype)
    assert ours.dtype == dtype
    assert ours.lm_head.weight is ours.transformer.wte.weight
    out = ours(tokens, mask)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits.detach()[mask.bool()], want[mask.bool()], atol=0.15, rtol=0.1)
    out.logits.square().mean().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {dtype}
    assert fm.tree.get(ours.params, "embed.tokens").dtype == str(dtype).removeprefix("torch.")


# --- names, bits, memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_state_dict_is_that_of_transformers(config):
    params = random_params(config)
    real, ours = to_transformers(params, config), it.TorchModel(params, config)
    expected = real.state_dict()
    for state in (it.to_torch(params, config), ours.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in real.named_parameters()}
    assert ours.num_parameters() == real.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == real.num_parameters(exclude_embeddings=True)
    if config.model_type != "llama":  # whose rules list the norms where they are computed
        assert list(it.to_torch(params, config)) == list(expected)
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in real.named_parameters()]
    real.load_state_dict(ours.state_dict())
    ours.load_state_dict(expected)


@pytest.mark.parametrize("config", [*THREE, LLAMA_TIED], ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layers", ["stacked", "list"])
def test_round_trip_is_bit_exact_and_without_a_copy(config, dtype, layers):
    params = random_params(config, dtype)
    if layers == "list":
        params = fm.unstack_layers(params)
    tensors = it.to_torch(params, config)
    memory = sorted((a.unsafe_buffer_pointer(), a.unsafe_buffer_pointer() + a.nbytes) for a in jax.tree.leaves(params))
    copied = [name for name, t in tensors.items() if not any(start <= t.data_ptr() < end for start, end in memory)]
    assert copied == it.copied_tensors(config)
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    back = it.from_torch(tensors, config)
    assert_equal(back, fm.stack_layers(params))
    again = it.to_torch(back, config)
    assert all(bits(again[name]) == bits(tensor) for name, tensor in tensors.items())
    if config.tie_word_embeddings:
        assert len({id(t) for t in tensors.values()}) == len(tensors) - len(it._repeated(config))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_special_values_survive():
    params = random_params(GPT2_LM, "bfloat16")
    odd = np.array([0x7FC1, 0xFFC2, 0x7F80, 0xFF80, 0x8000, 0x0001], np.uint16)  # NaNs, infinities, -0, a subnormal
    table = np.asarray(params["embed"]["tokens"]).copy()
    table.view(np.uint16)[0, : odd.size] = odd
    params = fm.tree.update(params, {"embed.tokens": jnp.asarray(table)})
    back = it.from_torch(it.to_torch(params, GPT2_LM), GPT2_LM)
    assert_equal(back, params)


def test_from_torch_shares_no_memory():
    real = to_transformers(random_params(GPT2_LM), GPT2_LM)
    params = it.from_torch(real, GPT2_LM)
    before = jax.tree.map(lambda a: np.asarray(a).copy(), params)
    with torch.no_grad():
        for p in real.parameters():
            p.fill_(0)
    assert_equal(params, before)
    one = {name: p.requires_grad_() for name, p in it.to_torch(before, GPT2_LM).items() if name != "lm_head.weight"}
    assert_equal(it.from_torch(one, GPT2_LM), before)


def test_torch_model_owns_its_parameters():
    params = random_params(GPT2_LM)
    before = jax.tree.map(lambda a: np.asarray(a).copy(), params)
    ours = it.TorchModel(params, GPT2_LM)
    snapshot = ours.params
    assert_equal(snapshot, params)
    with torch.no_grad():
        for p in ours.parameters():
            assert p.is_contiguous()
            p.fill_(0)
    assert_equal(params, before)
    assert_equal(snapshot, before)
    assert not np.asarray(ours.params["embed"]["tokens"]).any()


def test_numpy_leaves_and_read_only_ones():
    params = jax.tree.map(np.asarray, random_params(LLAMA_TIED, "bfloat16"))  # views of jax arrays cannot be written to
    tensors = it.to_torch(params, LLAMA_TIED)
    for tensor in tensors.values():
        tensor.zero_()
    assert np.asarray(params["embed"]["tokens"]).any()


def test_buffers_that_nothing_reads_are_accepted():
    params = random_params(GPT2_LM)
    state = it.to_torch(params, GPT2_LM)
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4, dtype=torch.float64)
    assert_equal(it.from_torch(state, GPT2_LM), params)


# --- a module as any other ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT2_LM, BERT_MLM], ids=name_of)
def test_deepcopy_pickle_and_saved_state(config):
    ours = it.TorchModel(random_params(config), config)
    ours.requires_grad_(False)
    tokens, mask = inputs_of(config)
    with torch.no_grad():
        want = ours(tokens, mask).logits
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert len(list(twin.parameters())) == len(list(ours.parameters()))
        assert torch.equal(twin(tokens, mask).logits, want)
        assert not any(a is b for a, b in zip(twin.parameters(), ours.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = it.TorchModel(random_params(config, seed=5), config)
    assert other.load_state_dict(torch.load(file, weights_only=True)) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(other(tokens, mask).logits, want)


def test_copy_of_a_model_that_was_called_does_not_drag_its_graph():
    ours = it.TorchModel(random_params(GPT2_LM), GPT2_LM)
    tokens, _ = inputs_of(GPT2_LM)
    ours(tokens).logits.sum().backward()
    assert copy.deepcopy(ours).transformer.wte.weight.grad is not None
    assert "gpt2, causal-lm" in repr(ours)
    assert ours.device == torch.device("cpu")


def test_no_recompilation_between_steps():
    ours = it.TorchModel(random_params(LLAMA_LM), LLAMA_LM)
    tokens, mask = inputs_of(LLAMA_LM)
    optimizer = torch.optim.SGD(ours.parameters(), 0.01)

    def step():
        ours(tokens, mask).logits.sum().backward()
        optimizer.step()
        with torch.no_grad():
            ours(tokens, mask)

    step()
    sizes = [f._cache_size() for f in (it._run, it._run_with_vjp, it._backward)]
    step()
    assert sizes == [f._cache_size() for f in (it._run, it._run_with_vjp, it._backward)]


# --- generation, resizing, pruning, files ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT2_LM, LLAMA_LM], ids=name_of)
def test_greedy_generation_equals_transformers(config):
    config = dataclasses.replace(config, eos_token_id=None)
    params = random_params(config)
    real, ours = to_transformers(params, config, attn_implementation="eager"), it.TorchModel(params, config)
    tokens = inputs_of(config)[0][1:]
    mask = torch.ones_like(tokens)
    tokens[0, :3], mask[0, :3] = 0, 0  # padding on the left
    want = real.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    got = ours.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=6, pad_token_id=0)
    assert got.dtype == torch.int64
    assert torch.equal(got, want)
    same = ours.generate(tokens, mask, generation_config=transformers.GenerationConfig(max_new_tokens=6), pad_token_id=0)
    assert torch.equal(same, want)
    short = ours.generate(tokens, mask, generation_config=fm.GenerationConfig(max_new_tokens=2), pad_token_id=0)
    assert torch.equal(short, want[:, :9])


def test_sampling_wants_and_follows_a_seed():
    ours = it.TorchModel(random_params(LLAMA_LM), LLAMA_LM)
    tokens = inputs_of(LLAMA_LM)[0][1:]
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 3.0}
    first = ours.generate(tokens, seed=1, **options)
    assert torch.equal(first, ours.generate(tokens, key=jax.random.key(1), **options))
    assert not torch.equal(first, ours.generate(tokens, seed=2, **options))
    drawn = [ours.generate(tokens, generator=torch.Generator().manual_seed(3), **options) for _ in range(2)]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="key"):
        ours.generate(tokens, **options)
    with pytest.raises(TypeError, match="one of"):
        ours.generate(tokens, seed=1, key=jax.random.key(1), **options)
    with pytest.raises(TypeError, match="temperature"):
        ours.generate(tokens, temperatur=1.0)


@pytest.mark.parametrize("config", [*THREE, LLAMA_TIED], ids=name_of)
def test_resize_token_embeddings(config):
    ours = it.TorchModel(random_params(config), config)
    tokens, mask = inputs_of(config)
    before, old = ours(tokens, mask).logits.detach(), dict(ours.named_parameters())
    ours.get_input_embeddings().weight.requires_grad_(False)
    table = ours.resize_token_embeddings(pad_to_multiple_of=16)
    assert table is ours.get_input_embeddings()
    assert table.weight.shape == (48, 16)
    assert not table.weight.requires_grad
    assert ours.config.vocab_size == 48
    out = ours(torch.where(mask.bool(), tokens, 47), mask).logits
    torch.testing.assert_close(out[mask.bool()][:, :37], before[mask.bool()], atol=1e-5, rtol=1e-5)
    out.sum().backward()
    for name, p in ours.named_parameters():
        assert (p is old[name]) == (p.shape == old[name].shape), name
    assert ours.resize_token_embeddings() is table
    assert ours.resize_token_embeddings(37).weight.shape == (37, 16)
    torch.testing.assert_close(ours(tokens, mask).logits[mask.bool()], before[mask.bool()])
    assert (ours.config.tie_word_embeddings and "lm_head.weight" in ours.state_dict()) == (
        config.model_type != "bert" and ours.lm_head.weight is table.weight
    )


def test_prune_heads_computes_what_masking_does():
    params = random_params(BERT_MLM)
    ours = it.TorchModel(params, BERT_MLM)
    tokens, mask = inputs_of(BERT_MLM)
    ours.prune_heads({0: [1], 1: {0, 3}})
    assert dict(ours.config.pruned_heads) == {0: (1,), 1: (0, 3)}
    assert ours.bert.encoder.layer[1].attention.self.query.weight.shape == (8, 16)
    want = fm.forward(fm.mask_heads(params, BERT_MLM, {0: [1], 1: [0, 3]}), BERT_MLM, tokens.numpy(), mask=mask.numpy()).logits
    out = ours(tokens, mask)
    torch.testing.assert_close(out.logits[mask.bool()].detach(), torch.from_numpy(np.array(want))[mask.bool()], atol=1e-5, rtol=1e-5)
    out.logits.sum().backward()
    ours.prune_heads({0: [1, 2]})
    assert dict(ours.config.pruned_heads) == {0: (1, 2), 1: (0, 3)}
    ours(tokens, mask)


@pytest.mark.parametrize("config", THREE, ids=name_of)
def test_saved_model_is_loaded_by_transformers_and_by_us(config, tmp_path):
    ours = it.TorchModel(random_params(config), config)
    ours.resize_token_embeddings(40)
    ours.save_pretrained(tmp_path, max_shard_size="10KB")
    real, info = getattr(transformers, config.ARCHITECTURES[config.task]).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = real.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    again = it.TorchModel.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert it.TorchModel.from_pretrained(tmp_path, dtype="bfloat16", layers="list").dtype == torch.bfloat16


# --- errors ------------------------------------------------------------------------------------------------------------


def test_from_torch_names_what_is_wrong():
    params = random_params(GPT2_LM)
    state = it.to_torch(params, GPT2_LM)
    with pytest.raises(TypeError, match="state_dict"):
        it.from_torch([1], GPT2_LM)
    with pytest.raises(TypeError, match="'x'"):
        it.from_torch({**state, "x": np.zeros(3)}, GPT2_LM)
    with pytest.raises(ValueError, match=r"transformer\.unknown"):
        it.from_torch({**state, "transformer.unknown": torch.zeros(3)}, GPT2_LM)
    with pytest.raises(ValueError, match=r"missing 'transformer\.ln_f\.bias'"):
        it.from_torch({name: t for name, t in state.items() if name != "transformer.ln_f.bias"}, GPT2_LM)
    with pytest.raises(ValueError, match=r"'transformer\.ln_f\.bias' has shape"):
        it.from_torch({**state, "transformer.ln_f.bias": torch.zeros(3)}, GPT2_LM)
    with pytest.raises(ValueError, match=r"ties 'lm_head\.weight'"):
        it.from_torch({**state, "lm_head.weight": state["lm_head.weight"] + 1}, GPT2_LM)
    with pytest.raises(ValueError, match="64 bits"):
        it.from_torch({name: t.double() for name, t in state.items()}, GPT2_LM)
    with pytest.raises(ValueError, match="meta"):
        it.from_torch({name: t.to("meta") for name, t in state.items()}, GPT2_LM)
    with pytest.raises(TypeError, match="sparse"):
        it.from_torch({**state, "transformer.ln_f.bias": state["transformer.ln_f.bias"].to_sparse()}, GPT2_LM)


def test_to_torch_names_what_is_wrong():
    params = random_params(GPT2_LM)
    with pytest.raises(ValueError, match=r"embed\.tokens"):
        it.to_torch(params, dataclasses.replace(GPT2_LM, vocab_size=5))
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda p: it.to_torch(p, GPT2_LM))(params)
    with pytest.raises(TypeError, match="int4"):
        it.to_torch(fm.tree.update(params, {"embed.tokens": params["embed"]["tokens"].astype("int4")}), GPT2_LM)


def test_forward_names_what_is_wrong():
    ours = it.TorchModel(random_params(BERT_MLM), BERT_MLM)
    tokens, mask = inputs_of(BERT_MLM)
    with pytest.raises(TypeError, match="input_ids"):
        ours()
    with pytest.raises(TypeError, match="same input"):
        ours(tokens, input_ids=tokens)
    with pytest.raises(TypeError, match="integers"):
        ours(tokens.float())
    with pytest.raises(TypeError, match="list"):
        ours([[1, 2]])
    with pytest.raises(ValueError, match="no tokens"):
        ours(tokens[:, :0])
    for bad in (tokens - 37, tokens + 37, tokens + 2**32):
        with pytest.raises(ValueError, match="0 … 36"):
            ours(bad)
    with pytest.raises(ValueError, match="0 … 1"):
        ours(tokens, token_types=tokens)
    with pytest.raises(ValueError, match="0 … 23"):
        ours(tokens, positions=tokens + 24)
    with pytest.raises(ValueError, match="mask has shape"):
        ours(tokens, mask[:, 1:])
    with pytest.raises(ValueError, match="mask holds 1"):
        ours(tokens, mask - 1)
    with pytest.raises(ValueError, match="24 positions"):
        ours(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="float64"):
        copy.deepcopy(ours).double()(tokens)
    with pytest.raises(ValueError, match="meta"):
        copy.deepcopy(ours).to("meta")(tokens)
    broken = copy.deepcopy(ours)
    broken.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(torch.zeros(5, 16))
    with pytest.raises(ValueError, match="word_embeddings"):
        broken(tokens)
    gpt2 = it.TorchModel(random_params(GPT2_LM), GPT2_LM)
    gpt2.lm_head.weight = torch.nn.Parameter(gpt2.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is tied"):
        gpt2(tokens)


def test_nothing_changes_when_a_transform_fails():
    ours = it.TorchModel(random_params(GPT2_LM), GPT2_LM)
    before = {name: (p, p.detach().clone()) for name, p in ours.named_parameters()}
    for change in (lambda: ours.resize_token_embeddings(0), lambda: ours.prune_heads({0: [9]}), lambda: ours.prune_heads({7: [0]})):
        with pytest.raises((ValueError, IndexError)):
            change()
    assert ours.config == GPT2_LM
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in ours.named_parameters())
