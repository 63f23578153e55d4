"""SavedModels run in a process that has no JAX, against `fm.forward` and `fm.generate`."""

import json
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest

import fmodels as fm
from interop.saved_model import export
from interop.tensorflow import TFModel

CODE = """
import json, sys
sys.modules["jax"] = sys.modules["jaxlib"] = sys.modules["fmodels"] = None  # importing one of them raises
import numpy as np, tensorflow as tf
folder, calls = sys.argv[1], json.loads(sys.argv[2])
loaded = tf.saved_model.load(folder + "/saved")
found = {"names": sorted(loaded.weights), "errors": {}}
for number, (signature, values) in enumerate(calls):
    given = {name: tf.constant(value, tf.float32 if name in ("temperature", "top_p") else tf.int32) for name, value in values.items()}
    try:
        out = loaded.signatures[signature](**given)
        np.savez(f"{folder}/{number}.npz", **{name: tensor.numpy() for name, tensor in out.items()})
    except Exception as error:
        found["errors"][number] = str(error)
assert not any(name.split(".")[0] in ("jax", "jaxlib", "fmodels") for name, module in sys.modules.items() if module)
print(json.dumps(found))
"""


def run(folder, calls):
    """The outputs of each call `(signature, inputs)`, or its error, and the names of the variables."""
    plain = [(signature, {n: np.asarray(a).tolist() for n, a in given.items()}) for signature, given in calls]
    arguments = [sys.executable, "-W", "error", "-c", CODE, str(folder), json.dumps(plain)]
    # LLVM's optimisations take most of the time to compile, which is what takes the time here.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, env={**os.environ, "XLA_FLAGS": flags}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    outputs = [
        found["errors"][str(i)] if str(i) in found["errors"] else dict(np.load(folder / f"{i}.npz"))
        for i in range(len(calls))
    ]
    return outputs, found["names"]


def call_of(loaded, padding="left"):
    return {name: a for name, a in loaded.inputs(padding).items() if name not in ("positions", "token_types")}


def equal(got, want):
    np.testing.assert_array_equal(got["tokens"], want.tokens)
    np.testing.assert_array_equal(got["lengths"], want.lengths)
    np.testing.assert_allclose(got["logprobs"], want.logprobs, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2/causal-lm", "llama/causal-lm", "t5/seq2seq-lm", "bart/seq2seq-lm"])
def test_forward_and_generate(case, tmp_path, name):
    loaded = case(name)
    params, config = loaded.params, loaded.config
    options = fm.GenerationConfig(do_sample=True, top_k=20)
    model = TFModel(params, config)
    sampled = name == "llama/causal-lm"
    choice = {"options": options, "per_call": ("seed", "temperature", "max_new_tokens")} if sampled else {}
    export(model, tmp_path / "saved", max_new_tokens=6, **choice)
    given = call_of(loaded)
    prompt = {n: given[n] for n in ("tokens", "mask")}
    short = {n: a[:1, -3:] for n, a in prompt.items()}  # another batch and length
    more = {"seed": 5, "temperature": 0.7, "max_new_tokens": 4} if sampled else {}
    bad = {**prompt, "mask": 0 * prompt["mask"]}
    texts = (prompt, short) if sampled else (prompt,)
    calls = [("serving_default", given), *[("generate", {**p, **more}) for p in (bad, *texts)]]
    (out, error, *found), names = run(tmp_path, calls)
    assert names == sorted(model.named_variables)
    assert "a row has no real token" in error
    real = given.get("decoder_mask", given["mask"]).astype(bool)
    want = np.asarray(fm.forward(params, config, **given).logits)[real]
    np.testing.assert_allclose(out["logits"][real], want, atol=1e-5, rtol=1e-5)
    asked = {"max_new_tokens": 6, "options": None}
    if sampled:
        asked = {"max_new_tokens": 4, "options": options.replace(temperature=0.7), "key": jax.random.key(5)}
    for got, text in zip(found, texts, strict=True):
        equal(got, fm.generate(params, config, text["tokens"], mask=text["mask"], **asked))
    held = sum(a.nbytes for a in jax.tree.leaves(params))
    assert (tmp_path / "saved" / "variables" / "variables.data-00000-of-00001").stat().st_size >= held


def test_beams_and_a_program_without_weights(tmp_path):
    config = fm.models.llama.Config(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
        task="causal-lm", eos_token_id=None,
    )  # fmt: skip
    params = fm.init(config, jax.random.key(0))
    options = fm.GenerationConfig(num_beams=3, num_return_sequences=2)
    export(TFModel(params, config), tmp_path / "saved", max_new_tokens=4, options=options)
    held = sum(a.nbytes for a in jax.tree.leaves(params))  # 5 MB, of which the program holds nothing
    assert (tmp_path / "saved" / "saved_model.pb").stat().st_size < held / 5
    tokens = np.random.default_rng(0).integers(1, 4096, (2, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    (got,), _ = run(tmp_path, [("generate", {"tokens": tokens, "mask": mask})])
    want = fm.generate(params, config, tokens, mask=mask, max_new_tokens=4, options=options)
    equal(got, want)
    np.testing.assert_allclose(got["sequence_scores"], want.sequence_scores, atol=1e-5)


def test_refusals(case, tmp_path):
    model = TFModel(*(case("bert/masked-lm").params, case("bert/masked-lm").config))
    with pytest.raises(ValueError, match="expected a causal language model"):
        export(model, tmp_path, max_new_tokens=3)
    with pytest.raises(ValueError, match="pass max_new_tokens, too"):
        export(model, tmp_path, per_call=("seed",))
    model = TFModel(*(case("llama/causal-lm").params, case("llama/causal-lm").config))
    with pytest.raises(ValueError, match=r"per_call has unknown names \['top_q'\]"):
        export(model, tmp_path, max_new_tokens=3, per_call=("top_q",))
    with pytest.raises(ValueError, match="sampling needs a seed in each call"):
        export(model, tmp_path, max_new_tokens=3, per_call=(), options=fm.GenerationConfig(do_sample=True))
    with pytest.raises(
        NotImplementedError, match="only greedy decoding, sampling and beams are exported, not contrastive"
    ):
        export(model, tmp_path, max_new_tokens=3, options=fm.GenerationConfig(penalty_alpha=0.5, top_k=4))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"export: expected a folder, .*file' is a file; give a folder"):
        model.export(tmp_path / "file")
