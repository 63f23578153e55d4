"""The import arrows of DESIGN.md, section 2, read from the sources with `ast`, and what `import fmodels` loads."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {
    **dict.fromkeys(["types", "schema", "tree", "arrays", "codecs", "low_rank"], 0),
    **dict.fromkeys(["nn", "weights"], 1),
    **dict.fromkeys(["models", "transforms", "generation"], 2),
}
TOP = 3  # every other module of fmodels, and fmodels itself
AT_IMPORT = {"jax", "jaxlib", "ml_dtypes", "numpy", "tqdm"}  # third parties that fmodels may import at its own import
IN_FUNCTIONS = {
    "flax", "gguf", "h5py", "huggingface_hub", "llguidance", "matplotlib", "optax", "orbax", "psutil", "safetensors", "tensorflow",
    "tokenizers", "torch",
}  # fmt: skip
DERIVED_FROM = {
    "Config",
    "FAMILY",
    "WEIGHTS",
    "forward",
    "init",
}  # a family that derives from another uses one of these
FORBIDDEN_AT_IMPORT = ["torch", "tensorflow", "transformers", "tokenizers", "h5py", "optax", "orbax", "huggingface_hub",
                       "safetensors.torch", "flax", "matplotlib"]  # fmt: skip


class Import(NamedTuple):
    """One import of one module: `name` is what is taken from it, None for the module as a whole."""

    source: str
    target: str
    name: str | None
    line: int
    in_function: bool  # or under `if TYPE_CHECKING`: not run when the module is imported


class Module(NamedTuple):
    """A parsed source file."""

    name: str
    is_package: bool
    tree: ast.Module


def parse(root: Path) -> dict[str, Module]:
    """All modules of the two packages under a folder, by dotted name."""
    modules = {}
    for path in sorted([*root.glob("fmodels/**/*.py"), *root.glob("interop/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, is_package, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return modules


def walk(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, each with whether it stays unexecuted while the module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child, in_function
        deferred = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            deferred = True
        yield from walk(child, deferred)


def read_imports(module: Module, modules: dict[str, Module]) -> Iterator[Import]:
    """The imports of a module, with relative names made absolute and `from package import module` resolved."""
    for node, in_function in walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module.name, alias.name, None, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.name.split(".")
                parents = parents[: len(parents) - node.level + module.is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                # `fmodels.load` the function hides a module of that name; interop takes names, not modules.
                if submodule in modules and not module.name.startswith("interop"):
                    yield Import(module.name, submodule, None, node.lineno, in_function)
                else:
                    yield Import(module.name, base, alias.name, node.lineno, in_function)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            if not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            yield Import(module.name, str(node.args[0].value), None, node.lineno, in_function)


def level(name: str) -> int:
    """The level of a module of fmodels."""
    parts = name.split(".")
    return TOP if len(parts) == 1 else LEVELS.get(parts[1], TOP)


def is_family(name: str, modules: dict[str, Module]) -> bool:
    """Whether a module is the file of a family: it lies in models and assigns FAMILY."""
    return name.startswith("fmodels.models.") and "FAMILY" in assigned(modules[name].tree)


def assigned(tree: ast.Module) -> set[str]:
    """The names that a module binds at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def public_names(modules: dict[str, Module]) -> set[str]:
    """What `fmodels` offers: its `__all__`, or without one the names that it binds and that have no underscore."""
    if "fmodels" not in modules:
        return set()
    tree = modules["fmodels"].tree
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value)) | {"__version__"}
    return {name for name in assigned(tree) if not name.startswith("_")} | {"__version__"}


def used_names(module: Module, alias: str) -> set[str]:
    """The attributes that a module reads from an imported module."""
    return {
        node.attr
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == alias
    }


def aliases(module: Module, target: str) -> set[str]:
    """The names under which a module knows another module."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name for a in node.names if a.name == target}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name for a in node.names if target.endswith("." + a.name)}
    return found


def check_inside(arrow: Import, modules: dict[str, Module]) -> str | None:
    """The problem with an import of fmodels by fmodels, or None."""
    source, target = level(arrow.source), level(arrow.target)
    if target > source:
        return f"L{source} imports L{target}"
    if source == target == 2 and arrow.source.split(".")[1] != arrow.target.split(".")[1]:
        return "models, transforms and generation do not import each other"
    families = [name in modules and is_family(name, modules) for name in (arrow.source, arrow.target)]
    if all(families) and arrow.source != arrow.target:
        module = modules[arrow.source]
        if arrow.name is None:
            names = set().union(*(used_names(module, alias) for alias in aliases(module, arrow.target)))
        else:
            names = {a.name for a in read_imports(module, modules) if a.target == arrow.target and a.name}
        if private := sorted(name for name in names if name.startswith("_")):
            return f"takes private names of another family: {private}"
        if not names & DERIVED_FROM:
            return f"a family imports another only to derive from it, by one of {sorted(DERIVED_FROM)}"
    return None


def check_interop(arrow: Import, modules: dict[str, Module]) -> str | None:
    """The problem with an import of fmodels by interop, or None."""
    if arrow.target != "fmodels":
        return "interop uses only public names: write `import fmodels as fm` or `from fmodels import …`"
    module, public = modules[arrow.source], public_names(modules)
    names = {arrow.name} if arrow.name else set().union(*(used_names(module, a) for a in aliases(module, "fmodels")))
    if hidden := sorted(names - public):
        return f"not public names of fmodels: {hidden}"
    return None


def check_third_party(arrow: Import) -> str | None:
    """The problem with an import from outside the two packages, or None."""
    package = arrow.target.split(".")[0]
    if package in sys.stdlib_module_names:
        return None
    if package == "transformers":
        return (
            None if arrow.source == "interop.transformers" else "transformers belongs to tests and interop.transformers"
        )
    if arrow.source.startswith("interop") or package in AT_IMPORT:
        return None
    if package not in IN_FUNCTIONS:
        return "not a dependency that fmodels declares (AT_IMPORT, IN_FUNCTIONS in tests/test_imports.py)"
    return None if arrow.in_function else "optional: import it inside the function that needs it"


def problems(root: Path) -> list[str]:
    """All arrows that are not allowed, and cycles among the imports that run at import time."""
    modules = parse(root)
    found, graph = [], {name: set() for name in modules}
    for module in modules.values():
        for arrow in read_imports(module, modules):
            source, target = arrow.source.split(".")[0], arrow.target.split(".")[0]
            if target in ("fmodels", "interop") and arrow.target not in modules:
                problem = "no such module"
            elif source == target == "fmodels":
                problem = check_inside(arrow, modules)
            elif target == "fmodels":
                problem = check_interop(arrow, modules)
            elif source == "fmodels" and target == "interop":
                allowed = level(arrow.source) == TOP and arrow.in_function
                problem = None if allowed else "only L3 uses interop, and only inside functions"
            elif target == "interop":
                problem = None
            else:
                problem = check_third_party(arrow)
            if problem:
                what = arrow.target if arrow.name is None else f"{arrow.target}.{arrow.name}"
                found.append(f"{arrow.source}:{arrow.line} -> {what}: {problem}")
            elif arrow.target in modules and not arrow.in_function and arrow.source != arrow.target:
                graph[arrow.source].add(arrow.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("modules import each other: " + " -> ".join(reversed(error.args[1])))
    return found


def test_sources_import_only_downwards():
    modules = parse(ROOT)
    assert {"fmodels", "fmodels.schema", "fmodels.tree"} <= set(modules)
    assert not problems(ROOT), "\n".join(problems(ROOT))


GOOD = {
    "fmodels/__init__.py": "from fmodels.api import load\n__all__ = ['load']",
    "fmodels/api.py": "from fmodels import checkpoint\nload = checkpoint.load",
    "fmodels/checkpoint.py": "from fmodels.weights import rules\nfrom .models import FAMILIES\ndef load(): ...",
    "fmodels/cli/__init__.py": "from fmodels.cli.parser import main",
    "fmodels/cli/parser.py": "from fmodels.cli import reading\nfrom .writing import run\ndef main(): ...",
    "fmodels/cli/reading.py": "def run():\n  from interop import torch\n  from fmodels import load",
    "fmodels/cli/writing.py": "def run(): ...",
    "fmodels/generation/__init__.py": "",
    "fmodels/models/__init__.py": "from fmodels.models import big, small\nFAMILIES = [small.FAMILY, big.FAMILY]",
    "fmodels/models/big.py": "from fmodels.models import small as base\nclass Config(base.Config): ...\nFAMILY = 2",
    "fmodels/models/small.py": "import jax\nfrom fmodels.nn import linear\nclass Config: ...\nFAMILY = 1",
    "fmodels/nn/__init__.py": "",
    "fmodels/nn/linear.py": "import jax.numpy as jnp\nfrom .. import tree\ndef f():\n  import h5py",
    "fmodels/transforms/__init__.py": "from .resize import resize",
    "fmodels/transforms/resize.py": "import functools\nfrom fmodels import schema\ndef resize(): ...",
    "fmodels/schema.py": "from fmodels import tree",
    "fmodels/tree.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import torch",
    "fmodels/weights/__init__.py": "",
    "fmodels/weights/rules.py": "import numpy",
    "interop/__init__.py": "",
    "interop/torch/__init__.py": "from interop.torch.convert import to_torch",
    "interop/torch/convert.py": "import torch\nimport fmodels as fm\nfrom fmodels import load\nfm.load",
    "interop/transformers.py": "import transformers\nfrom . import torch",
}
BAD = [
    ("fmodels/tree.py", "from fmodels.nn import linear", "L0 imports L1"),
    ("fmodels/tree.py", "from fmodels import load", "L0 imports L3"),
    ("fmodels/nn/linear.py", "from fmodels.models import small", "L1 imports L2"),
    ("fmodels/nn/linear.py", "def f():\n  from ..models.small import Config", "L1 imports L2"),
    (
        "fmodels/nn/linear.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import fmodels.api",
        "L1 imports L3",
    ),
    ("fmodels/weights/rules.py", "import importlib\nimportlib.import_module('fmodels.models.small')", "L1 imports L2"),
    ("fmodels/models/small.py", "import fmodels.checkpoint\nFAMILY = 1", "L2 imports L3"),
    ("fmodels/models/small.py", "from fmodels import generation\nFAMILY = 1", "do not import each other"),
    ("fmodels/transforms/resize.py", "from fmodels.models import small", "do not import each other"),
    ("fmodels/generation/__init__.py", "from fmodels.transforms.resize import resize", "do not import each other"),
    ("fmodels/models/big.py", "from fmodels.models.small import helper\nFAMILY = 2", "only to derive"),
    ("fmodels/models/big.py", "from fmodels.models.small import Config, _helper\nFAMILY = 2", "private names"),
    ("fmodels/models/big.py", "from fmodels.models import small\nsmall.helper\nFAMILY = 2", "only to derive"),
    ("fmodels/models/small.py", "from fmodels.models.big import Config\nFAMILY = 1", "import each other"),
    ("fmodels/models/small.py", "from fmodels import nothing", "L2 imports L3"),
    ("fmodels/models/small.py", "import fmodels.nothing", "no such module"),
    ("fmodels/api.py", "import torch\nload = 1", "inside the function"),
    ("fmodels/api.py", "try:\n  import optax\nexcept ImportError:\n  pass\nload = 1", "inside the function"),
    ("fmodels/api.py", "def load():\n  import transformers", "belongs to tests"),
    ("fmodels/api.py", "def load():\n  __import__('transformers')", "belongs to tests"),
    ("fmodels/api.py", "def load():\n  import pandas", "not a dependency"),
    ("fmodels/api.py", "from interop import torch\nload = 1", "only inside functions"),
    ("fmodels/weights/rules.py", "def f():\n  from interop.torch import to_torch", "only L3 uses interop"),
    ("interop/torch/convert.py", "from fmodels.models import small", "only public names"),
    ("interop/torch/convert.py", "import fmodels.tree", "only public names"),
    ("interop/torch/convert.py", "from fmodels import checkpoint", "not public names of fmodels: ['checkpoint']"),
    ("interop/torch/convert.py", "import fmodels as fm\nfm.models.small", "not public names of fmodels: ['models']"),
    ("interop/torch/convert.py", "import transformers", "belongs to tests"),
    ("interop/torch/convert.py", "from interop.torch import to_torch", "import each other"),
    ("fmodels/cli/reading.py", "import torch", "inside the function"),
    ("fmodels/cli/writing.py", "from interop import torch", "only inside functions"),
    ("fmodels/cli/writing.py", "from fmodels.cli import parser", "import each other"),
    ("fmodels/nn/linear.py", "from fmodels.cli.parser import main", "L1 imports L3"),
]


def write(root: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def test_checker_accepts_the_allowed_arrows(tmp_path):
    write(tmp_path, GOOD)
    assert problems(tmp_path) == []


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_checker_catches_a_bad_arrow(tmp_path, name, text, message):
    write(tmp_path, GOOD | {name: text})
    found = problems(tmp_path)
    assert any(message in problem for problem in found), found


def test_import_loads_no_optional_package():
    code = f"import sys, fmodels; fmodels.load; print([name for name in {FORBIDDEN_AT_IMPORT} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
