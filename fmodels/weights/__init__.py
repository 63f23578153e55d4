"""Bytes and names: files of weights in, files of weights out. Knows formats, no models."""

from fmodels.weights.folder import read_folder, read_index, write_folder
from fmodels.weights.formats import FORMATS, Format, find_weights, read_file
from fmodels.weights.tensors import Tensor

__all__ = ["FORMATS", "Format", "Tensor", "find_weights", "read_file", "read_folder", "read_index", "write_folder"]
