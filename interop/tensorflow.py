"""TensorFlow: weights in both directions, and a `tf.Module` that trains, generates and exports a SavedModel.

What is shared and what is copied, on the CPU:

* `to_tensorflow` shares the memory of every tensor that lies in one piece on a 64-byte boundary. Copied are tensors
  that Hugging Face lays out differently (GPT-2's transposed and fused matrices), layers of a stacked leaf that do not
  begin on such a boundary (TensorFlow aborts the process on those), and float8, which TensorFlow's dlpack lacks.
* `from_tensorflow` shares what needs no stacking when it comes as `tf.Tensor`, which nobody can change. Variables and
  numpy arrays are copied, since they can change under the tree.
* `TFModel` owns its memory. Arrays on an accelerator go through the host.

All of it is exact to the bit, bfloat16, float16 and float8 included.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import jax2tf

import fmodels as fm

ALIGNMENT = 64
PLATFORMS = ("cpu", "cuda", "tpu")
ALIASES = {
    "input_ids": "tokens",
    "attention_mask": "mask",
    "position_ids": "positions",
    "token_type_ids": "token_types",
    "decoder_input_ids": "decoder_tokens",
    "decoder_attention_mask": "decoder_mask",
}
"""transformers' name of an input -> ours."""


class TFOutput(NamedTuple):
    """What `TFModel` returns; a field that the task does not have is None.

    Attributes:
        logits: float32, as in `fm.Output`.
        hidden: `(b t d)`, the last hidden state after the final norm; also `last_hidden_state`.
        pooled: `(b d)`, the pooler's output; also `pooler_output`.
        sequence_logits: float32; the second head of models that have two.
        encoder_hidden: `(b s d)`, of encoder-decoder models.
    """

    logits: Any = None
    hidden: Any = None
    pooled: Any = None
    sequence_logits: Any = None
    encoder_hidden: Any = None

    @property
    def last_hidden_state(self) -> Any:
        """The hidden states by transformers' name."""
        return self.hidden

    @property
    def pooler_output(self) -> Any:
        """The pooler's output by transformers' name."""
        return self.pooled


def to_tensorflow(params: fm.Params, config: Any) -> dict[str, tf.Tensor]:
    """The tensors under the names and in the layout of transformers' PyTorch models, as `interop.torch.to_torch`.

    Tied repetitions are included, as in a `state_dict`; they share memory with what they repeat.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: its config.

    Returns:
        Name -> `tf.Tensor` in the host's memory, which it shares with `params` where the module's docstring says so.

    Raises:
        ValueError: the tree does not fit the config, or holds something else than arrays.

    Example:
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1,
        ...                                num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> tensors = to_tensorflow(fm.init(config, jax.random.key(0)), config)
        >>> tensors["transformer.wte.weight"].shape, tensors["transformer.h.0.attn.c_attn.weight"].shape
        (TensorShape([11, 8]), TensorShape([8, 24]))
    """
    return {name: _to_tensor(array) for name, array in _disk_arrays(params, config, "to_tensorflow", tied=True).items()}


def from_tensorflow(tensors_or_module: Any, config: Any) -> fm.Params:
    """A stacked tree from TensorFlow's tensors under transformers' PyTorch names; the inverse of `to_tensorflow`.

    Args:
        tensors_or_module: name -> `tf.Tensor`, `tf.Variable`, Keras variable or numpy array; or a `TFModel`; or any
            object whose `variables` have those names. Repeated tensors of a tied head are accepted.
        config: the config.

    Returns:
        A tree of jax arrays in the dtypes that came, stacked unless the config makes the layers differ.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape, of a 64-bit dtype that jax would cut to 32 bits,
            or a tied head that differs from its embedding; all are listed.
        TypeError: `tensors_or_module` is nothing of the above.

    Example:
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1,
        ...                                num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0), dtype="bfloat16")
        >>> again = from_tensorflow(to_tensorflow(params, config), config)
        >>> bool((again["layers"]["mlp"]["up"]["weight"] == params["layers"]["mlp"]["up"]["weight"]).all())
        True
    """
    named = _named(tensors_or_module)
    arrays = {name: _to_numpy(value, name) for name, value in named.items()}
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        names = ("float64", "int64", "uint64", "complex128")
        if wide := [f"{name!r} is {array.dtype}" for name, array in arrays.items() if array.dtype.name in names]:
            raise ValueError(
                f"from_tensorflow: {len(wide)} tensors have 64 bits, which jax would cut to 32: {', '.join(wide[:20])}"
                '; tf.cast them to float32, or set jax.config.update("jax_enable_x64", True)'
            )
    _check_repeated(config, arrays)
    params = fm.from_disk(arrays, config)
    shared = all(isinstance(value, tf.Tensor) for value in named.values())
    return jax.tree.map(lambda a: jax.device_put(a if shared or a.flags.owndata else a.copy()), params)


def _check_repeated(config: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises if a tensor that came as the repetition of another is none: it would get lost."""
    places = fm.disk_names(config, tied=True, module=True)
    first: dict[tuple[str, ...], str] = {}
    for name, leaves in places.items():
        first.setdefault(leaves, name)
    pairs = [(name, first[leaves]) for name, leaves in places.items() if name != first[leaves]]
    unequal = [a for a, b in pairs if a in arrays and b in arrays and not _same(arrays[a], arrays[b])]
    if unequal:
        raise ValueError(
            f"from_tensorflow: the config ties {', '.join(map(repr, unequal))} to another tensor, but they differ; "
            "use dataclasses.replace(config, tie_word_embeddings=False)"
        )


class TFModel(tf.Module):
    """A model for TensorFlow: variables under transformers' PyTorch names, computed by the JAX function.

    `model(tokens, mask)` works under `tf.GradientTape`, inside of `tf.function`, and with the optimizers of Keras and
    TensorFlow: `optimizer.apply_gradients(zip(gradients, model.trainable_variables))`. XLA compiles once for each shape
    of the inputs (and once more for gradients), so pad batches to a few lengths. The layers are stacked inside of the
    compiled program, whose compile time does therefore not grow with depth.

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

    def __init__(self, params: fm.Params, config: Any):
        super().__init__(name=config.model_type.replace("-", "_"))
        # A namespace, because tf.Module would wrap and track a dict of functions.
        self._functions = types.SimpleNamespace(by_inputs={})
        self.named_variables: dict[str, tf.Variable] = {}
        self._assign(params, config)

    def _assign(self, params: fm.Params, config: Any) -> None:
        """Takes over weights; variables whose shape stays keep their identity, and with it their optimizer's state."""
        variables = {}
        buffers = fm.models.family(config).weights.of_module.buffers(config)  # which PyTorch does not train
        for name, array in _disk_arrays(params, config, "TFModel").items():
            old = self.named_variables.get(name)
            if old is not None and tuple(old.shape) == array.shape and old.dtype == tf.as_dtype(array.dtype):
                old.assign(array)
                variables[name] = old
            else:
                fresh = name not in buffers and tf.as_dtype(array.dtype).is_floating
                trainable = old.trainable if old is not None else fresh
                # Not a tensor that shares JAX's memory: the variable must own what it changes.
                variables[name] = tf.Variable(tf.convert_to_tensor(array), trainable=trainable, name=name)
        self.named_variables = variables
        self.config = config
        embed = params["embed"] | params.get("decoder", {}).get("embed", {})
        self._tables = types.SimpleNamespace(
            tokens=embed["tokens"].shape[0],
            decoder_tokens=embed["tokens"].shape[0],
            positions=embed["positions"].shape[0] - config.position_offset if "positions" in embed else None,
            token_types=embed["types"].shape[0] if "types" in embed else None,
        )
        self._functions.by_inputs.clear()

    @property
    def variables(self) -> tuple[tf.Variable, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All variables, in the order of the checkpoint."""
        return tuple(self.named_variables.values())

    @property
    def trainable_variables(self) -> tuple[tf.Variable, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The variables that gradients are taken for, in the order of the checkpoint."""
        return tuple(v for v in self.named_variables.values() if v.trainable)

    @property
    def params(self) -> fm.Params:
        """A copy of the weights as they are now, as a stacked tree of jax arrays."""
        return from_tensorflow(self, self.config)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts numbers, a tied head once; `exclude_embeddings` leaves out the tables under `embed`."""
        names = fm.disk_names(self.config, module=True).items() if exclude_embeddings else ()
        left_out = {name for name, leaves in names if leaves[0].split(".")[-2] == "embed"}
        counted = [v for n, v in self.named_variables.items() if n not in left_out]
        return sum(int(tf.size(v)) for v in counted if v.trainable or not only_trainable)

    def get_input_embeddings(self) -> tf.Variable:
        """The table of the tokens."""
        names = fm.disk_names(self.config, module=True).items()
        return self.named_variables[next(name for name, leaves in names if leaves == ("embed.tokens",))]

    def __call__(
        self,
        tokens: Any = None,
        mask: Any = None,
        positions: Any = None,
        token_types: Any = None,
        *,
        decoder_tokens: Any = None,
        decoder_mask: Any = None,
        **aliases: Any,
    ) -> TFOutput:
        """Runs the model; see `fm.forward`.

        Args:
            tokens: `(b t)` int32 or int64; `(b n t)` for multiple choice. Also `input_ids`.
            mask: `(b t)` bool or 0/1, True for real tokens; all real if None. Also `attention_mask`.
            positions: `(b t)` int. Also `position_ids`.
            token_types: `(b t)` int. Also `token_type_ids`.
            decoder_tokens: `(b t)` int, of encoder-decoder models. Also `decoder_input_ids`.
            decoder_mask: `(b t)` bool or 0/1. Also `decoder_attention_mask`.
            **aliases: the inputs by transformers' names, such as `model(**tokenizer(texts, return_tensors="tf"))`.

        Returns:
            A `TFOutput`.

        Raises:
            ValueError: wrong shapes or dtypes, no tokens, tokens outside of the vocabulary.
            TypeError: an unknown name, or an input under both of its names.
        """
        given = {"tokens": tokens, "mask": mask, "positions": positions, "token_types": token_types}
        if self.config.is_encoder_decoder:
            given |= {"decoder_tokens": decoder_tokens, "decoder_mask": decoder_mask}
        elif decoder_tokens is not None or decoder_mask is not None:
            raise ValueError(f"TFModel: {self.config.model_type} of task {self.config.task!r} has no decoder tokens")
        inputs = self._inputs("TFModel", given, aliases)
        self._check_values(inputs)
        ready = {name: tf.cast(value, _kind(name)) for name, value in inputs.items()}
        key = (tuple(ready), inputs["tokens"].shape.rank)
        functions = self._functions.by_inputs
        if key not in functions:
            spec = {n: tf.TensorSpec([None] * key[1], t.dtype, name=n) for n, t in ready.items()}
            converted = self._convert(ready, key[1], with_gradient=True)
            functions[key] = tf.function(converted, input_signature=[spec], autograph=False)
        return TFOutput(**functions[key](ready))

    def _convert(self, names: Iterable[str], rank: int, *, with_gradient: bool) -> Any:
        """A TensorFlow function of a dict of inputs, whose batch and length may be anything."""
        config, variables = self.config, dict(self.named_variables)

        def forward(tensors: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
            out = fm.forward(fm.from_disk(tensors, config), config, **inputs)
            fields = {name: getattr(out, name) for name in TFOutput._fields}
            return {name: value for name, value in fields.items() if value is not None}

        shapes: Any = {name: "b, n, t" if rank == 3 else f"b, {_length(name, names)}" for name in names}
        # A table of positions bounds the length; stated, because a symbolic length cannot be compared with it.
        bounded = self._tables.positions is not None and "positions" not in names
        lengths = sorted({shape[-1] for shape in shapes.values()})
        converted = jax2tf.convert(
            forward,
            polymorphic_shapes=[None, shapes],
            polymorphic_constraints=[f"{n} <= {self._tables.positions}" for n in lengths] if bounded else [],
            with_gradient=with_gradient,
            native_serialization_platforms=PLATFORMS,
        )
        return lambda inputs: converted(variables, inputs)

    def _rank(self) -> int:
        """Of the tokens: `(b t)`, or `(b n t)` for tasks with `n` choices."""
        return 3 if self.config.task in ("multiple-choice", "double-heads") else 2

    def _inputs(self, what: str, given: Mapping[str, Any], aliases: Mapping[str, Any]) -> dict[str, tf.Tensor]:
        """The inputs that are there, as tensors, by our names; checks what can be known before the values."""
        inputs = dict(given)
        for name, value in aliases.items():
            if name not in ALIASES or ALIASES[name] not in given:
                raise TypeError(f"{what}: unknown input {name!r}; expected {', '.join((*given, *ALIASES))}")
            if value is not None and inputs[ALIASES[name]] is not None:
                raise TypeError(f"{what}: {name} and {ALIASES[name]} are the same input; pass one of them")
            inputs[ALIASES[name]] = value if inputs[ALIASES[name]] is None else inputs[ALIASES[name]]
        tensors = {name: tf.convert_to_tensor(value) for name, value in inputs.items() if value is not None}
        if "tokens" not in tensors:
            raise ValueError(f"{what}: tokens (or input_ids) are missing")
        shape = tensors["tokens"].shape
        problems = []
        rank = self._rank()
        if shape.rank != rank:
            letters = "(b n t)" if rank == 3 else "(b t)"
            problems.append(f"tokens have shape {letters} for task {self.config.task!r}; got {shape}")
        elif 0 in shape:
            problems.append(f"there are no tokens; tokens have shape {shape}")
        for name, tensor in tensors.items():
            other = "decoder_tokens" if _length(name, tensors) == "s" else "tokens"
            if other in tensors and not tensor.shape.is_compatible_with(tensors[other].shape):
                problems.append(f"{name} has shape {tensor.shape}, {other} have {tensors[other].shape}")
            masks = name.endswith("mask")
            if not (tensor.dtype.is_integer or (masks and (tensor.dtype.is_bool or tensor.dtype.is_floating))):
                wanted = "bool or 0/1" if masks else "integers, int32 or int64"
                problems.append(f"{name} must be {wanted}; got {tensor.dtype.name}")
        if problems:
            raise ValueError(f"{what}: " + "; ".join(problems))
        return tensors

    def _check_values(self, inputs: Mapping[str, tf.Tensor]) -> None:
        """Checks the inputs against the tables that they index, as far as they are known."""
        problems = []
        length, table = inputs["tokens"].shape[-1], self._tables.positions
        if length is not None and table is not None and length > table and "positions" not in inputs:
            problems.append(f"{length} tokens are more than the {table} positions of this model")
        for name, what in (
            ("tokens", "the vocabulary; see resize_token_embeddings"),
            ("decoder_tokens", "the vocabulary; see resize_token_embeddings"),
            ("positions", "the table of positions"),
            ("token_types", "the table of token types"),
        ):
            size = getattr(self._tables, name)
            if size is None or name not in inputs or tf.is_symbolic_tensor(inputs[name]):
                continue
            low, high = int(tf.reduce_min(inputs[name])), int(tf.reduce_max(inputs[name]))
            if low < 0 or high >= size:
                problems.append(f"{name} reach from {low} to {high}, outside of 0 … {size - 1}, {what}")
        if problems:
            raise ValueError("TFModel: " + "; ".join(problems))

    def generate(
        self,
        tokens: Any = None,
        mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        generation_config: fm.GenerationConfig | None = None,
        seed: int | None = None,
        key: Any = None,
        **options: Any,
    ) -> tf.Tensor:
        """Continues prompts; see `fm.generate`. Copies the weights once a call; runs eagerly, not in a `tf.function`.

        Args:
            tokens: `(b t)` int32 or int64 prompts, padded on either side. Also `input_ids`.
            mask: `(b t)` bool or 0/1. Also `attention_mask`.
            max_new_tokens: how many tokens to add at most.
            generation_config: all options at once; `options` go before it.
            seed: a number for sampling, or `key`.
            key: JAX's random key.
            **options: by the names of `fm.GenerationConfig`, such as `do_sample=True, top_p=0.9`.

        Returns:
            `(b t+n)`, prompts and new tokens, in the dtype of `tokens`.
        """
        aliases = {name: options.pop(name) for name in ("input_ids", "attention_mask") if name in options}
        inputs = self._inputs("generate", {"tokens": tokens, "mask": mask}, aliases)
        if any(tf.is_symbolic_tensor(tensor) for tensor in inputs.values()):
            raise ValueError("generate: it compiles its own loop; call it outside of tf.function")
        if seed is not None and key is not None:
            raise TypeError("generate: pass one of seed= and key=")
        prompt = inputs["tokens"]
        new = fm.GenerationConfig(**options)
        generated = fm.generate(
            self.params,
            self.config,
            prompt.numpy(),
            mask=inputs["mask"].numpy() if "mask" in inputs else None,
            max_new_tokens=max_new_tokens,
            key=key if seed is None else jax.random.key(seed),
            options=new if generation_config is None else generation_config.replace(**new.to_hf()),
        )
        return tf.cast(_to_tensor(np.asarray(generated.tokens)), prompt.dtype)

    def resize_token_embeddings(
        self, new_size: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
    ) -> tf.Variable:
        """Resizes the vocabulary in place; see `fm.resize_embeddings`. Variables of other sizes are new objects.

        An optimizer that was made before still holds the old ones: make a new one.

        Args:
            new_size: of the vocabulary; None keeps it (with `pad_to_multiple_of`: rounds it up).
            pad_to_multiple_of: the size becomes a multiple of it.
            **options: `key` and `init` of `fm.resize_embeddings`.

        Returns:
            The table of the tokens.
        """
        if new_size is not None or pad_to_multiple_of is not None:
            options["pad_to_multiple_of"] = pad_to_multiple_of
            self._assign(*fm.resize_embeddings(self.params, self.config, new_size, **options))
        return self.get_input_embeddings()

    def prune_heads(self, heads: Mapping[int, Iterable[int]]) -> None:
        """Removes heads, by their original numbers, in place; see `fm.prune_heads`. Smaller variables are new."""
        gone = {layer: list(numbers) for layer, numbers in heads.items()}
        self._assign(*fm.prune_heads(self.params, self.config, gone))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **load_options: Any) -> Self:
        """A model from a checkpoint folder or Hub id; the options are those of `fm.load`."""
        return cls(*fm.load(source, **load_options))

    def save_pretrained(self, folder: str | os.PathLike[str], **save_options: Any) -> None:
        """Saves a checkpoint that transformers loads; the options are those of `fm.save`."""
        fm.save(self.params, self.config, folder, **save_options)

    def export(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes a SavedModel for inference, which needs TensorFlow and no JAX; see `interop.saved_model.export`."""
        from interop.saved_model import export

        export(self, folder, **options)


def _kind(name: str) -> tf.DType:
    """The type of an input."""
    return tf.bool if name.endswith("mask") else tf.int32


def _length(name: str, names: Iterable[str]) -> str:
    """The letter of an input's length: a decoder has its own, and positions are the decoder's."""
    return "s" if "decoder_tokens" in names and (name.startswith("decoder_") or name == "positions") else "t"


def _disk_arrays(params: fm.Params, config: Any, what: str, *, tied: bool = False) -> dict[str, np.ndarray]:
    """The tensors by their names on disk, as numpy arrays, which are views of the tree where the layout allows it."""
    flat = fm.tree.flatten(params)
    strange = [path for path, leaf in flat.items() if not isinstance(leaf, jax.Array | np.ndarray)]
    if strange:
        kinds = ", ".join(f"{path!r} is a {type(flat[path]).__name__}" for path in strange[:20])
        raise ValueError(f"{what}: {len(strange)} leaves are not plain arrays: {kinds}; dequantize or merge them first")
    fm.check(params, config)
    host = fm.tree.unflatten({path: np.asarray(leaf) for path, leaf in flat.items()})
    return fm.to_disk(host, config, tied=tied, module=True)


class _Writable:
    """Lends an array's memory without its read-only flag, which numpy's dlpack cannot pass on; tensors are constant."""

    def __init__(self, array: np.ndarray):
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _to_tensor(array: np.ndarray) -> tf.Tensor:
    """A tensor that shares the array's memory if TensorFlow can read it where it lies, else a copy."""
    dtype = tf.as_dtype(array.dtype)
    plain = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(array.itemsize)
    aligned = array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0 and array.size > 0
    if not aligned or plain is None or dtype.name.startswith("float8") or dtype == tf.bool:
        return tf.convert_to_tensor(array)
    # As integers, because numpy's dlpack knows no bfloat16; bitcast shares memory too.
    lent = np.asarray(_Writable(array.view(plain)))
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(lent.__dlpack__()), dtype)


def _to_numpy(value: Any, name: str) -> np.ndarray:
    """A view of the tensor's memory if it is on the host; the caller copies it if it can change."""
    if isinstance(value, np.ndarray | jax.Array):
        return np.asarray(value)
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        kind = type(value).__name__
        raise TypeError(f"from_tensorflow: {name!r} must be a tensor, variable or numpy array; got {kind}") from error
    if tf.is_symbolic_tensor(tensor):
        raise ValueError(f"from_tensorflow: {name!r} has no value yet; call it outside of tf.function")
    if "CPU" not in tensor.device or tensor.dtype not in (tf.float32, tf.float16, tf.bfloat16):
        return tensor.numpy()
    if tensor.dtype == tf.bfloat16:
        return np.from_dlpack(tf.bitcast(tensor, tf.uint16)).view(tf.bfloat16.as_numpy_dtype)
    return np.from_dlpack(tensor)  # pyright: ignore[reportArgumentType]


def _named(source: Any) -> dict[str, Any]:
    """Name -> tensor or variable."""
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, TFModel):
        return dict(source.named_variables)
    if not hasattr(source, "variables"):
        raise TypeError(
            f"from_tensorflow: expected a dict of tensors or an object with `variables`, got {type(source).__name__}"
        )
    names = [str(getattr(v, "path", v.name)).removesuffix(":0") for v in source.variables]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"from_tensorflow: several variables are called {', '.join(repeated)}; pass a dict of tensors")
    return dict(zip(names, source.variables, strict=True))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, NaNs included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
