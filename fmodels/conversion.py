"""From any format to any other, a shard at a time: nothing is decoded that need not be, and all of it is checked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels import checkpoint, dialects
from fmodels.bytewise import canonical_names
from fmodels.dialects import tree as tree_dialect
from fmodels.layout import Plan
from fmodels.models import Config
from fmodels.weights import FORMATS, Tensor
from fmodels.weights.folder import lock, unlock, write_files
from fmodels.weights.formats import check_format, dtype_and_type
from fmodels.weights.quantized import expanded
from fmodels.weights.tensors import by_kind, cast, listing

JOB = "conversion.json"
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|ot|tflite|npz)(\.index(\.\w+)?\.json)?"
    r"|tf_model.*|flax_model.*|.*\.ckpt\.(index|meta|data-.*)"
)
"""Names of files of weights, of any format: a conversion copies the others."""
WRITTEN = ("config.json", "generation_config.json")
"""What `save` writes itself."""


class Conversion(NamedTuple):
    """What `convert` did.

    Attributes:
        source: the folder or file.
        folder: where the checkpoint is now.
        format: of the new files.
        tensors: how many it has.
        bytes: of them.
        sha256: of all tensors under PyTorch's names, or of a quantised checkpoint's as its files have them: the same in any
            format. None if it was not asked for.
        cast: how many were cast to another dtype.
        left_out: tensors of the source that the new files do not have, with the reason.
        copied: other files.
        resumed: how many files of weights were there already, from a run that was killed.
    """

    source: str
    folder: str
    format: str
    tensors: int
    bytes: int
    sha256: str | None
    cast: int
    left_out: tuple[str, ...]
    copied: tuple[str, ...]
    resumed: int


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    from_format: str | None = None,
    dtype: Any = None,
    task: str | None = None,
    dequantize: bool = False,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
    verify: bool = True,
    **hub_options: Any,
) -> Conversion:
    """Writes a checkpoint in another format or dtype, tensor by tensor, with the files beside it.

    Never more than one tensor is in memory (for orbax a leaf of the tree, and up to 1 GB that waits for the others). A run that is
    killed goes on where it was when the same conversion is started again: what it has written waits beside the new folder, in
    `.NAME.converting`. The new folder appears when all is written and checked.

    Args:
        source: a folder, a file of weights, or a Hub id.
        folder: where to: a new or empty folder.
        format: a key of `fm.FORMATS`.
        from_format: which of several formats in the source.
        dtype: floating tensors are cast to it; None keeps what they are. `"q8_0"` for format `"gguf"`, as in `save`.
        task: keep the head of this task only.
        dequantize: write the arrays that quantised weights stand for; else they are written as they are.
        max_shard_size: bytes of a file, or text such as `"5GB"`; None for 5GB, and for one file of GGUF.
        variant: of the source, as in `load`.
        verify: read the new files again and compare the SHA-256 of every tensor with the source's.
        hub_options: `revision`, `token`, … as in `load`.

    Returns:
        What was done.

    Raises:
        ValueError: the source cannot be read, does not fit its config, or does not come back as it was; nothing is left.
        FileExistsError: the folder has something in it already.
        OSError: the source is not there, or the folder cannot be written.

    Example:
        >>> import fmodels as fm, tempfile
        >>> done = fm.convert(fm.assets.TINY_LLAMA, tempfile.mkdtemp() + "/torch", format="torch")
        >>> done.tensors, done.cast, done.left_out
        (38, 0, ())
    """
    check_format(format, verb="convert")
    numbers, type = dtype_and_type("convert", dtype, format)
    opened = checkpoint.open_checkpoint(source, task=task, variant=variant, format=from_format, **hub_options)
    config, planned = checkpoint.plan(opened)
    tensors, left_out = _renamed(opened.tensors, planned, config)
    quantized = config.quantization is not None and not dequantize
    if quantized and (dtype is not None or FORMATS[format].dialect != "pt"):
        raise ValueError(
            f"convert: quantised weights have no {'other dtype' if dtype is not None else f'place in format {format!r}'}; "
            "pass dequantize=True (--dequantize) for the arrays that they stand for"
        )
    if quantized:  # as the files have them
        other = opened.tensors.keys() - planned.tensors.keys()
        tensors = {name: tensor for name, tensor in opened.raw.items() if name not in other}
    else:
        tensors = expanded(tensors)
    config = config if quantized else dataclasses.replace(config, quantization=None)
    wanted = tensors if numbers is None else {name: cast(tensor, numbers) for name, tensor in tensors.items()}
    kept = opened.metadata if dialects.has_own_metadata(opened.metadata["format"], FORMATS[format].dialect) else None
    written, metadata, files = checkpoint.as_written(
        wanted, config, _dtype_name(wanted), format, checkpoint.folder_of(opened.path), kept
    )
    count = sum(tensor.dtype != wanted[name].dtype for name, tensor in tensors.items())
    if type is not None:
        before, written = written, FORMATS[format].of_type(written, type)
        wanted = dialects.read(written, config, FORMATS[format].dialect)
        count += sum(tensor is not before[name] for name, tensor in written.items())
    release = {t.file for t in opened.raw.values() if t.file is not None}

    def advance(count: int) -> None:
        bar.update(count)
        for file in release:
            file.release()

    key = {
        "source": [str(opened.path.resolve()), str(from_format), str(variant)],
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in _files(opened.path)],
        "to": [format, str(dtype), str(max_shard_size), config.task, quantized], "tensors": len(written),
    }  # fmt: skip
    with _stage(opened.path, Path(folder), key) as stage:
        with tqdm(total=_total(written), desc="convert", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            resumed = write_files(
                stage, written, format=format, max_shard_size=max_shard_size, metadata=metadata, files=files,
                advance=advance,
            )  # fmt: skip
        own = opened.path if opened.path.is_dir() else None
        copied = () if own is None else tuple(copy_others(own, stage))
        held = dialects.read(written, config, FORMATS[format].dialect)
        digest = _verify(wanted, held, stage, release, format, quantized=quantized) if verify else None
    return Conversion(
        str(source), str(folder), format, len(written), _total(written), digest, count, left_out, copied, resumed
    )


def _renamed(tensors: Mapping[str, Tensor], planned: Plan, config: Config) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by the names that `save` writes, in its order; and the names that are left out, with the reason."""
    names = canonical_names(list(tensors), config)
    found = {names[name].canonical: tensors[name] for name in planned.tensors}
    leaves = tree_dialect.write(found, config)
    made, _ = tree_dialect.from_leaves(leaves, config, lambda path: leaves[path].array())
    repeats = {name: canonical for name, (kind, canonical) in names.items() if kind == "repeat"}
    left = tuple(
        f"{name} ({f'repeats {repeats[name]}' if name in repeats else names[name].kind})"
        for name in tensors
        if name not in planned.tensors
    )
    return {name: found.get(name, tensor) for name, tensor in made.items()}, left


def _files(source: Path) -> list[Path]:
    """The files that a conversion of `source` may read: those in the folder of its config, and in folders that are weights."""
    folder = checkpoint.folder_of(source)
    trees = [folder / kind.single() for kind in FORMATS.values() if kind.directory]
    trees += [source] if source.is_dir() and source != folder else []
    found = {*folder.iterdir(), *(path for tree in trees for path in tree.rglob("*"))}
    return sorted(path for path in found if path.is_file())


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """The dtype of most of the floating elements."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name], default="float32")


def _total(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _verify(
    wanted: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    stage: Path,
    release: set[Any],
    format: str,
    *,
    quantized: bool,
) -> str:
    """Compares the hashes of what should have been written with those of the new files; returns one of them all.

    A tensor that is read as `held` says is as the format can have it, and was not damaged.
    """
    opened = checkpoint.open_checkpoint(stage)
    names = canonical_names(list(opened.tensors), opened.config)
    new = opened.raw if quantized else {names[n].canonical: tensor for n, tensor in opened.tensors.items()}
    release = release | {t.file for t in opened.raw.values() if t.file is not None}
    problems = [f"{name!r} is not there" for name in wanted if name not in new]
    rounded: list[str] = []
    digests = {}
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=_total(wanted), desc="verify", unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        for name in sorted(wanted.keys() & new.keys(), key=by_kind):  # each leaf of a tree, of all layers, is read once
            one, digests[name] = pool.map(_digest, (wanted[name], new[name]))
            if one != digests[name] and name in held and _digest(held[name]) == digests[name]:
                rounded.append(name)
            elif one != digests[name]:
                problems.append(f"{name!r} was not written as it is")
            bar.update(wanted[name].nbytes)
            for file in release:
                file.release()
    if problems:
        raise ValueError("convert: nothing was written: " + "; ".join(problems[:20]))
    if rounded:
        raise ValueError(
            f"convert: nothing was written: format {format!r} rounds {len(rounded)} tensors: {listing(rounded)}; pass "
            "verify=False (--no-verify) to have them so, as save writes them"
        )
    return _together(digests)


def digest_of(tensors: Mapping[str, Tensor], config: Config) -> str:
    """The hash of a `Conversion`, of tensors by PyTorch's names."""
    names = canonical_names(list(tensors), config)
    return _together({names[name].canonical: _digest(tensor) for name, tensor in tensors.items()})


def _together(digests: Mapping[str, str]) -> str:
    """One hash of those of all tensors."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    """Of the dtype, the shape, and the bytes in row-major order."""
    array = np.ascontiguousarray(tensor.array()).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape} ".encode())
    digest.update(array.data)
    return digest.hexdigest()


@contextlib.contextmanager
def _stage(source: Path, dest: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that becomes `dest` if the block ends well; kept if the process is killed, for the same conversion again.

    Raises:
        ValueError: `dest` is the source, lies in it, or holds it.
        FileExistsError: `dest` has something in it already, or another process converts to it.
    """
    target = check_dest(source, dest)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.parent / f".{target.name}.converting"
    stage.mkdir(exist_ok=True)
    held = lock(stage)
    if held is None and os.name != "nt":
        raise FileExistsError(f"convert: another process is writing {str(dest)!r}; wait for it")
    try:
        job = stage / JOB
        text = json.dumps(key)
        same = job.exists() and job.read_text() == text
        if not same:  # gone first: of folders that are removed half may be left, which nobody shall take for the whole
            job.unlink(missing_ok=True)
        for path in stage.iterdir():  # of which files of weights are whole
            if not (same and (path == job or any(kind.owns(path.name) for kind in FORMATS.values()))):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if not same:
            job.write_text(text)
        try:
            yield stage
        except Exception:  # but not when it is interrupted
            job.unlink(missing_ok=True)
            shutil.rmtree(stage, ignore_errors=True)
            raise
        job.unlink()
        os.replace(stage, target)
    finally:
        unlock(held)


def check_dest(source: Path, dest: Path) -> Path:
    """The new folder of a command, which must be apart from the source's, and empty if it is there."""
    folder = (source if source.is_dir() else source.parent).resolve()
    target = dest.expanduser().resolve()
    if target == folder or folder in target.parents or target in folder.parents:
        raise ValueError(
            f"DEST {str(dest)!r} and SOURCE {str(source)!r} must be different folders, neither inside of the other"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"DEST {str(dest)!r} exists and is not an empty folder; give another, or remove it first")
    return target


def copy_others(source: Path, target: Path) -> list[str]:
    """Copies tokenizers, model cards and the like: all files but weights, hidden files, and what `save` writes itself.

    Weights of further modules of a sentence-transformers folder belong to it and are copied.
    """
    modules: set[str] = set()
    if (source / "modules.json").is_file():
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        modules = {str(module.get("path")) for module in listed if module.get("path")}
    folders = {kind.single() for kind in FORMATS.values() if kind.directory}
    copied = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if any(part.startswith(".") for part in name.parts) or not path.is_file() or name.parts[0] in folders:
            continue
        if name.as_posix() in WRITTEN or (WEIGHTS.fullmatch(path.name) and name.parts[0] not in modules):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        copied.append(name.as_posix())
    return copied
