"""TensorFlow: weights in both directions, and a `tf.Module` that trains, generates and exports a SavedModel.

What is shared and what is copied, on the CPU:

* `to_tensorflow` shares the memory of every tensor that lies in one piece on a 64-byte boundary. Copied are tensors
  that Hugging Face lays out differently (GPT-2's transposed and fused matrices), layers of a stacked leaf that do not
  begin on such a boundary (TensorFlow aborts the process on those), and float8, which TensorFlow's dlpack lacks.
* `from_tensorflow` shares what needs no stacking when it comes as `tf.Tensor`, which nobody can change. Variables and
  numpy arrays are copied, since they can change under the tree.
* `TFModel` owns its memory. Arrays on an accelerator go through the host.

All of it is exact to the bit, bfloat16, float16 and float8 included.
"""

from __future__ import annotations

from interop.tensorflow.convert import ALIGNMENT as ALIGNMENT
from interop.tensorflow.convert import from_tensorflow as from_tensorflow
from interop.tensorflow.convert import to_tensorflow as to_tensorflow
from interop.tensorflow.inputs import ALIASES as ALIASES
from interop.tensorflow.keras import TFLayer as TFLayer
from interop.tensorflow.model import PLATFORMS as PLATFORMS
from interop.tensorflow.model import TFModel as TFModel
from interop.tensorflow.output import TFOutput as TFOutput
