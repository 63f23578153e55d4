"""The tokenizer in GGUF files: what transformers and gguf-py make of them, or of the folder that they are from."""

import json
import logging

import gguf
import jax
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import Regex, decoders, pre_tokenizers, processors
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

import fmodels as fm
from fmodels.dialects import gguf_tokenizer as ours
from fmodels.weights import gguf as files

TEXTS = [
    "Hello, world! It's 12345 o'clock; HE'LL pay 3.14  euros.\n\n  def f(x):\r\n\treturn x**2  ",
    " leading, \u00fcml\u00e4ut \u732b\U0001f431 <|end|>after<tool> x<|begin|>",
    "\n \n\t3 33 333 3333 'S 're",
]
LONG = " ".join(TEXTS) * 3 + "the quick brown fox jumps over the lazy dog and then the others, 1234567890 times " * 5


def split(name):
    steps = [pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


PRE = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    **{name: split(name) for name in ("llama-bpe", "dbrx", "qwen2", "tekken")},
}


def make(folder, name, *, bos):
    """A folder with a model and a trained tokenizer, by fmodels and `tokenizers`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE[name], decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([LONG], trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|pad|>"])
    tokenizer.add_tokens(["<tool>", "<|looks|>"])
    if bos:
        number = tokenizer.token_to_id("<|begin|>")
        template = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", number)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    kind = fm.models.qwen2.Config if name == "qwen2" else fm.models.llama.Config
    config = kind(
        vocab_size=tokenizer.get_vocab_size() + 3, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm", bos_token_id=tokenizer.token_to_id("<|begin|>"),
        eos_token_id=tokenizer.token_to_id("<|end|>"),
    )  # fmt: skip
    fm.save(fm.init(config, jax.random.key(0)), config, folder)
    return fast, config


@pytest.mark.parametrize("name", PRE)
def test_transformers_reads_it_back(name, tmp_path):
    bos = name in ("llama-bpe", "gpt-2")
    want, config = make(tmp_path / "a", name, bos=bos)
    fm.convert(tmp_path / "a", tmp_path / "b", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "b" / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(kinds) == config.vocab_size
    own = gguf.TokenType
    assert kinds[:3] == [own.NORMAL] * 3
    assert kinds[-8:] == [own.CONTROL] * 3 + [own.USER_DEFINED, own.CONTROL] + [own.UNUSED] * 3
    assert tokens[-4:] == ["<|looks|>", *(f"[PAD{config.vocab_size - i}]" for i in (3, 2, 1))]

    theirs = gguf.SpecialVocab(tmp_path / "a", load_merges=True)
    assert fields["tokenizer.ggml.merges"].contents() == theirs.merges
    assert fields["tokenizer.chat_template"].contents() == theirs.chat_template
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    assert theirs.special_token_ids.keys() == keys.keys()
    assert all(
        fields[f"tokenizer.ggml.{keys[k]}_token_id"].contents() == n for k, n in theirs.special_token_ids.items()
    )
    assert fields["tokenizer.ggml.add_bos_token"].contents() == theirs.add_special_token.get("bos", False) == bos

    if name in SPLITS or name == "gpt-2":  # what transformers splits so, too
        (tmp_path / "c").mkdir()
        (tmp_path / "b" / "model.gguf").rename(tmp_path / "c" / "model.gguf")  # without the files beside
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / "c", gguf_file="model.gguf")
        for text in TEXTS:
            text = text.replace("<|looks|>", "")
            ids = want.encode(text, add_special_tokens=False)
            assert found.encode(text, add_special_tokens=False) == ids
            assert found.decode(ids) == want.decode(ids)
        assert (found.bos_token, found.eos_token, found.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
        assert found.chat_template == want.chat_template


def test_saved_beside_a_tokenizer(tmp_path):
    """`save` finds it, too; a GGUF file's own tokenizer is kept; more tokens than the model has are told."""
    _, config = make(tmp_path, "qwen2", bos=False)
    params, _ = fm.load(tmp_path)
    fm.save(params, config, tmp_path, format="gguf")
    said = files.read(tmp_path / "model.gguf")[1]
    assert said["tokenizer.ggml.pre"] == "qwen2"
    (tmp_path / "tokenizer.json").write_text("{}")
    fm.convert(tmp_path / "model.gguf", tmp_path.with_name("copy"), format="gguf")
    assert (
        files.read(tmp_path.with_name("copy") / "model.gguf")[1]["tokenizer.ggml.tokens"]
        == said["tokenizer.ggml.tokens"]
    )


def test_the_embedded_checkpoint(tmp_path):
    fm.convert(fm.assets.TINY_LLAMA, tmp_path / "gguf", format="gguf")
    want = transformers.AutoTokenizer.from_pretrained(fm.assets.TINY_LLAMA)
    (tmp_path / "gguf" / "tokenizer.json").unlink()
    (tmp_path / "gguf" / "tokenizer_config.json").unlink()
    (tmp_path / "gguf" / "config.json").unlink()
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    text = "def read(self, path):\n    return [line.strip() for line in open(path)]  # 1234"
    assert found.encode(text, add_special_tokens=False) == want.encode(text, add_special_tokens=False)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace"}}, "its step .*'Metaspace'.* is not in"),
        ({"model": BPE | {"byte_fallback": True}, "pre_tokenizer": None}, "does not write spaces as"),
        ({"model": BPE, "pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "no known name in llama.cpp"),
        ({"model": BPE | {"ignore_merges": True}, "pre_tokenizer": BYTE_LEVEL}, "no known name .*, ignore_merges"),
        ({"model": BPE, "pre_tokenizer": BYTE_LEVEL, "normalizer": {"type": "Lowercase"}}, "normalizer .*'Lowercase'"),
        ({"model": BPE | {"vocab": {"a": 9}}, "pre_tokenizer": BYTE_LEVEL}, "the model has 4 tokens, but 'a' is 9"),
        ({"model": BPE | {"vocab": {"a": "b"}}, "pre_tokenizer": BYTE_LEVEL}, "'a' is 'b'"),
        ({"model": BPE | {"vocab": ["a"]}, "pre_tokenizer": BYTE_LEVEL}, "vocabulary is .*, not a map"),
        ({"model": BPE | {"merges": [["a"]]}, "pre_tokenizer": BYTE_LEVEL}, r"merge \['a'\] is no pair"),
    ],
)  # fmt: skip
def test_what_llama_cpp_has_not_is_left_out_with_a_warning(tokenizer, message, tmp_path, caplog):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=message):
        ours.tokenizer_metadata(tmp_path, 4)
    config = fm.models.llama.Config(vocab_size=4, num_layers=1, task="causal-lm")
    with caplog.at_level(logging.WARNING, "fmodels"):
        said = fm.dialects.metadata_of(config, "gguf", None, tmp_path)
    assert said["tokenizer.ggml.model"] == "none"
    assert "the GGUF file has no tokenizer, as of the one in" in caplog.text


def test_merges_and_templates_as_gguf_has_them(tmp_path):
    """Spaces in merges, the older form of them, several chat templates; a user's token with a space of sentencepiece."""
    merges = [["\u0120 ", "a"], ["a", "b"]]
    added = [{"id": 2, "content": "\u2581x", "special": False}, {"id": 3, "content": "<s>", "special": True}]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    tokenizer = {
        "model": BPE | {"merges": merges}, "pre_tokenizer": BYTE_LEVEL, "added_tokens": added, "post_processor": template,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = {"chat_template": [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]}
    for given in (options, {}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
        said = ours.tokenizer_metadata(tmp_path, 4)
        theirs = gguf.SpecialVocab(tmp_path, load_merges=True)
        assert said["tokenizer.ggml.merges"] == theirs.merges
        assert said["tokenizer.ggml.add_bos_token"]
        assert said["tokenizer.ggml.bos_token_id"] == 3
        assert said["tokenizer.ggml.tokens"] == ["a", "[PAD1]", " x", "<s>"]
        assert said["tokenizer.ggml.token_type"].tolist() == [1, 5, 4, 3]
        assert said["tokenizer.ggml.token_type"].dtype == np.int32
    tokenizer["model"] = BPE | {"merges": ["a b"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    said = ours.tokenizer_metadata(tmp_path, 4)
    assert said["tokenizer.ggml.merges"] == ["a b"]
    assert said["tokenizer.chat_template"] == "d"
    assert said["tokenizer.chat_templates"] == ["rag"]
    assert said["tokenizer.chat_template.rag"] == "r"
