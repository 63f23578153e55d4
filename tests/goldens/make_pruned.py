"""Make the golden checkpoints of pruned heads, with transformers 4.57.6: version 5 has no `prune_heads` any more.

    python3.11 -m venv .venv-legacy
    .venv-legacy/bin/pip install "transformers==4.57.6" "jax==0.4.30" "jaxlib==0.4.30" "flax==0.8.5" "numpy<2" \
        "scipy<1.13" "tensorflow-cpu==2.15.*" torch==2.13.0 h5py
    .venv-legacy/bin/python tests/goldens/make_pruned.py        # writes tests/goldens/pruned

(jax, flax, tensorflow and h5py are not used here: this is the one environment of all goldens made by version 4.)

Per model: `unpruned`, `pruned_once` (`FIRST`) and `pruned_twice` (then `SECOND`, heads by their original numbers), each
a folder as `save_pretrained` writes it, and `expected.npz` with

- `tokens`, `mask`, `positions`, and for BERT `token_types`, all `(b t)`: one full row, one padded right, one left;
- `unpruned`, `pruned_once`, `pruned_twice`: float32 logits; those of language models mean nothing where `mask` is 0;
- `first`, `second`: the heads as JSON, what to give to `prune_heads`.

The same seeds give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

TRANSFORMERS = "4.57.6"
FIRST = {0: [1, 3], 2: [0]}
SECOND = {0: [0], 1: [2]}
VOCABULARY, POSITIONS, WIDTH = 61, 20, 11

GPT2 = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=POSITIONS,
    n_embd=24,
    n_layer=3,
    n_head=4,
    n_inner=13,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=1,
    attn_implementation="eager",
)
BERT = BertConfig(
    vocab_size=VOCABULARY,
    max_position_embeddings=POSITIONS,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=13,
    initializer_range=0.2,
    num_labels=3,
    attn_implementation="eager",
)
MODELS = {
    "gpt2_causal_lm": (GPT2LMHeadModel, GPT2),
    "bert_sequence_classification": (BertForSequenceClassification, BERT),
    "bert_masked_lm": (BertForMaskedLM, BERT),
}


def move_off_initial_values(model: PreTrainedModel) -> None:
    """Add noise to norms and biases: as they are initialized (ones, zeros) a model that forgets them would pass."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)


def make_inputs(model_type: str) -> dict[str, torch.Tensor]:
    """Three rows of tokens: full, padded right, padded left."""
    mask = torch.ones(3, WIDTH, dtype=torch.int64)
    mask[1, -4:] = 0
    mask[2, :3] = 0
    inputs = {"input_ids": torch.randint(VOCABULARY, mask.shape), "attention_mask": mask}
    if model_type == "gpt2":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    else:
        inputs["position_ids"] = torch.arange(WIDTH).expand(mask.shape)
        inputs["token_type_ids"] = torch.randint(2, mask.shape)
    return inputs


def save(model: PreTrainedModel, folder: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Save the model, check that the saved one computes the same, and return the logits."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with torch.no_grad():
        logits = model(**inputs).logits
        again = type(model).from_pretrained(folder, attn_implementation="eager")(**inputs).logits
    if not torch.equal(logits, again):
        raise AssertionError(f"{folder}: transformers reads back another model than it saved")
    return logits.numpy()


def make(name: str, folder: Path, seed: int) -> None:
    """Write the three checkpoints and the expected values of one model."""
    torch.manual_seed(seed)
    model_class, config = MODELS[name]
    model = model_class(type(config).from_dict(config.to_dict(), attn_implementation="eager")).eval()
    move_off_initial_values(model)
    inputs = make_inputs(config.model_type)
    logits = {"unpruned": save(model, folder / "unpruned", inputs)}
    model.prune_heads(FIRST)
    logits["pruned_once"] = save(model, folder / "pruned_once", inputs)
    model.prune_heads(SECOND)
    logits["pruned_twice"] = save(model, folder / "pruned_twice", inputs)

    names = {
        "input_ids": "tokens",
        "attention_mask": "mask",
        "position_ids": "positions",
        "token_type_ids": "token_types",
    }
    np.savez_compressed(
        folder / "expected.npz",
        first=json.dumps(FIRST),
        second=json.dumps(SECOND),
        **{names[key]: value.numpy().astype(np.int32) for key, value in inputs.items()},
        **logits,
    )


def main() -> None:
    """Read the arguments and write all models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pruned", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        parser.error(f"needs transformers {TRANSFORMERS}, this is {transformers.__version__}; see the docstring")
    for number, name in enumerate(MODELS):
        make(name, arguments.out / name, arguments.seed + number)


if __name__ == "__main__":
    main()
