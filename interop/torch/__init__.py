"""PyTorch: state dicts in both directions, and `TorchModel`, an `nn.Module` that computes through JAX.

Everything here lives on the CPU: tensors elsewhere are moved to it by `from_torch`, and `TorchModel` refuses them.
"""

from interop.torch.arrays import DTYPES as DTYPES
from interop.torch.call import FIELDS as FIELDS
from interop.torch.convert import copied_tensors as copied_tensors
from interop.torch.convert import from_torch as from_torch
from interop.torch.convert import to_torch as to_torch
from interop.torch.inputs import TABLES as TABLES
from interop.torch.model import TorchModel as TorchModel
from interop.torch.output import TorchOutput as TorchOutput
