"""`interop.transformers`: the real classes of transformers with our weights, and back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import fmodels as fm
from interop.torch import to_torch
from interop.transformers import from_transformers, to_transformers

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "head_dim": 4, "max_positions": 24}
LLAMA = {**SIZES, "num_kv_heads": 2, "intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {**SIZES, "num_kv_heads": 4, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**SIZES, "num_kv_heads": 4, "intermediate_size": 24}

CASES = [
    *(fm.models.gpt2.Config(**GPT2, task=task) for task in fm.models.gpt2.Config.ARCHITECTURES if task != "sequence-classification"),
    fm.models.gpt2.Config(**GPT2, task="sequence-classification", num_labels=3, labels=("x", "y", "z"), pad_token_id=0),
    fm.models.gpt2.Config(**GPT2, task="causal-lm", tie_word_embeddings=False),
    *(fm.models.llama.Config(**LLAMA, task=task, pad_token_id=0) for task in fm.models.llama.Config.ARCHITECTURES),
    fm.models.llama.Config(**LLAMA, task="causal-lm", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    *(fm.models.bert.Config(**BERT, task=task) for task in fm.models.bert.Config.ARCHITECTURES if task != "causal-lm"),
    fm.models.bert.Config(**BERT, task="causal-lm", causal=True),
    fm.models.bert.Config(**BERT, task="masked-lm", tie_word_embeddings=False),
]


def name_of(config):
    return f"{config.model_type}-{config.task}{'' if config.tie_word_embeddings else '-untied'}"


def random_params(config, dtype="float32", seed=0):
    """Random parameters in which nothing has a value that would hide its absence: norms and biases are moved, too."""
    params = fm.init(config, jax.random.key(seed))
    if config.model_type == "bert" and config.untied and config.task == "masked-lm":
        params = fm.tree.update(params, {"lm_head.spare_bias": jnp.zeros(config.vocab_size)})
    rng = np.random.default_rng(seed)
    return fm.tree.map_leaves(lambda path, a: (a + 0.2 * rng.standard_normal(a.shape, np.float32)).astype(dtype), params)


def inputs_of(config, seed=1):
    rng = np.random.default_rng(seed)
    shape = (2, 3, 7) if config.task in ("multiple-choice", "double-heads") else (3, 7)
    tokens = torch.from_numpy(rng.integers(3, config.vocab_size, shape))
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., 5:] = 0
    tokens[mask == 0] = config.pad_token_id or 0
    return tokens, mask


def reference(model, tokens, mask):
    """transformers' numbers by the names of `fm.Output`."""
    options = {} if not hasattr(model, "multiple_choice_head") else {"mc_token_ids": mask.sum(-1) - 1}
    if model.config.model_type == "gpt2":  # where transformers does not derive positions from the mask
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).flatten(0, -2)
    out = model(tokens, attention_mask=mask, **options)
    found = {"hidden": getattr(out, "last_hidden_state", None), "pooled": getattr(out, "pooler_output", None)}
    if "start_logits" in out:
        found["logits"] = torch.stack([out.start_logits, out.end_logits], -1)
    else:
        found["logits"] = out.get("logits", out.get("prediction_logits"))
    found["sequence_logits"] = out.get("mc_logits", out.get("seq_relationship_logits"))
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("config", CASES, ids=name_of)
def test_real_class_computes_the_same_and_comes_back(config):
    params = random_params(config)
    model = to_transformers(params, config, attn_implementation="eager")
    assert not model.training
    assert type(model).__name__ == config.ARCHITECTURES[config.task]
    tokens, mask = inputs_of(config)
    with torch.no_grad():
        want = reference(model, tokens, mask)
    got = fm.forward(params, config, tokens.numpy().astype(np.int32), mask=mask.numpy().astype(np.int32))
    real = mask.numpy().astype(bool)
    assert want
    for name, value in want.items():
        a, b = np.asarray(getattr(got, name)), value.numpy()
        if a.shape[: real.ndim] == real.shape:
            a, b = a[real], b[real]
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)

    again, same = from_transformers(model)
    assert same == config
    assert_equal(again, params)


def assert_equal(a, b):
    a, b = fm.tree.flatten(a), fm.tree.flatten(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert leaf.dtype == b[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.parametrize("config", [CASES[1], CASES[8], CASES[-1]], ids=name_of)
def test_dtypes_are_kept_tensor_by_tensor(config):
    params = random_params(config, "bfloat16")
    params = fm.tree.map_leaves(lambda path, a: a.astype("float32") if path.endswith(".scale") else a, params)
    model = to_transformers(params, config)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert_equal(from_transformers(model)[0], params)


def test_weights_are_copies_and_the_head_is_tied():
    config = fm.models.gpt2.Config(**GPT2, task="causal-lm")
    params = random_params(config)
    before = {name: tensor.clone() for name, tensor in to_torch(params, config).items()}
    model = to_transformers(params, config)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            assert parameter.is_contiguous()
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in to_torch(params, config).items())


def test_saved_model_is_loaded_by_us(tmp_path):
    config = fm.models.llama.Config(**LLAMA, task="causal-lm")
    params = random_params(config)
    to_transformers(params, config).save_pretrained(tmp_path)
    again, same = fm.load(tmp_path)
    assert same == config
    assert_equal(again, params)


def test_generation_config_goes_both_ways():
    options = fm.GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.5, eos_token_id=(2, 3))
    config = fm.models.llama.Config(**LLAMA, task="causal-lm", generation=options)
    model = to_transformers(random_params(config), config)
    assert model.generation_config.temperature == 0.5
    assert model.generation_config.eos_token_id == [2, 3]
    generation = from_transformers(model)[1].generation
    assert (generation.max_new_tokens, generation.temperature, generation.eos_token_id) == (3, 0.5, (2, 3))
    generation.require_supported("test")


def test_bert_without_pooler():
    config = fm.models.bert.Config(**BERT, task="base")
    params = fm.tree.remove(random_params(config), "pooler")
    model = to_transformers(params, config)
    assert model.pooler is None
    assert_equal(from_transformers(model)[0], params)


def test_bert_untied_spare_bias_goes_both_ways():
    config = fm.models.bert.Config(**BERT, task="masked-lm", tie_word_embeddings=False)
    hf = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, tie_word_embeddings=False
        )
    )
    torch.nn.init.normal_(hf.cls.predictions.bias)
    torch.nn.init.normal_(hf.cls.predictions.decoder.bias)
    params, read = from_transformers(hf)
    assert read.untied == config.untied
    back = to_transformers(params, read).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in hf.state_dict().items())


def test_pruned_models_are_refused():
    config = fm.models.gpt2.Config(**GPT2, task="causal-lm")
    pruned = fm.prune_heads(random_params(config), config, {1: [0]})
    with pytest.raises(ValueError, match="mask_heads"):
        to_transformers(*pruned)
    masked = fm.mask_heads(random_params(config), config, {1: [0]})
    tokens, mask = inputs_of(config)
    with torch.no_grad():
        want = reference(to_transformers(masked, config, attn_implementation="eager"), tokens, mask)["logits"]
    got = fm.forward(*pruned, jnp.asarray(tokens.numpy().astype(np.int32)), mask=jnp.asarray(mask.numpy().astype(np.int32))).logits
    real = mask.numpy().astype(bool)
    np.testing.assert_allclose(np.asarray(got)[real], want.numpy()[real], atol=1e-5, rtol=1e-5)


def test_wrong_arguments():
    config = fm.models.gpt2.Config(**GPT2, task="causal-lm")
    with pytest.raises(TypeError, match=r"interop\.torch\.from_torch"):
        from_transformers(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"embed\.tokens"):
        to_transformers(random_params(config), dataclasses.replace(config, hidden_size=32))
    with pytest.raises(ValueError, match="t5"):
        from_transformers(transformers.T5Model(transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, vocab_size=9)))
