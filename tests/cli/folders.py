"""What is in a folder: bytes, names, arrays."""

from pathlib import Path

from fmodels.weights import read_folder


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def arrays(folder):
    return {name: tensor.array() for name, tensor in read_folder(folder)[0].items()}
