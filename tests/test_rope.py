"""Rotary embeddings: every type of transformers 5, below and beyond the original length, and both forms of config.json."""

import json

import numpy as np
import pytest
import torch
import transformers

import fmodels as fm
from fmodels.nn.positions import rope_tables
from tests import families

LENGTH, ORIGINAL = 24, 12
HALF = 5  # of a head's ten numbers
SHORT, LONG = [1.0, 1.1, 1.3, 1.2, 1.05], [1.5, 2.0, 3.0, 4.5, 6.0]

TYPES = {
    "default": {"rope_type": "default"},
    "default theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn betas": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 2.0, "beta_slow": 0.5,
        "attention_factor": 1.2,
    },
    "yarn mscale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL, "mscale": 0.7, "mscale_all_dim": 0.9,
    },
    "yarn untruncated": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "truncate": False, "beta_fast": 2.0,
        "beta_slow": 0.3,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": ORIGINAL,
    },
    "longrope factor": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    """One set of random weights for all types."""
    return families.build(families.by_name("llama/causal-lm")).state_dict()


def build(rope, weights):
    # `dynamic` stretches beyond max_position_embeddings itself, the others beyond their original length.
    longest = ORIGINAL if rope["rope_type"] == "dynamic" else LENGTH
    config = transformers.LlamaConfig(
        **families.LLAMA | {"max_position_embeddings": longest}, attn_implementation="eager",
        rope_parameters={"rope_theta": 10000.0} | rope,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module", params=TYPES)
def made(request, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rope")
    model = build(TYPES[request.param], weights)
    model.save_pretrained(folder)
    return request.param, model, folder, *fm.load(folder)


def logits(model, tokens, mask):
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        given = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(positions)}
        return model(torch.tensor(tokens), **given).logits.numpy()


@pytest.mark.parametrize("length", [8, ORIGINAL, LENGTH], ids=["below", "at", "beyond"])
def test_logits(made, length):
    _, model, _, params, config = made
    tokens = np.random.default_rng(0).integers(4, 61, (2, LENGTH))
    mask = np.ones((2, LENGTH), np.int64)
    mask[:, : LENGTH - length] = 0  # one compiled shape for both lengths
    mask[1, : LENGTH - length + 2] = 0
    want = logits(model, tokens, mask)
    got = np.asarray(fm.forward(params, config, tokens, mask=mask).logits)
    assert (np.abs(got - want) / np.maximum(1, np.abs(want)))[mask == 1].max() < 1e-5


def test_types_differ(weights):
    """The test above can see each type: at the full length no two of them agree."""
    tokens = np.random.default_rng(0).integers(4, 61, (1, LENGTH))
    mask = np.ones((1, LENGTH), np.int64)
    all_logits = {name: logits(build(rope, weights), tokens, mask) for name, rope in TYPES.items()}
    for name, one in all_logits.items():
        for other, two in all_logits.items():
            assert name == other or np.abs(one - two).max() > 1e-3, (name, other)


def v4(config, spelling):
    """A config.json as transformers 4 wrote it."""
    data = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    rope = dict(config.rope_parameters)
    data["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    data["rope_scaling"] = None if kind == "default" else {spelling: kind, **rope}
    return data


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_v4_form(made, spelling, tmp_path):
    """`rope_theta` and `rope_scaling`, with `type` or `rope_type`, mean what transformers takes them to mean."""
    name, model, _, _, config = made
    data = v4(model.config, spelling)
    (tmp_path / "config.json").write_text(json.dumps(data))
    read = fm.load_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert theirs["rope_type"] == read.rope.type == TYPES[name]["rope_type"]
    assert read.rope == config.rope


def test_written_form_is_understood(made, tmp_path):
    """transformers reads our config.json to the same rotary settings."""
    _, model, _, params, config = made
    fm.save(params, config, tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(4, 61, (1, LENGTH))
    mask = np.ones((1, LENGTH), np.int64)
    assert np.array_equal(logits(again, tokens, mask), logits(model, tokens, mask))
    assert fm.load_config(tmp_path).rope == config.rope


def test_su_is_longrope(made, tmp_path):
    """Phi-3's first name for it."""
    name, model, _, _, config = made
    if name == "longrope":
        data = v4(model.config, "type")
        data["rope_scaling"]["type"] = "su"
        (tmp_path / "config.json").write_text(json.dumps(data))
        assert fm.load_config(tmp_path).rope == config.rope


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "spiral"}, "rope_type='spiral' is not supported"),
        ({"rope_type": "linear"}, "needs 'factor'"),
        ({"rope_type": "llama3", "factor": 2.0}, "needs 'low_freq_factor'"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": LONG},
            "'short_factor' has 1 numbers, expected 5",
        ),
        ({"rope_type": "linear", "factor": 2.0, "wobble": 1}, "'wobble'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_refused(rope, message):
    data = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 10, "rope_parameters": rope}
    with pytest.raises(ValueError, match=message):
        fm.models.llama.Config.from_hf(data)


YARN = TYPES["yarn untruncated"] | {"rope_theta": 50.0}
BY_TYPE = {
    "nested": {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}},  # `truncate` does nothing there
    "scaled": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "both": {
        "rope_parameters": {"full_attention": {"rope_theta": 50.0}, "sliding_attention": {}},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}


@pytest.mark.parametrize("given", BY_TYPE.values(), ids=BY_TYPE)
@pytest.mark.parametrize("family", ["gemma3_text", "modernbert"])
def test_by_type(family, given):
    """Of families whose layers with a window have settings of their own, both tables are those of transformers."""
    case = families.by_name({"gemma3_text": "gemma3_text/causal-lm", "modernbert": "modernbert/masked-lm"}[family])
    data = json.loads(json.dumps(case.config | given | {"model_type": family, "architectures": [case.architecture]}))
    config = fm.models.FAMILIES[family].config.from_hf(data)
    theirs = getattr(transformers, case.architecture).config_class.from_dict(data)
    rotary = getattr(transformers, case.architecture)(theirs).model.rotary_emb
    for name, rope in (("full_attention", config.rope), ("sliding_attention", config.local_rope)):
        want = [x[0].numpy() for x in rotary(torch.ones(1), torch.arange(LENGTH)[None], name)]
        got = rope_tables(rope, np.arange(LENGTH)[None], config.head_dim, config.max_positions)
        for ours, table in zip(got, want, strict=True):
            assert np.abs(np.asarray(ours)[0] - table[:, : table.shape[-1] // 2]).max() < 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "Write 'rope_type'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters has 'rope_type'"),
    ],
)
def test_by_type_refused(given, message):
    """What transformers 5 leaves unread."""
    with pytest.raises(ValueError, match=message):
        fm.models.gemma3_text.Config.from_hf(given | {"architectures": ["Gemma3ForCausalLM"]})


@pytest.mark.parametrize(("rotary", "size"), [(30, 44), (26, 46), (64, 256)])
def test_gptj_rotates_as_many_numbers_as_its_config_says(rotary, size):
    """Not a share of the head, which rounding can make one less."""
    data = {"n_embd": 2 * size, "n_head": 2, "rotary_dim": rotary, "architectures": ["GPTJModel"]}
    for config in (
        fm.models.gptj.Config.from_hf(data),
        fm.models.gptj.Config(hidden_size=2 * size, num_heads=2, num_kv_heads=2, head_dim=size, rotary_dim=rotary),
    ):
        assert config.rotary_size(config.rope) == rotary
