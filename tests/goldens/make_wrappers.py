"""Writes what the wrappers are compared with: names of methods, masks, counts and dtypes of transformers 4.57.6.

    .venv-legacy/bin/python tests/goldens/make_wrappers.py      # writes tests/goldens/wrappers

(`make_pruned.py` says what that environment is.)
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import tensorflow as tf
import torch
import transformers
from transformers.generation import FlaxGenerationMixin, TFGenerationMixin
from transformers.modeling_tf_utils import TFModelUtilsMixin
from transformers.modeling_utils import ModuleUtilsMixin
from transformers.utils import PushToHubMixin

FOLDER = Path(__file__).parent / "wrappers"
CLASSES = [
    transformers.PreTrainedModel, ModuleUtilsMixin, transformers.TFPreTrainedModel, TFModelUtilsMixin,
    transformers.FlaxPreTrainedModel, transformers.GenerationMixin, TFGenerationMixin, FlaxGenerationMixin, PushToHubMixin,
]  # fmt: skip
GPT2 = {
    "vocab_size": 11,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
BERT = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
TWO = [[1, 1, 1, 0], [0, 1, 1, 1]]
LONG = [[1, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]]
THREE = [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]]


def methods() -> dict[str, list[str]]:
    """The public names of each class that transformers itself defines."""
    found = {}
    for cls in CLASSES:
        own = [base for base in cls.__mro__ if base.__module__.startswith("transformers")]
        found[cls.__name__] = sorted({name for base in own for name in vars(base) if not name.startswith("_")})
    return found


class Utils(ModuleUtilsMixin, torch.nn.Module):
    """The masks' methods, which look at nothing but the dtype and the config."""

    def __init__(self, dtype: torch.dtype, is_decoder: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.config = SimpleNamespace(is_decoder=is_decoder)


class TFUtils(transformers.TFPreTrainedModel):
    """As `Utils`."""

    def __init__(self) -> None:
        super(transformers.TFPreTrainedModel, self).__init__()


def masks() -> list[dict]:
    """Calls of the methods of masks, with their results."""
    calls = []

    def add(dtype: str, decoder: bool, method: str, mask: list, kind: str, **options: object) -> None:
        model = Utils(getattr(torch, dtype), decoder)
        given = torch.tensor(mask, dtype=getattr(torch, kind))
        if method == "create_extended_attention_mask_for_decoder":
            made = model.create_extended_attention_mask_for_decoder(options["input_shape"], given)
        else:
            made = getattr(model, method)(given, **options)
        calls.append(
            {"dtype": dtype, "decoder": decoder, "method": method, "mask": mask, "kind": kind, "options": options,
             "result": made.tolist(), "result_dtype": str(made.dtype).removeprefix("torch.")}
        )  # fmt: skip

    for dtype in ("float32", "bfloat16", "float16"):
        add(dtype, False, "invert_attention_mask", TWO, "int64")
        add(dtype, False, "get_extended_attention_mask", TWO, "int64", input_shape=(2, 4))
        add(dtype, True, "get_extended_attention_mask", TWO, "int64", input_shape=(2, 4))
        add(dtype, False, "get_head_mask", [1, 0], "int64", num_hidden_layers=2)
    add("float32", False, "invert_attention_mask", THREE, "float32")
    add("float32", True, "get_extended_attention_mask", THREE, "int64", input_shape=(1, 4))
    add("float32", True, "get_extended_attention_mask", LONG, "float32", input_shape=(2, 4))
    add("float32", True, "create_extended_attention_mask_for_decoder", TWO, "int64", input_shape=(2, 4))
    add("float32", True, "create_extended_attention_mask_for_decoder", LONG, "int64", input_shape=(2, 3))
    add("float32", False, "get_head_mask", [[1, 0], [0.5, 1]], "float32", num_hidden_layers=2)
    add(
        "float32", False, "get_head_mask", [[1, 0], [0.5, 1]], "float32", num_hidden_layers=2, is_attention_chunked=True
    )
    return calls


def tf_masks() -> list[dict]:
    """As `masks`, of TensorFlow's one method."""
    model = TFUtils()
    masks = [1.0, 0.0], [[1.0, 0.0], [0.5, 1.0]]
    return [
        {"mask": mask, "num_hidden_layers": 2, "result": model.get_head_mask(tf.constant(mask), 2).numpy().tolist()}
        for mask in masks
    ]


def counts() -> dict[str, dict]:
    """What the models count, of themselves and of inputs."""
    found = {}
    tokens = torch.ones(2, 5, dtype=torch.long)
    for name, cls, config in (
        ("gpt2", transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
        ("bert", transformers.BertForMaskedLM, transformers.BertConfig(**BERT)),
    ):
        model = cls(config)
        model.get_input_embeddings().weight.requires_grad_(False)
        found[name] = {
            "config": {**json.loads(config.to_json_string(use_diff=False)), "architectures": [cls.__name__]},
            "num_parameters": model.num_parameters(),
            "only_trainable": model.num_parameters(only_trainable=True),
            "exclude_embeddings": model.num_parameters(exclude_embeddings=True),
            "get_memory_footprint": model.get_memory_footprint(return_buffers=False),
            "estimate_tokens": [
                model.estimate_tokens({"input_ids": tokens}),
                model.estimate_tokens({"labels": tokens}),
            ],
            "floating_point_ops": [
                model.floating_point_ops({"input_ids": tokens}),
                model.floating_point_ops({"input_ids": tokens}, exclude_embeddings=False),
            ],
        }
    return found


def casts() -> dict[str, dict[str, str]]:
    """The dtypes after Flax's casts: of everything, and of what a mask of the kernels names."""
    model = transformers.FlaxGPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    paths = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(key.key for key in path), model.params)
    mask = jax.tree_util.tree_map(lambda path: path.endswith("kernel"), paths)

    def dtypes(params: dict) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves(params)
        return dict(zip(jax.tree_util.tree_leaves(paths), [leaf.dtype.name for leaf in leaves], strict=True))

    return {
        "to_bf16": dtypes(model.to_bf16(model.params)),
        "to_fp16 of kernels": dtypes(model.to_fp16(model.params, mask)),
        "to_bf16, then to_fp32 of kernels": dtypes(model.to_fp32(model.to_bf16(model.params), mask)),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    FOLDER.mkdir(exist_ok=True)
    for function in (methods, masks, tf_masks, counts, casts):
        text = json.dumps(function(), indent=None, separators=(",", ":"))
        (FOLDER / f"{function.__name__}.json").write_text(text + "\n")
