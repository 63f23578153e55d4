"""`TFLayer`: a `TFModel` as a layer of Keras 3, for `compile`, `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import tensorflow as tf

import fmodels as fm
from interop.tensorflow.model import TFModel


@tf.keras.utils.register_keras_serializable(package="fmodels")
class TFLayer(tf.keras.layers.Layer):
    """A layer that runs a `TFModel`; both have the same variables, so that what is trained in one is so in the other.

    Keras has the weights under transformers' names with dots. Change the model (its vocabulary, heads, dtype) before the layer
    is made: its new variables would not be those that Keras trains, which `call` refuses. Keras' mixed precision does not
    reach into it: the dtypes of the model's variables say what is computed in which. A `.keras` file of a network with it can be
    loaded where this module has been imported; it holds the weights once more, so that `TFModel.save_pretrained` is for the rest.

    Labels among the inputs add the mean of the model's own loss: `compile(optimizer)` trains that, without a loss of its own.

    Args:
        model: the model; its variables become those of Keras.
        output: the field of `TFOutput` that the layer gives.
        **options: of Keras' layer, such as `name`.

    Example:
        >>> import jax, fmodels as fm
        >>> from interop.tensorflow import TFLayer, TFModel
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1,
        ...                                num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> layer = TFLayer(TFModel(fm.init(config, jax.random.key(0)), config))
        >>> layer(tf.constant([[1, 2, 3]])).shape, len(layer.trainable_weights)
        (TensorShape([1, 3, 11]), 16)
    """

    def __init__(self, model: TFModel, output: str = "logits", **options: Any):
        super().__init__(dtype="float32", autocast=False, **options)
        self.model, self.output_field = model, output
        shared = {}
        trained = {id(variable) for variable in model.trainable_variables}
        for name, variable in {**model.named_variables, **model.adapter_variables}.items():
            weight = self.add_weight(
                name=name,
                shape=tuple(variable.shape),
                dtype=variable.dtype.name,
                initializer=lambda shape, dtype=None, value=variable: tf.convert_to_tensor(value),
                trainable=id(variable) in trained,
            )
            shared[name] = weight.value
        own = {name: variable for name, variable in shared.items() if name in model.named_variables}
        model._take(own, {name: variable for name, variable in shared.items() if name not in own})
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the layer of: the model's config, and the shapes and dtypes of its variables.

        Raises:
            NotImplementedError: the model has adapters.
        """
        if self.model.adapter_variables:
            raise NotImplementedError("TFLayer: a model with adapters is not described; save it with save_pretrained")
        base = {name: value for name, value in super().get_config().items() if name != "dtype"}
        variables = {name: [v.dtype.name, *v.shape] for name, v in self.model.named_variables.items()}
        config = json.dumps(self.model.config.to_hf())
        return {**base, "output": self.output_field, "model_config": config, "variables": variables}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The layer with zeros for weights, which Keras then reads."""
        options = {**config}
        data = json.loads(options.pop("model_config"))
        own = fm.models.FAMILIES[data["model_type"]].config.from_hf(data)
        shapes = options.pop("variables")
        zeros = {n: np.zeros(shape, tf.as_dtype(dtype).as_numpy_dtype) for n, (dtype, *shape) in shapes.items()}
        return cls(TFModel(fm.from_disk(zeros, own), own), **options)

    def call(self, inputs: Any) -> tf.Tensor:
        """The output for tokens `(b t)`, or for a dict of inputs by the names of `TFModel`, whose labels add its loss.

        Tokens may be floating, as those of a `Sequential` without `Input` are: Keras' `Embedding` takes them, too.

        Raises:
            ValueError: the model has got other variables since; it does not give the output that the layer is made for.
        """
        if {id(variable) for variable in self.model.variables} != {id(weight.value) for weight in self.weights}:
            raise ValueError("TFLayer: its model has got new variables, which Keras does not train; make a new TFLayer")
        if not isinstance(inputs, Mapping):
            inputs = tf.convert_to_tensor(inputs)
            inputs = tf.cast(inputs, tf.int32) if inputs.dtype.is_floating else inputs
        out = self.model(inputs)
        if out.loss is not None:
            self.add_loss(tf.reduce_mean(out.loss))
        value = getattr(out, self.output_field)
        if value is None:
            raise ValueError(f"TFLayer: a model of task {self.model.config.task!r} has no {self.output_field}")
        return value
