"""transformers (version 5): models of its own classes with our weights, and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

import fmodels as fm
from interop.torch import from_torch, to_torch


def to_transformers(
    params: fm.Params, config: Any, *, attn_implementation: str | None = None
) -> transformers.PreTrainedModel:
    """The model of transformers' own class with these weights, in evaluation mode.

    The weights are copied, so that training the model does not change `params`; each keeps its dtype.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: its config; `config.task` names the class.
        attn_implementation: of transformers: `"eager"`, `"sdpa"`, …; its own choice if None.

    Raises:
        ValueError: the tree does not fit the config, or heads are pruned, which transformers 5 cannot represent.

    Example:
        >>> import jax
        >>> from interop.transformers import to_transformers
        >>> config = fm.models.bert.Config(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
        ...                                num_kv_heads=2, head_dim=4, max_positions=16, task="masked-lm")
        >>> model = to_transformers(fm.init(config, jax.random.key(0)), config)
        >>> type(model).__name__, model.bert.embeddings.word_embeddings.weight.shape
        ('BertForMaskedLM', torch.Size([11, 8]))
    """
    if config.pruned_heads:
        layers = ", ".join(str(layer) for layer, _ in config.pruned_heads)
        raise ValueError(
            f"to_transformers: layers {layers} have pruned heads, which transformers 5 cannot represent; use fm.mask_heads "
            "on the unpruned model, which computes the same, or interop.torch.TorchModel"
        )
    config = dataclasses.replace(config, quantization=None)  # its weights are plain arrays
    data = {**config.to_hf(), "dtype": params["embed"]["tokens"].dtype.name}
    hf_config = transformers.CONFIG_MAPPING[config.model_type].from_dict(data)
    if attn_implementation is not None:
        hf_config._attn_implementation = attn_implementation
    with no_init_weights():
        model = getattr(transformers, data["architectures"][0])(hf_config)
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in to_torch(params, config).items()
    }
    if not any(name.startswith("pooler.") for name in tensors) and getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's base model may come without one
    model.load_state_dict(tensors, assign=True)
    for name in fm.disk_names(
        config, module=True
    ):  # what has weights of its own stays so, whatever the class says (T5)
        model.all_tied_weights_keys.pop(name, None)
    model.tie_weights(recompute_mapping=False)
    if config.generation is not None and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_dict(config.generation.to_hf())
    return model.eval()


def from_transformers(model: transformers.PreTrainedModel) -> tuple[fm.Params, Any]:
    """The inverse of `to_transformers`: `(params, config)` of a model, each weight in its dtype, copied.

    Args:
        model: of a supported family and class.

    Raises:
        TypeError: it is no model of transformers.
        ValueError: its family, class or config is not supported.

    Example:
        >>> import transformers
        >>> from interop.transformers import from_transformers
        >>> hf_config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16,
        ...                                     bos_token_id=1, eos_token_id=1)
        >>> params, config = from_transformers(transformers.GPT2LMHeadModel(hf_config))
        >>> config.task, params["layers"]["attention"]["query"]["weight"].shape
        ('causal-lm', (2, 2, 4, 8))
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"from_transformers: expected a model of transformers, got {type(model).__name__}; "
            "of other modules use interop.torch.from_torch(module, config)"
        )
    data = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    data.pop("pruned_heads", None)  # transformers 5 keeps the key of old files, and all heads
    config = fm.models.family(data["model_type"]).config.from_hf(data)
    if model.can_generate() and model.generation_config is not None:
        options = {name: value for name, value in model.generation_config.to_diff_dict().items() if value is not None}
        config = dataclasses.replace(config, generation=fm.GenerationConfig.from_hf(options))
    state = model.state_dict()
    tied = fm.tied_names(config, module=True).items()
    if any(not torch.equal(state[name], state[own]) for name, own in tied if {name, own} <= state.keys()):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return from_torch(state, config), config
