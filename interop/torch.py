"""PyTorch: state dicts in both directions, and `TorchModel`, an `nn.Module` that computes through JAX.

Everything here lives on the CPU: tensors elsewhere are moved to it by `from_torch`, and `TorchModel` refuses them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from torch import Tensor, nn

import fmodels as fm

FIELDS = ("logits", "hidden", "pooled", "sequence_logits", "hidden_states")
"""The fields of `fm.Output` that `TorchModel` returns."""

DTYPES = frozenset(
    """float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu
    bool int8 int16 int32 int64 uint8 uint16 uint32 uint64""".split()
)
"""The types that JAX and PyTorch have in common."""

TABLES = {"tokens": "tokens", "positions": "positions", "token_types": "types"}
"""Input -> the table under `embed` of which it holds row numbers."""


def to_torch(params: fm.Params, config: Any) -> dict[str, Tensor]:
    """The tensors of a tree by transformers' names, as `state_dict()` gives them, tied repetitions included.

    Nothing is copied but what `copied_tensors` lists: **the tensors are the memory of the tree's arrays**, which JAX
    takes to be constant. Clone what you want to change in place. Tensors that PyTorch keeps transposed (GPT-2's
    `Conv1D`) are views with strides; `safetensors.torch.save_file` wants `.contiguous()` ones.

    Args:
        params: the tree, stacked or a tuple of layers. Arrays that are not on one CPU device are copied to it.
        config: its config.

    Returns:
        name -> tensor, in the order of an `nn.Module`: a module's own tensors before those of its children.

    Raises:
        ValueError: the tree does not fit the config.
        TypeError: a leaf that PyTorch has no type for, or that is traced by `jit`.

    Example:
        >>> import jax
        >>> from interop import torch as it
        >>> config = fm.models.llama.Config(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
        ...                                 num_kv_heads=1, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0), dtype="bfloat16")
        >>> tensors = it.to_torch(params, config)
        >>> tensors["model.layers.1.self_attn.q_proj.weight"].shape, tensors["lm_head.weight"].dtype
        (torch.Size([8, 8]), torch.bfloat16)
        >>> tensors["lm_head.weight"].data_ptr() == params["lm_head"]["weight"].unsafe_buffer_pointer()
        True
    """
    fm.check(params, config)
    arrays = fm.to_disk(fm.tree.map_leaves(_on_host, params), config, tied=True)
    shared: dict[Any, Tensor] = {}
    for array in arrays.values():
        shared.setdefault(_memory(array), _from_numpy(array))
    return {name: shared[_memory(arrays[name])] for name in _in_module_order(arrays)}


def copied_tensors(config: Any) -> list[str]:
    """The tensors that `to_torch` copies: those in which several leaves lie side by side.

    Example:
        >>> from interop import torch as it
        >>> it.copied_tensors(fm.models.gpt2.Config(num_layers=1))
        ['h.0.attn.c_attn.weight', 'h.0.attn.c_attn.bias']
        >>> it.copied_tensors(fm.models.llama.Config())
        []
    """
    return [name for name, leaves in fm.disk_names(config).items() if len(leaves) > 1]


def from_torch(source: Mapping[str, Tensor] | nn.Module, config: Any) -> fm.Params:
    """The inverse of `to_torch`: a stacked tree from a state dict, bit for bit. It shares no memory with PyTorch.

    Args:
        source: a state dict by transformers' names, or an `nn.Module` that has one. Tied repetitions and buffers that
            nothing reads are accepted; tensors may need gradients and may lie on any device.
        config: the config of the model.

    Returns:
        A stacked tree (a tuple of layers where `config.pruned_heads` makes them differ), each leaf in its tensor's dtype.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (all listed); a tied head that differs from the
            embedding; tensors of 64 bits, unless jax is told to keep them.
        TypeError: something that is not a dict of tensors.

    Example:
        >>> import jax
        >>> from interop import torch as it
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2,
        ...                                num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> again = it.from_torch(it.to_torch(params, config), config)
        >>> bool((again["layers"]["mlp"]["up"]["weight"] == params["layers"]["mlp"]["up"]["weight"]).all())
        True
    """
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"from_torch: expected a state dict or an nn.Module, got {_kind(source)}; pass model.state_dict()"
        )
    if odd := {name: _kind(value) for name, value in tensors.items() if not isinstance(value, Tensor)}:
        raise TypeError(
            f"from_torch: not tensors: {', '.join(f'{name!r} ({kind})' for name, kind in odd.items())}; "
            "pass the state dict itself, of arrays use torch.from_numpy"
        )
    arrays = {name: _to_numpy(tensor, f"from_torch: {name!r}") for name, tensor in tensors.items()}
    _check_tied(arrays, config)
    params = fm.from_disk(arrays, config)
    if wide := [path for path, leaf in fm.tree.flatten(params).items() if _is_too_wide(leaf.dtype)]:
        raise ValueError(
            f"from_torch: {len(wide)} leaves have 64 bits ({wide[0]!r} is {fm.tree.get(params, wide[0]).dtype}), which jax "
            'would cut to 32; convert the module with .float(), or set jax.config.update("jax_enable_x64", True)'
        )
    stacked = fm.tree.is_stacked(params)

    def own(path: str, leaf: np.ndarray) -> jax.Array:
        fresh = stacked and path.startswith("layers.")  # stacking has copied; the others are views of PyTorch's memory
        return jnp.asarray(leaf) if fresh else jnp.array(leaf, copy=True)

    return jax.block_until_ready(fm.tree.map_leaves(own, params))


@dataclasses.dataclass(frozen=True)
class TorchOutput:
    """What `TorchModel` returns: the fields of `fm.Output` as tensors; what the task does not have is None.

    Attributes:
        logits: float32, see `fm.Output`.
        hidden: `(b t d)`, the last hidden state; also as `last_hidden_state`.
        pooled: `(b d)`, the pooler's output; also as `pooler_output`.
        sequence_logits: float32, the second head of models that have two.
        hidden_states: `(l+1 b t d)`, on request.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    pooled: Tensor | None = None
    sequence_logits: Tensor | None = None
    hidden_states: Tensor | None = None

    @property
    def last_hidden_state(self) -> Tensor | None:
        return self.hidden

    @property
    def pooler_output(self) -> Tensor | None:
        return self.pooled


class TorchModel(nn.Module):
    """A model as an `nn.Module`: it owns `Parameter`s under transformers' names and computes through `fm.forward`.

    `named_parameters()`, `state_dict()`, `load_state_dict()`, `torch.optim`, `copy.deepcopy`, `torch.save` and the
    conversions of dtype work as for any module. There is no dropout: `train()` and `eval()` change nothing. Gradients
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

    def __init__(self, params: fm.Params, config: Any) -> None:
        super().__init__()
        self.config = config
        own: dict[int, nn.Parameter] = {}
        tensors = to_torch(params, config)
        for tensor in tensors.values():
            if id(tensor) not in own:
                own[id(tensor)] = _parameter(tensor)
        _register(self, fm.tree.unflatten({name: own[id(tensor)] for name, tensor in tensors.items()}))

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
        hidden_states: bool = False,
    ) -> TorchOutput:
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
            hidden_states: also return the input of every layer.

        Raises:
            TypeError: inputs that are not integer tensors, or that are given under both names.
            ValueError: wrong shapes; tokens, positions or types outside of their tables; parameters that are not on the
                CPU, or that no longer fit `.config`.
        """
        inputs = _inputs(
            self.config,
            tokens=_either("tokens", tokens, "input_ids", input_ids),
            mask=_either("mask", mask, "attention_mask", attention_mask),
            positions=_either("positions", positions, "position_ids", position_ids),
            token_types=_either("token_types", token_types, "token_type_ids", token_type_ids),
        )
        tensors = self._tensors()
        call = _Call(list(tensors), inputs, self.config, hidden_states)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            values = _Differentiable.apply(call, *tensors.values())
        else:
            values = [_to_tensor(value) for value in call.run(tensors.values()).values()]
        return TorchOutput(**dict(zip(call.fields, values, strict=True)))

    @property
    def params(self) -> fm.Params:
        """The stacked tree with the present values: a copy, which later steps of an optimizer do not change."""
        return from_torch(self._tensors(), self.config)

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
    ) -> Tensor:
        """Continues prompts; see `fm.generate`. Parameters are stacked once for all tokens.

        Args:
            tokens: `(b t)` integers; or `input_ids`.
            mask: `(b t)` bool or 0/1; or `attention_mask`.
            input_ids: another name of `tokens`.
            attention_mask: another name of `mask`.
            max_new_tokens: as in `fm.generate`.
            generation_config: `fm.GenerationConfig` or transformers'; `options` go before it.
            seed: a number for sampling; or `generator`, or `key`.
            generator: PyTorch's, of which one number is drawn.
            key: JAX's random key.
            **options: by the names of `fm.GenerationConfig`.

        Returns:
            `(b t+n)` int64, prompts and new tokens.

        Example:
            >>> import torch
            >>> from interop import torch as it
            >>> module = it.TorchModel.from_pretrained(fm.assets.TINY_LLAMA)
            >>> module.generate(torch.tensor([[300, 301]]), max_new_tokens=3).shape
            torch.Size([1, 5])
        """
        inputs = _inputs(
            self.config,
            tokens=_either("tokens", tokens, "input_ids", input_ids),
            mask=_either("mask", mask, "attention_mask", attention_mask),
            positions=None,
            token_types=None,
        )
        base = generation_config
        if base is not None and not isinstance(base, fm.GenerationConfig):
            if not hasattr(base, "to_dict"):
                raise TypeError(f"generate: generation_config must be an fm.GenerationConfig, got {_kind(base)}")
            base = fm.GenerationConfig.from_hf(
                {name: value for name, value in base.to_dict().items() if value is not None}
            )
        new = fm.GenerationConfig(**options)
        generated = fm.generate(
            self.params,
            self.config,
            inputs["tokens"],
            mask=inputs["mask"],
            max_new_tokens=max_new_tokens,
            key=_key(seed, generator, key),
            options=new if base is None else base.replace(**new.to_hf()),
        )
        return _to_tensor(generated.tokens).long()

    def resize_token_embeddings(
        self, new_size: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
    ) -> nn.Module:
        """Resizes the vocabulary in place; see `fm.resize_embeddings`. Parameters of other sizes are new objects.

        An optimizer that was made before still holds the old ones: make a new one. `requires_grad` is kept.

        Args:
            new_size: of the vocabulary; None keeps it (with `pad_to_multiple_of`: rounds it up).
            pad_to_multiple_of: the size becomes a multiple of it.
            **options: `key` and `init` of `fm.resize_embeddings`.

        Returns:
            The module of the input embedding, whose `.weight` is the Parameter.
        """
        if new_size is not None or pad_to_multiple_of is not None:
            changed = fm.resize_embeddings(
                self.params, self.config, new_size, pad_to_multiple_of=pad_to_multiple_of, **options
            )
            self._replace(*changed)
        return self.get_input_embeddings()

    def prune_heads(self, heads: Mapping[int, Iterable[int]]) -> None:
        """Removes heads, by their original numbers, in place; see `fm.prune_heads`. Smaller Parameters are new objects."""
        self._replace(*fm.prune_heads(self.params, self.config, {layer: list(gone) for layer, gone in heads.items()}))

    def get_input_embeddings(self) -> nn.Module:
        """The module whose `.weight` is the table of the tokens."""
        name = next(name for name, leaves in fm.disk_names(self.config).items() if leaves == ("embed.tokens",))
        return self.get_submodule(name.rpartition(".")[0])

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts numbers; a tied head once. `exclude_embeddings` leaves out the tables of tokens, positions and types."""
        tables = {("embed.tokens",), ("embed.positions",), ("embed.types",)}
        left_out = (
            {n for n, leaves in fm.disk_names(self.config).items() if leaves in tables} if exclude_embeddings else set()
        )
        return sum(
            p.numel()
            for n, p in self.named_parameters()
            if n not in left_out and (p.requires_grad or not only_trainable)
        )

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Self:
        """A module from a checkpoint; `source` and `options` are those of `fm.load`."""
        return cls(*fm.load(source, **options))

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Saves a checkpoint that transformers and `from_pretrained` load; `options` are those of `fm.save`."""
        fm.save(self.params, self.config, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads a checkpoint; `repo_id` and `options` are those of `fm.push_to_hub`. Returns the address."""
        return fm.push_to_hub(self.params, self.config, repo_id, **options)

    def extra_repr(self) -> str:
        return f"{self.config.model_type}, {self.config.task}, computed by jax"

    def _tensors(self) -> dict[str, Tensor]:
        """The parameters by name, tied ones once.

        Raises:
            ValueError: a parameter was put under the second name of a tied one, so that it would be passed over.
        """
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        if apart := [name for name in _repeated(self.config) if name in tensors]:
            raise ValueError(
                f"TorchModel: {', '.join(map(repr, apart))} is tied by the config, but has a Parameter of its own; assign to "
                "the embedding, or make the module with tie_word_embeddings=False in its config"
            )
        return tensors

    def _replace(self, params: fm.Params, config: Any) -> None:
        """Takes over a tree of the same names; Parameters that keep their size remain the same objects."""
        present = dict(self.named_parameters(remove_duplicate=False))
        own: dict[int, nn.Parameter] = {}
        for name, tensor in to_torch(params, config).items():
            old = present[name]
            if id(tensor) not in own:
                if old.shape == tensor.shape:
                    own[id(tensor)] = old
                    with torch.no_grad():
                        old.copy_(tensor)
                else:
                    own[id(tensor)] = new = _parameter(tensor)
                    new.requires_grad_(old.requires_grad)
            module, _, last = name.rpartition(".")
            self.get_submodule(module).register_parameter(last, own[id(tensor)])
        self.config = config


class _Call:
    """One run of the model: everything but the parameters' values. `fields` names the outputs once it ran."""

    def __init__(self, names: Sequence[str], inputs: dict[str, Any], config: Any, hidden_states: bool) -> None:
        self.names, self.inputs = names, inputs
        self.static = {"config": config, "hidden_states": hidden_states}
        self.fields: list[str] = []

    def run(self, tensors: Iterable[Tensor]) -> dict[str, jax.Array]:
        out = _run(
            {name: _to_jax(name, t) for name, t in zip(self.names, tensors, strict=True)}, self.inputs, **self.static
        )
        return self._finish(out, out)

    def run_with_vjp(self, tensors: Iterable[Tensor], trained: Iterable[bool]) -> tuple[dict[str, jax.Array], Any]:
        """The outputs, and what `_backward` needs for the gradients with respect to those tensors that are `trained`."""
        split: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name, tensor, wanted in zip(self.names, tensors, trained, strict=True):
            split[not wanted][name] = _to_jax(name, tensor)
        out, vjp = _run_with_vjp(*split, self.inputs, **self.static)
        return self._finish(out, (out, vjp)), vjp

    def _finish(self, out: dict[str, jax.Array], everything: Any) -> dict[str, jax.Array]:
        # JAX reads the tensors' own memory: it must be done before PyTorch may write to them again.
        jax.block_until_ready(everything)
        self.fields = list(out)
        return out


class _Differentiable(torch.autograd.Function):
    """The model as one node of PyTorch's graph: `(call, *tensors) -> outputs`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # What the backward pass needs may be the memory of a parameter itself; saving them lets PyTorch notice changes.
        ctx.save_for_backward(*tensors)
        ctx.call = call
        out, ctx.vjp = call.run_with_vjp(tensors, ctx.needs_input_grad[1:])
        values = tuple(_to_tensor(value) for value in out.values())
        ctx.like = [(value.shape, value.dtype) for value in values]
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors  # raises if one was changed in place since
        cotangents = {
            name: _to_jax(name, torch.zeros(shape, dtype=dtype) if gradient is None else gradient)
            for name, (shape, dtype), gradient in zip(ctx.call.fields, ctx.like, gradients, strict=True)
        }
        found = jax.block_until_ready(_backward(ctx.vjp, cotangents))
        return None, *(_to_tensor(found[name]) if name in found else None for name in ctx.call.names)


@functools.partial(jax.jit, static_argnames=("config", "hidden_states"))
def _run(tensors: dict[str, Any], inputs: dict[str, Any], *, config: Any, hidden_states: bool) -> dict[str, jax.Array]:
    out = fm.forward(fm.from_disk(tensors, config), config, **inputs, hidden_states=hidden_states)
    return {name: getattr(out, name) for name in FIELDS if getattr(out, name) is not None}


@functools.partial(jax.jit, static_argnames=("config", "hidden_states"))
def _run_with_vjp(trained: Any, fixed: Any, inputs: Any, *, config: Any, hidden_states: bool) -> tuple[Any, Any]:
    return jax.vjp(
        lambda tensors: _run({**tensors, **fixed}, inputs, config=config, hidden_states=hidden_states), trained
    )


@jax.jit
def _backward(vjp: Any, cotangents: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return vjp(cotangents)[0]


def _either(name: str, value: Any, other: str, other_value: Any) -> Any:
    if value is not None and other_value is not None:
        raise TypeError(f"TorchModel: {name} and {other} are the same input; pass one of them")
    return other_value if value is None else value


def _inputs(config: Any, **tensors: Any) -> dict[str, Any]:
    """The inputs as arrays of their own memory, checked as `fm.forward` checks them outside of `jit`."""
    if tensors["tokens"] is None:
        raise TypeError("TorchModel: there are no tokens; pass tokens= (or input_ids=)")
    arrays: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            arrays[name] = None
            continue
        if not isinstance(tensor, Tensor) or ((tensor.is_floating_point() or tensor.is_complex()) and name != "mask"):
            what = tensor.dtype if isinstance(tensor, Tensor) else _kind(tensor)
            raise TypeError(f"TorchModel: {name} must be a torch.Tensor of integers, got {what}; use torch.tensor(…)")
        if tensor.numel():
            _check_range(name, tensor, config)
        kind = torch.bool if name == "mask" else torch.int32
        arrays[name] = jnp.array(tensor.detach().to("cpu", kind).numpy(), copy=True)
    return arrays


def _check_range(name: str, tensor: Tensor, config: Any) -> None:
    low, high = tensor.min().item(), tensor.max().item()
    if name == "mask":
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise ValueError(f"TorchModel: mask holds 1 for tokens and 0 for padding; got numbers from {low} to {high}")
        return
    size = _table_sizes(config).get(TABLES[name])
    if size is not None and (low < 0 or high >= size):
        raise ValueError(f"TorchModel: {name} reach from {low} to {high}, outside of 0 … {size - 1}, their table")


@functools.lru_cache(maxsize=64)
def _repeated(config: Any) -> frozenset[str]:
    """The names that a tied head repeats."""
    return frozenset(fm.disk_names(config, tied=True)) - frozenset(fm.disk_names(config))


@functools.lru_cache(maxsize=64)
def _table_sizes(config: Any) -> dict[str, int]:
    embed = fm.abstract(config)["embed"]
    return {name: embed[name].shape[0] for name in TABLES.values() if name in embed}


def _key(seed: int | None, generator: torch.Generator | None, key: jax.Array | None) -> jax.Array | None:
    if sum(way is not None for way in (seed, generator, key)) > 1:
        raise TypeError("generate: pass one of seed=, generator= and key=")
    if generator is not None:
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device))
    return key if seed is None else jax.random.key(seed)


def _register(module: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    """Puts Parameters and nested dicts of them under a module; tuples become lists of modules."""
    for name, child in children.items():
        if isinstance(child, nn.Parameter):
            module.register_parameter(name, child)
        elif isinstance(child, tuple):
            module.add_module(name, nn.ModuleList([_register(nn.Module(), one) for one in child]))
        else:
            module.add_module(name, _register(nn.Module(), child))
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=tensor.is_floating_point())


def _in_module_order(names: Iterable[str]) -> list[str]:
    """Sorts names as `state_dict()` has them: a module's own tensors, then those of its children.

    Example:
        >>> _in_module_order(["cls.transform.weight", "cls.bias", "bert.weight"])
        ['cls.bias', 'cls.transform.weight', 'bert.weight']
    """

    def walk(node: Any) -> list[str]:
        children = list(node.values() if isinstance(node, Mapping) else node)
        own = [child for child in children if isinstance(child, str)]
        return own + [name for child in children if not isinstance(child, str) for name in walk(child)]

    return walk(fm.tree.unflatten({name: name for name in names}))


def _on_host(path: str, leaf: Any) -> np.ndarray:
    """A writable array of the leaf's own memory where that is possible, else of a copy."""
    if getattr(leaf, "dtype", None) is not None and leaf.dtype.name not in DTYPES:
        raise TypeError(f"to_torch: {path!r} is {leaf.dtype.name}, which PyTorch does not have; use fm.cast first")
    if isinstance(leaf, Tracer):
        raise TypeError(f"to_torch: {path!r} is traced by jit, grad or vmap; call to_torch outside of them")
    if isinstance(leaf, jax.Array):
        devices = leaf.devices()
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            return _to_numpy(torch.from_dlpack(jax.block_until_ready(leaf)), f"to_torch: {path!r}")
        return np.array(leaf)
    if not isinstance(leaf, np.ndarray):
        raise TypeError(f"to_torch: {path!r} is {_kind(leaf)}; expected arrays of jax or numpy")
    return leaf if leaf.flags.writeable else leaf.copy()


def _memory(array: np.ndarray) -> Any:
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype


def _from_numpy(array: np.ndarray) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError:  # bfloat16 and smaller, which PyTorch's numpy does not know
        return torch.from_numpy(array.view(f"u{array.dtype.itemsize}")).view(getattr(torch, array.dtype.name))


def _to_numpy(tensor: Tensor, where: str) -> np.ndarray:
    """The tensor's own memory as an array of numpy; a copy from other devices."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"{where} is a {'quantized' if tensor.is_quantized else tensor.layout} tensor; expected a dense one"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{where} is on the meta device and has no numbers; load the module first")
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # as above
        bits = torch.uint16 if tensor.itemsize == 2 else torch.uint8
        return tensor.view(bits).numpy().view(jnp.dtype(str(tensor.dtype).removeprefix("torch.")))


def _to_jax(name: str, tensor: Tensor) -> jax.Array:
    """The tensor's own memory as an array of JAX; a copy if it does not lie there row by row."""
    if tensor.device.type != "cpu":
        raise ValueError(f"TorchModel: {name!r} is on {tensor.device}, but computes on the CPU; use module.to('cpu')")
    if _is_too_wide(tensor.dtype):
        raise ValueError(
            f"TorchModel: {name!r} is {tensor.dtype}, which jax has only after "
            'jax.config.update("jax_enable_x64", True); use module.float()'
        )
    return jnp.from_dlpack(tensor.detach().contiguous())


def _to_tensor(array: jax.Array) -> Tensor:
    return torch.from_dlpack(array)


def _is_too_wide(dtype: Any) -> bool:
    wide = str(dtype).removeprefix("torch.") in ("float64", "int64", "uint64", "complex128")
    return wide and not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def _check_tied(arrays: Mapping[str, np.ndarray], config: Any) -> None:
    """Raises where a repetition, which is not read, differs from what it should repeat."""
    first: dict[tuple[str, ...], str] = {}
    for name, leaves in fm.disk_names(config, tied=True).items():
        known = first.setdefault(leaves, name)
        if name == known or name not in arrays or known not in arrays:
            continue
        a, b = arrays[name], arrays[known]
        same = _memory(a) == _memory(b) or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
        if not same:
            raise ValueError(
                f"from_torch: the config ties {name!r} to {known!r}, but they differ; "
                "use dataclasses.replace(config, tie_word_embeddings=False)"
            )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
