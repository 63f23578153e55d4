"""The variables of google-research's BERT and ALBERT, in their own TensorFlow checkpoints.

As in `bert/encoder/layer_0/attention/self/query/kernel`: PyTorch's names with other separators, `kernel` for a weight with
its axes in reverse, `gamma` and `beta` of norms, `output_weights` and `output_bias` of heads; ALBERT has names of its own.
Source: google-research/bert and google-research/albert, `modeling.py` and `run_*.py`; transformers 4.57.6,
`load_tf_weights_in_bert` and `load_tf_weights_in_albert`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fmodels.dialects.tensorflow import Variable, from_torch, to_torch
from fmodels.models import Config, family
from fmodels.weights import Tensor
from fmodels.weights.tensors import listing

OPTIMIZER = re.compile(
    r"(^|/)(adam_m|adam_v|lamb_m|lamb_v|AdamWeightDecayOptimizer(_1)?|LAMBOptimizer(_1)?|global_step)(/|$)"
)
"""What a training run keeps beside the weights."""


def read(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors under the names, and with the axes, of PyTorch's files; an optimizer's are left out.

    Args:
        tensors: by the variables' names.
        config: of the model.

    Returns:
        Lazy tensors; names that are not known stay.

    Example:
        >>> import fmodels as fm, numpy as np
        >>> config = fm.models.bert.Config(task="pretraining")
        >>> tensor = Tensor.lazy("", np.float32, (768, 3072), lambda: np.zeros((768, 3072), np.float32))
        >>> found = read({"bert/encoder/layer_0/intermediate/dense/kernel": tensor}, config)
        >>> {name: tensor.shape for name, tensor in found.items()}
        {'bert.encoder.layer.0.intermediate.dense.weight': (3072, 768)}
    """
    known = _variables(config, "load", every=True)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        variable = known.get(name.removeprefix("module/"))  # TensorFlow Hub's
        if variable is not None:
            found[variable.name] = to_torch(tensor, variable)
        elif not OPTIMIZER.search(name):
            found[name] = tensor
    return found


def write(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of `read`.

    Raises:
        ValueError: the family had no such checkpoints, or they have no variable for a tensor.
    """
    variables = {variable.name: (name, variable) for name, variable in _variables(config, "write").items()}
    if unplaced := [name for name in tensors if name not in variables]:
        raise ValueError(
            f"save: google-research's checkpoints of {config.model_type} have no variables for {len(unplaced)} tensors: "
            f"{listing(unplaced)}; use another format"
        )
    return {variables[name][0]: from_torch(tensor, variables[name][1]) for name, tensor in tensors.items()}


def config(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], *, task: str | None = None) -> Config | None:
    """The config that lies beside a checkpoint as `bert_config.json` or `albert_config.json`, if one does.

    Such files do not name a head: the models that were given away have those of pre-training.
    """
    for name, model_type in (("bert_config.json", "bert"), ("albert_config.json", "albert")):
        if name in metadata:
            return family(model_type).config.from_hf(metadata[name], task=task or "pretraining")
    return None


def _variables(config: Config, verb: str, *, every: bool = False) -> dict[str, Variable]:
    """Name of a variable -> what it is.

    Args:
        config: of the model.
        verb: what is done, for errors.
        every: also those that only models of other tasks have.
    """
    weights = family(config).weights
    names = weights.tensorflow.original if weights.tensorflow is not None else None
    if names is None:
        raise ValueError(
            f"{verb}: TensorFlow's own checkpoints are those of google-research's BERT and ALBERT, and this is "
            f"{config.model_type}; {'convert it with the library that wrote it' if verb == 'load' else 'use another format'}"
        )
    places = weights.places(config)
    places = weights.places_of_other_tasks(config) | places if every else places
    variables: dict[str, Variable] = {}
    for name, place in places.items():
        prefix = weights.prefix[""] + "."
        own = name if name.startswith(prefix) or "@" not in place.rule.name else prefix + name
        for pattern, replacement in names.items():
            own = re.sub(pattern, replacement, own)
        kind = place.rule.leaves[0].rpartition(".")[2]
        norm = place.rule.leaves[0].endswith(("norm.scale", "norm.bias"))
        path, _, last = own.rpartition(".")
        last = last.replace("output_weight", "output_weights")
        if norm:
            last = "gamma" if kind == "scale" else "beta"
        elif last == "weight":
            last = "kernel" if kind == "weight" else ""
        own = "/".join(part for part in (*path.split("."), last) if part)
        variables[own] = Variable(name, reverse=last == "kernel", lift=False)
    return variables
