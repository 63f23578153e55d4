"""The variables of each TensorFlow class of transformers 4.57.6 that fmodels has a family for, for test_tensorflow.py.

Makes `tensorflow/variables.json.gz`: for each class its config.json, the layers of its `tf_model.h5` with their weight
names, in the order of the file, and for each variable its shape and the CRC-32 of the values that transformers' own
`load_pytorch_weights_in_tf2_model` puts there. The PyTorch tensors that it takes them from have values that follow from
their names: see `values`.

The environment: Python 3.11, `pip install transformers==4.57.6 tensorflow-cpu==2.15.1 torch numpy<2`; run as
`python tests/goldens/make_tensorflow_names.py` there.
"""

import gzip
import json
import os
import tempfile
import zlib
from pathlib import Path

import h5py
import numpy as np

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers

FOLDER = Path(__file__).parent / "tensorflow"
SIZES = {"vocab_size": 11, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = SIZES | {
    "max_position_embeddings": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "type_vocab_size": 2,
}  # fmt: skip
NARROW = BERT | {"embedding_size": 6}
MPNET = {name: value for name, value in BERT.items() if name != "type_vocab_size"}
GPT2 = SIZES | {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12}
T5 = {
    "vocab_size": 11, "pad_token_id": 0, "d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 2, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0,
}  # fmt: skip
BART = SIZES | {
    "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
}  # fmt: skip
OPT = SIZES | {
    "hidden_size": 8, "ffn_dim": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
    "word_embed_proj_dim": 8,
}  # fmt: skip
LLAMA = SIZES | {
    "max_position_embeddings": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
DEBERTA = BERT | {
    "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm", "max_relative_positions": 8,
}  # fmt: skip
CLASSIFY = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
ENCODER = ("Model", "ForMaskedLM", *(f"For{head}" for head in CLASSIFY))
CASES = {  # what the names of the classes begin with: the config's arguments, how the names end
    "Albert": (NARROW, (*ENCODER, "ForPreTraining")),
    "Bart": (BART, ("Model", "ForConditionalGeneration", "ForSequenceClassification")),
    "Bert": (BERT, (*ENCODER, "LMHeadModel", "ForPreTraining", "ForNextSentencePrediction")),
    "Camembert": (BERT, (*ENCODER, "ForCausalLM")),
    "DebertaV2": (DEBERTA, ENCODER),
    "DistilBert": (SIZES | {"max_position_embeddings": 16, "dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2}, ENCODER),
    "Electra": (NARROW, (*ENCODER, "ForPreTraining")),
    "GPT2": (GPT2, ("Model", "LMHeadModel", "DoubleHeadsModel", "ForSequenceClassification")),
    "GPTJ": (GPT2 | {"rotary_dim": 2}, ("Model", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering")),
    "Mistral": (LLAMA, ("Model", "ForCausalLM", "ForSequenceClassification")),
    "MPNet": (MPNET, ENCODER),
    "MT5": (
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ("Model", "ForConditionalGeneration", "EncoderModel"),
    ),
    "OPT": (OPT, ("Model", "ForCausalLM")),
    "Roberta": (BERT, (*ENCODER, "ForCausalLM")),
    "RobertaPreLayerNorm": (BERT, (*ENCODER, "ForCausalLM")),
    "RoFormer": (NARROW, (*ENCODER, "ForCausalLM")),
    "T5": (T5, ("Model", "ForConditionalGeneration", "EncoderModel")),
    "XGLM": (
        SIZES | {"d_model": 8, "ffn_dim": 12, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 16},
        ("Model", "ForCausalLM"),
    ),
    "XLMRoberta": (BERT, (*ENCODER, "ForCausalLM")),
}  # fmt: skip
VARIANTS = {  # class: what is added to its family's arguments
    "OPTForCausalLM": {"word_embed_proj_dim": 6},
    "T5ForConditionalGeneration": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "ElectraForMaskedLM": {"embedding_size": 8},
    "RoFormerForMaskedLM": {"embedding_size": 8},
    "DebertaV2Model": {
        "type_vocab_size": 2, "position_biased_input": True, "share_att_key": False, "conv_kernel_size": 3,
    },
}  # fmt: skip


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the PyTorch tensor of that name holds."""
    count = int(np.prod(shape))
    return (np.arange(count) * 7 % 9973 + zlib.crc32(name.encode()) % 9973).astype(np.float32).reshape(shape)


def describe(name: str, options: dict) -> dict:
    """The config, layers and variables of one class."""
    torch_class, class_ = getattr(transformers, name), getattr(transformers, f"TF{name}")
    torch_model = torch_class(torch_class.config_class(**options))
    with torch.no_grad():
        for key, parameter in torch_model.named_parameters():
            parameter.copy_(torch.from_numpy(values(key, tuple(parameter.shape))))
        for key, buffer in torch_model.named_buffers():
            if key == "final_logits_bias":
                buffer.copy_(torch.from_numpy(values(key, tuple(buffer.shape))))
    with tempfile.TemporaryDirectory() as folder:
        torch_model.save_pretrained(folder, safe_serialization=False)
        model, info = class_.from_pretrained(folder, from_pt=True, output_loading_info=True)
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        with h5py.File(f"{folder}/tf_model.h5") as file:
            layers = {layer: list(file[layer].attrs["weight_names"]) for layer in file.attrs["layer_names"]}
            top = list(file["top_level_model_weights"].attrs["weight_names"])
    if any(info.values()) or top:
        print(name, options if name in VARIANTS else "", info, top)
    variables = {
        weight.name: [list(weight.shape), zlib.crc32(np.ascontiguousarray(weight.numpy(), np.float32).tobytes())]
        for weight in model.weights
    }
    return {"config": config, "layers": layers, "top": top, "variables": variables}


def main() -> None:
    transformers.logging.set_verbosity_error()
    table = {}
    for start, (options, endings) in CASES.items():
        for ending in endings:
            name = start + ending
            table[name] = describe(name, options)
            if name in VARIANTS:
                table[f"{name}/variant"] = describe(name, options | VARIANTS[name])
        print(start, len(table), flush=True)
    raw = json.dumps(table, separators=(",", ":"), sort_keys=False).encode()
    (FOLDER / "variables.json.gz").write_bytes(gzip.compress(raw, mtime=0))
    print(len(raw), (FOLDER / "variables.json.gz").stat().st_size)


if __name__ == "__main__":
    main()
