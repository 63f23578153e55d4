"""What all tests share: strict jax, a compile cache, two torch threads, and the table of families as a fixture."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# LLVM's optimisations take a third of the time to compile, which is most of the time that the tests take; XLA's own passes
# are as for users. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs them with all.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # flags of that version; they halve what is left of the time to compile
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
import torch
import transformers

from tests import families

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(2)
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", params=families.CASES, ids=lambda case: case.name)
def loaded(request, tmp_path_factory):
    """Each row of the table: transformers' model, the folder that it saved, and what `fm.load` makes of it."""
    return families.load(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """`case(name)`: one row of the table, loaded."""
    return lambda name: families.load(families.by_name(name), tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def few_programs():
    """Compiled programs are dropped before they fill the process's table of memory maps: a program of generation takes
    about 400 of its 65530 entries. A worker crashed in CI once; that this was the cause is a guess."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
