"""The losses of transformers' TensorFlow classes, and norms of their gradients: tests/goldens/tensorflow/losses.json.

Made by version 4.57.6 from labels with what does not count in them, in the environment of `make_tensorflow.py`:
`python tests/goldens/make_tensorflow_losses.py`. The weights are not kept: `values` makes them of their names.
"""

import json
import os
import tempfile
import zlib
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
import torch
import transformers
from transformers.modeling_tf_pytorch_utils import convert_tf_weight_name_to_pt_weight_name

FILE = Path(__file__).parent / "tensorflow" / "losses.json"
BERT = {
    "vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 17, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "num_labels": 3, "pad_token_id": 0}
T5 = {"vocab_size": 17, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
BART = {
    "vocab_size": 17, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
    "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
TOKENS = [[3, 5, 7, 9, 11, 13], [4, 16, 15, 3, 0, 0]]
GIVEN = {"input_ids": TOKENS, "attention_mask": [[1] * 6, [1, 1, 1, 1, 0, 0]]}
CHOICES = {"input_ids": [TOKENS, TOKENS[::-1]]}
PLACES = [[-100, 5, 7, 9, -100, 13], [4, 16, 0, 3, -100, -100]]
"""Labels of tokens."""
CLASSES = [[-100, 0, 1, 2, -1, 2], [1, 2, 0, 1, -100, -100]]
"""As `PLACES`, of the classification of tokens, where -1 does not count either."""
SAID = [[6, 8, 0, 2], [10, 1, -100, -100]]
"""Labels of a decoder, with BART's token of padding in it."""
ENDS = {"start_positions": [1, 2], "end_positions": [5, 3]}
TABLE, SHARED = "embeddings.word_embeddings.weight", "shared.weight"
CASES = [
    ("BertForMaskedLM", BERT, GIVEN, {"labels": PLACES}, [f"bert.{TABLE}", "cls.predictions.bias"]),
    ("BertLMHeadModel", BERT | {"is_decoder": True}, GIVEN, {"labels": PLACES}, [f"bert.{TABLE}"]),
    (
        "BertForPreTraining", BERT, GIVEN, {"labels": PLACES, "next_sentence_label": [1, -100]},
        [f"bert.{TABLE}", "cls.seq_relationship.weight"],
    ),
    (
        "BertForNextSentencePrediction", BERT, GIVEN, {"next_sentence_label": [-100, 1]},
        [f"bert.{TABLE}", "cls.seq_relationship.weight"],
    ),
    ("BertForSequenceClassification", BERT, GIVEN, {"labels": [2, 0]}, [f"bert.{TABLE}", "classifier.weight"]),
    (
        "BertForSequenceClassification", BERT | {"num_labels": 1}, GIVEN, {"labels": [0.5, -1.0]},
        [f"bert.{TABLE}", "classifier.weight"],
    ),
    ("BertForTokenClassification", BERT, GIVEN, {"labels": CLASSES}, [f"bert.{TABLE}", "classifier.weight"]),
    ("BertForQuestionAnswering", BERT | {"num_labels": 2}, GIVEN, ENDS, [f"bert.{TABLE}", "qa_outputs.weight"]),
    ("BertForMultipleChoice", BERT, CHOICES, {"labels": [1, 1]}, [f"bert.{TABLE}", "classifier.weight"]),
    (
        "AlbertForPreTraining", BERT | {"embedding_size": 6, "num_labels": 2}, GIVEN, {"labels": PLACES, "sentence_order_label": [1, 0]},
        [f"albert.{TABLE}", "sop_classifier.classifier.weight"],
    ),
    ("GPT2LMHeadModel", GPT2, GIVEN, {"labels": PLACES}, ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"]),
    ("GPT2ForSequenceClassification", GPT2, GIVEN, {"labels": [2, 0]}, ["transformer.wte.weight", "score.weight"]),
    ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}, GIVEN, {"labels": SAID}, [SHARED]),
    ("BartForConditionalGeneration", BART, GIVEN, {"labels": SAID}, ["model.shared.weight"]),
]  # fmt: skip
"""Class, config, inputs, labels, names of the weights whose gradients are measured."""


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a weight, which follows from its name; around 1 where norms have it."""
    i = np.arange(np.prod(shape), dtype=np.int64)
    drawn = ((31 * i * i + 7919 * i + zlib.crc32(name.encode())) % 1021 - 510) / 1024
    return (drawn + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32).reshape(shape)


def main() -> None:
    transformers.logging.set_verbosity_error()
    found = []
    for class_name, options, given, labels, names in CASES:
        torch_class = getattr(transformers, class_name)
        torch_model = torch_class(torch_class.config_class(**options)).eval()
        with torch.no_grad():
            for name, weight in torch_model.named_parameters():
                weight.copy_(torch.from_numpy(values(name, tuple(weight.shape))))
        with tempfile.TemporaryDirectory() as folder:
            torch_model.save_pretrained(folder, safe_serialization=False)
            config = json.loads((Path(folder) / "config.json").read_text())
            model = getattr(transformers, f"TF{class_name}").from_pretrained(folder, from_pt=True)
        by_name = {
            convert_tf_weight_name_to_pt_weight_name(v.name, tf_weight_shape=v.shape)[0]: v
            for v in model.trainable_variables
        }
        variables = [by_name[name] for name in names]
        with tf.GradientTape() as tape:
            out = model({name: tf.constant(value) for name, value in {**given, **labels}.items()})
        gradients = tape.gradient(out.loss, variables)
        norms = [float(tf.norm(tf.convert_to_tensor(gradient))) for gradient in gradients]
        found.append(
            {"config": config, "given": given, "labels": labels, "loss": out.loss.numpy().tolist(),
             "norms": dict(zip(names, norms, strict=True))}
        )  # fmt: skip
        print(class_name, found[-1]["loss"], norms, [v.name for v in variables])
    FILE.write_text("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in found) + "\n]\n")


if __name__ == "__main__":
    main()
