"""Whether transformers' TensorFlow classes read what fmodels writes, and compute with it what PyTorch's do.

Two steps: `python -m tests.goldens.read_back_tensorflow write FOLDER` with fmodels, then
`python tests/goldens/read_back_tensorflow.py read FOLDER` in the environment of make_tensorflow.py.

Of every class of make_tensorflow_names.py it reads the `tf_model.h5`, alone and in several files, and of BERT and ALBERT the
checkpoint of TensorFlow itself. Each must miss nothing and find nothing unexpected, and have all outputs of the PyTorch class
that read our safetensors. What the variables then were is kept in `tensorflow/read_back.json`, with which test_tensorflow.py
compares what is written today.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np

GOLDENS = Path(__file__).parent / "tensorflow"
RECORD = GOLDENS / "read_back.json"
TOKENS = np.array([[3, 5, 7, 9, 10, 2], [4, 6, 8, 2, 1, 1]], np.int32)
"""With the end, 2, and the padding, 1, of the classes' configs."""
DECODER = np.array([[0, 4, 5], [0, 10, 3]], np.int32)
TOLERANCE = 2e-5
NUMBERED = re.compile(r"dropout(_\d+)?")
"""Layers without variables that have a number of the process in their names: transformers misses those of its own files."""
NOT_IN_TORCH = "/mpnet/pooler/"
"""Variables of TensorFlow's classes with a head that none of PyTorch's has and nothing reads."""
ORIGINALS = (
    "BertModel", "BertForMaskedLM", "BertForNextSentencePrediction", "BertForPreTraining", "AlbertForMaskedLM",
    "AlbertForPreTraining",
)  # fmt: skip
"""Classes of PyTorch that read the checkpoints of google-research."""


def classes() -> dict[str, dict[str, Any]]:
    """Class, and perhaps `/variant` -> its config.json."""
    table = json.loads(gzip.decompress((GOLDENS / "variables.json.gz").read_bytes()))
    return {name: row["config"] for name, row in table.items()}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers between -1/2 and 1/2, for scales 1 more, that follow from the name."""
    i = np.arange(int(np.prod(shape)))
    drawn = ((31 * i * i + 7919 * i + zlib.crc32(name.encode())) % 1021 - 510) / 1024
    return (drawn + name.endswith("scale")).astype(np.float32).reshape(shape)


def model_of(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The params and config that are written for a config.json."""
    import fmodels as fm

    config = fm.models.family(given["model_type"]).config.from_hf(given)
    leaves = {path: values(path, leaf.shape) for path, leaf in fm.tree.flatten(fm.abstract(config)).items()}
    return fm.tree.unflatten(leaves), config


def write(folder: Path) -> None:
    """Writes the models of all classes, each in every format that is read back."""
    import fmodels as fm

    for name, given in classes().items():
        params, config = model_of(given)
        fm.save(params, config, folder / name / "torch")
        fm.save(params, config, folder / name / "tf", format="tf")
        fm.save(params, config, folder / name / "tf-sharded", format="tf", max_shard_size="3KB")
        if name in ORIGINALS:
            fm.save(params, config, folder / name / "tf-checkpoint", format="tf-checkpoint")


def digest(variables: Mapping[str, np.ndarray]) -> str:
    """Of the names, shapes and bytes."""
    whole = hashlib.sha256()
    for name in sorted(variables):
        array = np.ascontiguousarray(variables[name])
        whole.update(f"{name} {array.dtype} {array.shape} {zlib.crc32(array.tobytes())}\n".encode())
    return whole.hexdigest()


def inputs(name: str) -> dict[str, np.ndarray]:
    """What the class is asked."""
    given = {"input_ids": TOKENS, "attention_mask": (TOKENS != 1).astype(np.int32)}
    if "MultipleChoice" in name or "DoubleHeads" in name:
        given = {key: np.stack([value, value[::-1]], 1) for key, value in given.items()}
    if "DoubleHeads" in name:
        given["mc_token_ids"] = np.array([[5, 3], [3, 5]], np.int32)
    if name.startswith(("T5", "MT5", "BartModel", "BartForConditional")) and "Encoder" not in name:
        given["decoder_input_ids"] = DECODER
    return given


def difference(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest of all outputs, at real tokens."""
    worst, mask = 0.0, inputs(name)["attention_mask"]
    compared = [key for key in theirs if hasattr(theirs[key], "detach") and key in ours]
    assert compared, f"{name} has the outputs {[*ours]}, PyTorch's {[*theirs]}"
    for key in compared:
        gap = np.abs(np.asarray(ours[key]) - theirs[key].detach().numpy())
        if gap.shape[: mask.ndim] == mask.shape:
            gap = gap[mask == 1]
        worst = max(worst, float(gap.max()))
    return worst


def read(folder: Path) -> None:
    """Reads all of it, prints how each class did, and keeps what it read if all did well."""
    import tensorflow as tf
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    record: dict[str, str] = {}
    wrong: list[str] = []
    for name in classes():
        class_name = name.partition("/")[0]
        options = {"attn_implementation": "eager"}
        theirs, problems = getattr(transformers, class_name).from_pretrained(
            folder / name / "torch", output_loading_info=True, **options
        )
        given = {key: torch.from_numpy(value).long() for key, value in inputs(name).items()}
        with torch.no_grad():
            want = theirs.eval()(**given)
        for kind in ("tf", "tf-sharded"):
            tf.keras.backend.clear_session()  # else the second model of a class has a number in its names
            class_ = getattr(transformers, f"TF{class_name}")
            model, info = class_.from_pretrained(folder / name / kind, output_loading_info=True)
            gap = difference(name, model(**{key: tf.constant(value) for key, value in inputs(name).items()}), want)
            lost = [key for keys in info.values() for key in keys if not NUMBERED.fullmatch(key)]
            variables = {weight.name: weight.numpy() for weight in model.weights}
            if getattr(theirs.base_model, "pooler", None) is None:
                variables = {key: value for key, value in variables.items() if NOT_IN_TORCH not in key}
            found = digest(variables)
            bad = lost or any(problems.values()) or gap > TOLERANCE or record.get(name, found) != found
            record[name] = found
            wrong += [f"{name} {kind}"] if bad else []
            print(
                f"{name} {kind}: {len(model.weights)} variables, {gap:.1e}", (lost, problems) if bad else "", flush=True
            )
        if name in ORIGINALS:
            class_ = type(theirs)  # whose from_pretrained(from_tf=True) gives `load_tf_weights` a model without memory
            prefix = str(folder / name / "tf-checkpoint" / "model.ckpt")
            with contextlib.redirect_stdout(None):
                again = class_.load_tf_weights(class_(theirs.config), theirs.config, prefix).state_dict()
            differ = [key for key, tensor in theirs.state_dict().items() if not torch.equal(again[key], tensor)]
            wrong += [f"{name} tf-checkpoint"] if differ else []
            print(f"{name} tf-checkpoint: {len(again)} tensors, {len(differ)} differ {differ}", flush=True)
    print(f"wrong: {wrong}" if wrong else f"all {len(record)} classes read everything")
    if not wrong:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
