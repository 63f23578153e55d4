"""GGUF files against llama.cpp, which has loaded them and said what it makes of them: `goldens/make_llama_cpp.py`."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.convert_slow_tokenizer import import_protobuf

import fmodels as fm
from fmodels.dialects.gguf_sentencepiece import spaces_of
from fmodels.dialects.gguf_tokenizer import tokenizer_metadata
from fmodels.weights.sentencepiece import read_sentencepiece
from tests import gguf_files
from tests.test_gguf import READ_BY_TRANSFORMERS, ROWS

GOLDENS = Path(__file__).parent / "goldens" / "llama_cpp"
TOKENS = jnp.array([[3, 7, 1, 9, 4, 30, 11, 2, 5, 17, 8, 8]])


@pytest.mark.parametrize("name", [name for name in ROWS if name not in READ_BY_TRANSFORMERS])
def test_logits(name, tmp_path):
    """Of models that transformers does not read from GGUF."""
    want = json.loads((GOLDENS / "logits.json").read_text())[name]
    fm.save(*gguf_files.drawn(name, *ROWS[name]), tmp_path, format="gguf")
    (tmp_path / "config.json").unlink()
    with gguf_files.gelu_of_float16():
        got = np.asarray(fm.forward(*fm.load(tmp_path), TOKENS).logits)[0]
    atol = 3e-3 if "gemma" in name else 1e-4
    np.testing.assert_allclose(got[-1], want["last"], rtol=0, atol=atol)
    assert got.argmax(-1).tolist() == want["likeliest"]


def test_alignment_is_the_default(tmp_path):
    """What llama.cpp's own quantiser makes of a file with another it cannot read: it keeps the key, and aligns to 32."""
    fm.save(*gguf_files.drawn("llama", *ROWS["llama"]), tmp_path, format="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.alignment == 32
    assert "general.alignment" not in reader.fields


def size_of(folder):
    """Of the vocabulary with what was added."""
    model = next(folder.glob("*.model"), None)
    return len(transformers.AutoTokenizer.from_pretrained(folder)) if model is None else len(proto(model).pieces) + 3


def proto(path: Path) -> Any:
    """By SentencePiece's own description of its files."""
    found: Any = import_protobuf().ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    found.ParseFromString(path.read_bytes())
    return found


def saved(kind: str, folder: Path, **changes: Any) -> Any:
    """A small model with the tokenizer, as GGUF alone."""
    shutil.copytree(GOLDENS / kind, folder)
    family = fm.models.gemma2 if kind == "gemma" else fm.models.llama
    changes |= {"query_pre_attn_scalar": 4} if kind == "gemma" else {}
    config = family.Config(
        vocab_size=size_of(folder) + 3, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2,
        head_dim=4, max_positions=16, task="causal-lm", **changes,
    )  # fmt: skip
    fm.save(fm.init(config, jax.random.key(0)), config, folder, format="gguf")
    for path in folder.iterdir():
        if path.suffix != ".gguf":
            path.unlink()
    return gguf.GGUFReader(folder / "model.gguf").fields


KNOWN = {  # what transformers makes otherwise of the same file than llama.cpp: it drops the table of characters, and is told
    # neither which tokens T5's fillers are nor that a text may begin without a space
    "bpe": ("   ", "before", "\u2581x"),
    "sentencepiece": ("   ", "before", "\u2581x", "Hello"),
    "unigram": ("Hello", "   ", "before", "\u2581x"),
    "unigram_model": ("Hello", "   ", "before", "\u2581x", "\uff26"),
}


@pytest.mark.parametrize("kind", ["byte_level", "bpe", "gemma", "unigram", "sentencepiece", "unigram_model"])
def test_tokens(kind, tmp_path):
    """transformers makes of our file the tokens that llama.cpp has made of it, which those of the folder are, too."""
    fields = saved(kind, tmp_path / "a", eos_token_id=1 if "unigram" in kind else None)
    model = {"byte_level": "gpt2", "unigram": "t5", "unigram_model": "t5"}.get(kind, "llama")
    assert fields["tokenizer.ggml.model"].contents() == model
    size = size_of(GOLDENS / kind)
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert tokens[size:] == [f"[PAD{size + i}]" for i in range(3)]
    assert types[size:] == [gguf.TokenType.UNUSED] * 3
    assert types[tokens.index("<tool>")] == gguf.TokenType.USER_DEFINED
    assert types[tokens.index("<|end|>")] == gguf.TokenType.CONTROL
    if (GOLDENS / kind / "added_tokens.json").exists():  # which does not say that a token is special
        assert types[tokens.index("<|x|>")] == gguf.TokenType.USER_DEFINED
    if model == "llama":
        assert types[tokens.index("<0x0A>")] == gguf.TokenType.BYTE
    if model != "gpt2":
        assert fields["tokenizer.ggml.scores"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32]
        assert fields["tokenizer.ggml.add_space_prefix"].contents() == (kind != "gemma")
        assert types[fields["tokenizer.ggml.unknown_token_id"].contents()] == gguf.TokenType.UNKNOWN
    assert fields["tokenizer.chat_template"].contents()

    expected = json.loads((GOLDENS / kind / "expected.json").read_text())
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "a", gguf_file="model.gguf")
    texts = [text for text in expected if not text.startswith(KNOWN.get(kind, ()) or "\0")]
    assert len(texts) >= 5
    for text in texts:
        own = slice(0, -1) if "unigram" in kind else slice(1, None)
        assert found.encode(text, add_special_tokens=False) == expected[text][own], text
    if not any((GOLDENS / kind).glob("*.model")):
        folder = transformers.AutoTokenizer.from_pretrained(GOLDENS / kind)
        assert all(folder.encode(text) == expected[text] for text in texts)


@pytest.mark.parametrize(("kind", "name"), [("sentencepiece", "tokenizer.model"), ("unigram_model", "spiece.model")])
def test_models_of_sentencepiece(kind, name):
    """The pieces and settings are those of SentencePiece's own description; so is the file's table of characters."""
    theirs, ours = proto(GOLDENS / kind / name), read_sentencepiece(GOLDENS / kind / name)
    assert [(piece.piece, piece.type, piece.score) for piece in theirs.pieces] == [
        tuple(piece) for piece in ours.pieces
    ]
    trainer, normalizer = theirs.trainer_spec, theirs.normalizer_spec
    assert ours.algorithm == {1: "unigram", 2: "bpe"}[trainer.model_type]
    ids = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    assert ours.special == {kind: number for kind, number in ids.items() if number >= 0}
    assert (ours.charsmap, ours.prefix) == (normalizer.precompiled_charsmap, normalizer.add_dummy_prefix)
    assert ours.merges_spaces == normalizer.remove_extra_whitespaces == (kind == "unigram_model")
    said = tokenizer_metadata(GOLDENS / kind, len(ours.pieces) + 3)
    assert said.get("tokenizer.ggml.precompiled_charsmap", np.zeros(0, np.uint8)).tobytes() == ours.charsmap
    assert said.get("tokenizer.ggml.remove_extra_whitespaces", False) == ours.merges_spaces
    count = len(ours.pieces)
    assert said["tokenizer.ggml.tokens"][count:] == ["<|x|>", "<|begin|>", "<|end|>"]
    kinds = [
        gguf.TokenType.USER_DEFINED,
        gguf.TokenType.CONTROL,
        gguf.TokenType.CONTROL,
    ]  # the first: added_tokens.json alone
    assert said["tokenizer.ggml.token_type"][count:].tolist() == kinds
    assert np.array_equal(
        said["tokenizer.ggml.scores"][:count], np.array([piece.score for piece in ours.pieces], np.float32)
    )


UNIGRAM = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
SPACE = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
MERGE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}
OLD_METASPACE = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True}
BYTES = {f"<0x{i:02X}>": i for i in range(256)}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (UNIGRAM, "does not write spaces as"),
        (UNIGRAM | {"pre_tokenizer": METASPACE | {"replacement": "_"}}, "its step .*'_'.* is not in llama.cpp"),
        (UNIGRAM | {"pre_tokenizer": METASPACE, "normalizer": {"type": "NFKC"}}, "its step .*NFKC"),
        (UNIGRAM | {"pre_tokenizer": METASPACE, "normalizer": {"type": "Precompiled"}}, "precompiled_charsmap is None"),
        (UNIGRAM | {"pre_tokenizer": METASPACE, "normalizer": {"type": "Strip"}}, "takes spaces away at the ends alone"),
        ({"model": {"type": "Unigram", "vocab": [["a"]]}, "pre_tokenizer": METASPACE}, "its piece 0 is"),
        ({"model": {"type": "Unigram", "vocab": [["<0x41>", 0.0]], "byte_fallback": True}, "pre_tokenizer": METASPACE},
         "Unigram with tokens for bytes"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}, "pre_tokenizer": METASPACE}, "it is 'WordPiece'; only"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "byte_fallback": True}, "pre_tokenizer": METASPACE},
         "0 of the 256 tokens for bytes"),
        ({"model": {"type": "BPE", "vocab": BYTES, "byte_fallback": True},
          "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}},
         "BPE that merges spaces"),
        ({"model": {"type": "BPE", "vocab": BYTES | {"b": 0}}, "pre_tokenizer": METASPACE}, "'b' and '<0x00>' both are 0"),
        (UNIGRAM | {"pre_tokenizer": METASPACE, "added_tokens": [{"id": 2, "content": "a"}]}, "'a' is 1 and 2"),
        (UNIGRAM | {"pre_tokenizer": METASPACE, "added_tokens": [{"id": [], "content": "a"}]}, r"'a' is \[\], no number"),
        (UNIGRAM | {"pre_tokenizer": METASPACE, "added_tokens": [{"id": 999, "content": "b"}]}, "'b' is 999"),
    ],
)  # fmt: skip
def test_what_is_not_written(tokenizer, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(tmp_path, 300)


@pytest.mark.parametrize("raw", [b"", b"\x0a\x05abc", b"IQ== 0\n", b"\x0a\x02\x08\x01", b"\xff" * 40, b"\x08\x01"])
def test_files_that_are_no_model_of_sentencepiece(raw, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(ValueError, match=r"'tokenizer\.model' is no model of SentencePiece"):
        tokenizer_metadata(tmp_path, 300)


@pytest.mark.parametrize(
    ("normalizer", "pre", "want"),
    [
        # Llama 2 and Phi-3; T5, as old versions wrote it; XLM-R; ALBERT's kind without its letters
        (
            {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]},
            None,
            (True, False, b""),
        ),
        (
            {"type": "Precompiled", "precompiled_charsmap": "AAEC"},
            {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, OLD_METASPACE]},
            (True, True, bytes(range(3))),
        ),
        ({"type": "Sequence", "normalizers": [{"type": "Strip"}, MERGE]}, METASPACE, (True, True, b"")),
        (REPLACE, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}, (False, False, b"")),
    ],
)
def test_how_published_tokenizers_treat_spaces(normalizer, pre, want):
    assert spaces_of({"normalizer": normalizer, "pre_tokenizer": pre}) == want


def test_the_start_token_is_the_tokenizers(tmp_path):
    """Where it puts one before a text; config.json may name another, or none."""
    fields = saved("bpe", tmp_path / "a", bos_token_id=5, eos_token_id=6)
    assert fields["tokenizer.ggml.tokens"].contents()[fields["tokenizer.ggml.bos_token_id"].contents()] == "<|begin|>"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 6
