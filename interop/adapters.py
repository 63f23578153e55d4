"""Adapters on a wrapper, under the names of transformers' `PeftAdapterMixin` and in PEFT's files.

A wrapper keeps the tensors of each adapter beside those of the model, which stay as they are; `fm.add_adapter` joins them in
every call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import fmodels as fm

PREFIX = "adapters."
"""What the names of adapters' tensors begin with: `adapters.<adapter>.<name in PEFT's file>`."""
BASE = "base_model.model."
"""What names in PEFT's files begin with, and those of `get_adapter_state_dict` do not."""

Active = tuple[tuple[str, fm.AdapterConfig], ...]
"""Name and config of each adapter that a call uses."""


def adapted(params: fm.Params, config: Any, tensors: Mapping[str, Any], active: Active) -> fm.Params:
    """The tree with the active adapters, whose tensors are under their names in the wrapper."""
    if not active:
        return params
    parts = [fm.Adapter(own(tensors, name), spec) for name, spec in active]
    return fm.add_adapter(params, config, parts)


def own(tensors: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """The tensors of one adapter, by the names of PEFT's files."""
    prefix = f"{PREFIX}{adapter}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Adapters:
    """The methods of a wrapper for adapters; it brings what raises NotImplementedError here."""

    config: Any
    params: Any
    _specs: dict[str, fm.AdapterConfig]
    _active: tuple[str, ...] = ()
    _adapters_on: bool = True

    def _adapter_tensors(self) -> dict[str, Any]:
        """Those of all adapters, by their names in the wrapper."""
        raise NotImplementedError

    def _set_adapter(self, name: str, tensors: Mapping[str, np.ndarray] | None, trained: bool) -> None:
        """Takes over tensors by the names of PEFT's files; None removes the adapter. Trained ones freeze the model."""
        raise NotImplementedError

    @staticmethod
    def _arrays_of_adapter(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Any] | None = None,
        hotswap: bool = False,
        **hub_options: Any,
    ) -> None:
        """Reads an adapter of PEFT and makes it the active one.

        Args:
            peft_model_id: a folder or a Hub id.
            adapter_name: what it is called here.
            is_trainable: whether it is trained, and the model's own parameters are not; see `add_adapter`.
            peft_config: with `adapter_state_dict`, in place of a folder: as the config of `add_adapter`.
            adapter_state_dict: tensors, by the names of PEFT's files or of `get_adapter_state_dict`.
            hotswap: whether it replaces an adapter of this name.
            **hub_options: those of `fm.load_adapter`.

        Raises:
            ValueError: an adapter of this name is there, or (with `hotswap=True`) is not; what does not fit the model.
        """
        if (peft_model_id is None) == (adapter_state_dict is None) or (peft_config is None) != (
            peft_model_id is not None
        ):
            raise TypeError("load_adapter: pass peft_model_id, or peft_config and adapter_state_dict")
        if adapter_name in self._specs and not hotswap:
            raise ValueError(
                f"load_adapter: there is an adapter {adapter_name!r}; pass another adapter_name, or hotswap=True"
            )
        if hotswap and adapter_name not in self._specs:
            raise ValueError(f"load_adapter: there is no adapter {adapter_name!r} to be replaced; leave hotswap out")
        if peft_model_id is not None:
            adapter = fm.load_adapter(peft_model_id, **hub_options)
        else:
            assert adapter_state_dict is not None
            arrays = self._arrays_of_adapter(adapter_state_dict)
            whole = {name if name.startswith(BASE) else BASE + name: array for name, array in arrays.items()}
            adapter = fm.Adapter(jax.tree.map(jax.numpy.asarray, whole), _spec("load_adapter", peft_config))
        self._put("load_adapter", adapter_name, adapter, trained=is_trainable)

    def add_adapter(
        self, adapter_config: Any, adapter_name: str = "default", *, key: Any = None, seed: int | None = None
    ) -> None:
        """Makes a new adapter, the active one, which is trained; the model's own parameters are not any more.

        Args:
            adapter_config: an `fm.AdapterConfig`, PEFT's `LoraConfig`, or an adapter_config.json as a dict.
            adapter_name: what it is called here.
            key: JAX's random key; or `seed`.
            seed: a number.

        Raises:
            TypeError: neither `key` nor `seed`, or both.
            ValueError: an adapter of this name is there; the config does not fit the model.
        """
        if (key is None) == (seed is None):
            raise TypeError("add_adapter: a new adapter is random; pass one of key= and seed=")
        if adapter_name in self._specs:
            raise ValueError(f"add_adapter: there is an adapter {adapter_name!r}; pass another adapter_name")
        spec = _spec("add_adapter", adapter_config)
        adapter = fm.init_adapter(self.params, self.config, spec, key if seed is None else jax.random.key(seed))
        self._put("add_adapter", adapter_name, adapter, trained=True)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Makes one adapter, or several whose effects are summed, the active ones; the others do nothing."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._known("set_adapter", names)
        self._active = names
        self._changed()

    def active_adapters(self) -> list[str]:
        """The names of the active adapters, whether they are enabled or not."""
        self._known("active_adapters", ())
        return list(self._active)

    def disable_adapters(self) -> None:
        """The model computes without its adapters, until `enable_adapters`."""
        self._known("disable_adapters", ())
        self._adapters_on = False
        self._changed()

    def enable_adapters(self) -> None:
        """The inverse of `disable_adapters`."""
        self._known("enable_adapters", ())
        self._adapters_on = True
        self._changed()

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Removes adapters."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self._known("delete_adapter", names)
        for name in names:
            self._set_adapter(name, None, False)
            del self._specs[name]
        self._active = tuple(name for name in self._active if name not in names)
        self._changed()

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Any]:
        """An adapter's tensors by PEFT's names in the model; those of the first active one without a name."""
        name = self._active_one("get_adapter_state_dict") if adapter_name is None else adapter_name
        self._known("get_adapter_state_dict", (name,))
        return {n.removeprefix(BASE): tensor for n, tensor in own(self._adapter_tensors(), name).items()}

    def _save_adapter(self, folder: str | os.PathLike[str], **options: Any) -> None:
        if len(self._active) > 1:
            raise ValueError(
                f"save_pretrained: {len(self._active)} adapters are active; set_adapter the one that is saved"
            )
        name = self._active_one("save_pretrained")
        arrays: dict[str, Any] = self._arrays_of_adapter(own(self._adapter_tensors(), name))
        fm.save_adapter(fm.Adapter(arrays, self._specs[name]), folder, **options)

    def _using(self) -> Active:
        """The adapters that a call uses."""
        return tuple((name, self._specs[name]) for name in self._active) if self._adapters_on else ()

    def _adapted(self) -> fm.Params:
        """The tree with the adapters that a call uses."""
        return adapted(self.params, self.config, self._arrays_of_adapter(self._adapter_tensors()), self._using())

    def _put(self, what: str, name: str, adapter: fm.Adapter, *, trained: bool) -> None:
        if not name or "." in name:
            raise ValueError(f"{what}: names of adapters have no dots, got {name!r}")
        fm.add_adapter(self.params, self.config, adapter)  # raises if it does not fit
        if name in self._specs:
            self._set_adapter(name, None, False)
        self._set_adapter(name, {n: np.asarray(array) for n, array in adapter.tensors.items()}, trained)
        self._specs[name] = adapter.config
        self._active = (name,)
        self._changed()

    def _changed(self) -> None:
        """Called when other adapters are used."""

    def _active_one(self, what: str) -> str:
        self._known(what, ())
        if not self._active:
            raise ValueError(f"{what}: no adapter is active; call set_adapter")
        return self._active[0]

    def _known(self, what: str, names: Sequence[str]) -> None:
        if not self._specs:
            raise ValueError(f"{what}: there is no adapter; call load_adapter or add_adapter")
        if unknown := [name for name in names if name not in self._specs]:
            raise ValueError(f"{what}: there is no adapter {', '.join(unknown)}; there are {', '.join(self._specs)}")


def _spec(what: str, config: Any) -> fm.AdapterConfig:
    if isinstance(config, fm.AdapterConfig):
        return config
    if hasattr(config, "to_dict"):  # of PEFT, which has sets where its files have lists
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    if not isinstance(config, Mapping):
        raise TypeError(
            f"{what}: expected an fm.AdapterConfig, PEFT's LoraConfig or a dict, got {type(config).__name__}"
        )
    return fm.AdapterConfig.from_peft({"peft_type": "LORA", **config})
