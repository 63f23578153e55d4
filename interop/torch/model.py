"""`TorchModel`, an `nn.Module` that computes through JAX."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import torch
from torch import Tensor, nn

import fmodels as fm
from interop.torch.arrays import kind_of, to_tensor
from interop.torch.call import Call, Differentiable
from interop.torch.convert import from_torch, to_torch
from interop.torch.inputs import either, random_key, read_inputs


@dataclasses.dataclass(frozen=True)
class TorchOutput:
    """What `TorchModel` returns: the fields of `fm.Output` as tensors; what the task does not have is None.

    Attributes:
        logits: float32, see `fm.Output`.
        hidden: `(b t d)`, the last hidden state; also as `last_hidden_state`.
        pooled: `(b d)`, the pooler's output; also as `pooler_output`.
        sequence_logits: float32, the second head of models that have two.
        hidden_states: `(l+1 b t d)`, on request.
        encoder_hidden: `(b s d)`, of encoder-decoder models.
        encoder_hidden_states: `(l+1 b s d)`, on request.
        attentions: `(l b h t t)`, on request, weights of attention.
        cross_attentions: `(l b h t s)`, on request, of a decoder to what the encoder has read.
        encoder_attentions: `(l b h s s)`, on request, of the encoder.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    pooled: Tensor | None = None
    sequence_logits: Tensor | None = None
    hidden_states: Tensor | None = None
    encoder_hidden: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    attentions: Tensor | None = None
    cross_attentions: Tensor | None = None
    encoder_attentions: Tensor | None = None

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
        own: dict[int, Tensor] = {}
        tensors = to_torch(params, config)
        buffers = fm.models.family(config).weights.of_module.buffers(config)
        for name, tensor in tensors.items():
            if id(tensor) not in own:
                own[id(tensor)] = tensor.clone() if name in buffers else _parameter(tensor)
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
        decoder_tokens: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
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
            decoder_tokens: `(b t)` integers, of encoder-decoder models; or `decoder_input_ids`.
            decoder_mask: `(b t)` bool or 0/1; or `decoder_attention_mask`.
            decoder_input_ids: another name of `decoder_tokens`.
            decoder_attention_mask: another name of `decoder_mask`.
            hidden_states: also return the input of every layer.
            attentions: also return the weights of every attention.

        Raises:
            TypeError: inputs that are not integer tensors, or that are given under both names.
            ValueError: wrong shapes; tokens, positions or types outside of their tables; parameters that are not on the
                CPU, or that no longer fit `.config`; `attentions` of layers that differ in their heads.
        """
        inputs = read_inputs(
            self.config,
            tokens=either("tokens", tokens, "input_ids", input_ids),
            mask=either("mask", mask, "attention_mask", attention_mask),
            positions=either("positions", positions, "position_ids", position_ids),
            token_types=either("token_types", token_types, "token_type_ids", token_type_ids),
            decoder_tokens=either("decoder_tokens", decoder_tokens, "decoder_input_ids", decoder_input_ids),
            decoder_mask=either("decoder_mask", decoder_mask, "decoder_attention_mask", decoder_attention_mask),
        )
        tensors = self._tensors()
        asked = {"hidden_states": hidden_states, "attentions": attentions}
        kept = tuple(name for name, wanted in asked.items() if wanted)
        call = Call(list(tensors), inputs, self.config, kept)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            values = Differentiable.apply(call, *tensors.values())
        else:
            values = [to_tensor(value) for value in call.run(tensors.values()).values()]
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
        inputs = read_inputs(
            self.config,
            tokens=either("tokens", tokens, "input_ids", input_ids),
            mask=either("mask", mask, "attention_mask", attention_mask),
            positions=None,
            token_types=None,
        )
        base = generation_config
        if base is not None and not isinstance(base, fm.GenerationConfig):
            if not hasattr(base, "to_dict"):
                raise TypeError(f"generate: generation_config must be an fm.GenerationConfig, got {kind_of(base)}")
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
            key=random_key(seed, generator, key),
            options=new if base is None else base.replace(**new.to_hf()),
        )
        return to_tensor(generated.tokens).long()

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
        name = next(
            name for name, leaves in fm.disk_names(self.config, module=True).items() if leaves == ("embed.tokens",)
        )
        return self.get_submodule(name.rpartition(".")[0])

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts numbers; a tied head once. `exclude_embeddings` leaves out the tables under `embed`."""
        names = fm.disk_names(self.config, module=True).items() if exclude_embeddings else ()
        left_out = {name for name, leaves in names if leaves[0].split(".")[-2] == "embed"}
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
        """The parameters and buffers by name, tied ones once.

        Raises:
            ValueError: a parameter was put under the second name of a tied one, so that it would be passed over.
        """
        tensors: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        if apart := [name for name in _repeated(self.config) if name in tensors]:
            raise ValueError(
                f"TorchModel: {', '.join(map(repr, apart))} is tied by the config, but has a Parameter of its own; assign to "
                "the embedding, or make the module with tie_word_embeddings=False in its config"
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
                        old.copy_(tensor)
                else:
                    new = _parameter(tensor) if isinstance(old, nn.Parameter) else tensor.clone()
                    own[id(tensor)] = new.requires_grad_(old.requires_grad)
            module, _, last = name.rpartition(".")
            setattr(self.get_submodule(module), last, own[id(tensor)])
        self.config = config


@functools.lru_cache(maxsize=64)
def _repeated(config: Any) -> frozenset[str]:
    """The names that a tied head repeats."""
    return frozenset(fm.disk_names(config, tied=True, module=True)) - frozenset(fm.disk_names(config, module=True))


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
