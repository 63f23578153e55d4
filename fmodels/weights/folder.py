"""Folders of weights under Hugging Face's names: which files to read, and how to replace them all at once.

A save builds the whole new folder beside the old one (what it does not write is hard-linked) and exchanges the two in
one system call. A process that is killed leaves the old folder or the new one, never a mixture.
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fmodels.weights.formats import (
    FORMATS,
    OTHERS,
    Format,
    Metadata,
    Tensors,
    candidates,
    check_format,
    find_weights,
    is_alone,
    read_file,
)
from fmodels.weights.tensors import Tensor, brief, listing, parse_json, replacing

logger = logging.getLogger("fmodels")


def read_index(path: str | os.PathLike[str]) -> dict[str, str]:
    """The map from tensors to files of an index, all of whose files must lie beside it.

    Raises:
        ValueError: no such map, or names that lead out of the folder.
    """
    weight_map = parse_json(Path(path).read_bytes(), f"read: index {str(path)!r}").get("weight_map")
    if not isinstance(weight_map, dict) or any(not isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(
            f"read: index {str(path)!r} needs a weight_map from tensors to file names, got {brief(weight_map)}; "
            "save or download the checkpoint again"
        )
    # Names are checked, not where links lead: in the Hub's cache all files are links to blobs outside of the folder.
    outside = sorted({shard for shard in weight_map.values() if not _is_inside(shard)})
    if outside:
        raise ValueError(
            f"read: index {str(path)!r} points outside of its folder: {listing([brief(s) for s in outside])}; "
            "put the files beside the index and list them by name"
        )
    return weight_map


def read_folder(
    folder: str | os.PathLike[str], *, variant: str | None = None, format: str | None = None
) -> tuple[Tensors, Metadata]:
    """Reads the weights of a checkpoint folder; bytes stay on disk until they are asked for.

    Looks for the formats in the order of `FORMATS`: `model.safetensors`, its index, `pytorch_model.bin`, its index, ….

    Args:
        folder: the checkpoint.
        variant: reads `model.<variant>.safetensors` and so on.
        format: reads this one, whichever others are there.

    Returns:
        The tensors by the names in the files, and the metadata of the files; its entry `format` says whose names they are.

    Raises:
        FileNotFoundError: no folder, no weights in it, or missing shards.
        ValueError: an index that contradicts its shards, or a damaged file.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = tempfile.mkdtemp()
        >>> write_folder(folder, {"x": Tensor.lazy("x", np.int8, (2,), lambda: np.ones(2, np.int8))})
        >>> tensors, metadata = read_folder(folder)
        >>> tensors["x"].shape, metadata
        ((2,), {'format': 'pt'})
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file; use read_file" if folder.exists() else "not there; check the path"
        raise FileNotFoundError(f"read: expected a folder of weights, {str(folder)!r} is {kind}")
    names = os.listdir(folder)
    there = find_weights(names, variant, format)
    if there is None:
        found = sorted({path.name for pattern in OTHERS for path in folder.glob(pattern)})
        hint = f"; there is {listing(found)}, whose path may be given if it holds the weights" if found else ""
        raise FileNotFoundError(f"read: {str(folder)!r} has none of {', '.join(candidates(variant, format))}{hint}")
    kind, name = FORMATS[there[0]], there[1]
    others = [one for one, other in FORMATS.items() if other is not kind and other.find(names, variant)]
    if others and format is None:
        logger.info("read: %r is read as %r; format= takes one of %s", str(folder), there[0], ", ".join(others))
    if kind.directory:
        tensors, metadata = kind.read(folder / name)
        return tensors, {"format": kind.dialect, **metadata}
    if not name.endswith(".json"):
        return read_file(folder / name)
    weight_map = {kind.in_shard(key): shard for key, shard in read_index(folder / name).items()}
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(
            f"read: {str(folder / name)!r} lists {len(shards)} files, {len(missing)} are missing: {listing(missing)}; "
            "copy or download them"
        )
    tensors: Tensors = {}
    metadata: Metadata = {}
    home: dict[str, str] = {}
    problems: list[str] = []
    for shard in shards:
        found, text = read_file(folder / shard)
        problems += [f"{key!r} is in {home[key]} and in {shard}" for key in found if key in home]
        problems += [f"{key!r} is in {shard}, not in the index" for key in found if key not in weight_map]
        home |= dict.fromkeys(found, shard)
        tensors |= found
        metadata = text | metadata
    problems += [f"{key!r} is not in {shard}" for key, shard in weight_map.items() if home.get(key) != shard]
    if problems:
        raise ValueError(
            f"read: {str(folder / name)!r} does not fit its files: {listing(problems, sep='; ')}; "
            "save or download the checkpoint again"
        )
    return tensors, metadata


def write_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    format: str = "safetensors",
    max_shard_size: int | str | None = None,
    variant: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    progress: bool = True,
) -> None:
    """Writes the weights of a checkpoint and the small files that belong to them, all or nothing.

    Weights of an older save that would be read in place of the new ones (shards, an index, a file of a format that is
    preferred) go; everything else in the folder stays. The tensors may lie in the very files that are replaced.

    Killed at any point, with a full disk or an exception, the old checkpoint is whole or the new one is. Where folders
    cannot be exchanged (not Linux, a mount point, the current directory, a parent without write permission) files are
    renamed one by one, the index last: exceptions are still rolled back, a kill between two renames is not.

    Args:
        folder: where to; made if missing.
        tensors: by name.
        format: a key of `FORMATS`.
        max_shard_size: bytes of a file, or text such as "5GB" (10^9), "5GiB" (2^30); a larger tensor has its own file. None
            for the format's own: 5GB where an index lists the files, else one file.
        variant: writes `model.<variant>.safetensors` and so on.
        metadata: of the files; `{"format": …}`, which says whose names the tensors have, if None.
        files: more files by name, such as `config.json`.
        progress: shows a bar, on a terminal only.

    Raises:
        ValueError: an argument or tensor that cannot be written; nothing has changed.
        OSError: the disk is full, the path a file, …; nothing has changed.

    Example:
        >>> import tempfile, numpy as np
        >>> folder, x = tempfile.mkdtemp(), Tensor.lazy("x", np.int8, (8,), lambda: np.ones(8, np.int8))
        >>> write_folder(folder, {"a": x, "b": x}, max_shard_size=8, files={"config.json": b"{}"})
        >>> for name in sorted(os.listdir(folder)): print(name)
        config.json
        model-00001-of-00002.safetensors
        model-00002-of-00002.safetensors
        model.safetensors.index.json
    """
    check_format(format, verb="write")
    kind = FORMATS[format]
    named, files = _arrange(tensors, kind, max_shard_size, variant, files or {})

    def fill(stage: Path) -> None:
        from tqdm import tqdm

        total = sum(tensor.nbytes for tensor in tensors.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="save", disable=None if progress else True) as bar:
            _fill(stage, kind, named, files, metadata, bar.update)

    preferred = list(FORMATS.values())[: list(FORMATS).index(format) + 1]
    # What makes the folder a new checkpoint comes last: the index, or the file that stands for all.
    weights = [*reversed(named)] if len(named) > 1 else kind.files(variant)
    order = [*named, *files] if len(named) > 1 and kind.indexed else [*files, *weights]
    commit(Path(folder), fill, order, lambda name: any(other.owns(name, variant) for other in preferred))


def write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    format: str,
    max_shard_size: int | str | None,
    metadata: Mapping[str, Any],
    files: Mapping[str, bytes],
    advance: Callable[[int], object],
) -> int:
    """Writes the files of `write_folder` into a folder that nobody reads yet, but for those of the weights that are there.

    Args:
        folder: where to.
        tensors: by name.
        format: a key of `FORMATS`.
        max_shard_size: as in `write_folder`.
        metadata: of the files.
        files: more files by name.
        advance: called with the number of bytes after each tensor.

    Returns:
        How many files of weights were there already, from a process that was killed: each is whole if it is there.
    """
    check_format(format, verb="write")
    named, files = _arrange(tensors, FORMATS[format], max_shard_size, None, files)
    return _fill(folder, FORMATS[format], named, files, metadata, advance)


def _arrange(
    tensors: Mapping[str, Tensor],
    kind: Format,
    max_shard_size: int | str | None,
    variant: str | None,
    files: Mapping[str, bytes],
) -> tuple[dict[str, Tensors], dict[str, bytes]]:
    """Name of each file of weights -> its tensors; and the other files, with the index if there is one."""
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
        raise ValueError(f"write: variant {variant!r} cannot be part of a file name; use letters and digits")
    if wrong := [name for name in files if not _is_inside(name) or any(f.owns(name) for f in FORMATS.values())]:
        raise ValueError(f"write: files {wrong} are outside of the folder or weights; use names such as config.json")
    size = kind.shard_size if max_shard_size is None else max_shard_size
    limit = None if size is None else parse_size(size)
    shards = split(tensors, limit) if kind.sharded and limit is not None else [dict(tensors)]
    if len(shards) == 1:
        return {kind.single(variant): shards[0]}, dict(files)
    names = [kind.shard(i + 1, len(shards), variant) for i in range(len(shards))]
    index = {kind.index(variant): _index(shards, names)} if kind.indexed else {}
    return dict(zip(names, shards, strict=True)), {**files, **index}


def _fill(
    stage: Path,
    kind: Format,
    named: Mapping[str, Tensors],
    files: Mapping[str, bytes],
    metadata: Mapping[str, Any] | None,
    advance: Callable[[int], object],
) -> int:
    """Writes all of it; returns how many of the files of weights were there."""
    metadata = {"format": kind.dialect} if metadata is None else metadata
    there = 0
    for number, (name, shard) in enumerate(named.items()):
        if (stage / name).exists():
            there += 1
            advance(sum(tensor.nbytes for tensor in shard.values()))
        else:
            said = kind.of_shard(dict(metadata), number, list(named.values())) if len(named) > 1 else metadata
            kind.write(stage / name, shard, said, advance=advance)
    for name, content in files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(stage / name) as out:
            out.write(content)
    return there


def parse_size(size: int | str) -> int:
    """A number of bytes: an integer, or text as in transformers, where a last small "b" means bits.

    Example:
        >>> parse_size("5MB"), parse_size("5MiB"), parse_size("8kb"), parse_size(7)
        (5000000, 5242880, 1000, 7)
    """
    value = size
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+)\s*([KMGT])(I?)(B)", size.strip(), re.IGNORECASE)):
        base = 1024 if match[3] else 1000
        value = int(match[1]) * base ** (" KMGT".index(match[2].upper()))
        if match[4] == "b" and not match[3]:
            value //= 8
    if type(value) is not int or value <= 0:
        raise ValueError(f'max_shard_size: expected a positive integer or text such as "5GB" or "512MiB", got {size!r}')
    return value


def split(tensors: Mapping[str, Tensor], limit: int) -> list[Tensors]:
    """Groups of at most `limit` bytes in the given order, as transformers makes them: a larger tensor is alone."""
    shards: list[Tensors] = []
    current: Tensors = {}
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            shards.append({name: tensor})
            continue
        if tensor.nbytes > room:
            shards.append(current)
            current, room = {}, limit
        current[name] = tensor
        room -= tensor.nbytes
    return [*shards, current] if current or not shards else shards


def _index(shards: list[Tensors], names: list[str]) -> bytes:
    everything = [tensor for shard in shards for tensor in shard.values()]
    metadata = {
        "total_parameters": sum(tensor.size for tensor in everything),
        "total_size": sum(tensor.nbytes for tensor in everything),
    }
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def _is_inside(name: str) -> bool:
    """Whether `name` is a plain relative path, on every system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0"))


# The rest replaces a folder.


def commit(folder: Path, fill: Callable[[Path], None], order: list[str], stale: Callable[[str], bool]) -> None:
    """Puts the files `order`, which `fill` writes into a given folder, into `folder`, removing those that are stale."""
    target = Path(os.path.realpath(folder))  # a link to the folder stays a link
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            f"write: expected a folder, {str(folder)!r} is a file; give a folder or remove the file"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    exchangeable = not target.exists() or _exchangeable(target)
    with staging(target.parent if exchangeable else target, target.name) as stage:
        fill(stage)
        if not exchangeable:
            _move_in(stage, target, order, stale)
            return
        if target.exists():
            _keep(target, stage, lambda name: name in order or stale(name) or name.startswith(_prefix(target.name)))
            _like(target, stage)
        for path, _, _ in os.walk(stage, topdown=False):
            _sync(Path(path))
        if not target.exists():
            os.rename(stage, target)
        elif not _exchange(stage, target):
            _move_in(stage, target, order, stale)
            return
        _sync(target.parent)


def _exchangeable(target: Path) -> bool:
    """Whether the folder itself may become another one."""
    here = Path(os.path.realpath(os.curdir))
    mounts = any(os.path.ismount(path) for path, _, _ in os.walk(target))  # a mount would move with the old folder
    return (
        sys.platform == "linux" and not mounts and target not in (here, *here.parents) and os.access(target.parent, 3)
    )


def _exchange(stage: Path, target: Path) -> bool:
    """Exchanges two folders in one step, or returns False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(stage), here, os.fsencode(target), exchange) == 0


def _keep(source: Path, target: Path, drop: Callable[[str], bool], prefix: str = "") -> None:
    """Hard-links all files of `source` that are not dropped by their name into `target`."""
    with os.scandir(source) as listed:
        entries = list(listed)
    for entry in entries:
        name, new = prefix + entry.name, target / entry.name
        if drop(name):
            if (
                entry.is_dir(follow_symlinks=False)
                and not entry.name.startswith(".")
                and not is_alone(Path(entry.path))
            ):
                raise IsADirectoryError(f"write: expected a file, {entry.path!r} is a folder; rename it")
        elif entry.is_symlink():
            os.symlink(os.readlink(entry.path), new)
        elif entry.is_dir():
            new.mkdir(exist_ok=True)
            _keep(Path(entry.path), new, drop, f"{name}/")
            _like(Path(entry.path), new)
        else:
            _link(Path(entry.path), new)


def _link(source: Path, new: Path) -> None:
    try:
        os.link(source, new, follow_symlinks=False)
    except OSError:  # a file system without hard links, or a file of somebody else
        shutil.copy2(source, new, follow_symlinks=False)
        _sync(new)


def _like(source: Path, new: Path) -> None:
    """Gives the folder `new` the permissions and, where allowed, the owner of `source`."""
    shutil.copystat(source, new)
    with contextlib.suppress(OSError):
        os.chown(new, source.stat().st_uid, source.stat().st_gid)


def _move_in(stage: Path, target: Path, order: list[str], stale: Callable[[str], bool]) -> None:
    """Renames the files `order` from `stage` into `target`, undoing all of it after an exception."""
    backup = stage / ".old"
    backup.mkdir()
    undo: list[tuple[Path | None, Path]] = []
    # An old index goes first: no index is an error to the reader, an old one with new shards would be a mixture.
    leaving = [name for name in os.listdir(target) if stale(name) and (name not in order or name.endswith(".json"))]
    try:
        for number, name in enumerate([*leaving, *order]):
            old, saved = target / name, backup / str(number)
            present = os.path.lexists(old)
            undo.append((saved if present else None, old))
            if number < len(leaving):
                os.rename(old, saved)
                continue
            if present:  # a folder has no second name
                os.rename(old, saved) if old.is_dir() else _link(old, saved)
            old.parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, old)
        _sync(target)
    except BaseException:
        for saved, old in reversed(undo):
            if saved is not None and not os.path.lexists(saved):
                continue  # the failure came before it was moved
            if old.is_dir():
                shutil.rmtree(old)
            if saved is not None:
                os.replace(saved, old)
            else:
                old.unlink(missing_ok=True)
        raise


def _prefix(name: str) -> str:
    return f".{name}.saving-"


@contextlib.contextmanager
def staging(place: Path, name: str) -> Iterator[Path]:
    """An empty folder in `place`, locked while this process lives, gone afterwards with all that is then in it."""
    while True:
        stage = place / (_prefix(name) + secrets.token_hex(4))
        stage.mkdir()
        held = lock(stage)
        if stage.exists():  # else somebody swept it before it was locked
            break
        unlock(held)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        unlock(held)


def sweep(target: Path) -> None:
    """Removes what dead processes left."""
    for place in (target.parent, target):
        for path in place.glob(_prefix(target.name).replace("[", "[[]") + "*") if place.is_dir() else ():
            held = lock(path)
            if held is not None:
                shutil.rmtree(path, ignore_errors=True)
                unlock(held)


def lock(folder: Path) -> int | None:
    """Locks a folder; None if another process holds it, or where nobody can tell."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(held: int | None) -> None:
    """Gives back what `lock` gave."""
    if held is not None:
        os.close(held)


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
