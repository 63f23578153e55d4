"""Writes `tests/goldens/llama_cpp/`: what llama.cpp itself makes of GGUF files that fmodels has written.

* `logits.json`: for each model of `tests.test_gguf.ROWS`, with weights that numpy draws, the logits of the last token of a
  text and the likeliest token at each position.
* a folder for each kind of tokenizer, trained here on a few sentences: as it lies beside a checkpoint, and `expected.json`,
  text -> the numbers that llama.cpp gives it, with the tokens that it puts around.

It stops where llama.cpp refuses a file or gives other logits than fmodels does (by 1e-4, or 3e-3 of GELU, which llama.cpp takes
from a table of float16, and so does fmodels here), or other tokens than `tokenizers` or SentencePiece.

    python -m venv llama_cpp
    llama_cpp/bin/pip install llama-cpp-python==0.3.36 sentencepiece==0.2.3 -e '.[dev]'
    JAX_PLATFORMS=cpu PYTHONPATH=. llama_cpp/bin/python tests/goldens/make_llama_cpp.py

llama-cpp-python is built from its source, with a llama.cpp of October 2026: five minutes, with cmake and a compiler.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

import jax
import llama_cpp
import numpy as np
import sentencepiece
import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

import fmodels as fm
from tests import gguf_files
from tests.test_gguf import ROWS

SPACE = "\u2581"
HERE = Path(__file__).parent / "llama_cpp"
TOKENS = [3, 7, 1, 9, 4, 30, 11, 2, 5, 17, 8, 8]
WITHOUT_WINDOWS = ("phi3",)  # llama.cpp says that it leaves them out
CORPUS = """the quick brown fox jumps over the lazy dog and then the others, while the river runs down to the sea
In the beginning there was a word; the words were many, and nobody counted them: 1234567890 times.
def f(x):    return [line.strip() for line in open(x) if line]  # three
Die Bäume blühen früh im März, \N{LATIN CAPITAL LETTER U WITH DIAERESIS}bermut tut selten gut. Ça été naïve œuvre
\u732b\u306f\u597d\u304d\u3067\u3059\u3002\u72ac\u3082\u597d\u304d\u3067\u3059\u3002
she sells sea shells by the sea shore; these shells that she sells are sea shells for sure""".split("\n")
TEXTS = [
    "the quick brown fox",
    "Hello, world! It's 12345 o'clock; pay 3.14  euros.\n\n  def f(x):\r\n\treturn x**2  ",
    "   three spaces, \u00fcml\u00e4ut caf\u00e9 cafe\u0301 \u732b\U0001f431\U0001f469\u200d\U0001f680 \u0000\u00a0\u3000 end",
    "before<tool>after <|end|> the words<|begin|>\u732b  <tool>",
    "a", "", "\u2581x", "aaaaaaaaaaaaaaaaaaaaaaaa", "theretheretherethere and then thethe", "\uff26\uff55\uff4c\uff4c \ufb01ne",
]  # fmt: skip
NOT_COMPARED = {
    "sentencepiece": [TEXTS[3]],  # SentencePiece has no special tokens in texts
    "unigram_model": [TEXTS[3]],
    # `tokenizers` puts a space neither before a text with one nor, in this tokenizer, behind special tokens
    "bpe": [TEXTS[2], TEXTS[3], TEXTS[6]],
    # llama.cpp takes nothing but spaces for spaces, unless a table of characters makes spaces of others
    "unigram": [TEXTS[1], TEXTS[6]],
}
RULES = {0xFF26: 0x46, 0xFB01: 0x66, 0x3000: 0x20, 0xA0: 0x20, 0x9: 0x20, 0xA: 0x20}


def train(**options):
    """A model of SentencePiece, as bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=out, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, **options,
    )  # fmt: skip
    return out.getvalue()


def rules():
    """The path of a file with `RULES`."""
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.writelines(f"{code:X}\t{to:X}\n" for code, to in RULES.items())
    return file.name


def fast(tokenizer, folder, **special):
    """Saves it as transformers does."""
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", **special
    )
    found.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found.save_pretrained(folder)


def trained(model, trainer, *, start=True):
    """A tokenizer with added tokens; one puts a token before, or one behind."""
    tokenizer = tokenizers.Tokenizer(model)

    def finish():
        tokenizer.train_from_iterator(CORPUS * 4, trainer)
        tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
        tokenizer.add_tokens(["<tool>"])
        named = "<|begin|>" if start else "<|end|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{named} $A" if start else f"$A {named}", special_tokens=[(named, tokenizer.token_to_id(named))]
        )
        return tokenizer

    return tokenizer, finish


def bpe(folder, *, prefix):
    """Llama's (with a prefix) or Gemma's; words are told apart in training, as SentencePiece does."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<unk>", *bytes_], show_progress=False)
    tokenizer, finish = trained(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), trainer)
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    finish()
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] not in bytes_]
    fast(tokenizers.Tokenizer.from_str(json.dumps(data)), folder, unk_token="<unk>")


def byte_level(folder):
    """Llama 3's."""
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer, finish = trained(models.BPE(ignore_merges=True), trainer)
    split = SPLITS["llama-bpe"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast(finish(), folder)


def unigram(folder):
    """T5's, with the numbers of its first tokens."""
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<pad>", "<|end|>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer, finish = trained(models.Unigram(), trainer, start=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace()
    fast(finish(), folder, pad_token="<pad>", unk_token="<unk>")


def of_model(folder, name, **options):
    """A folder with SentencePiece's file, and the tokens that were added."""
    folder.mkdir(parents=True)
    raw = train(user_defined_symbols=["<tool>"], **options)
    (folder / name).write_bytes(raw)
    size = sentencepiece.SentencePieceProcessor(model_proto=raw).vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<|x|>": size}))
    added = {str(size + i): {"content": text, "special": True} for i, text in ((1, "<|begin|>"), (2, "<|end|>"))}
    options = {"added_tokens_decoder": added, "chat_template": "{{ bos_token }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options) + "\n")


KINDS = {
    "byte_level": byte_level,
    "bpe": lambda folder: bpe(folder, prefix=True),
    "gemma": lambda folder: bpe(folder, prefix=False),
    "unigram": unigram,
    "sentencepiece": lambda folder: of_model(
        folder, "tokenizer.model", model_type="bpe", vocab_size=420, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    ),
    "unigram_model": lambda folder: of_model(
        folder, "spiece.model", model_type="unigram", vocab_size=220, normalization_rule_tsv=rules(), bos_id=-1,
        pad_id=0, eos_id=1, unk_id=2,
    ),
}  # fmt: skip


def wanted(folder, text):
    """What `tokenizers` or SentencePiece give."""
    model = next((one for one in folder.glob("*.model")), None)
    if model is not None:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        bos, eos = processor.bos_id(), processor.eos_id()
        ids = processor.encode(text)
        return [bos, *ids] if model.name == "tokenizer.model" else [*ids, eos]
    return transformers.AutoTokenizer.from_pretrained(folder).encode(text)


def tokenize(folder, work, kind):
    """Text -> tokens by llama.cpp of a model that is saved beside the tokenizer."""
    shutil.copytree(folder, work)
    if model := next(folder.glob("*.model"), None):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        size, end = processor.vocab_size() + 3, processor.eos_id()
    else:
        own = transformers.AutoTokenizer.from_pretrained(folder)
        size, end = len(own), own.eos_token_id
    family = fm.models.gemma if kind == "gemma" else fm.models.llama
    config = family.Config(
        vocab_size=size + 3, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4,
        max_positions=16, task="causal-lm", eos_token_id=end,
    )  # fmt: skip
    fm.save(fm.init(config, jax.random.key(0)), config, work, format="gguf")
    model = llama_cpp.Llama(str(work / "model.gguf"), vocab_only=True, verbose=False)
    return {text: model.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS}


def logits(name, folder):
    """What llama.cpp computes of a model of fmodels, which must be what fmodels does."""
    architecture, row = ROWS[name]
    params, config = gguf_files.drawn(
        name, architecture, row | {"sliding_window": None} if name in WITHOUT_WINDOWS else row
    )
    fm.save(params, config, folder, format="gguf")
    with gguf_files.gelu_of_float16():
        want = np.asarray(fm.forward(params, config, np.array([TOKENS])).logits)[0]
    model = llama_cpp.Llama(
        str(folder / "model.gguf"), n_ctx=32, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0,
        flash_attn=False,
    )  # fmt: skip
    model.eval(TOKENS)
    got = np.array(model.scores[: len(TOKENS)])
    gap = float(np.abs(got - want).max())
    assert gap < (3e-3 if config.activation.startswith("gelu") else 1e-4), (name, gap)
    print(f"{name}: the logits differ by {gap:.1e} of {np.abs(want).max():.1f}")
    return {"last": [round(float(x), 5) for x in got[-1]], "likeliest": got.argmax(-1).tolist()}


if __name__ == "__main__":
    for kind, make in KINDS.items():
        shutil.rmtree(HERE / kind, ignore_errors=True)
        make(HERE / kind)
        found = tokenize(HERE / kind, Path(tempfile.mkdtemp()) / kind, kind)
        for text, ids in found.items():
            assert text in NOT_COMPARED.get(kind, []) or ids == wanted(HERE / kind, text), (kind, text, ids)
        (HERE / kind / "expected.json").write_text(json.dumps(found, indent=0) + "\n")
    found = [f"{json.dumps(name)}: {json.dumps(logits(name, Path(tempfile.mkdtemp())))}" for name in ROWS]
    (HERE / "logits.json").write_text("{" + ",\n".join(found) + "}\n")
