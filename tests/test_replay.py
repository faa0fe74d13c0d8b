"""Text becomes the very ids it was made of, and never ids of another text."""

from functools import cache
from threading import Thread
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mtp_mlx.replay import Replay

examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)

SAMPLE = ["hello world, hello there\n\nthe user thinks of the answer <think> ok"] * 3
MARKERS = ["<bos>", "<end>", "<think>"]
KINDS = ["bytes", "stripping", "composing", "blank", "pieces", "first piece"]


def _parts(kind: str) -> tuple[Tokenizer, BpeTrainer]:
    """A tokenizer to be trained. Pieces are SentencePiece's: words begin with a mark, texts as if with a space."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind not in ("pieces", "first piece"):
        made = Tokenizer(BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        return made, BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    scheme = "always" if kind == "pieces" else "first"
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return made, BpeTrainer(vocab_size=320, special_tokens=raw, show_progress=False)


@cache
def tokenizer(kind: str = "bytes") -> TokenizerWrapper:
    made, trainer = _parts(kind)
    made.train_from_iterator(SAMPLE, trainer)
    if kind == "composing":
        made.normalizer = normalizers.NFC()
    strips = kind == "stripping"
    markers = [*MARKERS, "\n\n"] if kind == "blank" else MARKERS
    made.add_tokens(
        [AddedToken(marker, normalized=False, lstrip=strips, rstrip=strips and marker == "<end>") for marker in markers]
    )
    bos = made.token_to_id("<bos>")
    made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False))


def ids_of(wrapper: TokenizerWrapper, text: str) -> list[int]:
    ids: list[int] = wrapper.encode(text, add_special_tokens=False)
    return ids


def text_of(wrapper: TokenizerWrapper, ids: list[int]) -> str:
    text: str = wrapper.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def letters(wrapper: TokenizerWrapper, text: str) -> list[int]:
    """A text token by token as no tokenizer splits it: every character on its own."""
    return [token for letter in text for token in ids_of(wrapper, letter)]


def marker(wrapper: TokenizerWrapper, name: str) -> int:
    return int(wrapper.convert_tokens_to_ids(name))


texts = st.lists(st.one_of(st.sampled_from([*MARKERS, "\n\n", " ", "e\u0301", "<th", "ink>"]), st.text(max_size=6)))
tokens = st.lists(st.integers(0, 10**6), max_size=24)


@pytest.mark.parametrize("kind", KINDS)
@examples
@given(pieces=texts, special=st.booleans())
def test_without_memory_the_tokenizer_decides(kind: str, pieces: list[str], special: bool) -> None:
    text, wrapper = "".join(pieces), tokenizer(kind)
    expected = wrapper.encode(text, add_special_tokens=special)
    assert Replay(wrapper).encode(text, special).ids == expected


@pytest.mark.parametrize("kind", ["bytes", "blank", "composing"])
@examples
@given(prompt=texts, drawn=tokens, more=texts)
def test_a_text_begins_with_the_ids_it_was_made_of(
    kind: str, prompt: list[str], drawn: list[int], more: list[str]
) -> None:
    wrapper = tokenizer(kind)
    replay = Replay(wrapper)
    ids = replay.encode("".join(prompt)).ids + [token % len(wrapper) for token in drawn]
    if "\ufffd" in text_of(wrapper, ids):
        ids = ids_of(wrapper, "".join(prompt))
    if _ambiguous(wrapper, ids):
        return
    replay.remember(ids)
    text = text_of(wrapper, ids)
    assert replay.encode(text).ids == ids
    assert replay.encode(text + "<end>" + "".join(more)).ids[: len(ids)] == ids


def _ambiguous(wrapper: TokenizerWrapper, ids: list[int]) -> bool:
    """Whether markers are also spelled in these ids' ordinary text, or texts merge into one across them."""
    read = ids_of(wrapper, text_of(wrapper, ids))
    added = set(wrapper.added_tokens_decoder)
    return [token for token in ids if token in added] != [token for token in read if token in added]


@pytest.mark.parametrize("kind", KINDS)
@examples
@given(pieces=texts, memories=st.lists(tokens, max_size=3), cuts=st.lists(st.integers(0, 30), max_size=3))
def test_no_memory_changes_a_text(kind: str, pieces: list[str], memories: list[list[int]], cuts: list[int]) -> None:
    wrapper, text = tokenizer(kind), "".join(pieces)
    replay = Replay(wrapper)
    for memory in memories:
        replay.remember([token % len(wrapper) for token in memory])
    for cut in cuts:  # of the same text, otherwise than the tokenizer does it
        replay.remember(letters(wrapper, text[:cut]))
    again, expected = text_of(wrapper, replay.encode(text).ids), text_of(wrapper, ids_of(wrapper, text))
    if kind not in ("bytes", "blank"):  # these tokenizers change texts; a memory has them as they were
        again, expected = _essence(again), _essence(expected)
    assert again == expected


def _essence(text: str) -> str:
    return "".join(normalize("NFC", text).split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_is_replayed_within_a_longer_text(kind: str) -> None:
    wrapper = tokenizer(kind)
    replay, end = Replay(wrapper), marker(wrapper, "<end>")
    prompt = ids_of(wrapper, "<bos>hello<end>")
    reply = letters(wrapper, "world") if "piece" not in kind else _pieces(wrapper, "world")
    assert reply != ids_of(wrapper, "world")
    ids = [*prompt, *reply, end]
    replay.remember(ids)
    text = text_of(wrapper, ids)
    assert replay.encode(text + "the user").ids[: len(ids)] == ids
    assert Replay(wrapper).encode(text + "the user").ids[: len(ids)] != ids


def _pieces(wrapper: TokenizerWrapper, text: str) -> list[int]:
    return [marker(wrapper, letter) for letter in text]


def test_what_followed_other_ids_is_not_replayed() -> None:
    wrapper = tokenizer()
    replay = Replay(wrapper)
    reply = letters(wrapper, "hello world")
    replay.remember([*ids_of(wrapper, "<bos>the user<end>"), *reply, marker(wrapper, "<end>")])
    same, other = "<bos>the user<end>hello world<end>", "<bos>the answer<end>hello world<end>"
    assert replay.encode(same).ids == [*ids_of(wrapper, "<bos>the user<end>"), *reply, marker(wrapper, "<end>")]
    assert replay.encode(other).ids == ids_of(wrapper, other)
    assert replay.encode("hello world").ids == ids_of(wrapper, "hello world")


def test_of_two_replies_to_the_same_each_is_replayed() -> None:
    wrapper = tokenizer()
    replay, end = Replay(wrapper), marker(wrapper, "<end>")
    prompt = ids_of(wrapper, "<bos>hello<end>")
    for said in ("the answer", "the answer is hello", "hello"):
        replay.remember([*prompt, *letters(wrapper, said), end])
    for said in ("the answer", "the answer is hello", "hello"):
        ids = [*prompt, *letters(wrapper, said), end]
        assert replay.encode(text_of(wrapper, ids)).ids == ids


def test_a_marker_that_was_only_spelled_is_replayed_as_spelled() -> None:
    wrapper = tokenizer()
    replay = Replay(wrapper)
    ids = [*ids_of(wrapper, "<bos>hello<end>"), *letters(wrapper, "so <"), *letters(wrapper, "think> it is")]
    assert marker(wrapper, "<think>") not in ids
    replay.remember(ids)
    text = text_of(wrapper, ids)
    assert replay.encode(text + "<end>hello").ids == [*ids, *ids_of(wrapper, "<end>hello")]
    assert replay.encode(text + " hello<end>").ids == ids_of(wrapper, text + " hello<end>")


def test_the_longest_of_what_is_known_is_replayed() -> None:
    wrapper = tokenizer()
    replay = Replay(wrapper)
    prompt = ids_of(wrapper, "<bos>hello<end>")
    marked = [*prompt, *letters(wrapper, "hello "), marker(wrapper, "<think>"), marker(wrapper, "<end>")]
    spelled = [*prompt, *letters(wrapper, "hello <"), *letters(wrapper, "think> it is"), marker(wrapper, "<end>")]
    replay.remember(marked)
    replay.remember(spelled)
    assert replay.encode(text_of(wrapper, spelled)).ids == spelled
    assert replay.encode(text_of(wrapper, marked)).ids == marked


def test_white_space_that_a_template_strips_costs_nothing_before_it() -> None:
    wrapper = tokenizer()
    replay = Replay(wrapper)
    reply = letters(wrapper, "hello there")
    prompt = ids_of(wrapper, "<bos>the user<end>")
    replay.remember([*prompt, *reply, *letters(wrapper, "\n \n"), marker(wrapper, "<end>")])
    assert replay.encode("<bos>the user<end>hello there<end>").ids == [*prompt, *reply, marker(wrapper, "<end>")]


def test_the_places_of_markers_are_those_of_the_ids() -> None:
    wrapper = tokenizer("stripping")
    replay = Replay(wrapper)
    text = "<bos>hello  <end>  world<end>"
    replay.remember([*ids_of(wrapper, "<bos>"), *letters(wrapper, "hello"), *ids_of(wrapper, "  <end>")])
    for special in (False, True):
        encoded = replay.encode(text, special)
        for border in encoded.borders:
            assert text_of(wrapper, [encoded.ids[border.at]]) == text[border.start : border.end]
        assert [text[border.start : border.end] for border in encoded.borders] == ["<bos>", "<end>", "<end>"]


def test_text_that_stands_alone_is_replayed_too() -> None:
    wrapper = tokenizer()
    replay = Replay(wrapper)
    ids = [marker(wrapper, "<bos>"), *letters(wrapper, "hello world")]
    replay.remember(ids)
    assert replay.encode("hello world", special=True).ids == ids
    assert replay.encode("hello world").ids == ids_of(wrapper, "hello world")


def test_memory_is_bounded_and_the_longest_unused_goes_first() -> None:
    wrapper = tokenizer()
    replay, end = Replay(wrapper, budget=4000), marker(wrapper, "<end>")
    said = [[*ids_of(wrapper, f"<bos>user {i}<end>"), *letters(wrapper, "hello world"), end] for i in range(40)]
    for ids in said:
        replay.remember(ids)
        assert replay.encode(text_of(wrapper, said[0])).ids == said[0]  # in use all the time
        assert replay.nbytes <= 4000
    replayed = [replay.encode(text_of(wrapper, ids)).ids == ids for ids in said]
    assert replayed[0] and replayed[-1] and not replayed[1] and 3 < sum(replayed) < 20
    replay.remember(letters(wrapper, "hello world " * 200))
    assert replay.nbytes <= 4000 and replay.encode(text_of(wrapper, said[-1])).ids == said[-1]


def test_what_the_tokenizer_would_say_takes_no_memory() -> None:
    replay = Replay(tokenizer())
    replay.remember(ids_of(tokenizer(), "<bos>hello world<end>the answer"))
    assert replay.nbytes == 0


def test_a_tokenizer_that_changes_text_on_its_own_is_left_alone() -> None:
    class Lines(PreTrainedTokenizerFast):
        def encode(self, text: str, **options: bool) -> list[int]:
            ids: list[int] = super().encode(text.replace("\n", " "), **options)
            return ids

    wrapper = TokenizerWrapper(Lines(tokenizer_object=tokenizer().backend_tokenizer))  # type: ignore[no-untyped-call]
    replay = Replay(wrapper)
    replay.remember(letters(wrapper, "hello world"))
    assert replay.encode("hello\nworld").ids == ids_of(tokenizer(), "hello world")
    assert replay.encode("hello world").borders == ()


def test_many_threads_may_use_it() -> None:
    wrapper = tokenizer()
    replay, end = Replay(wrapper, budget=6000), marker(wrapper, "<end>")
    wrong: list[int] = []

    def talk(number: int) -> None:
        for turn in range(30):
            ids = [*ids_of(wrapper, f"<bos>user {number}.{turn}<end>"), *letters(wrapper, "hello world"), end]
            replay.remember(ids)
            text = text_of(wrapper, ids)
            if text_of(wrapper, replay.encode(text).ids) != text:
                wrong.append(turn)

    threads = [Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
