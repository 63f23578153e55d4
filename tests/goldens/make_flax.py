"""Make golden files of Flax trees with transformers 4.57.6 (version 5 has no Flax classes), or read back those that we wrote.

    python3.11 -m venv .venv-legacy
    .venv-legacy/bin/pip install "transformers==4.57.6" "jax==0.4.30" "jaxlib==0.4.30" "flax==0.8.5" "numpy<2" \
        "scipy<1.13" torch==2.13.0
    .venv-legacy/bin/python tests/goldens/make_flax.py           # writes tests/goldens/flax

- `trees.json`: for every Flax class of our families, the keys of its config that are not the default, and its tree with the
  shape of each array. Where the head may be tied there are two entries.
- `<name>/`: what `save_pretrained` of a tiny model wrote, all of whose parameters are random and, as after training in JAX,
  sorted; and `expected.npz`: its inputs, and the logits of the Flax class (`flax`) and of PyTorch's (`torch`).

To read back what we wrote, in the environment of fmodels

    python -c "import sys; from tests.dialects.test_flax import save_all; save_all(sys.argv[1])" written

writes the golden models, and one of each entry of `trees.json`, as `flax_model.msgpack`, and

    .venv-legacy/bin/python tests/goldens/make_flax.py --read written

loads each with its Flax class, which must miss nothing and find nothing unexpected, and compares the arrays of the golden
models and their logits bit by bit. Of five classes of BigBird it says that a pooler was not used: PyTorch's have one, which
nothing reads, and its bytes are kept.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict
from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model

TRANSFORMERS = "4.57.6"
SEED = 0
BERT = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 10, "type_vocab_size": 3, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip
GPT2 = {"vocab_size": 11, "n_positions": 10, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 12}
LLAMA = {
    "vocab_size": 11, "max_position_embeddings": 10, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
T5 = {
    "vocab_size": 11, "d_model": 8, "d_kv": 5, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2,
    "relative_attention_num_buckets": 8, "decoder_start_token_id": 0,
}  # fmt: skip
NARROW = BERT | {"embedding_size": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # model_type: how its classes begin, config
    "albert": ("Albert", NARROW | {"num_hidden_groups": 2, "num_hidden_layers": 4}),
    "bart": (
        "Bart",
        {
            "vocab_size": 11,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 14,
            "max_position_embeddings": 10,
        },
    ),
    "bert": ("Bert", BERT),
    "big_bird": ("BigBird", BERT | {"attention_type": "original_full"}),
    "bloom": ("Bloom", {"vocab_size": 11, "hidden_size": 8, "n_layer": 1, "n_head": 2}),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 11,
            "dim": 8,
            "hidden_dim": 12,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": 10,
            "num_labels": 3,
        },
    ),
    "electra": ("Electra", NARROW),
    "gemma": ("Gemma", LLAMA | {"head_dim": 4}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": 11,
            "max_position_embeddings": 10,
            "hidden_size": 8,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 12,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gptj": ("GPTJ", GPT2 | {"rotary_dim": 2}),
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA),
    "mt5": ("MT5", T5),
    "opt": (
        "OPT",
        {
            "vocab_size": 11,
            "max_position_embeddings": 10,
            "hidden_size": 8,
            "ffn_dim": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 6,
        },
    ),
    "roberta": ("Roberta", BERT),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", BERT),
    "roformer": ("RoFormer", BERT),
    "t5": ("T5", T5),
    "xglm": (
        "XGLM",
        {
            "vocab_size": 11,
            "max_position_embeddings": 10,
            "d_model": 8,
            "ffn_dim": 12,
            "num_layers": 1,
            "attention_heads": 2,
        },
    ),
    "xlm-roberta": ("XLMRoberta", BERT),
}
ENDINGS = """Model EncoderModel LMHeadModel ForCausalLM ForMaskedLM ForPreTraining ForConditionalGeneration
    ForNextSentencePrediction ForSequenceClassification ForTokenClassification ForQuestionAnswering ForMultipleChoice""".split()
HEADS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")  # that may be tied
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: model_type, how its class ends, more of its config
    "bart": ("bart", "ForConditionalGeneration", {"forced_eos_token_id": None}),
    "bert": ("bert", "ForMaskedLM", {"num_hidden_layers": 2}),
    "big_bird": ("big_bird", "ForMaskedLM", {}),
    "gpt2": ("gpt2", "LMHeadModel", {"n_layer": 2}),
    "gpt2_sharded": ("gpt2", "LMHeadModel", {}),
    "llama": ("llama", "ForCausalLM", {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama_bf16": ("llama", "ForCausalLM", {}),
    "roformer": ("roformer", "ForMaskedLM", {"tie_word_embeddings": False}),
    "t5": ("t5", "ForConditionalGeneration", {}),
}


def config_of(name: str, ending: str, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of a class, and what is special in it."""
    stem, keys = FAMILIES[name]
    keys = {**keys, **more, "architectures": [stem + ending]}
    if ending == "ForQuestionAnswering" and "num_labels" in keys:
        keys["num_labels"] = 2
    return transformers.CONFIG_MAPPING[name](**keys), {"model_type": name, **keys}


def class_of(config: Any) -> Any:
    """The Flax class that a config names."""
    name = {"BertLMHeadModel": "BertForCausalLM"}.get(config.architectures[0], config.architectures[0])
    return getattr(transformers, f"Flax{name}")


def make_trees() -> list[dict[str, Any]]:
    """The entries of `trees.json`."""
    found = []
    for name, (stem, _) in FAMILIES.items():
        for ending in ENDINGS:
            if not hasattr(transformers, f"Flax{stem}{ending}"):
                continue
            for tied in (True, False) if ending in HEADS else (None,):
                if name == "gptj" and tied:
                    continue  # which fails: the head looks for a bias among the parameters that it is given
                config, keys = config_of(name, ending, {} if tied is None else {"tie_word_embeddings": tied})
                shapes = class_of(config)(config, _do_init=False).params_shape_tree
                found.append({"config": keys, "tree": jax.tree_util.tree_map(lambda leaf: list(leaf.shape), shapes)})
    return found


def inputs_of(config: Any) -> dict[str, np.ndarray]:
    """Two texts, the second of them padded at its end."""
    rng = np.random.default_rng(SEED)
    tokens = rng.integers(3, config.vocab_size, (2, 7))
    mask = np.ones_like(tokens)
    mask[1, 5:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = rng.integers(3, config.vocab_size, (2, 4))
    return {name: value.astype(np.int32) for name, value in inputs.items()}


def logits_of(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The logits of a Flax model."""
    return np.asarray(model(**inputs).logits, np.float32)


def make_model(name: str, folder: Path) -> None:
    """Write a golden model."""
    config, _ = config_of(*MODELS[name])
    model = class_of(config)(config, seed=SEED)
    rng = np.random.default_rng(SEED)

    def draw(leaf: Any) -> Any:
        return jnp.asarray(rng.normal(0.1, 0.5, leaf.shape), jnp.bfloat16 if name.endswith("bf16") else jnp.float32)

    params = jax.tree_util.tree_map(draw, model.params)
    model.params = params
    model.save_pretrained(folder, params=params, max_shard_size="1kB" if name.endswith("sharded") else "10GB")
    inputs = inputs_of(config)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, config.architectures[0])(config)
    theirs = load_flax_weights_in_pytorch_model(theirs, params).eval()
    with torch.no_grad():
        found = theirs(**{key: torch.from_numpy(value).long() for key, value in inputs.items()}).logits.numpy()
    (folder / "generation_config.json").unlink(missing_ok=True)
    flax = logits_of(model, inputs)
    print(f"{name}: largest difference of Flax and PyTorch at real tokens {difference(flax, found, inputs):.1e}")
    np.savez(folder / "expected.npz", flax=flax, torch=found, **inputs)


def difference(a: np.ndarray, b: np.ndarray, inputs: dict[str, np.ndarray]) -> float:
    """The largest difference of two arrays of logits, at tokens that are not padding."""
    real = np.ones(a.shape[:2], bool) if "decoder_input_ids" in inputs else inputs["attention_mask"] == 1
    return float(np.abs(a - b)[real].max())


class Warned(logging.Handler):
    """Collects what transformers warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def read_back(folder: Path) -> None:
    """Load everything that lies in a folder, and compare the golden models."""
    goldens = Path(__file__).parent / "flax"
    handler = Warned()
    logging.getLogger("transformers").addHandler(handler)
    wrong = 0
    for path in sorted(folder.iterdir()):
        config = transformers.AutoConfig.from_pretrained(path)
        is_golden = (goldens / path.name).exists()
        handler.messages.clear()
        model = class_of(config).from_pretrained(path, _do_init=is_golden)  # False is fast, and warns of the same
        problems = [m for m in handler.messages if "checkpoint" in m and "precision" not in m]
        if is_golden:
            golden = class_of(config).from_pretrained(goldens / path.name)
            ours, theirs = (flatten_dict(m.params, sep="/") for m in (model, golden))
            if ours.keys() != theirs.keys():
                problems.append(f"other names: {sorted(ours.keys() ^ theirs.keys())}")
            problems += [f"{key} differs" for key in theirs if not same(ours[key], theirs[key])]
            inputs = inputs_of(config)
            if not same(logits_of(model, inputs), logits_of(golden, inputs)):
                problems.append("other logits")
        wrong += bool(problems)
        print(f"{path.name}: {'; '.join(problems) or 'ok'}")
    print(f"{wrong} of {len(list(folder.iterdir()))} are wrong")


def same(a: Any, b: Any) -> bool:
    """Whether two arrays are equal bit by bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def main() -> None:
    """Read the arguments, and make or read."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "flax", help="where to")
    parser.add_argument("--read", type=Path, help="a folder of models that we wrote")
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        parser.error(f"needs transformers {TRANSFORMERS}, this is {transformers.__version__}; see the docstring")
    warnings.simplefilter("ignore")
    if arguments.read is not None:
        read_back(arguments.read)
        return
    transformers.logging.set_verbosity_error()
    arguments.out.mkdir(exist_ok=True, parents=True)
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in make_trees())
    (arguments.out / "trees.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    for name in MODELS:
        make_model(name, arguments.out / name)


if __name__ == "__main__":
    main()
