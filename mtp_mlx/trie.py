"""What is known of texts that begin alike: a compressed trie, whose edges are runs of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Node(Generic[T]):
    edge: tuple[int, ...] = ()  # the tokens that lead here from the node before
    value: T | None = None
    children: dict[int, "_Node[T]"] = field(default_factory=dict)  # by the first token of their edge


class _Way(NamedTuple, Generic[T]):
    """How far a text leads."""

    nodes: list[_Node[T]]  # those that it passes, the root first
    length: int  # tokens on the way
    parted: _Node[T] | None  # the node on the edge to which it ends or leaves


class Match(NamedTuple, Generic[T]):
    """What is known of a text."""

    value: T | None  # of the longest known text that it begins with
    length: int  # how many of its tokens some known text begins with
    beyond: T | None  # of one such text


class Trie(Generic[T]):
    """Values of texts, which are runs of token ids of at least one token."""

    def __init__(self) -> None:
        self._root = _Node[T]()

    def get(self, text: Sequence[int]) -> T | None:
        """The value of just this text."""
        way = self._way(text)
        return way.nodes[-1].value if way.length == len(text) and way.parted is None else None

    def match(self, text: Sequence[int]) -> Match[T]:
        nodes, length, parted = self._way(text)
        value = next((node.value for node in reversed(nodes) if node.value is not None), None)
        return Match(value, length, _any(parted or nodes[-1]))

    def put(self, text: Sequence[int], value: T) -> None:
        nodes, length, parted = self._way(text)
        node = nodes[-1] if parted is None else _split(nodes, length, parted)
        if length < len(text):
            node.children[text[length]] = node = _Node(tuple(text[length:]))
        node.value = value

    def remove(self, text: Sequence[int]) -> None:
        """Forget a text that is known, and every edge that leads nowhere then."""
        nodes = self._way(text).nodes
        nodes[-1].value = None
        for parent, node in zip(nodes[-2::-1], nodes[:0:-1], strict=True):
            if node.value is not None or len(node.children) > 1:
                return
            del parent.children[node.edge[0]]
            for child in node.children.values():  # the only one
                child.edge = node.edge + child.edge
                parent.children[child.edge[0]] = child

    def _way(self, text: Sequence[int]) -> _Way[T]:
        nodes, length = [self._root], 0
        while child := nodes[-1].children.get(text[length]) if length < len(text) else None:
            agreeing = _agreeing(child.edge, text[length : length + len(child.edge)])
            length += agreeing
            if agreeing < len(child.edge):
                return _Way(nodes, length, child)
            nodes.append(child)
        return _Way(nodes, length, None)


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two runs begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _split(nodes: list[_Node[T]], length: int, parted: _Node[T]) -> _Node[T]:
    """A new node on the edge to `parted`, at so many tokens from the root."""
    cut = length - sum(len(node.edge) for node in nodes)
    upper = _Node[T](parted.edge[:cut])
    nodes[-1].children[upper.edge[0]] = upper
    parted.edge = parted.edge[cut:]
    upper.children[parted.edge[0]] = parted
    return upper


def _any(node: _Node[T]) -> T | None:
    """A value at or below a node; every edge leads to one, except in an empty trie."""
    while node.value is None and node.children:
        node = next(iter(node.children.values()))
    return node.value
