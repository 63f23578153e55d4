"""Make golden files of Flax greedy and beam search, with transformers 4.57.6 (version 5 has no Flax models).

They stand beside the ones of `make_generation.py`, from the same checkpoints, which must be there.

    python3.11 -m venv .venv-legacy
    .venv-legacy/bin/pip install "transformers==4.57.6" "jax==0.4.30" "jaxlib==0.4.30" "flax==0.8.5" "numpy<2" \
        "scipy<1.13" torch==2.13.0
    .venv-legacy/bin/python tests/goldens/make_generation_flax.py     # writes tests/goldens/generation/*/cases_flax.json

(It is the environment of the other goldens made by version 4, without tensorflow and h5py.)

`cases_flax.json` is a list of cases, each

- `name`, unique in its file, and `strategy`: `greedy` or `beam`;
- `tokens`, `mask`: the prompts and their attention mask, rows of ints; padded left, for encoder-decoder models right;
- `kwargs`: what the Flax `generate` was given beside them, by transformers' names;
- `sequences`: the answer, rows of ints as long as `max_length` is, whatever was generated;
- `scores`, for beams: one float32 a sequence. A sequence that did not end has, unlike in PyTorch, the plain sum of log
  probabilities; rows of nothing but pads have about -1e7.

Prompts are those of the cases of beam search in `cases.json`. The same checkpoints give the same sequences.
"""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from transformers import (
    FlaxBartForConditionalGeneration,
    FlaxGPT2LMHeadModel,
    FlaxPreTrainedModel,
    FlaxT5ForConditionalGeneration,
)

TRANSFORMERS = "4.57.6"
PAD, END = 3, 7
NEVER = 1000  # no token
MODELS = {
    "gpt2": FlaxGPT2LMHeadModel,
    "t5": FlaxT5ForConditionalGeneration,
    "t5_gated": FlaxT5ForConditionalGeneration,
    "bart": FlaxBartForConditionalGeneration,
}
# The name of a case, whose prompts it has, and what `generate` is given.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("beams_2", {}),
    "greedy_min_length": ("beams_3_all", {"min_length": 10}),
    "greedy_pad_is_end": ("beams_4_pad_is_end", {"pad_token_id": END}),
    "beams_2": ("beams_2", {"num_beams": 2}),
    "beams_3_all": ("beams_3_all", {"num_beams": 3, "num_return_sequences": 3}),
    "beams_4_lp_2": ("beams_4_lp_2", {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0}),
    "beams_5_lp_0": ("beams_5_lp_0", {"num_beams": 5, "num_return_sequences": 2, "length_penalty": 0.0}),
    "beams_3_early": ("beams_3_early", {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True}),
    "beams_4_never": (
        "beams_4_never_lp_0.8",
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 0.8},
    ),
    "beams_4_no_repeat": ("beams_4_processed", {"num_beams": 4, "no_repeat_ngram_size": 2}),
    # With an end that never comes Flax's beams are PyTorch's.
    "beams_2_endless": ("beams_2", {"num_beams": 2, "eos_token_id": NEVER}),
    "beams_4_endless": (
        "beams_4_lp_2",
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, "eos_token_id": NEVER},
    ),
    "beams_3_endless": (
        "beams_3_all",
        {"num_beams": 3, "num_return_sequences": 3, "no_repeat_ngram_size": 2, "eos_token_id": NEVER},
    ),
}


def make_case(
    model: FlaxPreTrainedModel, name: str, prompts: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """One case."""
    kwargs = {"max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": END, **options}
    out = model.generate(
        jnp.asarray(prompts["tokens"], jnp.int32),
        attention_mask=jnp.asarray(prompts["mask"], jnp.int32),
        do_sample=False,
        **kwargs,
    )
    case = {
        "name": name,
        "strategy": "beam" if "num_beams" in kwargs else "greedy",
        "tokens": prompts["tokens"],
        "mask": prompts["mask"],
        "kwargs": kwargs,
        "sequences": np.asarray(out.sequences).tolist(),
    }
    if "num_beams" in kwargs:
        case["scores"] = [float(str(score)) for score in np.asarray(out.scores, np.float32)]
    return case


def make(name: str, folder: Path) -> None:
    """Write the cases of one model."""
    model = MODELS[name].from_pretrained(folder, from_pt=True)
    prompts = {case["name"]: case for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))}
    cases = [make_case(model, case, prompts[source], options) for case, (source, options) in CASES.items()]
    lines = ",\n".join(json.dumps(case, allow_nan=False) for case in cases)
    (folder / "cases_flax.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{name}: {len(cases)} cases")


def main() -> None:
    """Read the arguments and write the cases of all models."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "generation", help="folder of the models")
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        parser.error(f"needs transformers {TRANSFORMERS}, this is {transformers.__version__}; see the docstring")
    warnings.simplefilter("ignore")
    for name in MODELS:
        make(name, arguments.out / name)


if __name__ == "__main__":
    main()
