"""How far a text has come with phrases that it must contain: each is a tree of tokens, and one is followed at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.generation.options import bucket_of
from fmodels.types import Array


class Phrases(NamedTuple):
    """The trees of `c` phrases; node `i < c` is the root of phrase `i`, filled up to powers of two.

    Attributes:
        parent: `(e)` int32, the node that each edge starts from; -1 where there is none.
        token: `(e)` int32, of each edge.
        child: `(e)` int32, the node that it leads to.
        leaf: `(n)` bool, whether a node is the end of its phrase.
        left: `(n)` int32, the longest path from the root, less the depth of the node.
        real: `(c)` bool, which phrases there are.
        longest: `()` int32, tokens of the longest of all.
    """

    parent: Array
    token: Array
    child: Array
    leaf: Array
    left: Array
    real: Array
    longest: Array


class Progress(NamedTuple):
    """How far each of `r` texts has come.

    Attributes:
        order: `(r c)` int32, phrases that wait are tried from the lowest number up.
        done: `(r c)` bool, phrases that the text contains.
        current: `(r)` int32, the phrase that is being followed; -1 for none.
        node: `(r)` int32, how far.
    """

    order: Array
    done: Array
    current: Array
    node: Array


def compile_phrases(given: Sequence[Any], vocabulary: int) -> tuple[Phrases, int]:
    """The trees, and how many tokens at most can go on with them.

    Args:
        given: phrases, each a sequence of tokens, or of sequences of which one must occur.
        vocabulary: its size.

    Raises:
        ValueError: tokens outside of the vocabulary; a phrase that begins with another one of its alternatives.
    """
    trees = [phrase if isinstance(phrase[0], Sequence) else (phrase,) for phrase in given]
    flat = [token for tree in trees for words in tree for token in words]
    if wrong := sorted({token for token in flat if token >= vocabulary}):
        raise ValueError(
            f"generate: force_words_ids has tokens outside of the vocabulary 0 … {vocabulary - 1}: {wrong}"
        )
    size = bucket_of(len(trees))
    edges: list[tuple[int, int, int]] = []
    depth = dict.fromkeys(range(size), 0)
    heights = []
    left = np.zeros(bucket_of(size + len(flat)), np.int32)
    for root, tree in enumerate(trees):
        children: dict[tuple[int, int], int] = {}
        ends = set()
        for words in tree:
            node = root
            for token in words:
                if (node, token) not in children:
                    child = children[node, token] = len(depth)
                    depth[child] = depth[node] + 1
                    edges.append((node, token, child))
                node = children[node, token]
            ends.add(node)
        inner = {node for node, _ in children}
        if len(ends) < len(tree) or ends & inner:
            raise ValueError(
                f"generate: of the alternatives {[list(words) for words in tree]} in force_words_ids one begins with another; "
                "leave the longer one out"
            )
        heights.append(max(map(len, tree)))
        for node in [root, *children.values()]:
            left[node] = heights[-1] - depth[node]
    table = np.full((bucket_of(len(edges)), 3), -1, np.int32)
    table[: len(edges)] = edges
    leaf = np.ones(len(left), bool)
    leaf[[parent for parent, _, _ in edges]] = False
    starts = sum(parent < size for parent, _, _ in edges)
    widest = max(starts, *(sum(parent == node for parent, _, _ in edges) for node in depth))
    phrases = Phrases(
        *(jnp.asarray(column) for column in table.T),
        leaf=jnp.asarray(leaf),
        left=jnp.asarray(left),
        real=jnp.asarray(np.arange(size) < len(trees)),
        longest=jnp.asarray(max(heights), jnp.int32),
    )
    return phrases, widest


def begin(phrases: Phrases, rows: int) -> Progress:
    """Nothing done yet."""
    count = phrases.real.shape[0]
    return Progress(
        order=jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (rows, count)),
        done=jnp.zeros((rows, count), bool),
        current=jnp.full(rows, -1, jnp.int32),
        node=jnp.zeros(rows, jnp.int32),
    )


def complete(phrases: Phrases, progress: Progress) -> Array:
    """`(r)` bool, whether all phrases are there."""
    return (progress.done | ~phrases.real[None]).all(-1)


def bank(phrases: Phrases, progress: Progress) -> Array:
    """`(r)` int32, how far a text has come, in tokens of phrases."""
    busy = jnp.where(progress.current >= 0, phrases.longest - phrases.left[progress.node], 0)
    return progress.done.sum(-1, dtype=jnp.int32) * phrases.longest + busy


def update(phrases: Phrases, progress: Progress, token: Array) -> Progress:
    """After one more `token` `(r)`.

    A token that does not go on with the phrase that is followed sends it to the end of the queue, and begins no other.

    Source: matches transformers 4.55's `ConstraintListState.add`.
    """
    count = phrases.real.shape[0]
    numbers = jnp.arange(count, dtype=jnp.int32)[None]
    busy = progress.current >= 0
    starts = _move(phrases, jnp.broadcast_to(numbers, progress.done.shape), token[:, None])
    can = (starts >= 0) & ~progress.done & phrases.real[None]
    first = jnp.argmin(jnp.where(can, progress.order, jnp.iinfo(jnp.int32).max), axis=-1).astype(jnp.int32)
    phrase = jnp.where(busy, progress.current, first)
    begun = jnp.take_along_axis(jnp.where(can, starts, -1), first[:, None], axis=1)[:, 0]
    node = jnp.where(busy, _move(phrases, progress.node, token), begun)
    stepped, this = node >= 0, numbers == phrase[:, None]
    ended = stepped & phrases.leaf[node]
    last = progress.order.max(-1, keepdims=True) + 1
    return Progress(
        order=jnp.where(this & (busy & ~stepped)[:, None], last, progress.order),
        done=progress.done | (this & ended[:, None]),
        current=jnp.where(stepped & ~ended, phrase, -1),
        node=jnp.maximum(node, 0),
    )


def advances(phrases: Phrases, progress: Progress, widest: int) -> tuple[Array, Array, Array]:
    """The tokens that go on with the phrase that is followed, or begin one of those that wait.

    Args:
        phrases: the trees.
        progress: of `r` texts.
        widest: how many tokens there can be; static.

    Returns:
        `(r widest)` int32 tokens, bool which of them there are, and int32 the bank of the text with each. Where several
        alternatives go on, the bank is transformers': there they are tried one after the other without a step back.
    """
    edges = phrases.parent.shape[0]
    busy = (progress.current >= 0)[:, None]
    waits = ~progress.done & phrases.real[None]
    root = jnp.clip(phrases.parent, 0, waits.shape[1] - 1)
    starts = (phrases.parent >= 0) & (phrases.parent < waits.shape[1])
    active = jnp.where(busy, phrases.parent[None] == progress.node[:, None], starts[None] & waits[:, root])
    rank = jnp.where(busy, 0, progress.order[:, root]) * edges + jnp.arange(edges, dtype=jnp.int32)[None]
    rank = jnp.where(active & ~complete(phrases, progress)[:, None], rank, jnp.iinfo(jnp.int32).max)
    edge = jnp.argsort(rank, axis=-1)[:, :widest]
    there = jnp.take_along_axis(rank, edge, axis=1) < jnp.iinfo(jnp.int32).max
    tokens = phrases.token[edge]

    def one(node: Array, x: tuple[Array, Array]) -> tuple[Array, Progress]:
        token, there = x
        after = update(phrases, progress._replace(node=node), token)
        moved = _move(phrases, node, token)
        return jnp.where(there & (moved >= 0) & busy[:, 0], moved, node), after

    node, after = jax.lax.scan(one, progress.node, (tokens.T, there.T))
    after = after._replace(node=jnp.where(busy.T & (after.current >= 0), node[None], after.node))
    return tokens, there, jax.vmap(lambda p: bank(phrases, p))(after).T


def _move(phrases: Phrases, node: Array, token: Array) -> Array:
    """The node that an edge with `token` leads to from `node`; -1 if there is none."""
    parent, edge, child = (jnp.expand_dims(x, range(node.ndim)) for x in (phrases.parent, phrases.token, phrases.child))
    fits = (parent == node[..., None]) & (edge == token[..., None])
    return jnp.where(fits, child, -1).max(-1)
