"""What `TorchModel` and `TFModel` have in common: transformers' methods, in terms of the functions of `fmodels`.

`interop/methods.py` says which of transformers' methods there are not, and why.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np

import fmodels as fm
from interop import masks
from interop.adapters import Adapters
from interop.loading import check_state_dict, load, read_config, setting
from interop.positions import resize_positions

logger = logging.getLogger("fmodels")

DUMMY = ((7, 6, 0, 0, 1), (1, 2, 3, 0, 0), (0, 0, 0, 4, 5))
"""transformers' example tokens."""

OF_HUB = ("token", "private", "revision", "create_pr", "commit_message", "commit_description", "tags", "certificate")
"""The options of `fm.push_to_hub` that `fm.save` does not have."""

Mask = Mapping[str, Any] | Callable[[str], bool]
"""Which parameters: name -> bool for each, as a nested dict or with dots; or a function of the name with dots."""


class Pretrained(Adapters):
    """The methods of a wrapper that say the same in every library.

    A wrapper brings `config` and what raises NotImplementedError here.

    Attributes:
        is_gradient_checkpointing: whether gradients compute each layer twice; `gradient_checkpointing_enable` turns it on.
    """

    config: Any
    framework: ClassVar[str]
    _integers: ClassVar[Any]
    _floats: ClassVar[Any]
    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    output_modalities: ClassVar[tuple[str, ...]] = ("text",)
    is_parallelizable: ClassVar[bool] = False
    supports_gradient_checkpointing: ClassVar[bool] = True
    is_gradient_checkpointing: bool = False

    def __init__(self, params: fm.Params, config: Any):
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """The type of the first floating parameter."""
        raise NotImplementedError

    def get_input_embeddings(self) -> Any:
        """What holds the table of the tokens."""
        raise NotImplementedError

    def _named(self) -> dict[str, Any]:
        """Name -> parameter or buffer; a tied one once, under its first name."""
        raise NotImplementedError

    def _is_trained(self, tensor: Any) -> bool:
        raise NotImplementedError

    def _replace(self, params: fm.Params, config: Any) -> None:
        """Takes over a tree; what keeps its shape remains the same object."""
        raise NotImplementedError

    def _set_dtype(self, dtype: str, names: Iterable[str]) -> None:
        raise NotImplementedError

    @staticmethod
    def _tensor(value: Any, dtype: Any) -> Any:
        """A tensor of a tensor or an array of numpy, in this dtype of the library."""
        raise NotImplementedError

    @staticmethod
    def _arrays(what: str, tensors: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
        """Arrays of tensors by name, for the method `what`; raises where the repetition of a tied tensor differs from it."""
        raise NotImplementedError

    @staticmethod
    def _bytes_of(dtype: Any) -> int:
        raise NotImplementedError

    @staticmethod
    def _lowest(dtype: Any) -> float:
        """The lowest number of a dtype."""
        raise NotImplementedError

    def _asked(self, **wanted: bool | None) -> tuple[str, ...]:
        """Those of `hidden_states` and `attentions` that a call returns; None is what config.json says."""
        return tuple(
            name
            for name, value in wanted.items()
            if (setting(self.config, f"output_{name}", False) if value is None else value)
        )

    # --- from and to disk ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None, **options: Any) -> Any:
        """A model from a checkpoint, whose weights are assigned and never first initialised.

        Args:
            source: a folder, a file or a Hub id; None where the weights come as `state_dict`.
            **options: those of `fm.load`, or of transformers' `from_pretrained`; `interop.loading.load` lists them.

        Returns:
            The model; with `output_loading_info=True` `(model, info)`, where `info` has missing_keys, unexpected_keys,
            mismatched_keys and error_msgs; with `_do_init=False` `(model, params)`, the tree as well.
        """
        do_init = options.pop("_do_init", True)
        loaded = load(functools.partial(cls._arrays, "from_pretrained"), source, **options)
        model = cls(loaded.params, loaded.config)
        if not do_init:
            return model, loaded.params
        return (model, loaded.info) if options.get("output_loading_info") else model

    @classmethod
    def from_config(cls, config: Any, *, key: Any = None, seed: int | None = None, dtype: Any = "float32") -> Self:
        """A model with random weights, by its family's scheme.

        Args:
            config: a config of `fmodels` or transformers, a config.json as a dict, or the path of a checkpoint.
            key: JAX's random key; or `seed`.
            seed: a number.
            dtype: of the weights.

        Raises:
            TypeError: neither `key` nor `seed`, or both.
        """
        if (key is None) == (seed is None):
            raise TypeError("from_config: the weights are random; pass one of key= and seed=")
        config = read_config(config)
        return cls(fm.init(config, jax.random.key(seed) if seed is not None else key, dtype=dtype), config)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Any = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        safe_serialization: bool | None = None,
        save_original_format: bool = True,
        save_peft_format: bool = True,
        distributed_checkpoint: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Saves a checkpoint that transformers and `from_pretrained` load; with adapters the active one alone, as PEFT does.

        Args:
            folder: made if it is not there.
            is_main_process: False writes nothing: of several processes one saves.
            state_dict: tensors by name to save in place of the model's.
            save_function: refused, because `fm.save` writes the files itself.
            push_to_hub: also upload the checkpoint, to `repo_id`.
            safe_serialization: False is `format="torch"`, True is `format="safetensors"`.
            save_original_format: False is refused: files have the names that transformers writes.
            save_peft_format: False is refused: adapters have the names that PEFT writes.
            distributed_checkpoint: True is refused: `fm.save` writes one checkpoint.
            repo_id: where to upload; the folder's name if None.
            **options: those of `fm.save`: `format`, `dtype`, `max_shard_size`, `variant`; of `fm.save_adapter`: `format`; with
                `push_to_hub` those of `fm.push_to_hub`: `token`, `private`, `commit_message`, ….
        """
        if save_function is not None:
            raise TypeError("save_pretrained: save_function is not called by fm.save; leave it out, or pass format=")
        if not save_original_format or not save_peft_format or distributed_checkpoint:
            raise ValueError(
                "save_pretrained: files have the names that transformers and PEFT write, in one checkpoint; leave "
                "save_original_format, save_peft_format and distributed_checkpoint out"
            )
        options = _with_format("save_pretrained", safe_serialization, options)
        of_hub = {name: options.pop(name) for name in list(options) if name in OF_HUB}
        if of_hub.keys() - {"token"} and not push_to_hub:
            raise ValueError(f"save_pretrained: {', '.join(of_hub)} change nothing without push_to_hub=True")
        if self._specs and (state_dict is not None or push_to_hub):
            raise ValueError(
                "save_pretrained: an adapter is saved as it is, to a folder; leave state_dict and push_to_hub"
            )
        if not is_main_process:
            return
        if self._specs:
            self._save_adapter(folder, **options)
            return
        if state_dict is None:
            params = self.params
        else:
            check_state_dict("save_pretrained", state_dict)
            params = fm.from_disk(self._arrays("save_pretrained", state_dict, self.config), self.config)
        fm.save(params, self.config, folder, **options)
        if push_to_hub:
            name = Path(folder).resolve().name if repo_id is None else repo_id
            fm.push_to_hub(params, self.config, name, **options, **of_hub)

    def push_to_hub(
        self, repo_id: str, *, use_temp_dir: bool | None = None, safe_serialization: bool | None = None, **options: Any
    ) -> str:
        """Uploads a checkpoint; `repo_id` and `options` are those of `fm.push_to_hub`. Returns the address.

        Args:
            repo_id: such as `"me/my-model"`.
            use_temp_dir: False is refused: the upload is made in a temporary folder.
            safe_serialization: as for `save_pretrained`.
            **options: token, private, revision, create_pr, commit_message, ….

        Raises:
            ValueError: the model has adapters, which would not be uploaded.
        """
        if self._specs:
            raise ValueError(
                "push_to_hub: an adapter is saved as it is, to a folder; save_pretrained and upload the folder, or delete_adapter"
            )
        if use_temp_dir is False:
            raise ValueError(
                "push_to_hub: it uploads from a temporary folder; leave use_temp_dir out, or save_pretrained and upload the folder"
            )
        options = _with_format("push_to_hub", safe_serialization, options)
        return fm.push_to_hub(self.params, self.config, repo_id, **options)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def params(self) -> fm.Params:
        """The weights as they are now; a tree that is assigned is copied, and must fit `config`."""
        raise NotImplementedError

    @params.setter
    def params(self, params: fm.Params) -> None:
        fm.check(params, self.config)
        self._replace(params, self.config)

    @property
    def params_shape_tree(self) -> fm.Params:
        """The tree of shapes and dtypes."""
        return jax.eval_shape(lambda: self.params)

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """The paths of the leaves, in stacked form, without which there is no model of this config."""
        return {tuple(path.split(".")) for path in fm.models.family(self.config).weights.leaves(self.config)}

    @property
    def config_class(self) -> type:
        """The class of the config."""
        return type(self.config)

    @property
    def base_model_prefix(self) -> str:
        """What the names of the base model's parameters begin with, in a model with a head."""
        return fm.models.family(self.config).weights.prefix[""]

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """Inputs to try the model with."""
        tokens = self._tensor(np.array(DUMMY) % self.config.vocab_size, self._integers)
        if self.config.task in ("multiple-choice", "double-heads"):
            tokens = tokens[:, None, :]
        names = ("input_ids", "decoder_input_ids") if self.config.is_encoder_decoder else ("input_ids",)
        return dict.fromkeys(names, tokens)

    def can_generate(self) -> bool:
        """Whether `generate` works, which the config decides."""
        return self.config.task in ("causal-lm", "seq2seq-lm", "double-heads") and getattr(self.config, "causal", True)

    def get_parameter_or_buffer(self, target: str) -> Any:
        """The parameter or buffer of a name.

        Raises:
            AttributeError: there is none of that name.
        """
        named = self._named()
        if target not in named:
            raise AttributeError(f"get_parameter_or_buffer: there is no {target!r}; one of {', '.join(named)}")
        return named[target]

    # --- counts -------------------------------------------------------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts numbers, adapters' too; a tied head once. `exclude_embeddings` leaves out the tables under `embed`."""
        places = fm.disk_names(self.config, module=True)
        buffers = fm.models.family(self.config).weights.of_module.buffers(self.config)
        left_out = {n for n, leaves in places.items() if exclude_embeddings and leaves[0].split(".")[-2] == "embed"}
        return sum(
            math.prod(tensor.shape)
            for name, tensor in {**self._named(), **self._adapter_tensors()}.items()
            if name not in left_out and name not in buffers and (self._is_trained(tensor) or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, adapters' too, and of the buffers that a checkpoint has."""
        left_out = () if return_buffers else fm.models.family(self.config).weights.of_module.buffers(self.config)
        return sum(
            math.prod(tensor.shape) * self._bytes_of(tensor.dtype)
            for name, tensor in {**self._named(), **self._adapter_tensors()}.items()
            if name not in left_out
        )

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """How many tokens inputs have, under `input_ids` or `tokens`; 0, with a warning in the log, if they have none."""
        tokens = input_dict.get("input_ids", input_dict.get("tokens"))
        if tokens is None:
            logger.warning("estimate_tokens: there are no input_ids among %s", ", ".join(input_dict))
            return 0
        return math.prod(tokens.shape)

    def floating_point_ops(self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
        """Of a forward and a backward pass: `6 · tokens · parameters`; see `fm.floating_point_ops`."""
        return 6 * self.estimate_tokens(input_dict) * self.num_parameters(exclude_embeddings=exclude_embeddings)

    # --- masks --------------------------------------------------------------------------------------------------------

    def invert_attention_mask(self, encoder_attention_mask: Any) -> Any:
        """What to add to scores, `(b 1 1 s)` or `(b 1 t s)`: 0 where the mask is 1, the lowest number where it is 0."""
        mask = masks.for_all_heads("invert_attention_mask", encoder_attention_mask)
        return masks.to_scores(mask, self._caster(self.dtype), self._lowest(self.dtype))

    def get_extended_attention_mask(
        self, attention_mask: Any, input_shape: Sequence[int], device: Any = None, dtype: Any = None
    ) -> Any:
        """As `invert_attention_mask`; where the config says `is_decoder`, a mask `(b s)` becomes causal, too.

        Args:
            attention_mask: `(b s)` or `(b t s)` of 0 and 1.
            input_shape: `(b, t)`.
            device: of no effect: the mask stays where it is.
            dtype: of the result; the model's if None.
        """
        dtype = self.dtype if dtype is None else dtype
        if len(attention_mask.shape) == 2 and self.config.to_hf().get("is_decoder", False):
            mask = self.create_extended_attention_mask_for_decoder(input_shape, attention_mask)
        else:
            mask = masks.for_all_heads("get_extended_attention_mask", attention_mask)
        return masks.to_scores(mask, self._caster(dtype), self._lowest(dtype))

    @classmethod
    def create_extended_attention_mask_for_decoder(
        cls, input_shape: Sequence[int], attention_mask: Any, device: Any = None
    ) -> Any:
        """`(b 1 t s)` of 0 and 1: the mask `(b s)`, of which each token sees only what is before it.

        Args:
            input_shape: `(b, t)`.
            attention_mask: `(b s)`; columns beyond `t` are those of a cache, at the left.
            device: of no effect: the mask stays where it is.
        """
        return masks.causal(input_shape, attention_mask, cls._caster(attention_mask.dtype))

    def get_head_mask(self, head_mask: Any, num_hidden_layers: int, is_attention_chunked: bool = False) -> Any:
        """`(l 1 h 1 1)` of a mask `(h)` or `(l h)`; `[None, …]` without one. To compute with one: `fm.scale_heads`."""
        return masks.of_heads(head_mask, num_hidden_layers, self._caster(self.dtype), chunked=is_attention_chunked)

    @classmethod
    def _caster(cls, dtype: Any) -> masks.Cast:
        return lambda value: cls._tensor(value, dtype)

    # --- changes ------------------------------------------------------------------------------------------------------

    def prune_heads(self, heads: Mapping[int, Iterable[int]]) -> None:
        """Removes heads, by their original numbers, in place; see `fm.prune_heads`. Smaller parameters are new objects."""
        self._replace(*fm.prune_heads(self.params, self.config, {layer: list(gone) for layer, gone in heads.items()}))

    def resize_token_embeddings(
        self, new_size: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
    ) -> Any:
        """Resizes the vocabulary in place; see `fm.resize_embeddings`. Parameters of other sizes are new objects.

        An optimizer that was made before still holds the old ones: make a new one. What is trained stays so.

        Args:
            new_size: of the vocabulary; also `new_num_tokens`. None keeps it (with `pad_to_multiple_of`: rounds it up).
            pad_to_multiple_of: the size becomes a multiple of it.
            **options: `key` and `init` of `fm.resize_embeddings`; `seed`, a number in place of a key; `mean_resizing=True` is
                `init="mean"`, False is `init="normal"`, for which one of the two is needed.

        Returns:
            What `get_input_embeddings` gives.
        """
        if "new_num_tokens" in options:
            if new_size is not None:
                raise TypeError("resize_token_embeddings: new_size and new_num_tokens are the same; pass one of them")
            new_size = options.pop("new_num_tokens")
        if "seed" in options:
            if "key" in options:
                raise TypeError("resize_token_embeddings: pass one of key= and seed=")
            options["key"] = jax.random.key(options.pop("seed"))
        if "mean_resizing" in options:
            options.setdefault("init", "mean" if options.pop("mean_resizing") else "normal")
        if new_size is not None or pad_to_multiple_of is not None:
            options["pad_to_multiple_of"] = pad_to_multiple_of
            self._replace(*fm.resize_embeddings(self.params, self.config, new_size, **options))
        return self.get_input_embeddings()

    def resize_position_embeddings(self, new_num_position_embeddings: int, *, key: Any = None) -> None:
        """Makes the table of positions longer or shorter, in place. Tables of other sizes are new objects.

        Args:
            new_num_position_embeddings: how many positions.
            key: JAX's random key for new rows, drawn from N(0, initializer_range).

        Raises:
            NotImplementedError: the model computes its positions and has no table of them.
            ValueError: fewer than one position, or more than there are without a key.
        """
        self._replace(*resize_positions(self.params, self.config, new_num_position_embeddings, key))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Gradients keep only the input of every layer and compute the layer again; see `remat` of `fm.forward`.

        Args:
            gradient_checkpointing_kwargs: of PyTorch's function, such as `use_reentrant`; of no effect in JAX.
        """
        self._set_remat(True)

    def gradient_checkpointing_disable(self) -> None:
        """Gradients keep what they need, which is faster; see `gradient_checkpointing_enable`."""
        self._set_remat(False)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Version 5's name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Version 5's name of `gradient_checkpointing_disable`."""
        self.gradient_checkpointing_disable()

    def enable_gradient_checkpointing(self) -> None:
        """Flax's name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Version 5's name of `is_gradient_checkpointing`."""
        return self.is_gradient_checkpointing

    def _set_remat(self, value: bool) -> None:
        self.is_gradient_checkpointing = value

    def to_bf16(self, mask: Mask | None = None) -> Self:
        """Casts floating parameters to bfloat16, in place; those of the mask, or all. Returns the model."""
        return self._cast("to_bf16", "bfloat16", mask)

    def to_fp16(self, mask: Mask | None = None) -> Self:
        """Casts floating parameters to float16, in place; those of the mask, or all. Returns the model."""
        return self._cast("to_fp16", "float16", mask)

    def to_fp32(self, mask: Mask | None = None) -> Self:
        """Casts floating parameters to float32, in place; those of the mask, or all. Returns the model."""
        return self._cast("to_fp32", "float32", mask)

    def _cast(self, what: str, dtype: str, mask: Mask | None) -> Self:
        names = list(self._named())
        if isinstance(mask, Mapping):
            chosen = fm.tree.flatten(dict(mask)) if any(isinstance(v, Mapping) for v in mask.values()) else dict(mask)
            if chosen.keys() != set(names):
                odd = ", ".join(sorted(chosen.keys() ^ set(names)))
                raise ValueError(
                    f"{what}: the mask says True or False of each parameter and of nothing else; see {odd}"
                )
            names = [name for name in names if chosen[name]]
        elif mask is not None:
            names = [name for name in names if mask(name)]
        self._set_dtype(dtype, names)
        return self

    # --- generation ---------------------------------------------------------------------------------------------------

    def compute_transition_scores(
        self, sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
    ) -> Any:
        """The score of each new token among those of all tokens at its step; see `fm.compute_transition_scores`."""
        arrays = [np.asarray(x) for x in scores] if isinstance(scores, Sequence) else np.asarray(scores)
        found = fm.compute_transition_scores(
            np.asarray(sequences),
            arrays,
            None if beam_indices is None else np.asarray(beam_indices),
            normalize_logits=normalize_logits,
        )
        return self._tensor(np.array(found), self._floats)


def _with_format(what: str, safe_serialization: bool | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the format that `safe_serialization` is another name of."""
    if safe_serialization is None:
        return options
    name = "safetensors" if safe_serialization else "torch"
    if options.get("format", name) != name:
        raise ValueError(
            f"{what}: safe_serialization={safe_serialization} is format={name!r}, which contradicts "
            f"format={options['format']!r}; pass one of them"
        )
    return {**options, "format": name}
