"""Exports of `jax.export`: the numbers of `fm.forward` and the tokens of `fm.generate`, for every platform, from one file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmodels as fm
from fmodels.arrays import einsum

ALL = ("cpu", "cuda", "tpu")


def given_of(loaded, padding="left"):
    return {name: a for name, a in loaded.inputs(padding).items() if name not in ("positions", "token_types")}


def close(got, want, mask):
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm", "bart/seq2seq-lm", "mixtral/causal-lm"]
)
def test_forward(case, tmp_path, name):
    loaded = case(name)
    fm.export_forward(loaded.params, loaded.config, tmp_path)
    exported = fm.load_exported(tmp_path)
    assert exported.record["forward"]["platforms"] == list(ALL)
    for length in (None, 5):  # any length, from the same file
        given = {n: a[:, -length:] if length else a for n, a in given_of(loaded).items()}
        got = exported.forward(exported.params, **given)
        want = fm.forward(loaded.params, loaded.config, **given)
        mask = given.get("decoder_mask", given["mask"])
        close(got.logits, want.logits, mask)
        close(got.hidden, want.hidden, mask)
    if "token_types" not in loaded.inputs("left"):
        close(exported.forward(exported.params, **given_of(loaded)).logits, loaded.reference("left")["logits"],
              given_of(loaded).get("decoder_mask", given_of(loaded)["mask"]))  # fmt: skip
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert (tmp_path / "model.safetensors").stat().st_size > weights


def test_gradient(case, tmp_path):
    loaded = case("llama/causal-lm")
    fm.export_forward(loaded.params, loaded.config, tmp_path, platforms=("cpu",), gradient=True)
    exported = fm.load_exported(tmp_path)
    given = given_of(loaded, "right")

    def loss(forward):
        return lambda params: (
            jax.nn.log_softmax(forward(params, **given).logits) * jnp.float32(given["mask"])[..., None]
        ).mean()

    got = jax.jit(jax.grad(loss(exported.forward)))(exported.params)
    want = jax.jit(jax.grad(loss(lambda p, **given: fm.forward(p, loaded.config, **given))))(loaded.params)
    for (path, a), b in zip(fm.tree.flatten(got).items(), fm.tree.flatten(want).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("name", "options", "asked"),
    [
        ("gpt2/causal-lm", {}, {}),
        ("llama/causal-lm", {"do_sample": True, "top_p": 0.9}, {"seed": 7, "temperature": 0.8}),
        ("t5/seq2seq-lm", {"num_beams": 3, "num_return_sequences": 2}, {}),
    ],
)
def test_generate(case, tmp_path, name, options, asked):
    loaded = case(name)
    params, given = fm.unstack_layers(loaded.params), given_of(loaded)
    options = fm.GenerationConfig(**options)
    fm.export_generate(params, loaded.config, tmp_path, max_new_tokens=6, options=options)
    exported = fm.load_exported(tmp_path)
    assert isinstance(fm.tree.get(exported.params, next(iter(fm.tree.stacks(params)))), tuple)
    now = options.replace(**{n: v for n, v in asked.items() if n != "seed"})
    for rows in (slice(None), slice(1, 2)):
        tokens, mask = given["tokens"][rows], given["mask"][rows]
        got = exported.generate(exported.params, tokens, mask=mask, **asked)
        want = fm.generate(
            params,
            loaded.config,
            tokens,
            mask=mask,
            max_new_tokens=6,
            options=now,
            key=jax.random.key(asked.get("seed", 0)),
        )
        for field in ("tokens", "mask", "lengths"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
        if want.sequence_scores is not None:
            np.testing.assert_allclose(got.sequence_scores, want.sequence_scores, atol=1e-5)


def test_each_platform_gets_its_own_form():
    """What is fast on CPU is in the program for CPUs alone, and one form of experts beside the other."""
    x, weight = jnp.ones((3, 8)), jnp.ones((16, 8))

    def text(*platforms):
        with fm.export.target(fm.export.Target()):
            lowered = jax.export.export(jax.jit(lambda x, w: einsum("ni,oi->no", x, w)), platforms=platforms)
            return lowered(x, weight).mlir_module()

    assert "optimization_barrier" in text("cpu")
    assert "optimization_barrier" not in text("cuda")
    assert "optimization_barrier" not in text("tpu")
    both = text(*ALL)
    assert "optimization_barrier" in both
    assert "stablehlo.case" in both


def test_leaves_that_no_checkpoint_has_are_refused(case, tmp_path):
    loaded = case("gpt2/causal-lm")
    head = fm.tree.update(loaded.params, {"embed.tokens": fm.arrays.Scaled.quantize(loaded.params["embed"]["tokens"])})
    adapted = fm.init_adapter(
        loaded.params, loaded.config, fm.AdapterConfig(target_modules=("c_fc",)), jax.random.key(0)
    )
    for write in (fm.export_forward, fm.save):
        with pytest.raises(ValueError, match=r"'embed.tokens' is a Scaled; use fm\.dequantize"):
            write(head, loaded.config, tmp_path)
        with pytest.raises(ValueError, match="leaves have adapters"):
            write(fm.add_adapter(loaded.params, loaded.config, adapted), loaded.config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(case, tmp_path):
    loaded = case("gpt2/causal-lm")
    params, config = loaded.params, loaded.config
    fm.export_generate(params, config, tmp_path, max_new_tokens=4, platforms=("cpu",), per_call=("max_new_tokens",))
    exported = fm.load_exported(tmp_path)
    assert exported.generate(exported.params, [[5, 6]], max_new_tokens=2).tokens.shape == (1, 4)
    for match, call in {
        "30 columns of tokens, exported for at most 29": {"tokens": np.ones((1, 30), int)},
        r"outside of 0 … 60": {"tokens": [[61]]},
        r"rows \[0\] have no real token": {"tokens": [[5]], "mask": [[0]]},
        "exported without temperature in per_call": {"tokens": [[5]], "temperature": 0.5},
        "max_new_tokens is exported for 1 … 4; got 5": {"tokens": [[5]], "max_new_tokens": 5},
        r"tokens are \(b t\) integers": {"tokens": [5]},
        "max_new_tokens": {"tokens": [[5]], "max_new_tokens": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            exported.generate(exported.params, **call)
    with pytest.raises(ValueError, match="only generate was exported"):
        exported.forward(exported.params, [[5]])
    with pytest.raises(ValueError, match=r"holds generate\.jax for other leaves"):
        fm.export_forward(fm.unstack_layers(params), config, tmp_path)
    with pytest.raises(ValueError, match="inputs are tokens and any of mask"):
        fm.export_forward(params, config, tmp_path, inputs=("tokens", "labels"))

    record = json.loads((tmp_path / "export.json").read_text())

    def broken(match, **changes):
        (tmp_path / "export.json").write_text(json.dumps({"generate": {**record["generate"], **changes}}))
        with pytest.raises(ValueError, match=match):
            fm.load_exported(tmp_path)

    broken("jax 9.9 wrote it with calling convention 99, this jax .* reads", calling_convention=99, jax="9.9")
    broken("it is for tpu, this is cpu", platforms=["tpu"])
    broken("config.json has another n_head", config={**record["generate"]["config"], "n_head": 1})
    leaves = {**record["generate"]["params"], "embed.tokens": ["bfloat16", 61, 20]}
    broken(r"1 leaves have changed: embed.tokens is \['float32', 61, 20\], was \['bfloat16', 61, 20\]", params=leaves)
    (tmp_path / "generate.jax").write_bytes(b"x")
    broken("generate.jax is not the file that export.json tells of")
    (tmp_path / "export.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no export\.json"):
        fm.load_exported(tmp_path)
