"""Tiny checkpoints of TensorFlow, written by others, with their logits: tests/goldens/tensorflow/.

Made by transformers 4.57.6: `<family>/tf_model.h5` by its TensorFlow classes, `gpt2_sharded` in several files, and the
logits of those classes in `expected.npz`. `bert_original` and `albert_original` are TensorFlow 1 checkpoints under the
names that google-research/bert and google-research/albert give to their variables, with an optimizer's; the logits are those
of transformers' PyTorch classes, and the script checks that transformers' own readers of such files give the same.

The environment: Python 3.11, `pip install transformers==4.57.6 tensorflow-cpu==2.15.1 torch "numpy<2" h5py`; run as
`python tests/goldens/make_tensorflow.py` there.
"""

import json
import os
import shutil
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
import torch
import transformers
from transformers.models.albert.modeling_albert import load_tf_weights_in_albert
from transformers.models.bert.modeling_bert import load_tf_weights_in_bert

FOLDER = Path(__file__).parent / "tensorflow"
SIZES = {"vocab_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
BERT = {
    "vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "type_vocab_size": 2, "hidden_act": "gelu", "initializer_range": 0.3,
    "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1,
}  # fmt: skip
ALBERT = BERT | {"embedding_size": 6, "num_hidden_groups": 1, "inner_group_num": 1, "hidden_act": "gelu_new"}
CASES = {
    "gpt2": ("GPT2LMHeadModel", SIZES | {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}),
    "bert": ("BertForPreTraining", BERT),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 17, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 2, "num_heads": 2,
            "relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "pad_token_id": 0,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "vocab_size": 17, "d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.3,
        },
    ),
    "albert": ("AlbertForMaskedLM", ALBERT),
}  # fmt: skip
READERS = {"bert_original": load_tf_weights_in_bert, "albert_original": load_tf_weights_in_albert}
TOKENS = np.array([[3, 5, 7, 9, 11, 13], [4, 16, 15, 3, 8, 6]], np.int32)
DECODER = np.array([[0, 4, 5], [0, 12, 3]], np.int32)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random values that three digits hold, also where they would be zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                start = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
                value.copy_((start + 0.3 * torch.randn(value.shape, generator=generator)).mul(500).round() / 500)
    return model.eval()


def inputs(name: str) -> dict[str, np.ndarray]:
    return {"input_ids": TOKENS} | ({"decoder_input_ids": DECODER} if name in ("t5", "bart") else {})


def outputs(name: str, out) -> dict[str, np.ndarray]:
    """What is compared, by its name in `expected.npz`."""
    if hasattr(out, "prediction_logits"):
        second = out.sop_logits if "albert" in name else out.seq_relationship_logits
        return {f"{name}/logits": np.asarray(out.prediction_logits), f"{name}/sequence_logits": np.asarray(second)}
    return {f"{name}/logits": np.asarray(out.logits)}


def save_h5(name: str, class_name: str, options: dict, expected: dict, limit: str = "1GB") -> None:
    torch_class = getattr(transformers, class_name)
    torch_model = fill(torch_class(torch_class.config_class(**options)))
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    torch_model.save_pretrained(folder, safe_serialization=False)
    model = getattr(transformers, f"TF{class_name}").from_pretrained(folder, from_pt=True)
    (folder / "pytorch_model.bin").unlink()
    model.save_pretrained(folder, max_shard_size=limit)
    expected |= outputs(name, model(**inputs(name)))


def original_bert(name: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The variables of google-research/bert's pre-training graph (modeling.py, run_pretraining.py)."""
    found = {}
    for key, value in model.named_parameters():
        for old, new in [
            ("cls.predictions.bias", "cls.predictions.output_bias"),
            ("seq_relationship.weight", "seq_relationship.output_weights"),
            ("seq_relationship.bias", "seq_relationship.output_bias"),
            ("layer.", "layer_"),
            ("_embeddings.weight", "_embeddings"),
            ("LayerNorm.weight", "LayerNorm.gamma"),
            ("LayerNorm.bias", "LayerNorm.beta"),
        ]:
            key = key.replace(old, new)
        array = value.detach().numpy()
        if key.endswith(".weight"):
            key, array = f"{key.removesuffix('weight')}kernel", array.T
        found[key.replace(".", "/")] = array
    return found


def original_albert(name: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The variables of google-research/albert's pre-training graph (modeling.py, run_pretraining.py)."""
    found = {}
    inner = "bert/encoder/transformer/group_{0}/inner_group_{1}"
    names = {
        "attention.query": f"{inner}/attention_1/self/query", "attention.key": f"{inner}/attention_1/self/key",
        "attention.value": f"{inner}/attention_1/self/value", "attention.dense": f"{inner}/attention_1/output/dense",
        "attention.LayerNorm": f"{inner}/LayerNorm", "full_layer_layer_norm": f"{inner}/LayerNorm_1",
        "ffn": f"{inner}/ffn_1/intermediate/dense", "ffn_output": f"{inner}/ffn_1/intermediate/output/dense",
        "albert.pooler": "bert/pooler/dense", "predictions.dense": "cls/predictions/transform/dense",
        "predictions.LayerNorm": "cls/predictions/transform/LayerNorm",
        "albert.encoder.embedding_hidden_mapping_in": "bert/encoder/embedding_hidden_mapping_in",
        "albert.embeddings.LayerNorm": "bert/embeddings/LayerNorm",
    }  # fmt: skip
    for key, value in model.named_parameters():
        module, _, last = key.rpartition(".")
        array = value.detach().numpy()
        if module.endswith("_embeddings"):
            path = f"bert/embeddings/{module.rpartition('.')[2]}"
        elif key == "predictions.bias":
            path = "cls/predictions/output_bias"
        elif module == "sop_classifier.classifier":
            path = f"cls/seq_relationship/output_{'weights' if last == 'weight' else 'bias'}"
        else:
            short = module.partition("albert_layers.")[2]
            group = module.partition("albert_layer_groups.")[2].partition(".")[0]
            short, number = (short[2:], short[0]) if short else (module, "0")
            norm = "LayerNorm" in module or "layer_norm" in module
            ends = {"weight": "gamma" if norm else "kernel", "bias": "beta" if norm else "bias"}
            path = f"{names[short].format(group, number)}/{ends[last]}"
            array = array.T if ends[last] == "kernel" else array
        found[path] = array
    return found


def save_original(name: str, class_name: str, options: dict, variables, expected: dict) -> None:
    class_ = getattr(transformers, class_name)
    config = class_.config_class(**options)
    model = fill(class_(config))
    with torch.no_grad():
        want = outputs(name, model(input_ids=torch.from_numpy(TOKENS).long()))
    arrays = variables(name, model)
    optimizer = {f"{key}/adam_{m}": np.zeros_like(array) for key, array in list(arrays.items())[-2:] for m in "mv"}
    arrays |= optimizer | {"global_step": np.array(7, np.int64)}
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = sorted(arrays)
    tf.raw_ops.SaveV2(
        prefix=str(folder / "model.ckpt"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(arrays[key]) for key in names],
    )
    keys = {key: value for key, value in options.items() if key != "pad_token_id"}
    config_name = "bert_config.json" if name == "bert_original" else "albert_config.json"
    (folder / config_name).write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")
    again = READERS[name](class_(config), config, str(folder / "model.ckpt")).eval()
    with torch.no_grad():
        got = outputs(name, again(input_ids=torch.from_numpy(TOKENS).long()))
    for key in want:
        assert np.abs(got[key] - want[key]).max() < 1e-5, key
    expected |= want


def main() -> None:
    transformers.logging.set_verbosity_error()
    expected = {"tokens": TOKENS, "decoder_tokens": DECODER}
    for name, (class_name, options) in CASES.items():
        save_h5(name, class_name, options, expected)
    save_h5("gpt2_sharded", *CASES["gpt2"], expected, limit="3KB")
    save_original("bert_original", "BertForPreTraining", BERT, original_bert, expected)
    save_original("albert_original", "AlbertForPreTraining", ALBERT, original_albert, expected)
    np.savez_compressed(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()
