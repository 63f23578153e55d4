"""`TorchModel` against transformers on PyTorch: numbers, gradients, optimizers, generation, names."""

from __future__ import annotations

import copy
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
from interop.torch import call
from interop.transformers import to_transformers
from tests import families
from tests.interop.test_transformers import assert_equal

THREE = ["gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm"]
FOUR = [*THREE, "llama/causal-lm/tied-biases"]
HEADS = [
    *FOUR, "gpt2/double-heads", "llama/sequence-classification", "bert/pretraining", "t5/seq2seq-lm", "t5/encoder",
    "mt5/question-answering", "bart/seq2seq-lm", "bart/causal-lm",
]  # fmt: skip


def inputs_of(row, padding=None):
    """The row's inputs as tensors, positions left to the default rule."""
    return {name: torch.from_numpy(a).long() for name, a in row.inputs(padding).items() if name != "positions"}


def module_of(row, dtype=None):
    return it.TorchModel(row.params if dtype is None else fm.cast(row.params, dtype), row.config)


# --- numbers and gradients --------------------------------------------------------------------------------------------


def loss_of(values):
    """A scalar that depends on every number of every output, each with its own weight."""
    total = 0
    for _, value in sorted(values.items()):
        weight = torch.linspace(-9, 9, value.numel()).reshape(value.shape).cos()
        total = total + (value * weight).sum() / value.numel() ** 0.5
    return total


@pytest.mark.parametrize("name", HEADS)
def test_outputs_and_gradients_equal_transformers(case, name):
    row = case(name)
    ours = module_of(row)
    want = families.outputs(families.call(row.model, row.inputs()))
    out = ours(**inputs_of(row), hidden_states=True, attentions=True)
    got = {name: getattr(out, name) for name in want}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    theirs = dict(row.model.named_parameters())
    expected = torch.autograd.grad(loss_of(want), list(theirs.values()), allow_unused=True)
    loss_of(got).backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == theirs.keys()
    for name, gradient in zip(theirs, expected, strict=True):
        gradient = torch.zeros_like(theirs[name]) if gradient is None else gradient
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_optimizer_steps_equal_transformers(case, name, optimizer):
    row = case(name)
    ours, theirs = module_of(row), copy.deepcopy(row.model)
    tokens = inputs_of(row)["tokens"]
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 1e-3, "eps": 1e-4}}[optimizer]

    def losses(model, run):
        stepper = getattr(torch.optim, optimizer)(model.parameters(), **options)
        for _ in range(3):
            stepper.zero_grad()
            loss = torch.nn.functional.cross_entropy(run().flatten(0, 1), tokens.flatten())
            loss.backward()
            stepper.step()
            yield loss.item()

    got = list(losses(ours, lambda: ours(**inputs_of(row), hidden_states=True).logits))
    want = list(losses(theirs, lambda: families.call(theirs, row.inputs()).logits))
    assert got[0] > got[1] > got[2]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name)
        torch.testing.assert_close(parameter, expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_and_the_names_of_transformers(case):
    row = case("bert/base")
    ours = module_of(row)
    tokens, mask, types = inputs_of(row, "left").values()
    positions = torch.arange(7).flip(0).expand_as(tokens)
    names = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "token_type_ids": types}
    with torch.no_grad():
        out, want = ours(**names), row.model(**names)
        torch.testing.assert_close(out.last_hidden_state, want.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.pooler_output, want.pooler_output, atol=1e-5, rtol=1e-5)
        assert out.logits is None
        assert torch.equal(ours(tokens, mask.bool(), positions, types.int()).hidden, out.hidden)
        assert torch.equal(ours(**{**names, "attention_mask": mask.float()}).hidden, out.hidden)


def test_gradients_accumulate_and_frozen_parameters_get_none(case):
    row = case("gpt2/causal-lm")
    ours = module_of(row)
    given = inputs_of(row) | {"hidden_states": True}
    out = ours(**given)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    loss = (scale * out.logits.relu()).sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in ours.named_parameters()}
    assert scale.grad is not None
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])

    frozen = {"transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"}
    ours.zero_grad()
    for name, p in ours.named_parameters():
        p.requires_grad_(name not in frozen)
    (2 * ours(**given).logits.relu()).sum().backward()
    assert {name for name, p in ours.named_parameters() if p.grad is None} == frozen
    torch.testing.assert_close(ours.transformer.ln_f.weight.grad, once["transformer.ln_f.weight"], atol=1e-4, rtol=1e-4)
    assert ours.num_parameters(only_trainable=True) == sum(
        p.numel() for n, p in ours.named_parameters() if n not in frozen
    )
    ours.requires_grad_(False)
    assert not ours(**given).logits.requires_grad


def test_second_derivatives_are_refused_and_not_zero(case):
    row = case("gpt2/causal-lm")
    ours, given = module_of(row), inputs_of(row)
    weight = ours.transformer.wte.weight
    for loss in (ours(**given).logits.sum(), ours(**given).logits.logsumexp(-1).sum()):
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        (again,) = torch.autograd.grad(ours(**given).logits.sum(), weight)
        assert gradient.shape == again.shape
        with pytest.raises(RuntimeError, match="second derivatives are not available"):
            (loss + gradient.square().sum()).backward()


def test_change_in_place_before_backward_is_noticed(case):
    row = case("gpt2/causal-lm")
    ours = module_of(row)
    loss = ours(**inputs_of(row), hidden_states=True).logits.sum()
    with torch.no_grad():
        ours.transformer.wte.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_changes_in_place_are_seen_and_outputs_stay(case):
    row = case("llama/causal-lm")
    ours = module_of(row)
    with torch.no_grad():
        before = ours(**inputs_of(row)).logits
        kept = before.clone()
        ours.lm_head.weight.mul_(2)
        after = ours(**inputs_of(row)).logits
        torch.testing.assert_close(after, 2 * kept)
        assert torch.equal(before, kept)
        other = torch.func.functional_call(ours, {"lm_head.weight": -ours.lm_head.weight}, (), inputs_of(row))
        torch.testing.assert_close(other.logits, -2 * kept)


def test_bfloat16(case):
    row = case("gpt2/causal-lm")
    ours = module_of(row)
    ours.to(torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert ours.lm_head.weight is ours.transformer.wte.weight
    out = ours(**inputs_of(row))
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits.detach(), torch.from_numpy(row.reference()["logits"]), atol=0.1, rtol=0.1)
    out.logits.square().mean().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.params["embed"]["tokens"].dtype == jnp.bfloat16


def test_one_compilation_for_all_steps(case):
    row = case("llama/causal-lm")
    ours = module_of(row)
    optimizer = torch.optim.SGD(ours.parameters(), 0.01)
    functions = (call._run, call._run_with_vjp, call._backward)

    def step():
        ours(**inputs_of(row), hidden_states=True).logits.sum().backward()
        optimizer.step()
        with torch.no_grad():
            ours(**inputs_of(row))

    step()
    sizes = [function._cache_size() for function in functions]
    step()
    assert sizes == [function._cache_size() for function in functions]


# --- names, memory ----------------------------------------------------------------------------------------------------


def test_state_dict_is_that_of_transformers(loaded):
    ours, expected = module_of(loaded), loaded.model.state_dict()
    for state in (it.to_torch(loaded.params, loaded.config), ours.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    spellings = {}
    for name, p in loaded.model.named_parameters(remove_duplicate=False):
        spellings.setdefault(p, []).append(name)
    names = [name for name, _ in ours.named_parameters()]
    theirs = [next(name for name in same if name in names) for same in spellings.values()]
    assert sorted(names) == sorted(theirs)
    assert ours.num_parameters() == loaded.model.num_parameters()
    others = loaded.model.num_parameters(exclude_embeddings=True)
    table = loaded.model.get_input_embeddings().weight
    if spellings[table][0].startswith("lm_head"):  # whose name is then all that transformers looks at
        others -= table.numel()
    assert ours.num_parameters(exclude_embeddings=True) == others
    # Rules of these are in the order of computation, or of RoBERTa: the others' heads come before the base model.
    if loaded.case.family not in ("llama", "xlm-roberta", "camembert") and loaded.case.task != "double-heads":
        assert names == theirs
        assert list(it.to_torch(loaded.params, loaded.config)) == list(expected)
    ours.load_state_dict(expected)
    copy.deepcopy(loaded.model).load_state_dict(ours.state_dict())


def test_torch_model_owns_its_parameters(case):
    row = case("gpt2/causal-lm")
    before = jax.tree.map(lambda a: np.asarray(a).copy(), row.params)
    ours = module_of(row)
    snapshot = ours.params
    with torch.no_grad():
        for p in ours.parameters():
            assert p.is_contiguous()
            p.fill_(0)
    assert_equal(row.params, before)
    assert_equal(snapshot, before)
    assert not np.asarray(ours.params["embed"]["tokens"]).any()


# --- a module as any other ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2/causal-lm", "bert/masked-lm"])
def test_deepcopy_pickle_and_saved_state(case, name):
    row = case(name)
    ours, tokens = module_of(row), inputs_of(row)
    for p in ours.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        want = ours(**tokens).logits
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert len(list(twin.parameters())) == len(list(ours.parameters()))
            assert torch.equal(twin(**tokens).logits, want)
            assert not any(a is b for a, b in zip(twin.parameters(), ours.parameters(), strict=True))
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        other = it.TorchModel(jax.tree.map(jnp.zeros_like, row.params), row.config)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(**tokens).logits, want)
    assert row.config.task in repr(ours)
    assert ours.device == torch.device("cpu")


# --- generation, resizing, pruning, files ------------------------------------------------------------------------------


def test_greedy_generation_equals_transformers(case):
    row = case("llama/causal-lm")
    ours = module_of(row)
    given = inputs_of(row, "left")
    tokens, mask = given["tokens"], given["mask"]
    want = row.model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    got = ours.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=6, generation_config=fm.GenerationConfig()
    )
    assert got.dtype == torch.int64
    assert torch.equal(got[:, :8], want[:, :8])
    theirs = transformers.GenerationConfig(max_new_tokens=6, pad_token_id=3)
    assert torch.equal(ours.generate(tokens, mask, generation_config=theirs), got)
    short = ours.generate(tokens, mask, generation_config=theirs, max_new_tokens=2)
    assert torch.equal(short, got[:, :9])


def test_sampling_wants_and_follows_a_seed(case):
    row = case("llama/causal-lm")
    ours = module_of(row)
    tokens = inputs_of(row)["tokens"]
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0}
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
    with pytest.raises(TypeError, match="generation_config"):
        ours.generate(tokens, generation_config=7)


@pytest.mark.parametrize("name", FOUR)
def test_resize_token_embeddings(case, name):
    row = case(name)
    ours = module_of(row)
    old, size = dict(ours.named_parameters()), row.config.vocab_size
    ours.get_input_embeddings().weight.requires_grad_(False)
    table = ours.resize_token_embeddings(pad_to_multiple_of=16)
    assert table is ours.get_input_embeddings()
    assert table.weight.shape == (64, row.config.hidden_size)
    assert not table.weight.requires_grad
    assert ours.config.vocab_size == 64
    for name, p in ours.named_parameters():
        assert (p is old[name]) == (p.shape == old[name].shape), name
    assert ours.resize_token_embeddings() is table
    if row.case.family == "bert":
        with torch.no_grad():
            logits = ours(**inputs_of(row)).logits[..., :size]
        torch.testing.assert_close(logits, torch.from_numpy(row.reference()["logits"]), atol=1e-5, rtol=1e-5)
    assert ours.resize_token_embeddings(size).weight.shape[0] == size
    assert_equal(ours.params, row.params)


def test_prune_heads_computes_what_masking_does(case):
    row = case("bert/masked-lm")
    ours = module_of(row)
    ours.prune_heads({0: [1], 1: {0, 3}})
    ours.prune_heads({0: [1]})
    assert dict(ours.config.pruned_heads) == {0: (1,), 1: (0, 3)}
    assert ours.bert.encoder.layer[1].attention.self.query.weight.shape == (10, 20)
    masked = fm.mask_heads(row.params, row.config, {0: [1], 1: [0, 3]})
    want = families.reference(to_transformers(masked, row.config, attn_implementation="eager"), row.inputs())
    with torch.no_grad():
        logits = ours(**inputs_of(row)).logits
    torch.testing.assert_close(logits, torch.from_numpy(want["logits"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", THREE)
def test_saved_model_is_loaded_by_transformers_and_by_us(case, name, tmp_path):
    row = case(name)
    ours = module_of(row)
    ours.resize_token_embeddings(70)
    ours.save_pretrained(tmp_path, max_shard_size="10KB")
    theirs, info = type(row.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    again = it.TorchModel.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert it.TorchModel.from_pretrained(tmp_path, dtype="bfloat16", layers="list").dtype == torch.bfloat16


def test_push_to_hub_hands_on_what_it_holds(case, monkeypatch):
    row = case("llama/causal-lm")
    calls = []
    monkeypatch.setattr(fm, "push_to_hub", lambda *args, **options: calls.append((args, options)) or "address")
    assert module_of(row).push_to_hub("me/tiny", private=True) == "address"
    ((params, config, name), options) = calls[0]
    assert_equal(params, row.params)
    assert (config, name, options) == (row.config, "me/tiny", {"private": True})


# --- errors ------------------------------------------------------------------------------------------------------------


def test_forward_names_what_is_wrong(case):
    row = case("bert/masked-lm")
    ours = module_of(row)
    tokens, mask, types = inputs_of(row).values()
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
    for bad in (tokens - 61, tokens + 61, tokens + 2**32):
        with pytest.raises(ValueError, match="0 … 60"):
            ours(bad)
    with pytest.raises(ValueError, match="0 … 2"):
        ours(tokens, token_types=types + 3)
    with pytest.raises(ValueError, match="0 … 31"):
        ours(tokens, positions=tokens + 32)
    with pytest.raises(ValueError, match="mask has shape"):
        ours(tokens, mask[:, 1:])
    with pytest.raises(ValueError, match="mask holds 1"):
        ours(tokens, mask - 2)
    with pytest.raises(ValueError, match="32 positions"):
        ours(torch.ones(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="float64"):
        copy.deepcopy(ours).double()(tokens)
    broken = copy.deepcopy(ours)
    broken.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(torch.zeros(5, 20))
    with pytest.raises(ValueError, match="word_embeddings"):
        broken(tokens)
    with pytest.raises(ValueError, match="on meta"):
        module_of(case("llama/causal-lm")).to("meta")(tokens)
    untied = module_of(case("gpt2/causal-lm"))
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is tied"):
        untied(tokens)


def test_nothing_changes_when_a_transform_fails(case):
    row = case("gpt2/causal-lm")
    ours = module_of(row)
    before = {name: (p, p.detach().clone()) for name, p in ours.named_parameters()}
    for change in (
        lambda: ours.resize_token_embeddings(0),
        lambda: ours.prune_heads({0: [9]}),
        lambda: ours.prune_heads({7: [0]}),
    ):
        with pytest.raises((ValueError, IndexError)):
            change()
    assert ours.config == row.config
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in ours.named_parameters())
