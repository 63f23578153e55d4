"""Make golden files of the generation strategies that transformers 5 no longer has, with transformers 4.55.4.

4.55.4 is the last version whose own code has all four: group (diverse) beam search, constrained beam search,
contrastive search and DoLa. Plain beam search is here too, as a cross-check of the live comparisons.

    python3.11 -m venv .venv-generation
    .venv-generation/bin/pip install "transformers==4.55.4" torch==2.13.0 "numpy<2" safetensors
    .venv-generation/bin/python tests/goldens/make_generation.py      # writes tests/goldens/generation

(torch==2.13.0 is the CPU build where this was made. `make_generation_flax.py` adds `cases_flax.json` to each folder.)

Per model a folder with a tiny checkpoint (`config.json`, `model.safetensors`; there is no `generation_config.json`, and
`config.json` names no end token: whatever a case needs is in its `kwargs`) and `cases.json`, a list of cases, each

- `name`, unique in its file, and `strategy`: `beam`, `group`, `constrained`, `contrastive` or `dola`;
- `tokens`, `mask`: the prompts and their attention mask, rows of ints; padded left, for encoder-decoder models right;
- `kwargs`: what `generate` was given beside them, by transformers' names; `constraints` is written as a list of
  `{"phrasal": [token, …]}` (`PhrasalConstraint`) and `{"disjunctive": [[token, …], …]}` (`DisjunctiveConstraint`);
- `sequences`: the answer, rows of ints: prompt (or the decoder's start token), new tokens, pads;
- `sequences_scores`, for the three strategies with beams: float32;
- `step_scores`, for the other two: at each new token the processed score that it was chosen with (contrastive search:
  its logit before the softmax), null after a row's end.

Prompts (and the words of constraints, from those that the model likes) are drawn until the answer is worth keeping: it
is the same under slightly other weights (so no tie of rounding decides) and differs from what the plain strategy gives;
where an end token is given, rows end at different lengths, and of constraints at least one row a prompt fulfils all. The
last two are waived after a few draws: transformers itself often finds nothing better. The same seeds give the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DisjunctiveConstraint,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhrasalConstraint,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.beam_search import ConstrainedBeamSearchScorer

TRANSFORMERS = "4.55.4"
PAD, START, END, END_2 = 3, 5, 7, 11
DRAWS, ENOUGH = 20, 6  # draws of prompts at most, and when what is only fair is taken
SAME_LENGTH, UNFULFILLED = "all of one length", "not all constraints fulfilled"  # fair
PERTURBATION = 2e-5  # of each weight; other float32 implementations differ by less

T5 = {
    "vocab_size": 57,
    "d_model": 24,
    "d_kv": 7,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": PAD,
    "eos_token_id": None,
    "decoder_start_token_id": START,
}


class Recipe(NamedTuple):
    """A model, and how its random weights are moved away from where they start."""

    model_class: type[PreTrainedModel]
    config: transformers.PretrainedConfig
    seed: int
    inner: float  # standard deviation of matrices times the root of their inputs
    logits: float  # standard deviation of a token's logits over contexts
    ends: tuple[float, float]  # by how much the logits of END and END_2 are above the average one
    last_norm: str  # its signs are mixed: else tied models repeat the last token for ever


RECIPES = {
    "gpt2": Recipe(
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=61,
            n_positions=40,
            n_embd=20,
            n_layer=5,
            n_head=4,
            n_inner=40,
            bos_token_id=None,
            eos_token_id=None,
        ),
        seed=2,
        inner=4.0,
        logits=2.0,
        ends=(2.5, 2.0),
        last_norm="transformer.ln_f.weight",
    ),
    "llama": Recipe(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=59,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=40,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        ),
        seed=2,
        inner=1.5,
        logits=2.0,
        ends=(2.5, 2.0),
        last_norm="model.norm.weight",
    ),
    "t5": Recipe(
        T5ForConditionalGeneration,
        T5Config(feed_forward_proj="relu", tie_word_embeddings=True, **T5),
        seed=1,
        inner=2.5,
        logits=2.0,
        ends=(2.5, 2.0),
        last_norm="decoder.final_layer_norm.weight",
    ),
    "t5_gated": Recipe(
        T5ForConditionalGeneration,
        T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5),
        seed=1,
        inner=2.5,
        logits=2.0,
        ends=(2.5, 2.0),
        last_norm="decoder.final_layer_norm.weight",
    ),
    "bart": Recipe(
        BartForConditionalGeneration,
        BartConfig(
            vocab_size=58,
            max_position_embeddings=40,
            d_model=24,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=3,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=28,
            scale_embedding=True,
            bos_token_id=None,
            pad_token_id=PAD,
            eos_token_id=None,
            forced_eos_token_id=None,
            decoder_start_token_id=START,
        ),
        seed=0,
        inner=0.7,
        logits=2.0,
        ends=(2.5, 2.0),
        last_norm="model.decoder.layers.2.final_layer_norm.weight",
    ),
}

# One case: its name and what `generate` is given. `ends` says which end tokens there are, `rows` is the batch size,
# `prompt` puts these tokens at the end of each prompt. `max_new_tokens` is 12 unless given.
ONE, TWO, NONE = END, [END, END_2], None
BEAM: dict[str, dict[str, Any]] = {
    "beams_2": {"num_beams": 2},
    "beams_3_all": {"num_beams": 3, "num_return_sequences": 3},
    "beams_5_lp_0": {"num_beams": 5, "length_penalty": 0.0, "num_return_sequences": 2},
    "beams_4_lp_2": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 4},
    "beams_4_lp_-1": {"num_beams": 4, "length_penalty": -1.0, "num_return_sequences": 4},
    "beams_3_early": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 3},
    "beams_5_early_lp_2": {"num_beams": 5, "early_stopping": True, "length_penalty": 2.0, "num_return_sequences": 3},
    "beams_4_never_lp_0.8": {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.8},
    "beams_4_never_lp_2": {
        "num_beams": 4,
        "early_stopping": "never",
        "length_penalty": 2.0,
        "num_return_sequences": 4,
    },
    "beams_3_never_lp_-1": {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    "beams_3_two_ends": {"num_beams": 3, "num_return_sequences": 3, "ends": TWO},
    "beams_4_two_ends_early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4, "ends": TWO},
    "beams_4_no_end": {"num_beams": 4, "num_return_sequences": 2, "ends": NONE},
    "beams_4_pad_is_end": {"num_beams": 4, "num_return_sequences": 3, "pad_token_id": END},
    "beams_4_processed": {
        "num_beams": 4,
        "num_return_sequences": 2,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
    },
}
GROUP: dict[str, dict[str, Any]] = {
    "4_in_2": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "4_in_2_all": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.5, "num_return_sequences": 4},
    "6_in_3": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5, "num_return_sequences": 3},
    "6_in_2_all": {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 1.5, "num_return_sequences": 6},
    "4_in_4_all": {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.5, "num_return_sequences": 4},
    "6_in_3_lp_0": {
        "num_beams": 6,
        "num_beam_groups": 3,
        "diversity_penalty": 1.5,
        "length_penalty": 0.0,
        "num_return_sequences": 3,
    },
    "4_in_2_lp_2": {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 0.5,
        "length_penalty": 2.0,
        "num_return_sequences": 2,
    },
    "6_in_2_lp_-1": {
        "num_beams": 6,
        "num_beam_groups": 2,
        "diversity_penalty": 0.5,
        "length_penalty": -1.0,
        "num_return_sequences": 4,
    },
    "4_in_2_early": {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 1.5,
        "early_stopping": True,
        "num_return_sequences": 4,
    },
    "6_in_3_never_lp_0.8": {
        "num_beams": 6,
        "num_beam_groups": 3,
        "diversity_penalty": 0.5,
        "early_stopping": "never",
        "length_penalty": 0.8,
        "num_return_sequences": 2,
    },
    "4_in_2_never_lp_-1": {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 1.5,
        "early_stopping": "never",
        "length_penalty": -1.0,
        "num_return_sequences": 4,
    },
    "4_in_2_no_end": {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 0.5,
        "num_return_sequences": 2,
        "ends": NONE,
    },
    "6_in_3_no_end_all": {
        "num_beams": 6,
        "num_beam_groups": 3,
        "diversity_penalty": 1.5,
        "num_return_sequences": 6,
        "ends": NONE,
        "rows": 2,
    },
    "6_in_2_two_ends": {
        "num_beams": 6,
        "num_beam_groups": 2,
        "diversity_penalty": 1.5,
        "num_return_sequences": 3,
        "ends": TWO,
    },
    "4_in_2_pad_is_end": {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 0.5,
        "num_return_sequences": 3,
        "pad_token_id": END,
    },
    "6_in_3_processed": {
        "num_beams": 6,
        "num_beam_groups": 3,
        "diversity_penalty": 0.5,
        "num_return_sequences": 3,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
    },
}
CONSTRAINED: dict[str, dict[str, Any]] = {
    "one_token": {"num_beams": 4, "force_words_ids": [[21]]},
    "two_tokens": {"num_beams": 4, "force_words_ids": [[33, 14]], "num_return_sequences": 4},
    "three_tokens": {"num_beams": 5, "force_words_ids": [[44, 9, 30]], "num_return_sequences": 2},
    "repeated_token": {"num_beams": 4, "force_words_ids": [[26, 26]], "num_return_sequences": 2},
    "two_phrases": {"num_beams": 6, "force_words_ids": [[21], [40, 18]], "num_return_sequences": 3},
    "three_phrases": {"num_beams": 6, "force_words_ids": [[50], [16, 28], [37, 12, 22]], "num_return_sequences": 2},
    "phrases_that_share": {"num_beams": 5, "force_words_ids": [[19, 31], [31, 19]], "num_return_sequences": 2},
    "disjunctive": {"num_beams": 4, "force_words_ids": [[[21], [35, 10]]], "num_return_sequences": 2},
    "disjunctive_prefix": {
        "num_beams": 4,
        "force_words_ids": [[[24, 13], [24, 41, 8]]],
        "num_return_sequences": 4,
    },
    "disjunctive_three": {
        "num_beams": 6,
        "force_words_ids": [[[45, 17, 29], [45, 17, 6], [45, 51, 20], [27, 39]]],
        "num_return_sequences": 3,
    },
    "phrase_and_disjunctive": {
        "num_beams": 5,
        "force_words_ids": [[15, 47], [[23], [36, 48]]],
        "num_return_sequences": 3,
    },
    "early": {
        "num_beams": 4,
        "force_words_ids": [[33, 14]],
        "early_stopping": True,
        "num_return_sequences": 4,
    },
    "never_lp_2": {
        "num_beams": 4,
        "force_words_ids": [[42], [25, 34]],
        "early_stopping": "never",
        "length_penalty": 2.0,
        "num_return_sequences": 2,
    },
    "lp_0": {"num_beams": 5, "force_words_ids": [[21, 38]], "length_penalty": 0.0, "num_return_sequences": 3},
    "lp_-1": {"num_beams": 4, "force_words_ids": [[46]], "length_penalty": -1.0, "num_return_sequences": 2},
    "no_end": {"num_beams": 4, "force_words_ids": [[32, 19], [43]], "num_return_sequences": 4, "ends": NONE},
    "two_ends": {"num_beams": 4, "force_words_ids": [[20, 49]], "num_return_sequences": 2, "ends": TWO},
    "pad_is_end": {"num_beams": 4, "force_words_ids": [[31]], "num_return_sequences": 3, "pad_token_id": END},
    "processed": {
        "num_beams": 4,
        "force_words_ids": [[22, 30]],
        "num_return_sequences": 2,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_new_tokens": 5,
    },
    "phrase_in_prompt": {
        "num_beams": 4,
        "force_words_ids": [[18, 29]],
        "num_return_sequences": 2,
        "prompt": [18, 29],
        "free": True,
    },
    "phrase_begun_in_prompt": {
        "num_beams": 4,
        "force_words_ids": [[18, 29]],
        "num_return_sequences": 2,
        "prompt": [18],
    },
    "too_few_steps": {
        "num_beams": 4,
        "force_words_ids": [[44, 9, 30]],
        "num_return_sequences": 1,
        "ends": NONE,
        "max_new_tokens": 2,
        "free": True,
    },
    "constraint_phrasal": {"num_beams": 4, "constraints": [{"phrasal": [28, 16]}], "num_return_sequences": 2},
    "constraint_disjunctive": {
        "num_beams": 5,
        "constraints": [{"disjunctive": [[39], [12, 50]]}],
        "num_return_sequences": 2,
    },
    "constraints_and_words": {
        "num_beams": 6,
        "constraints": [{"disjunctive": [[39, 8], [12]]}, {"phrasal": [34]}],
        "force_words_ids": [[27, 48]],
        "num_return_sequences": 2,
    },
    # One answer a prompt is fulfilled where it can be; more are filled with better scored ones that are not.
    "two_phrases_best": {"num_beams": 6, "force_words_ids": [[21], [40, 18]]},
    "three_phrases_best": {"num_beams": 6, "force_words_ids": [[50], [16, 28], [37, 12, 22]]},
    "phrases_that_share_best": {"num_beams": 5, "force_words_ids": [[19, 31], [31, 19]]},
    "disjunctive_three_best": {
        "num_beams": 6,
        "force_words_ids": [[[45, 17, 29], [45, 17, 6], [45, 51, 20], [27, 39]]],
    },
    "phrase_and_disjunctive_best": {"num_beams": 5, "force_words_ids": [[15, 47], [[23], [36, 48]]]},
}
CONTRASTIVE: dict[str, dict[str, Any]] = {
    "a_0.3_k_2": {"penalty_alpha": 0.3, "top_k": 2},
    "a_0.3_k_4": {"penalty_alpha": 0.3, "top_k": 4},
    "a_0.6_k_2": {"penalty_alpha": 0.6, "top_k": 2},
    "a_0.6_k_4": {"penalty_alpha": 0.6, "top_k": 4},
    "a_0.6_k_6": {"penalty_alpha": 0.6, "top_k": 6},
    "a_0.9_k_4": {"penalty_alpha": 0.9, "top_k": 4},
    "a_0.9_k_6": {"penalty_alpha": 0.9, "top_k": 6},
    "a_0.3_k_6_no_end": {"penalty_alpha": 0.3, "top_k": 6, "ends": NONE},
    "a_0.6_k_4_no_end": {"penalty_alpha": 0.6, "top_k": 4, "ends": NONE},
    "a_0.9_k_2_no_end": {"penalty_alpha": 0.9, "top_k": 2, "ends": NONE},
    "a_0.6_k_4_one_row": {"penalty_alpha": 0.6, "top_k": 4, "rows": 1},
    "a_0.6_k_4_two_ends": {"penalty_alpha": 0.6, "top_k": 4, "ends": TWO},
    "a_0.3_k_4_pad_is_end": {"penalty_alpha": 0.3, "top_k": 4, "pad_token_id": END},
    "a_0.6_k_4_processed": {"penalty_alpha": 0.6, "top_k": 4, "repetition_penalty": 1.3, "min_new_tokens": 4},
}
DOLA: dict[str, dict[str, Any]] = {
    "low": {"dola_layers": "low"},
    "low_penalty": {"dola_layers": "low", "repetition_penalty": 1.2},
    "low_no_end": {"dola_layers": "low", "ends": NONE},
    "high": {"dola_layers": "high"},
    "high_penalty": {"dola_layers": "high", "repetition_penalty": 1.2},
    "high_no_end": {"dola_layers": "high", "ends": NONE},
    "high_no_end_penalty": {"dola_layers": "high", "ends": NONE, "repetition_penalty": 1.2},
    "layer_3": {"dola_layers": [3]},
    "layers_1_3": {"dola_layers": [1, 3], "repetition_penalty": 1.2},
    "layers_0_2_4": {"dola_layers": [0, 2, 4]},
    "layers_1_2_3_99_no_end": {"dola_layers": [1, 2, 3, 99], "ends": NONE},
    "high_one_row": {"dola_layers": "high", "rows": 1},
    "high_two_ends": {"dola_layers": "high", "ends": TWO},
    "layers_1_3_pad_is_end": {"dola_layers": [1, 3], "pad_token_id": END},
    "layers_2_4_processed": {"dola_layers": [2, 4], "repetition_penalty": 1.2, "min_new_tokens": 5},
}
STRATEGIES = {"beam": BEAM, "group": GROUP, "constrained": CONSTRAINED, "contrastive": CONTRASTIVE, "dola": DOLA}
# What makes a strategy of a plain one; without these the answer must be another one.
MARKS = {
    "beam": {"num_beams", "num_return_sequences", "length_penalty", "early_stopping"},
    "group": {"num_beam_groups", "diversity_penalty"},
    "constrained": {"force_words_ids", "constraints"},
    "contrastive": {"penalty_alpha", "top_k"},
    "dola": {"dola_layers"},
}


class Answer(NamedTuple):
    """What `generate` gave."""

    sequences: list[list[int]]
    sequences_scores: list[float] | None
    step_scores: list[list[float | None]] | None


def raise_logit(model: PreTrainedModel, inputs: dict[str, torch.Tensor], token: int, above: float) -> None:
    """Move a token's output embedding, so that its logit is `above` over the average one, on average."""
    output = model.get_output_embeddings()
    seen: list[torch.Tensor] = []
    hook = output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(**inputs).logits
    hook.remove()
    mean = seen[0].mean((0, 1))
    output.weight[token] += (above + logits.mean() - logits[..., token].mean()) * mean / mean.dot(mean)


def make_model(recipe: Recipe) -> PreTrainedModel:
    """A random model whose logits are sometimes peaked and sometimes flat, and which ends now and then."""
    torch.manual_seed(recipe.seed)
    config = type(recipe.config).from_dict(recipe.config.to_dict(), attn_implementation="eager")
    model = recipe.model_class(config).eval()
    output = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
                if name == recipe.last_norm:
                    parameter *= torch.randint(2, parameter.shape) * 2 - 1
            elif "embed" in name or "shared" in name or "wte" in name or "wpe" in name or "relative" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                inputs = parameter.shape[0 if isinstance(model, GPT2LMHeadModel) else 1]
                scale = recipe.inner / math.sqrt(inputs)
                if isinstance(model, T5ForConditionalGeneration) and name.endswith("SelfAttention.q.weight"):
                    scale /= math.sqrt(config.d_kv)
                parameter.copy_(scale * torch.randn_like(parameter))
        if isinstance(model, BartForConditionalGeneration):
            model.final_logits_bias.copy_(0.3 * torch.randn_like(model.final_logits_bias))

        sizes = 0.6 + 0.8 * torch.rand(config.vocab_size, 1)  # some tokens are louder than others
        output.weight.mul_(sizes)
        tokens = torch.randint(config.vocab_size, (64, 12))
        inputs = {"input_ids": tokens}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens.flip(0)
        for _ in range(4 if config.tie_word_embeddings else 1):  # tied: another scale is another model
            logits = model(**inputs).logits
            output.weight.mul_(recipe.logits / (logits - logits.mean((0, 1))).std())
        if isinstance(model, BartForConditionalGeneration):
            model.final_logits_bias -= model(**inputs).logits.mean((0, 1))  # else one token is always the best
        for token, above in zip((END, END_2), recipe.ends, strict=True):
            raise_logit(model, inputs, token, above)
        output.weight[PAD] *= 0.5
    return model


def perturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with weights that are very slightly different."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1 + PERTURBATION * torch.randn(parameter.shape, generator=generator)
    return other


def draw_prompts(model: PreTrainedModel, generator: torch.Generator, rows: int, inside: list[int]) -> dict[str, Any]:
    """Rows of random tokens of different lengths, without the special ones; `inside` ends each."""
    allowed = torch.tensor([t for t in range(model.config.vocab_size) if t not in (PAD, START, END, END_2)])
    width = int(torch.randint(5, 8, (), generator=generator))
    tokens = allowed[torch.randint(len(allowed), (rows, width), generator=generator)]
    mask = torch.ones_like(tokens)
    for row in range(1, rows):
        pads = (1, 3)[row % 2] if row < 3 else 0
        where = slice(width - pads, width) if model.config.is_encoder_decoder else slice(pads)
        mask[row, where] = 0
    tokens[mask == 0] = PAD
    if inside:
        tokens[:, width - len(inside) :] = torch.tensor(inside)
    return {"input_ids": tokens, "attention_mask": mask}


def parse(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` from what is written down."""
    kinds = {"phrasal": PhrasalConstraint, "disjunctive": DisjunctiveConstraint}
    result = copy.deepcopy(kwargs)
    if "constraints" in result:
        result["constraints"] = [kinds[kind](value) for one in result["constraints"] for kind, value in one.items()]
    return result


def float32(value: torch.Tensor) -> float:
    """A float that prints as short as a float32 can."""
    return float(str(np.float32(value.item())))


def run_constrained(model: PreTrainedModel, given: dict[str, Any]) -> Answer:
    """What `generate` gives with constraints: the scores as the scorer returns them.

    `generate` returns scores only together with `beam_indices`, and raises if some of these are missing: those of
    beams that fill the answer although they do not fulfil all constraints.
    """
    results = []
    finalize = ConstrainedBeamSearchScorer.finalize

    def record(self: ConstrainedBeamSearchScorer, *arguments: Any, **options: Any) -> Any:
        results.append(finalize(self, *arguments, **options))
        return results[-1]

    ConstrainedBeamSearchScorer.finalize = record
    try:
        sequences = model.generate(**given)
    finally:
        ConstrainedBeamSearchScorer.finalize = finalize
    return Answer(sequences.tolist(), [float32(score) for score in results[0]["sequence_scores"]], None)


def run(model: PreTrainedModel, prompts: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> Answer:
    """What `generate` gives."""
    given = {**prompts, **parse(kwargs), "do_sample": False, "use_cache": True}
    if MARKS["constrained"] & set(kwargs):
        return run_constrained(model, given)
    out = model.generate(**given, return_dict_in_generate=True, output_scores=True)
    if kwargs.get("num_beams", 1) > 1:
        return Answer(out.sequences.tolist(), [float32(score) for score in out.sequences_scores], None)
    ends = kwargs.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    first = out.sequences.shape[1] - len(out.scores)
    steps = []
    for row, sequence in enumerate(out.sequences[:, first:].tolist()):
        length = next((i + 1 for i, token in enumerate(sequence) if token in ends), len(sequence))
        values = [float32(out.scores[i][row, token]) for i, token in enumerate(sequence[:length])]
        steps.append(values + [None] * (len(sequence) - length))
    return Answer(out.sequences.tolist(), None, steps)


def lengths(answer: Answer, first: int, ends: list[int]) -> list[int]:
    """How many new tokens each row has, its end token included."""
    rows = [row[first:] for row in answer.sequences]
    return [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]


def includes(row: list[int], words: list[Any]) -> bool:
    """Whether all of the phrases are in the row, and one of each disjunctive list."""

    def found(phrase: list[int]) -> bool:
        return any(row[i : i + len(phrase)] == phrase for i in range(len(row)))

    return all(any(map(found, word)) if isinstance(word[0], list) else found(word) for word in words)


def likely_tokens(model: PreTrainedModel, prompts: dict[str, torch.Tensor]) -> list[int]:
    """The tokens that greedy search and sampling give after these prompts, most frequent first."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = model.generate(**prompts, do_sample=True, num_return_sequences=8, max_new_tokens=12, pad_token_id=PAD)
    counts = torch.bincount(out[:, -12:].flatten(), minlength=model.config.vocab_size)
    counts[[PAD, START, END, END_2]] = -1
    return counts.argsort(descending=True, stable=True).tolist()


def replace(value: Any, tokens: dict[int, int]) -> Any:
    """The same lists and dicts with other tokens."""
    if isinstance(value, list):
        return [replace(one, tokens) for one in value]
    if isinstance(value, dict):
        return {key: replace(one, tokens) for key, one in value.items()}
    return tokens.setdefault(value, len(tokens))


def draws(
    name: str, strategy: str, options: dict[str, Any], models: list[PreTrainedModel], seed: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """Cases of one kind, each with what speaks against it ("" if nothing)."""
    options = {"max_new_tokens": 12, "pad_token_id": PAD, **options}
    rows, inside, free = options.pop("rows", 3), options.pop("prompt", []), options.pop("free", False)
    kwargs = {**options, "eos_token_id": options.pop("ends", ONE)}
    kwargs = {key: value for key, value in kwargs.items() if key != "ends"}
    ends = kwargs["eos_token_id"]
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not ends:
        del kwargs["eos_token_id"]
    plain = {key: value for key, value in kwargs.items() if key not in MARKS[strategy]}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS):
        prompts = draw_prompts(models[0], generator, rows, inside)
        first = 1 if models[0].config.is_encoder_decoder else prompts["input_ids"].shape[1]
        if strategy == "constrained" and not inside:  # words that the model might say: others never end in time
            numbers: dict[int, int] = {}
            words = {
                key: replace(options[key], numbers) for key in ("constraints", "force_words_ids") if key in options
            }
            kwargs |= replace(words, dict(enumerate(likely_tokens(models[0], prompts))))
        answer = run(models[0], prompts, kwargs)
        reasons = []
        counts = lengths(answer, first, ends)
        if not np.isfinite(answer.sequences_scores or [0]).all():
            reasons.append("a score of minus infinity")  # of a forced token that a processor bans
        if ends and rows == 1 and counts[0] < 5:
            reasons.append("too short")
        if len({token for row in answer.sequences for token in row[first:]}) < 5 and not free:
            reasons.append("too few tokens")
        if not reasons and not free and run(models[0], prompts, plain).sequences == answer.sequences:
            reasons.append("no other than the plain one")
        if not reasons and any(run(other, prompts, kwargs).sequences != answer.sequences for other in models[1:]):
            reasons.append("a tie of rounding")
        words = [value for one in kwargs.get("constraints", []) for value in one.values()]
        words += kwargs.get("force_words_ids", [])
        good = [includes(row[0 if inside else first :], words) for row in answer.sequences]
        if not reasons and not free and not np.reshape(good, (rows, -1)).any(1).all():
            reasons.append(UNFULFILLED)
        if not reasons and ends and rows > 1 and len(set(counts)) == 1:
            reasons.append(SAME_LENGTH)
        case = {
            "name": f"{strategy}_{name}" if not name.startswith(strategy) else name,
            "strategy": strategy,
            "tokens": prompts["input_ids"].tolist(),
            "mask": prompts["attention_mask"].tolist(),
            "kwargs": dict(kwargs),
            **{key: value for key, value in answer._asdict().items() if value is not None},
        }
        yield case, ", ".join(reasons)


def make_cases(models: list[PreTrainedModel], seed: int) -> list[dict[str, Any]]:
    """All cases of one model."""
    cases, failed = [], []
    for strategy, kinds in STRATEGIES.items():
        if strategy == "dola" and models[0].config.is_encoder_decoder:
            continue
        for number, (name, options) in enumerate(kinds.items()):
            if "prompt" in options and models[0].config.is_encoder_decoder:
                continue  # their prompt is not in the sequence
            seen: dict[str, int] = {}
            found: dict[str, dict[str, Any]] = {}
            for case, reason in draws(name, strategy, options, models, seed + number):
                seen[reason] = seen.get(reason, 0) + 1
                found.setdefault(reason, case)
                if not reason or (sum(seen.values()) >= ENOUGH and {SAME_LENGTH, UNFULFILLED} & set(seen)):
                    break
            print(models[0].config.model_type, strategy, name, seen, flush=True)
            best = next((found[reason] for reason in ("", SAME_LENGTH, UNFULFILLED) if reason in found), None)
            if best:
                cases.append(best)
            else:
                failed.append(f"{strategy} {name}: no good prompt, but {seen}")
    if failed:
        raise AssertionError("\n".join([models[0].config.model_type, *failed]))
    return cases


def save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save the model and return what is read back."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    again = type(model).from_pretrained(folder, attn_implementation="eager").eval()
    for name, value in model.state_dict().items():
        if not torch.equal(value, again.state_dict()[name]):
            raise AssertionError(f"{folder}: transformers reads back another {name} than it saved")
    return again


def make(name: str, folder: Path, seed: int) -> None:
    """Write one model and its cases."""
    model = save(make_model(RECIPES[name]), folder)
    models = [model, *(perturbed(model, number) for number in range(3))]
    cases = make_cases(models, 1000 * seed)
    lines = ",\n".join(json.dumps(case, allow_nan=False) for case in cases)
    (folder / "cases.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{name}: {len(cases)} cases")


def main() -> None:
    """Read the arguments and write all models."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "generation", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RECIPES, nargs="*", default=list(RECIPES), help="models to make")
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        parser.error(f"needs transformers {TRANSFORMERS}, this is {transformers.__version__}; see the docstring")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for number, name in enumerate(RECIPES):
        if name in arguments.only:
            make(name, arguments.out / name, arguments.seed + number)


if __name__ == "__main__":
    main()
