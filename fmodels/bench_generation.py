"""Speed of the ways of decoding: against transformers where it has them, against our own greedy decoding for what is added."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmodels.bench import Result, Theirs, bench_config, median_of


def _llama() -> tuple[Any, Any]:
    import jax

    import fmodels as fm

    config = bench_config("llama-50m")
    return fm.unstack_layers(fm.init(config, jax.random.key(0))), config


def beams(*, new_tokens: int = 32, repeats: int = 5) -> Iterator[Result]:
    """Beam search with four beams."""
    import jax

    import fmodels as fm

    params, config = _llama()
    tokens = np.random.default_rng(0).integers(1, 1000, (1, 16))
    with tempfile.TemporaryDirectory() as folder:
        fm.save(params, config, folder)
        setup = f"ids = torch.tensor({tokens.tolist()})"
        given = f"max_new_tokens={new_tokens}, num_beams=4, do_sample=False, pad_token_id=0"
        body = f"model.generate(ids, attention_mask=torch.ones_like(ids), {given})"
        options = fm.GenerationConfig(num_beams=4)
        with Theirs(folder, setup, body) as theirs:
            run = lambda: jax.block_until_ready(  # noqa: E731
                fm.generate(params, config, tokens, max_new_tokens=new_tokens, options=options).tokens
            )
            ours_s, theirs_s = median_of(run, theirs, repeats=repeats)
    name = "decode llama-50m, 4 beams"
    yield Result(name, new_tokens / ours_s, new_tokens / theirs_s, "tokens/s", theirs_s / ours_s, ">= 2")


def added(*, new_tokens: int = 64, repeats: int = 9) -> Iterator[Result]:
    """What sampling with every logits function and a constraint add to greedy decoding."""
    import jax

    import fmodels as fm

    params, config = _llama()
    tokens = np.random.default_rng(0).integers(1, 1000, (1, 16))
    every = fm.GenerationConfig(
        do_sample=True, temperature=0.9, top_h=0.95, top_k=50, top_p=0.95, min_p=0.01, typical_p=0.95, epsilon_cutoff=1e-4,
        eta_cutoff=1e-4, repetition_penalty=1.1, encoder_repetition_penalty=1.05, no_repeat_ngram_size=3,
        encoder_no_repeat_ngram_size=4, bad_words_ids=[[5], [6, 7]], sequence_bias={(8,): 1.0, (9, 10): -1.0}, min_length=4,
        min_new_tokens=2, suppress_tokens=[11, 12], begin_suppress_tokens=[13], exponential_decay_length_penalty=(40, 1.01),
        remove_invalid_values=True, renormalize_logits=True, eos_token_id=[31999],
    )  # fmt: skip
    random = np.random.default_rng(1)
    letters = np.frombuffer(b'abcdefghijklmnopqrstuvwxyz     0123456789{}[]:,".', np.uint8)
    words = [bytes(random.choice(letters, random.integers(1, 8))) for _ in range(config.vocab_size)]
    held = fm.GenerationConfig(eos_token_id=[31999], min_new_tokens=new_tokens)
    constraint = fm.constraints.regex(r"([a-z]+ )*[0-9]{1,9}([a-z ]|[0-9]+\.[0-9]{2} )*")

    def run(options: Any, **given: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(
            fm.generate(
                params, config, tokens, max_new_tokens=new_tokens, options=options, key=jax.random.key(0), **given
            ).tokens
        )

    greedy, sampled, constrained = median_of(
        run(held), run(every), run(held, constraint=constraint, tokenizer=words), repeats=repeats
    )
    for name, seconds, limit in (
        ("sampling with every logits function (against greedy)", sampled, 1.15),
        ("decoding under a regular expression (against greedy)", constrained, 1.25),
    ):
        yield Result(name, seconds * 1e3, greedy * 1e3, "ms", seconds / greedy, f"<= {limit}")


COPY = """
class Settings:
    def __init__(self, name, value):
        self.name = name
        self.value = value

    def get_name(self):
        return self.name

    def get_value(self):
        return self.value


class Settings:
    def __init__(self, name, value):
        self.name = name
        self.value = value

    def get_name(self):
        return self.name

    def get_value(self):
        return self.value


class Settings:
    def __init__(self, name"""
"""Text that repeats itself."""


def speculation(*, new_tokens: int = 192, repeats: int = 15) -> Iterator[Result]:
    """Speculation by n-grams on text that repeats itself, with the embedded checkpoint; the prompt is read by both."""
    import jax
    from tokenizers import Tokenizer

    import fmodels as fm

    params, config = fm.load(fm.assets.TINY_LLAMA, layers="list")
    params = fm.cast(params, "float32")
    tokens = [Tokenizer.from_file(str(Path(fm.assets.TINY_LLAMA) / "tokenizer.json")).encode(COPY).ids]

    def run(**given: Any) -> Callable[[], Any]:
        options = fm.GenerationConfig(eos_token_id=[0], **given)
        return lambda: jax.block_until_ready(
            fm.generate(params, config, tokens, max_new_tokens=new_tokens, options=options).tokens
        )

    plain, guessed = median_of(run(), run(prompt_lookup_num_tokens=7), repeats=repeats)
    name = "speculation by n-grams (against greedy)"
    yield Result(name, new_tokens / guessed, new_tokens / plain, "tokens/s", plain / guessed, ">= 1.5")


def many(*, prompts: int = 256, new_tokens: int = 64) -> Iterator[Result]:
    """256 prompts of mixed length whose continuations end at different times, against padded batches of 16."""
    import jax

    import fmodels as fm

    params, config = _llama()
    random = np.random.default_rng(0)
    rows = [random.integers(1, 30000, n).tolist() for n in random.integers(4, 65, prompts)]
    ends = list(range(30000, 31000))  # a random model draws one of them about every 32 tokens
    options = fm.GenerationConfig(do_sample=True, top_k=0, eos_token_id=ends)
    with tempfile.TemporaryDirectory() as folder:
        fm.save(params, config, folder)
        setup = f"""
rows, ends = {rows}, list(range(30000, 31000))
torch.manual_seed(0)
def run():
    made = 0
    for first in range(0, len(rows), 16):
        part = rows[first : first + 16]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in part])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part])
        model.generate(ids, attention_mask=mask, max_new_tokens={new_tokens}, do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=0)
"""
        with Theirs(folder, setup, "run()") as theirs:
            run = lambda: fm.generate_many(  # noqa: E731
                params, config, rows, max_new_tokens=new_tokens, options=options, key=jax.random.key(0), batch_size=16
            )
            ours_s, theirs_s = median_of(run, theirs, repeats=1)
    yield Result(
        f"generate_many, {prompts} prompts",
        prompts / ours_s,
        prompts / theirs_s,
        "prompts/s",
        theirs_s / ours_s,
        ">= 3",
    )


BENCHES: dict[str, Callable[[], Iterator[Result]]] = {
    "beams": beams,
    "added": added,
    "speculation": speculation,
    "many": many,
}
"""Name -> benchmark."""
