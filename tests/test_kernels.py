"""Kernels of attention: transformers' numbers by each of them, and errors where a platform, a shape or a model does not fit.

cuDNN's own kernel runs only on a GPU; elsewhere its arguments go to jax's reference of the same function. Splash attention
runs on CPU through Pallas's interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

import fmodels as fm
from fmodels.nn import kernels
from interop.transformers import from_transformers
from tests import families

GPU = jax.default_backend() == "gpu"
ROWS = [
    "llama/causal-lm", "gpt2/causal-lm/untied", "bert/masked-lm", "mistral/causal-lm", "t5/seq2seq-lm", "bart/seq2seq-lm",
    "bloom/causal-lm", "modernbert/masked-lm", "deberta-v2/masked-lm", "big_bird/token-classification",
]  # fmt: skip


@pytest.fixture
def anywhere(monkeypatch):
    """Kernels run whatever the platform is, in float32."""
    monkeypatch.setattr(kernels, "PLATFORMS", dict.fromkeys(kernels.PLATFORMS))
    monkeypatch.setattr(kernels, "_refuse", lambda name, problems: None)
    monkeypatch.setitem(kernels.KERNELS, "cudnn", functools.partial(kernels.cudnn, implementation="xla"))
    monkeypatch.setitem(kernels.KERNELS, "splash", functools.partial(kernels.splash, interpret=True))
    jax.clear_caches()
    with jax.default_matmul_precision("highest"):  # a GPU multiplies float32 with fewer bits unless jax is told so
        yield
    jax.clear_caches()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ROWS)
def test_what_goes_to_the_kernel_gives_the_numbers_of_transformers(anywhere, case, name, padding):
    loaded = case(name)
    got = loaded.forward(padding, attentions=False, attention="cudnn")
    want = {n: x for n, x in loaded.reference(padding).items() if not n.endswith("attentions")}
    # A place that sees no token sees all by a kernel, and equally much of each by transformers: only padding does.
    families.assert_equal(got, want, **loaded.masks(padding), causal=True)


def test_a_cache_goes_to_the_kernel_too(anywhere, case):
    loaded = case("llama/causal-lm")
    given = loaded.inputs("left")
    given.pop("positions", None)
    cache, parts, start = fm.init_cache(loaded.params, 2, 9), [], 0
    for width in (4, 2, 1):
        part = {name: a[:, start : start + width] for name, a in given.items()}
        out = fm.forward(loaded.params, loaded.config, **part, cache=cache, attention="cudnn")
        cache, start = out.cache, start + width
        parts.append(out.logits)
    real = given["mask"].astype(bool)
    assert np.abs(np.concatenate(parts, 1) - loaded.reference("left")["logits"])[real].max() < 1e-5


@pytest.mark.parametrize("window", [None, 100])
def test_splash_has_the_numbers_of_transformers(anywhere, window):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 128, "initializer_range": 0.1, "max_position_embeddings": 256,
    }  # fmt: skip
    model = hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=window)).eval()
    params, config = from_transformers(model)
    tokens = np.random.default_rng(0).integers(1, 61, (2, 128))
    mask = np.arange(128)[None] >= np.array([[0], [37]])
    with torch.no_grad():
        want = model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits.numpy()
    got = np.asarray(fm.forward(params, config, tokens, mask=mask, attention="splash").logits)
    assert np.abs(got - want)[mask].max() < 1e-5
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got[1], np.asarray(fm.forward(params, config, tokens).logits)[1], atol=1e-3)


@pytest.mark.parametrize("grad", [False, True])
def test_splash_compiles_for_a_tpu(monkeypatch, grad):
    """As far as a machine without one goes: to the kernel's own program, in a module for TPUs."""
    monkeypatch.setitem(kernels.PLATFORMS, "splash", None)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    config = fm.models.gemma2.Config(**sizes, vocab_size=64, head_dim=128, sliding_window=100, task="causal-lm")
    params = jax.eval_shape(lambda: fm.cast(fm.init(config, jax.random.key(0)), "bfloat16"))

    def loss(params: fm.Params, tokens: jax.Array) -> jax.Array:
        return fm.forward(params, config, tokens, attention="splash").logits.mean()

    program = jax.jit(jax.grad(loss) if grad else loss)
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    exported = jax.export.export(program, platforms=["tpu"])(params, tokens)
    assert exported.platforms == ("tpu",)
    assert exported.mlir_module().count("tpu_custom_call") >= 1 + 2 * grad  # forwards; of keys and values, of queries


@pytest.mark.skipif(not GPU, reason="cuDNN's attention needs a GPU")
@pytest.mark.parametrize("grad", [False, True])
def test_cudnn_on_a_gpu(grad):
    """In bfloat16, against float32: no farther away than XLA's own kernel in bfloat16 is."""
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
    }
    config = fm.models.llama.Config(**sizes, task="causal-lm")
    params = fm.init(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 512, (2, 128))
    mask = np.arange(128)[None] >= np.array([[0], [36]])

    def run(params, **given):
        logits = fm.forward(params, config, tokens, mask=mask, **given).logits
        return jnp.where(mask[..., None], logits.astype(jnp.float32), 0)

    def of(params, **given):
        if not grad:
            return run(params, **given)
        slope = jax.grad(lambda p: (run(p, **given) ** 2).sum())(params)
        return slope["layers"]["attention"]["query"]["weight"].astype(jnp.float32)

    half = fm.cast(params, "bfloat16")
    exact = of(fm.cast(half, "float32"))
    ours, other = (float(jnp.abs(of(half, attention=k) - exact).max()) for k in ("xla", "cudnn"))
    assert other < 1.5 * ours + 1e-6


def test_what_does_not_fit_is_said():
    x = functools.partial(jnp.zeros, dtype=jnp.float32)
    seen = jnp.ones((1, 6, 6), bool)
    with pytest.raises(
        ValueError, match=r"float16 and bfloat16, not float32.*multiple of 8 numbers, at most 256, not 12.*cap.*sinks"
    ):
        kernels.cudnn(x((1, 6, 2, 12)), x((1, 6, 2, 12)), x((1, 6, 2, 12)), seen, cap=3.0, sinks=x(2))
    with pytest.raises(ValueError, match=r"one size, not 16 and 8"):
        kernels.cudnn(x((1, 6, 2, 16)), x((1, 6, 2, 16)), x((1, 6, 2, 8)), seen)
    with pytest.raises(
        ValueError, match=r"multiple of 128 tokens, not 6 queries and 6 keys.*128 numbers, not 12 and 12.*added"
    ):
        kernels.splash(x((1, 6, 2, 12)), x((1, 6, 2, 12)), x((1, 6, 2, 12)), seen, x((1, 2, 6, 6)))


@pytest.mark.skipif(GPU, reason="this platform has cuDNN's attention")
def test_other_platforms_and_names_are_refused(case):
    loaded = case("llama/causal-lm")
    tokens = np.full((1, 4), 5)
    for given, words in (
        ({"attention": "flash"}, "attention='flash' is not a kernel; one of xla, cudnn, splash"),
        ({"attention": ["xla"]}, r"attention=\['xla'\] is not a kernel; one of xla, cudnn, splash"),
        ({"attention": "cudnn"}, "attention='cudnn' runs on a gpu, this is a cpu"),
        ({"attention": "splash"}, "attention='splash' runs on a tpu, this is a cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            fm.forward(loaded.params, loaded.config, tokens, **given)


@pytest.mark.parametrize("name", ["llama/causal-lm", "t5/seq2seq-lm"])
def test_prompts_are_read_by_the_kernel(anywhere, case, monkeypatch, name):
    loaded = case(name)
    calls, kernel = [], kernels.KERNELS["cudnn"]
    monkeypatch.setitem(
        kernels.KERNELS, "cudnn", lambda *args, **rest: calls.append(args[0].shape) or kernel(*args, **rest)
    )
    given = {k: x for k, x in loaded.inputs("left").items() if k in ("tokens", "mask")}
    options = fm.GenerationConfig(pad_token_id=3, eos_token_id=60)
    want = loaded.model.generate(
        torch.tensor(given["tokens"], dtype=torch.long), attention_mask=torch.tensor(given["mask"]), max_new_tokens=7,
        do_sample=False, pad_token_id=3, eos_token_id=60,
    )  # fmt: skip
    got = fm.generate(
        loaded.params, loaded.config, given.pop("tokens"), **given, max_new_tokens=7, options=options, attention="cudnn"
    )
    np.testing.assert_array_equal(got.tokens, want)
    assert {shape[1] for shape in calls} == {16}  # prompts and what encoders read; no single step


def test_kernels_have_no_weights_to_return(anywhere, case):
    loaded = case("llama/causal-lm")
    options = fm.GenerationConfig(output_attentions=True)
    with pytest.raises(ValueError, match="generate: attention='cudnn' has no weights to return"):
        fm.generate(loaded.params, loaded.config, [[5]], options=options, attention="cudnn")
    with pytest.raises(ValueError, match="generate: attention='flash' is not a kernel"):
        fm.generate(loaded.params, loaded.config, [[5]], attention="flash")
    with pytest.raises(ValueError, match="attention='cudnn' has no weights to return"):
        fm.forward(loaded.params, loaded.config, np.full((1, 4), 5), attention="cudnn", attentions=True)
