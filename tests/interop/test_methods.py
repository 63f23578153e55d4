"""The wrappers' methods against the lists of those of transformers, versions 4.57.6 (golden) and 5 (installed)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
import torch
import transformers
from transformers.utils import PushToHubMixin

import fmodels as fm
from interop import methods
from interop.tensorflow import TFModel
from interop.torch import TorchModel

GOLDENS = Path(__file__).parent.parent / "goldens" / "wrappers"


def names_of_both_versions():
    """All public names that the classes of transformers define."""
    found = {name for names in json.loads((GOLDENS / "methods.json").read_text()).values() for name in names}
    for cls in (transformers.PreTrainedModel, transformers.GenerationMixin, PushToHubMixin):
        own = [base for base in cls.__mro__ if base.__module__.startswith("transformers")]
        found |= {name for base in own for name in vars(base) if not name.startswith("_")}
    return found


@pytest.mark.parametrize(("wrapper", "table"), [(TorchModel, methods.TORCH), (TFModel, methods.TENSORFLOW)])
def test_each_method_is_there_or_has_a_reason(wrapper, table):
    config = fm.models.gpt2.Config(
        vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4,
        max_positions=16, task="causal-lm",
    )  # fmt: skip
    model = wrapper(fm.init(config, jax.random.key(0)), config)
    names = names_of_both_versions()
    reasons = {**methods.NEITHER, **table}
    assert reasons.keys() <= names, "reasons for methods that do not exist"
    assert not methods.NEITHER.keys() & table.keys()
    assert all(reasons.values())
    for name in sorted(names):
        if name in reasons:
            assert not hasattr(model, name), f"{name} is there, and has a reason for not being there"
        else:
            assert hasattr(model, name), f"{name} is not there, and has no reason"
    assert isinstance(model, torch.nn.Module) == (wrapper is TorchModel)
