"""Make a BERT checkpoint as it was saved in 2018: the form of `bert-base-uncased`, which is still downloaded daily.

Environment as in `make_pruned.py`; then

    .venv-legacy/bin/python tests/goldens/make_old_names.py     # writes tests/goldens/old_names

`zip` and `legacy` hold the same `pytorch_model.bin` in the two container formats of `torch.save`: a state dict (an
`OrderedDict` with `_metadata`) with `LayerNorm.gamma` and `.beta`, the prefix `bert.`, both pretraining heads, the
`position_ids` buffer, and a decoder that shares its storage with the embedding. `config.json` is written by hand as
that repository has it: `BertForMaskedLM` in `architectures` although the file holds the next-sentence head too.

`expected.npz`: `tokens`, `mask`, `token_types` `(b t)`; of BertModel `hidden` `(b t d)` and `pooled` `(b d)`; of
BertForMaskedLM `logits` `(b t v)`; of BertForPreTraining `sequence_logits` `(b 2)`. Rows are padded right.

The same seed gives the same bytes, but for `legacy`, whose storage keys are memory addresses.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import transformers
from make_pruned import TRANSFORMERS, move_off_initial_values
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

CONFIG = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.2,
    "intermediate_size": 13,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 20,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 61,
}


def old_state_dict(model: BertForPreTraining) -> OrderedDict[str, torch.Tensor]:
    """The model's state dict under the names of 2018; tied tensors keep sharing their storage."""
    state = model.state_dict()
    position_ids = torch.arange(model.config.max_position_embeddings)[None]
    old = OrderedDict([("bert.embeddings.position_ids", position_ids)])
    for name, tensor in state.items():
        if name == "cls.predictions.decoder.bias":  # came in 2020, beside cls.predictions.bias
            continue
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    old._metadata = state._metadata
    return old


def run(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What transformers computes from the checkpoint in the folder."""
    models = [
        model_class.from_pretrained(folder, attn_implementation="eager").eval()
        for model_class in (BertModel, BertForMaskedLM, BertForPreTraining)
    ]
    with torch.no_grad():
        base, masked, pretraining = (model(**inputs) for model in models)
    if not torch.equal(masked.logits, pretraining.prediction_logits):
        raise AssertionError(f"{folder}: the heads of transformers disagree")
    return {
        "hidden": base.last_hidden_state.numpy(),
        "pooled": base.pooler_output.numpy(),
        "logits": masked.logits.numpy(),
        "sequence_logits": pretraining.seq_relationship_logits.numpy(),
    }


def main() -> None:
    """Read the arguments and write both containers and the expected values."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "old_names", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        parser.error(f"needs transformers {TRANSFORMERS}, this is {transformers.__version__}; see make_pruned.py")

    torch.manual_seed(arguments.seed)
    model = BertForPreTraining(BertConfig.from_dict(CONFIG, attn_implementation="eager")).eval()
    move_off_initial_values(model)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, -4:] = 0
    inputs = {
        "input_ids": torch.randint(CONFIG["vocab_size"], mask.shape),
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, mask.shape),
    }
    with torch.no_grad():
        original = model(**inputs)

    expected = {}
    for container in ("zip", "legacy"):
        folder = arguments.out / container
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        file = folder / "pytorch_model.bin"
        torch.save(old_state_dict(model), file, _use_new_zipfile_serialization=container == "zip")
        expected = run(folder, inputs)
        if not np.array_equal(expected["logits"], original.prediction_logits.numpy()) or not np.array_equal(
            expected["sequence_logits"], original.seq_relationship_logits.numpy()
        ):
            raise AssertionError(f"{folder}: transformers reads back another model than was saved")
    np.savez_compressed(
        arguments.out / "expected.npz",
        tokens=inputs["input_ids"].numpy().astype(np.int32),
        mask=mask.numpy().astype(np.int32),
        token_types=inputs["token_type_ids"].numpy().astype(np.int32),
        **expected,
    )


if __name__ == "__main__":
    main()
