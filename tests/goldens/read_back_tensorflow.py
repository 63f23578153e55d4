"""Whether transformers' TensorFlow classes read the `tf_model.h5` that fmodels writes.

Two steps: `python tests/goldens/read_back_tensorflow.py write FOLDER` with fmodels, then `... read FOLDER` in the
environment of make_tensorflow.py, which compares the logits with those of the classes that wrote the goldens.
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np

GOLDENS = Path(__file__).parent / "tensorflow"
CASES = {
    "gpt2": "GPT2LMHeadModel", "gpt2_sharded": "GPT2LMHeadModel", "bert": "BertForPreTraining", "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration", "albert": "AlbertForMaskedLM", "bert_original": "BertForPreTraining",
}  # fmt: skip


def write(folder: Path) -> None:
    import fmodels as fm

    for name in CASES:
        params, config = fm.load(GOLDENS / name)
        fm.save(params, config, folder / name, format="tf", max_shard_size="3KB" if name.endswith("sharded") else "5GB")


def read(folder: Path) -> None:
    import transformers

    expected = np.load(GOLDENS / "expected.npz")
    for name, class_name in CASES.items():
        class_ = getattr(transformers, f"TF{class_name}")
        model, info = class_.from_pretrained(folder / name, output_loading_info=True)
        more = {"decoder_input_ids": expected["decoder_tokens"]} if name in ("t5", "bart") else {}
        out = model(input_ids=expected["tokens"], **more)
        got = out.prediction_logits if "prediction_logits" in out else out.logits
        difference = np.abs(np.asarray(got) - expected[f"{name}/logits"]).max()
        print(f"{name:15} {len(model.weights)} variables, largest difference {difference:.2e}, {info}")
        assert difference < 1e-5
        assert not any(info.values())


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
