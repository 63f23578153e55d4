"""`TorchModel`, an `nn.Module` that computes through JAX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn

import fmodels as fm
from interop.adapters import PREFIX
from interop.generation import GeneratedDict, generate
from interop.labels import given_labels
from interop.loading import setting
from interop.positions import POSITIONS
from interop.pretrained import Pretrained
from interop.torch.arrays import from_numpy, kind_of, to_numpy, to_tensor
from interop.torch.call import Call, Differentiable
from interop.torch.convert import arrays_of, from_torch, to_torch
from interop.torch.inputs import either, random_key, read_inputs
from interop.torch.losses import check_labels, loss_of, shifted_right
from interop.torch.output import TorchOutput


class TorchModel(Pretrained, nn.Module):
    """A model as an `nn.Module`: it owns `Parameter`s under transformers' names and computes through `fm.forward`.

    `named_parameters()`, `state_dict()`, `load_state_dict()`, `torch.optim`, `copy.deepcopy`, `torch.save` and the
    conversions of dtype work as for any module, and the methods of transformers' models have their names here
    (`interop.methods` lists those that there are not). There is no dropout: `train()` and `eval()` change nothing, nor does
    `torch.autocast`: the dtypes of the parameters say what is computed in which. JAX compiles it, `torch.compile` cannot. Gradients
    come from `jax.vjp`, compiled once per shape of the inputs; second derivatives are not available. A tied head is one
    Parameter under two names.

    Parameters may change between any two calls, so each call stacks the layers anew: one pass over the weights more than
    `fm.forward(module.params, module.config, …)`, which is the faster one for many calls without training.

    Args:
        params: the tree, stacked or a tuple of layers; it is copied.
        config: its config; the module's is `.config`.

    Example:
        >>> import jax, torch
        >>> from interop import torch as it
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2,
        ...                                num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> module = it.TorchModel(fm.init(config, jax.random.key(0)), config)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> out = module(torch.tensor([[1, 2, 3]]))
        >>> out.logits.shape
        torch.Size([1, 3, 11])
        >>> out.logits.logsumexp(-1).sum().backward()
        >>> optimizer.step()
        >>> module.transformer.h[1].mlp.c_fc.weight.grad.shape
        torch.Size([8, 32])
    """

    framework = "pt"
    _integers = torch.int64
    _floats = torch.float32

    def __init__(self, params: fm.Params, config: Any) -> None:
        nn.Module.__init__(self)
        self._specs = {}
        self.config = config
        own: dict[int, Tensor] = {}
        tensors = to_torch(params, config)
        buffers = fm.models.family(config).weights.of_module.buffers(config)
        for name, tensor in tensors.items():
            if id(tensor) not in own:
                own[id(tensor)] = tensor.clone() if name in buffers else _parameter(tensor)
        _register(self, fm.tree.unflatten({name: own[id(tensor)] for name, tensor in tensors.items()}))
        self.eval()  # as what transformers loads

    def forward(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_tokens: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> TorchOutput | tuple[Tensor, ...]:
        """Runs the model; see `fm.forward`. The names of transformers are accepted for the same inputs.

        Args:
            tokens: `(b t)` integers, `(b n t)` for multiple choice and double heads; or `input_ids`.
            mask: `(b t)` bool or 0/1; or `attention_mask`.
            positions: `(b t)` integers; or `position_ids`.
            token_types: `(b t)` integers; or `token_type_ids`.
            input_ids: another name of `tokens`.
            attention_mask: another name of `mask`.
            position_ids: another name of `positions`.
            token_type_ids: another name of `token_types`.
            decoder_tokens: `(b t)` integers, of encoder-decoder models; or `decoder_input_ids`.
            decoder_mask: `(b t)` bool or 0/1; or `decoder_attention_mask`.
            decoder_input_ids: another name of `decoder_tokens`.
            decoder_attention_mask: another name of `decoder_mask`.
            hidden_states: also return the input of every layer.
            attentions: also return the weights of every attention.
            output_hidden_states: another name of `hidden_states`; None: what config.json says, False if nothing.
            output_attentions: another name of `attentions`; None: as above.
            return_dict: False returns `to_tuple()`; None: what config.json says, True if nothing.
            use_cache: of no effect: `generate` has a cache, this has none.
            labels: of each token, or of each row: what `loss` is computed of, as transformers does for the task; -100 does not
                count. Of double heads those of the language model. Without decoder tokens an encoder-decoder language model
                reads them shifted to the right.
            next_sentence_label: `(b)`, of BERT's pretraining; of the next sentence the same as `labels`.
            sentence_order_label: `(b)`, of ALBERT's pretraining.
            start_positions: `(b)`, of question answering.
            end_positions: `(b)`, of question answering.

        Raises:
            TypeError: labels that the task has not; inputs that are not integer tensors, or that are given under both names.
            ValueError: wrong shapes; tokens, positions or types outside of their tables; parameters that are not on the
                CPU, or that no longer fit `.config`; `attentions` of layers that differ in their heads.
        """
        given = given_labels(
            "TorchModel", self.config, labels=labels, next_sentence_label=next_sentence_label,
            sentence_order_label=sentence_order_label, start_positions=start_positions, end_positions=end_positions,
        )  # fmt: skip
        check_labels(given)
        mask = either("mask", mask, "attention_mask", attention_mask)
        decoder_tokens = either("decoder_tokens", decoder_tokens, "decoder_input_ids", decoder_input_ids)
        if decoder_tokens is None and labels is not None and self.config.task == "seq2seq-lm":
            decoder_tokens = shifted_right(self.config, labels)
        inputs = read_inputs(
            self.config,
            tokens=either("tokens", tokens, "input_ids", input_ids),
            mask=mask,
            positions=either("positions", positions, "position_ids", position_ids),
            token_types=either("token_types", token_types, "token_type_ids", token_type_ids),
            decoder_tokens=decoder_tokens,
            decoder_mask=either("decoder_mask", decoder_mask, "decoder_attention_mask", decoder_attention_mask),
        )
        tensors = {**self._tensors(), **self._adapter_tensors()}
        asked = self._asked(
            hidden_states=hidden_states or output_hidden_states, attentions=attentions or output_attentions
        ) + (("remat",) if self.is_gradient_checkpointing else ())
        call = Call(list(tensors), inputs, self.config, asked, self._using())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            values = Differentiable.apply(call, *tensors.values())
        else:
            values = [to_tensor(value) for value in call.run(tensors.values()).values()]
        out = TorchOutput(**dict(zip(call.fields, values, strict=True)))
        if given:
            assert out.logits is not None
            out = dataclasses.replace(out, loss=loss_of(self.config, out.logits, out.sequence_logits, given, mask))
        named = setting(self.config, "return_dict", True) if return_dict is None else return_dict
        return out if named else out.to_tuple()

    @property
    def params(self) -> fm.Params:
        """The stacked tree with the present values: a copy, which later steps of an optimizer do not change."""
        return from_torch(self._tensors(), self.config)

    @params.setter
    def params(self, params: fm.Params) -> None:
        Pretrained.params.fset(self, params)  # pyright: ignore[reportOptionalCall]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def generate(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        generation_config: Any = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Tensor | GeneratedDict:
        """Continues prompts; see `fm.generate`. Parameters are stacked once for all tokens.

        Args:
            tokens: `(b t)` integers; or `input_ids`, or `inputs`.
            mask: `(b t)` bool or 0/1; or `attention_mask`.
            input_ids: another name of `tokens`.
            attention_mask: another name of `mask`.
            max_new_tokens: as in `fm.generate`.
            generation_config: `fm.GenerationConfig` or transformers'; `options` go before it.
            seed: a number for sampling; or `generator`, or `key`.
            generator: PyTorch's, of which one number is drawn.
            key: JAX's random key.
            **options: by the names of `fm.GenerationConfig`; other arguments of `fm.generate`, such as `decoder_tokens` (also
                `decoder_input_ids`), `processors` and `tokenizer`; and `return_dict_in_generate`.

        Returns:
            `(b t+n)` int64, prompts and new tokens; with `return_dict_in_generate=True` a `GeneratedDict`.

        Example:
            >>> import torch
            >>> from interop import torch as it
            >>> module = it.TorchModel.from_pretrained(fm.assets.TINY_LLAMA)
            >>> module.generate(torch.tensor([[300, 301]]), max_new_tokens=3).shape
            torch.Size([1, 5])
        """
        tokens = either("tokens", tokens, "inputs", options.pop("inputs", None))
        inputs = read_inputs(
            self.config,
            tokens=either("tokens", tokens, "input_ids", input_ids),
            mask=either("mask", mask, "attention_mask", attention_mask),
        )
        sequences, whole = generate(
            self._adapted(), self.config, inputs, torch.from_numpy, max_new_tokens=max_new_tokens,
            generation_config=generation_config, key=random_key(seed, generator, key), options=options,
        )  # fmt: skip
        return sequences.long() if whole is None else whole._replace(sequences=sequences.long())

    # --- tables and heads ---------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The module whose `.weight` is the table of the tokens."""
        return self._module_of("embed.tokens")

    def set_input_embeddings(self, value: nn.Module | Tensor) -> None:
        """Makes the `.weight` of a module, or a Parameter or tensor, the table of the tokens, and a tied head with it.

        Raises:
            ValueError: it has another shape; `resize_token_embeddings` changes the size.
        """
        self._set_weight("set_input_embeddings", self.get_input_embeddings(), value)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module | None:
        """The module whose `.weight` gives the logits over the vocabulary; None if the model has no such head."""
        tied = self.config.tie_word_embeddings
        names = _names_of("embed.tokens" if tied else "lm_head.weight", self.config, tied=True)
        heads = names[1:] if tied else names  # the first is that of the table
        return self.get_submodule(heads[-1].rpartition(".")[0]) if heads else None

    def set_output_embeddings(self, value: nn.Module | Tensor) -> None:
        """Makes the `.weight` of a module, or a Parameter or tensor, that of the head.

        Raises:
            ValueError: the model has no such head, or a tied one, which `set_input_embeddings` sets; another shape.
        """
        head = self.get_output_embeddings()
        if head is None or self.config.tie_word_embeddings:
            raise ValueError(
                f"set_output_embeddings: {self.config.model_type} of task {self.config.task!r} has "
                f"{'no' if head is None else 'a tied'} head; fm.untie gives a tied one a table of its own"
            )
        self._set_weight("set_output_embeddings", head, value)

    def get_position_embeddings(self) -> nn.Module | tuple[nn.Module, ...]:
        """The module whose `.weight` is the table of positions; the encoder's and the decoder's if there are two.

        Raises:
            NotImplementedError: the model has none.
        """
        names = [name for path in POSITIONS for name in _names_of(path, self.config)]
        if not names:
            raise NotImplementedError(f"get_position_embeddings: {self.config.model_type} has no table of positions")
        modules = [self.get_submodule(name.rpartition(".")[0]) for name in names]
        return modules[0] if len(modules) == 1 else tuple(modules)

    def tie_weights(self, **options: Any) -> None:
        """Makes what the config ties one Parameter again, that of the first name; see `fm.tie` and `fm.untie`.

        Args:
            **options: `missing_keys` and `recompute_mapping` of transformers, of no effect.
        """
        if odd := options.keys() - {"missing_keys", "recompute_mapping"}:
            raise TypeError(f"tie_weights: unknown {', '.join(odd)}")
        for name, home in fm.tied_names(self.config, module=True).items():
            module, _, last = name.rpartition(".")
            setattr(self.get_submodule(module), last, self._get(home))

    @property
    def base_model(self) -> nn.Module:
        """The module that holds the base model's parameters; it is not called. The model itself if it has no head."""
        prefix = self.base_model_prefix if self.config.task != "base" else ""
        return self.get_submodule(prefix) if prefix else self

    def get_encoder(self) -> nn.Module:
        """The module that holds the encoder's parameters; it is not called. The model itself if it is one stack."""
        return self._part("encoder")

    def get_decoder(self) -> nn.Module:
        """The module that holds the decoder's parameters; it is not called. The base model if it is one stack."""
        return self._part("decoder")

    def _part(self, part: str) -> nn.Module:
        base = self.base_model
        return getattr(base, part) if self.config.is_encoder_decoder and hasattr(base, part) else base

    # --- what `Pretrained` asks for -------------------------------------------------------------------------------------

    def _named(self) -> dict[str, Tensor]:
        return self._tensors()

    def _adapter_tensors(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named_parameters() if name.startswith(PREFIX)} if self._specs else {}

    def _set_adapter(self, name: str, tensors: Mapping[str, np.ndarray] | None, trained: bool) -> None:
        container = self._modules.setdefault(PREFIX.removesuffix("."), nn.Module())
        assert container is not None
        if tensors is None:
            del container._modules[name]
            if not container._modules:
                del self._modules[PREFIX.removesuffix(".")]
            return
        own = {n: nn.Parameter(from_numpy(array.copy()), requires_grad=trained) for n, array in tensors.items()}
        container.add_module(name, _register(nn.Module(), fm.tree.unflatten(own)))
        if trained:
            for tensor in self._tensors().values():
                tensor.requires_grad_(False)

    @staticmethod
    def _arrays_of_adapter(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {n: t if isinstance(t, np.ndarray) else to_numpy(t, f"load_adapter: {n!r}") for n, t in tensors.items()}

    def _is_trained(self, tensor: Tensor) -> bool:
        return tensor.requires_grad

    def _set_dtype(self, dtype: str, names: Iterable[str]) -> None:
        for name in names:
            tensor = self._get(name)
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(getattr(torch, dtype))

    @staticmethod
    def _tensor(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value).to(dtype)

    @staticmethod
    def _arrays(what: str, tensors: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
        return arrays_of(what, tensors, config, (Tensor, np.ndarray))

    @staticmethod
    def _bytes_of(dtype: torch.dtype) -> int:
        return dtype.itemsize

    @staticmethod
    def _lowest(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).min

    def _get(self, name: str) -> Tensor:
        module, _, last = name.rpartition(".")
        return getattr(self.get_submodule(module), last)

    def _module_of(self, leaf: str) -> nn.Module:
        return self.get_submodule(_names_of(leaf, self.config)[0].rpartition(".")[0])

    def _set_weight(self, what: str, module: nn.Module, value: Any) -> None:
        weight = getattr(value, "weight", value)
        old: Any = module.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{what}: expected a module with a weight, a Parameter or a tensor, got {kind_of(value)}")
        if weight.shape != old.shape:
            raise ValueError(
                f"{what}: expected a weight of shape {list(old.shape)}, got {list(weight.shape)}; resize_token_embeddings "
                "changes the size of the vocabulary"
            )
        module.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach().clone())

    def extra_repr(self) -> str:
        return f"{self.config.model_type}, {self.config.task}, computed by jax"

    def _tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers by name, tied ones once.

        Raises:
            ValueError: a parameter was put under the second name of a tied one, so that it would be passed over.
        """
        tensors: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        if apart := [name for name in _repeated(self.config) if name in tensors]:
            raise ValueError(
                f"TorchModel: {', '.join(map(repr, apart))} is tied by the config, but has a Parameter of its own; tie_weights() "
                "takes that of the embedding, a module with tie_word_embeddings=False in its config keeps both"
            )
        return tensors

    def _replace(self, params: fm.Params, config: Any) -> None:
        """Takes over a tree of the same names; Parameters that keep their size remain the same objects."""
        present: dict[str, Tensor] = dict(self.named_parameters(remove_duplicate=False))
        present |= dict(self.named_buffers(remove_duplicate=False))
        own: dict[int, Tensor] = {}
        for name, tensor in to_torch(params, config).items():
            old = present[name]
            if id(tensor) not in own:
                if old.shape == tensor.shape:
                    own[id(tensor)] = old
                    with torch.no_grad():
                        if old.dtype == tensor.dtype:
                            old.copy_(tensor)
                        else:
                            old.data = tensor.clone(memory_format=torch.contiguous_format)
                else:
                    new = _parameter(tensor) if isinstance(old, nn.Parameter) else tensor.clone()
                    own[id(tensor)] = new.requires_grad_(old.requires_grad)
            module, _, last = name.rpartition(".")
            setattr(self.get_submodule(module), last, own[id(tensor)])
        self.config = config


@functools.lru_cache(maxsize=256)
def _names_of(leaf: str, config: Any, tied: bool = False) -> tuple[str, ...]:
    """The names of PyTorch's tensors that are this leaf."""
    places = fm.disk_names(config, tied=tied, module=True).items()
    return tuple(name for name, leaves in places if leaves == (leaf,))


@functools.lru_cache(maxsize=64)
def _repeated(config: Any) -> frozenset[str]:
    """The names that a tied head repeats."""
    return frozenset(fm.tied_names(config, module=True))


def _register(module: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    """Puts Parameters, buffers and nested dicts of them under a module; tuples become lists of modules."""
    for name, child in children.items():
        if isinstance(child, nn.Parameter):
            module.register_parameter(name, child)
        elif isinstance(child, Tensor):
            module.register_buffer(name, child)
        elif isinstance(child, tuple):
            module.add_module(name, nn.ModuleList([_register(nn.Module(), one) for one in child]))
        else:
            module.add_module(name, _register(nn.Module(), child))
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=tensor.is_floating_point())
