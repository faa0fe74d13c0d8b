"""A trie says of texts what comparing them all would say."""

import random

import pytest

from mtp_mlx.trie import Trie, _Node


def test_of_no_texts_nothing_is_known() -> None:
    trie = Trie[str]()
    assert trie.get([]) is None and trie.get([1]) is None
    assert trie.match([1, 2]) == trie.match([]) == (None, 0, None)


def test_a_text_is_found_by_those_that_begin_with_it() -> None:
    trie = Trie[str]()
    trie.put([1, 2, 3, 4], "long")
    trie.put([1, 2], "short")
    trie.put([1, 2, 9], "other")
    assert trie.match([1, 2, 3, 4, 5]) == ("long", 4, "long")
    value, agreeing, beyond = trie.match([1, 2, 3, 8])
    assert (value, agreeing, beyond) == ("short", 3, "long")
    assert trie.match([1, 7]) == (None, 1, "short")
    assert trie.get([1, 2, 3]) is None and trie.get([1, 2]) == "short"


@pytest.mark.parametrize("seed", range(40))
def test_it_knows_what_comparing_all_texts_would_tell(seed: int) -> None:
    rng, trie, known = random.Random(seed), Trie[int](), dict[tuple[int, ...], int]()
    for number in range(150):
        text = tuple(rng.choices((0, 1), k=rng.randint(1, 9)))
        if rng.random() < 0.4 and known:
            gone = rng.choice(list(known))
            trie.remove(gone)
            del known[gone]
        elif rng.random() < 0.7:
            trie.put(text, number)
            known[text] = number
        assert trie.get(text) == known.get(text)
        match = trie.match(text)
        prefixes = [other for other in known if text[: len(other)] == other]
        assert match.value == (known[max(prefixes, key=len)] if prefixes else None)
        assert match.length == max((_agreeing(text, other) for other in known), default=0)
        beyond = [value for other, value in known.items() if other[: match.length] == text[: match.length]]
        assert match.beyond in beyond or not known
        _check(trie._root, 0)


def _agreeing(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return max(n for n in range(10) if one[:n] == other[:n] and n <= len(one))


def _check(node: _Node[int], depth: int) -> None:
    """Every edge is needed: it leads to a value or to a fork."""
    for token, child in node.children.items():
        assert child.edge[0] == token and (child.value is not None or len(child.children) > 1)
        _check(child, depth + 1)
