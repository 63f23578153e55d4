"""Orbax checkpoints: a folder with the arrays of a tree, as `orbax.checkpoint.StandardCheckpointer` writes it.

The names are the dotted paths of the tree. Orbax is imported when this module is used.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmodels.weights.safetensors import CODES
from fmodels.weights.tensors import Tensor, brief, listing, shape_problem

SPOOLED = 2**30
"""Bytes of a tree from which on its leaves are spooled to disk, as orbax wants all of them at once."""
MAX_RATIO = 10_000
"""Of the bytes of the arrays to those of the folder: more is no compression but holes."""


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what arrays a checkpoint has; each is restored when it is asked for.

    Args:
        path: the folder, of a tree of arrays (dicts, lists or tuples).

    Returns:
        The tensors by their dotted paths, and no metadata.

    Raises:
        ValueError: orbax cannot read it, or it holds anything but arrays of numbers; all bad ones are named.
        ImportError: orbax is not installed.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = tempfile.mkdtemp() + "/params"
        >>> write(folder, {"embed.tokens": Tensor.lazy("", np.float32, (2,), lambda: np.ones(2, np.float32))})
        >>> read(folder)[0]["embed.tokens"].array()
        array([1., 1.], dtype=float32)
    """
    import orbax.checkpoint as ocp

    path = Path(path).resolve()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
        described = _flatten(tree)
    except Exception as error:  # whatever orbax, tensorstore and JSON raise for a damaged folder
        raise ValueError(
            f"read: {str(path)!r} is no checkpoint of orbax that can be read ({type(error).__name__}: {brief(str(error))}); "
            "copy or save it again"
        ) from None
    room = MAX_RATIO * sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for keys, leaf in described.items():
        name = ".".join(map(str, keys))
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None or np.dtype(dtype) not in CODES:
            problems.append(f"{name!r} is no array of numbers: {brief(type(leaf).__name__)} {dtype}")
        elif problem := shape_problem(tuple(shape), np.dtype(dtype).itemsize):
            problems.append(f"{name!r}: {problem}")
        elif (size := int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize) > room:
            problems.append(f"{name!r} has {size} bytes, the folder cannot hold more than {room}")
        else:
            tensors[name] = Tensor.lazy(name, dtype, shape, lambda keys=keys: _restore(path, tree, keys))
    if problems:
        raise ValueError(f"read: {str(path)!r}: {listing(problems, sep='; ')}; save the parameters alone")
    return tensors, {}


def _flatten(tree: Any, keys: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple) and not hasattr(tree, "dtype"):
        items = enumerate(tree)
    else:
        return {keys: tree}
    found: dict[tuple[Any, ...], Any] = {}
    for key, value in items:
        found |= _flatten(value, (*keys, key))
    return found


def _restore(path: Path, tree: Any, keys: tuple[Any, ...]) -> np.ndarray:
    """One array of the tree."""
    import orbax.checkpoint as ocp

    def only(node: Any, at: tuple[Any, ...] | None, chosen: Any, other: Any) -> Any:
        """The tree with `chosen` at one place and `other` everywhere else."""
        if isinstance(node, Mapping):
            return {k: only(child, at[1:] if at and at[0] == k else None, chosen, other) for k, child in node.items()}
        if isinstance(node, list | tuple) and not hasattr(node, "dtype"):
            return [only(c, at[1:] if at and at[0] == i else None, chosen, other) for i, c in enumerate(node)]
        return other if at is None else chosen

    how = ocp.RestoreArgs(restore_type=np.ndarray)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arguments = ocp.args.PyTreeRestore(
            item=only(tree, keys, 0, ocp.PLACEHOLDER), restore_args=only(tree, keys, how, ocp.RestoreArgs())
        )
        found = checkpointer.restore(path, args=arguments)
    for key in keys:
        found = found[key]
    return np.asarray(found)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Writes a checkpoint that `StandardCheckpointer().restore(path)` reads as a tree of nested dicts.

    Args:
        path: the folder; it must not exist.
        tensors: by dotted path; `layers.0.…` are the layers of a tuple.
        metadata: ignored, the format has no place for it.
        advance: called with the number of bytes after each tensor that was handed to orbax.

    Raises:
        ValueError: a dtype that other formats do not have.
        OSError: it cannot be written.
        ImportError: orbax is not installed.
    """
    import orbax.checkpoint as ocp

    if wrong := [f"{name!r} is {t.dtype}" for name, t in tensors.items() if t.dtype not in CODES]:
        raise ValueError(f"write: orbax has no place for {listing(wrong)}; cast them")
    path = Path(path).resolve()
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".spool-") as spool:
        tree: dict[str, Any] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            array = tensor.array()
            if total > SPOOLED and array.nbytes:
                file = np.memmap(Path(spool) / str(number), np.uint8, "w+", shape=(array.nbytes,))
                np.copyto(file, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                file.flush()
                array = np.asarray(file).view(array.dtype).reshape(array.shape)
            *parents, last = name.split(".")
            inner = tree
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = array
            if advance is not None:
                advance(tensor.nbytes)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, _with_lists(tree))
        except ValueError as error:  # by which TensorStore says that the disk is full
            raise OSError(f"write: orbax could not write {str(path)!r}: {error}") from None


def _with_lists(tree: Any) -> Any:
    """Dicts whose keys are 0, 1, … as lists."""
    if not isinstance(tree, dict):
        return tree
    items = {key: _with_lists(value) for key, value in tree.items()}
    return (
        [items[str(i)] for i in range(len(items))]
        if set(items) == set(map(str, range(len(items)))) and items
        else items
    )
