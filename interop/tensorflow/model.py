"""`TFModel`, a `tf.Module` that computes through JAX."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import tensorflow as tf

import fmodels as fm
from interop.adapters import PREFIX, adapted
from interop.generation import GeneratedDict, generate
from interop.labels import given_labels
from interop.positions import POSITIONS
from interop.pretrained import Pretrained
from interop.tensorflow.convert import arrays_of, disk_arrays, from_tensorflow, to_numpy
from interop.tensorflow.inputs import check_values, kind_of, length_of, rank_of, read_inputs
from interop.tensorflow.losses import loss_of, shifted_right
from interop.tensorflow.output import TFOutput
from interop.tensorflow.programs import convert

PLATFORMS = ("cpu", "cuda", "tpu")


class _Functions:
    """What was compiled, by inputs: no dict, which tf.Module would wrap and track. Its functions hold the variables of one model."""

    def __init__(self) -> None:
        self.by_inputs: dict[Any, Any] = {}

    def __deepcopy__(self, memo: Any) -> _Functions:
        return _Functions()


class TFModel(Pretrained, tf.Module):
    """A model for TensorFlow: variables under transformers' PyTorch names, computed by the JAX function.

    `model(tokens, mask)` works under `tf.GradientTape`, inside of `tf.function`, and with the optimizers of Keras and
    TensorFlow: `optimizer.apply_gradients(zip(gradients, model.trainable_variables))`. Of labels it computes the loss of
    transformers' TensorFlow classes: `model(tokens, labels=labels).loss`. XLA compiles once for each shape of the inputs
    (and once more for gradients), so pad batches to a few lengths. The layers are stacked inside of the compiled program,
    whose compile time does therefore not grow with depth.

    In a Keras model it is a layer, `TFLayer`. The methods of transformers' models have their names here (`interop.methods`
    lists those that there are not).

    Token ids and the other inputs are checked against their tables where they are known: outside of `tf.function`.

    Args:
        params: the tree, stacked or a tuple of layers; it is copied.
        config: its config.

    Attributes:
        config: the config; `resize_token_embeddings` and `prune_heads` replace it.
        named_variables: name -> `tf.Variable`, in the order of the checkpoint.

    Example:
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1,
        ...                                num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> model = TFModel(fm.init(config, jax.random.key(0)), config)
        >>> model(tf.constant([[1, 2, 3]])).logits.shape
        TensorShape([1, 3, 11])
        >>> model.trainable_variables[0].name
        'transformer.wte.weight:0'
    """

    framework = "tf"
    supports_xla_generation = True
    _integers = tf.int32
    _floats = tf.float32

    def __init__(self, params: fm.Params, config: Any):
        tf.Module.__init__(self, name=config.model_type.replace("-", "_"))
        self._functions = _Functions()
        self.named_variables: dict[str, tf.Variable] = {}
        self.adapter_variables: dict[str, tf.Variable] = {}
        self._specs = {}
        self._assign(params, config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (
            "params",
            "_specs",
        ):  # a tree that the setter copies, and what is no variable: tf.Module would keep them
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _assign(self, params: fm.Params, config: Any) -> None:
        """Takes over weights; variables whose shape stays keep their identity, and with it their optimizer's state."""
        variables = {}
        buffers = fm.models.family(config).weights.of_module.buffers(config)  # which PyTorch does not train
        for name, array in disk_arrays(params, config, "TFModel").items():
            old = self.named_variables.get(name)
            if old is not None and tuple(old.shape) == array.shape and old.dtype == tf.as_dtype(array.dtype):
                old.assign(array)
                variables[name] = old
            else:
                fresh = name not in buffers and tf.as_dtype(array.dtype).is_floating
                trainable = old.trainable if old is not None else fresh
                # Not a tensor that shares JAX's memory: the variable must own what it changes.
                variables[name] = tf.Variable(tf.convert_to_tensor(array), trainable=trainable, name=name)
        self._take(variables)
        self.config = config
        embed = params["embed"] | params.get("decoder", {}).get("embed", {})
        self._tables = types.SimpleNamespace(
            tokens=embed["tokens"].shape[0],
            decoder_tokens=embed["tokens"].shape[0],
            positions=embed["positions"].shape[0] - config.position_offset if "positions" in embed else None,
            token_types=embed["types"].shape[0] if "types" in embed else None,
        )

    def _take(self, variables: dict[str, tf.Variable], adapters: dict[str, tf.Variable] | None = None) -> None:
        self.named_variables = variables
        if adapters is not None:
            self.adapter_variables = adapters
        self._functions.by_inputs.clear()

    @property
    def variables(self) -> tuple[tf.Variable, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All variables, in the order of the checkpoint, then those of adapters."""
        return (*self.named_variables.values(), *self.adapter_variables.values())

    @property
    def trainable_variables(self) -> tuple[tf.Variable, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The variables that gradients are taken for: those of adapters that are trained, else the model's own."""
        trained = tuple(v for v in self.adapter_variables.values() if v.trainable)
        return trained or tuple(v for v in self.named_variables.values() if v.trainable)

    @property
    def params(self) -> fm.Params:
        """A copy of the weights as they are now, as a stacked tree of jax arrays."""
        return from_tensorflow(self, self.config)

    @params.setter
    def params(self, params: fm.Params) -> None:
        Pretrained.params.fset(self, params)  # pyright: ignore[reportOptionalCall]

    @property
    def dtype(self) -> tf.DType:
        """The type of the first floating variable."""
        return next(v.dtype for v in self.variables if v.dtype.is_floating)

    def __call__(
        self,
        tokens: Any = None,
        mask: Any = None,
        positions: Any = None,
        token_types: Any = None,
        *,
        decoder_tokens: Any = None,
        decoder_mask: Any = None,
        hidden_states: bool = False,
        attentions: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        training: bool | None = None,
        labels: Any = None,
        next_sentence_label: Any = None,
        sentence_order_label: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        **aliases: Any,
    ) -> TFOutput:
        """Runs the model; see `fm.forward`.

        Args:
            tokens: `(b t)` int32 or int64; `(b n t)` for multiple choice. Also `input_ids`; or a dict of all inputs.
            mask: `(b t)` bool or 0/1, True for real tokens; all real if None. Also `attention_mask`.
            positions: `(b t)` int. Also `position_ids`.
            token_types: `(b t)` int. Also `token_type_ids`.
            decoder_tokens: `(b t)` int, of encoder-decoder models. Also `decoder_input_ids`.
            decoder_mask: `(b t)` bool or 0/1. Also `decoder_attention_mask`.
            hidden_states: also return the input of every layer.
            attentions: also return the weights of every attention.
            output_hidden_states: another name of `hidden_states`; None: what config.json says, False if nothing.
            output_attentions: another name of `attentions`; None: as above.
            training: of no effect: there is no dropout.
            labels: of each token, or of each row: what `loss` is computed of, in numbers and shape as in the TensorFlow classes
                of transformers 4.57: `(1,)`, the mean over tokens, or `(b,)`, one of each row. -100 does not count: it is left
                out of the mean, the loss of a row is 0. Nor does -1 for classes of tokens, nor BART's pad token for what it
                shall say. Of double heads those of the language model. Without decoder tokens an encoder-decoder language
                model reads them shifted to the right.
            next_sentence_label: `(b)`, of BERT's pretraining; of the next sentence the same as `labels`.
            sentence_order_label: `(b)`, of ALBERT's pretraining.
            start_positions: `(b)`, of question answering; one behind the last token is refused, where PyTorch's classes pass
                over it.
            end_positions: `(b)`, of question answering.
            **aliases: the inputs by transformers' names, such as `model(**tokenizer(texts, return_tensors="tf"))`.

        Returns:
            A `TFOutput`.

        Raises:
            ValueError: wrong shapes or dtypes, no tokens, tokens outside of the vocabulary, labels outside of the classes.
            TypeError: an unknown name, or an input under both of its names; labels that the task has not.
        """
        all_labels = {
            "labels": labels, "next_sentence_label": next_sentence_label, "sentence_order_label": sentence_order_label,
            "start_positions": start_positions, "end_positions": end_positions,
        }  # fmt: skip
        if isinstance(tokens, Mapping):
            tokens, aliases = None, {**tokens, **aliases}
            all_labels |= {name: aliases.pop(name) for name in all_labels.keys() & aliases.keys()}
        said = given_labels("TFModel", self.config, **all_labels)
        said = {name: tf.convert_to_tensor(label) for name, label in said.items()}
        reads = (decoder_tokens, aliases.get("decoder_tokens"), aliases.get("decoder_input_ids"))
        if said and self.config.task == "seq2seq-lm" and all(one is None for one in reads):
            decoder_tokens = shifted_right(self.config, said["labels"])
        given = {"tokens": tokens, "mask": mask, "positions": positions, "token_types": token_types}
        if self.config.is_encoder_decoder:
            given |= {"decoder_tokens": decoder_tokens, "decoder_mask": decoder_mask}
        elif decoder_tokens is not None or decoder_mask is not None:
            raise ValueError(f"TFModel: {self.config.model_type} of task {self.config.task!r} has no decoder tokens")
        inputs = read_inputs("TFModel", self.config, given, aliases)
        check_values(self._tables, inputs)
        ready = {name: tf.cast(value, kind_of(name)) for name, value in inputs.items()}
        asked = self._asked(
            hidden_states=hidden_states or output_hidden_states, attentions=attentions or output_attentions
        )
        key = (tuple(ready), inputs["tokens"].shape.rank, asked)
        functions = self._functions.by_inputs
        if key not in functions:
            spec = {n: tf.TensorSpec([None] * key[1], t.dtype, name=n) for n, t in ready.items()}
            converted = self._convert(ready, key[1], asked)
            functions[key] = tf.function(converted, input_signature=[spec], autograph=False)
        out = TFOutput(**functions[key](ready))
        if not said:
            return out
        return out._replace(loss=loss_of(self.config, out.logits, out.sequence_logits, said, ready.get("mask")))

    def _convert(self, names: Iterable[str], rank: int, asked: tuple[str, ...]) -> Any:
        """A TensorFlow function of a dict of inputs, whose batch and length may be anything."""
        config, remat, using = self.config, self.is_gradient_checkpointing, self._using()
        options: dict[str, Any] = dict.fromkeys(asked, True)
        variables = {**self.named_variables, **self.adapter_variables}

        def forward(tensors: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
            params = adapted(fm.from_disk(own, config), config, tensors, using)
            out = fm.forward(params, config, **inputs, remat=remat, **options)
            if isinstance(out.attentions, tuple):
                raise ValueError(
                    "TFModel: attentions needs layers with equally many heads; mask_heads instead of prune_heads keeps them so"
                )
            fields = {name: getattr(out, name) for name in TFOutput._fields if name != "loss"}
            return {name: value for name, value in fields.items() if value is not None}

        shapes: Any = {name: "b, n, t" if rank == 3 else f"b, {length_of(name, names)}" for name in names}
        # A table of positions bounds the length; stated, because a symbolic length cannot be compared with it.
        bounded = self._tables.positions is not None and "positions" not in names
        lengths = sorted({shape[-1] for shape in shapes.values()})
        converted = convert(
            forward,
            [None, shapes],
            constraints=[f"{n} <= {self._tables.positions}" for n in lengths] if bounded else [],
            gradient=True,
            platforms=PLATFORMS,
        )
        return lambda inputs: converted(variables, inputs)

    def generate(
        self,
        tokens: Any = None,
        mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        generation_config: Any = None,
        seed: int | None = None,
        key: Any = None,
        **options: Any,
    ) -> tf.Tensor | GeneratedDict:
        """Continues prompts; see `fm.generate`. Copies the weights once a call; runs eagerly, not in a `tf.function`.

        Args:
            tokens: `(b t)` int32 or int64 prompts, padded on either side. Also `input_ids` and `inputs`.
            mask: `(b t)` bool or 0/1. Also `attention_mask`.
            max_new_tokens: how many tokens to add at most.
            generation_config: `fm.GenerationConfig` or transformers'; `options` go before it.
            seed: a number for sampling, or `key`.
            key: JAX's random key.
            **options: by the names of `fm.GenerationConfig`, such as `do_sample=True, top_p=0.9`; other arguments of
                `fm.generate`, such as `decoder_tokens` (also `decoder_input_ids`); and `return_dict_in_generate`.

        Returns:
            `(b t+n)`, prompts and new tokens, in the dtype of `tokens`; with `return_dict_in_generate=True` a `GeneratedDict`.
        """
        aliases = {name: options.pop(name) for name in ("input_ids", "attention_mask") if name in options}
        tokens = options.pop("inputs", None) if tokens is None else tokens
        inputs = read_inputs("generate", self.config, {"tokens": tokens, "mask": mask}, aliases)
        if any(tf.is_symbolic_tensor(tensor) for tensor in inputs.values()):
            raise ValueError("generate: it compiles its own loop; call it outside of tf.function")
        if seed is not None and key is not None:
            raise TypeError("generate: pass one of seed= and key=")
        sequences, whole = generate(
            self._adapted(), self.config, {name: tensor.numpy() for name, tensor in inputs.items()}, tf.convert_to_tensor,
            max_new_tokens=max_new_tokens, generation_config=generation_config,
            key=key if seed is None else jax.random.key(seed), options=options,
        )  # fmt: skip
        sequences = tf.cast(sequences, inputs["tokens"].dtype)
        return sequences if whole is None else whole._replace(sequences=sequences)

    # --- tables and heads ---------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> tf.Variable:
        """The table of the tokens."""
        return self._variables_of("embed.tokens")[0]

    def set_input_embeddings(self, value: Any) -> None:
        """Assigns a tensor, or the first weight of a layer, to the table of the tokens, and so to a tied head."""
        self.get_input_embeddings().assign(value.weights[0] if hasattr(value, "weights") else value)

    def get_output_embeddings(self) -> tf.Variable | None:
        """The weight that gives the logits over the vocabulary; None if the model has no such head."""
        if self.config.tie_word_embeddings:
            return self.get_input_embeddings() if self._has_head() else None
        return next(iter(self._variables_of("lm_head.weight")), None)

    def set_output_embeddings(self, value: Any) -> None:
        """Assigns a tensor, or the first weight of a layer, to the weight of the head; a tied one is the table, too."""
        head = self.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"set_output_embeddings: a model of task {self.config.task!r} has no head over the vocabulary"
            )
        head.assign(value.weights[0] if hasattr(value, "weights") else value)

    def get_lm_head(self) -> tf.Variable | None:
        """As `get_output_embeddings`."""
        return self.get_output_embeddings()

    def get_bias(self) -> dict[str, tf.Variable] | None:
        """The bias of the logits over the vocabulary, by its name; None if there is none."""
        places = fm.disk_names(self.config, module=True).items()
        found = {
            n: self.named_variables[n]
            for n, leaves in places
            if leaves == ("lm_head.bias",) and n in self.named_variables
        }
        return found or None

    def set_bias(self, value: Mapping[str, Any]) -> None:
        """Assigns to what `get_bias` gives."""
        bias = self.get_bias() or {}
        if value.keys() != bias.keys():
            raise ValueError(f"set_bias: expected {', '.join(bias) or 'nothing'}, got {', '.join(value)}")
        for name, new in value.items():
            bias[name].assign(new)

    def get_position_embeddings(self) -> tf.Variable | tuple[tf.Variable, ...]:
        """The table of positions; the encoder's and the decoder's if there are two.

        Raises:
            NotImplementedError: the model has none.
        """
        tables = [table for path in POSITIONS for table in self._variables_of(path)]
        if not tables:
            raise NotImplementedError(f"get_position_embeddings: {self.config.model_type} has no table of positions")
        return tables[0] if len(tables) == 1 else tuple(tables)

    def tie_weights(self) -> None:
        """Does nothing: what the config ties is one variable under one name."""

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """What `model(**inputs)` takes, by transformers' names: int32, of any batch and length."""
        names = ["input_ids", "attention_mask", "position_ids"]
        names += ["token_type_ids"] if self._tables.token_types is not None else []
        names += ["decoder_input_ids", "decoder_attention_mask"] if self.config.is_encoder_decoder else []
        return {name: tf.TensorSpec([None] * rank_of(self.config), tf.int32, name=name) for name in names}

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, saved_model: bool = False, version: int = 1, **options: Any
    ) -> None:
        """As `Pretrained.save_pretrained`; also a SavedModel, `saved_model/<version>`, if `saved_model`; see `export`."""
        super().save_pretrained(folder, **options)
        if saved_model and options.get("is_main_process", True):
            self.export(os.path.join(os.fspath(folder), "saved_model", str(version)))

    # --- what `Pretrained` asks for -------------------------------------------------------------------------------------

    def _named(self) -> dict[str, tf.Variable]:
        return self.named_variables

    def _is_trained(self, tensor: tf.Variable) -> bool:
        return any(tensor is variable for variable in self.trainable_variables)

    def _adapter_tensors(self) -> dict[str, tf.Variable]:
        return self.adapter_variables

    def _set_adapter(self, name: str, tensors: Mapping[str, np.ndarray] | None, trained: bool) -> None:
        prefix = f"{PREFIX}{name}."
        kept = {n: v for n, v in self.adapter_variables.items() if not n.startswith(prefix)}
        new = {f"{prefix}{n}": array for n, array in (tensors or {}).items()}
        made = {n: tf.Variable(tf.convert_to_tensor(array), trainable=trained, name=n) for n, array in new.items()}
        self.adapter_variables = {**kept, **made}

    def _changed(self) -> None:
        self._functions.by_inputs.clear()

    @staticmethod
    def _arrays_of_adapter(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: to_numpy(tensor, f"load_adapter: {name!r}") for name, tensor in tensors.items()}

    def _replace(self, params: fm.Params, config: Any) -> None:
        self._assign(params, config)

    def _set_dtype(self, dtype: str, names: Iterable[str]) -> None:
        changed = dict(self.named_variables)
        for name in names:
            old = changed[name]
            if old.dtype.is_floating and old.dtype.name != dtype:
                changed[name] = tf.Variable(tf.cast(old, dtype), trainable=old.trainable, name=name)
        self._take(changed)

    def _set_remat(self, value: bool) -> None:
        super()._set_remat(value)
        self._functions.by_inputs.clear()

    @staticmethod
    def _tensor(value: Any, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(value, dtype)

    @staticmethod
    def _arrays(what: str, tensors: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
        return arrays_of(what, tensors, config)

    @staticmethod
    def _bytes_of(dtype: tf.DType) -> int:
        return dtype.size

    @staticmethod
    def _lowest(dtype: tf.DType) -> float:
        return float(dtype.min)

    def _variables_of(self, leaf: str) -> list[tf.Variable]:
        places = fm.disk_names(self.config, module=True).items()
        return [self.named_variables[name] for name, leaves in places if leaves == (leaf,)]

    def _has_head(self) -> bool:
        places = fm.disk_names(dataclasses.replace(self.config, tie_word_embeddings=False), module=True)
        return ("lm_head.weight",) in places.values()

    # --- SavedModel -----------------------------------------------------------------------------------------------------

    def export(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes a SavedModel for inference, which needs TensorFlow and no JAX; see `interop.saved_model.export`."""
        from interop.saved_model import export

        if self._using():
            raise ValueError(
                "export: a SavedModel has the model's own weights alone; disable_adapters or delete_adapter first, or make a "
                "TFModel of fm.merge_adapters(fm.add_adapter(params, config, adapter))"
            )
        export(self, folder, **options)
