"""Tiny random models of transformers and what `fmodels` reads of them, prompts, and `generate` of both."""

from typing import Any

import numpy as np
import torch
import transformers as hf

import fmodels as fm
from interop.transformers import from_transformers

VOCAB, PAD = 61, 3


def pair(name: str, *, peaked: float = 1.0):
    """A model of transformers, parameters and config; `peaked` multiplies its logits."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "attn_implementation": "eager", "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=64, n_embd=24, n_layer=2, n_head=4, **shared))
    else:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=10, max_position_embeddings=64, **shared,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        norm = model.transformer.ln_f if name == "gpt2" else model.model.norm
        for parameter in norm.parameters():
            parameter.mul_(peaked)
    return model.eval(), *from_transformers(model)


def prompts(batch: int, length: int, seed: int = 0):
    """Tokens and mask, padded on the left."""
    random = np.random.default_rng(seed)
    mask = np.arange(length)[None] >= (np.arange(batch) * 2 % length)[:, None]
    return np.where(mask, random.integers(10, VOCAB, (batch, length)), PAD), mask.astype(np.int64)


def likely(model, count: int) -> list[int]:
    """The tokens that are the likeliest on average: good end tokens for a test."""
    tokens, _ = prompts(16, 12, seed=99)
    with torch.no_grad():
        mean = torch.softmax(model(torch.tensor(tokens)).logits, -1).mean((0, 1))
    return mean.topk(count).indices.tolist()


def theirs(model, tokens, mask, **options):
    """What transformers gives, as an output of `generate`."""
    options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, **options}
    with torch.no_grad():
        return model.generate(torch.tensor(tokens), attention_mask=torch.tensor(mask), **options)


def ours(params, config, tokens, mask, *, key=None, **options):
    """What `fm.generate` gives for the same options."""
    count = options.pop("max_new_tokens", None)
    options = fm.GenerationConfig(**options)
    return fm.generate(params, config, tokens, mask=mask, max_new_tokens=count, key=key, options=options)
