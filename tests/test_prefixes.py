"""What was read before is not read again, and nobody can tell from what is said."""

import random
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import PROGRAMS, Forced, gap, open_sequence, tiny_pair, varied_tokens
from test_programs import Reader, Toy
from test_rounds import EXACT
from test_snapshots import FEW, pair_of

from mtp_mlx import memory
from mtp_mlx.cache import FullCache
from mtp_mlx.choosing import Rules
from mtp_mlx.models.gemma4 import Model as Gemma4
from mtp_mlx.ngram import NOBODY
from mtp_mlx.prefixes import NEAR, WAYPOINTS, Prefixes, Text
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Pair

PLENTY = 2**30
TEXT = varied_tokens(400)


def _pair(name: str = "gemma4_keqv") -> Pair:
    return Pair(*pair_of(name), PROGRAMS)


def _rules(text: list[int]) -> Rules:
    """They write the given text."""
    return Rules(Forced(mx.array(text + [0] * 40)), drafts="argmax")


def _read(prefixes: Prefixes, prompt: list[int], marks: tuple[int, ...] = (), rounds: int = 0) -> int:
    """Read a prompt with a store's help and let it end; how many tokens were cached."""
    with prefixes.open(prompt, Rules()) as text:
        done = [text.cached, *text.read(32, marks)]
        assert done == sorted(done) and done[-1] == len(prompt) - 1 == text.sequence.length
        for _ in range(rounds):
            text.sequence.round(0)
        return text.cached


def _held(prefixes: Prefixes) -> list[int]:
    """Lengths of the texts that are stored."""
    return sorted(entry.snapshot.length for entry in prefixes._entries)


@pytest.mark.parametrize("name", FEW)
def test_a_conversation_that_goes_on_from_what_is_stored_is_one_that_was_read(name: str) -> None:
    """Three turns and a second reply to the first, with drafts in all of them, against sequences that read it all."""
    pair = _pair(name)
    prefixes = Prefixes(pair, PLENTY, every=32, near=1)
    branch = TEXT[:75] + varied_tokens(100, seed=8)
    for text, length, stored in ((TEXT, 60, 0), (TEXT, 90, 63), (branch, 90, 64), (TEXT, 140, 93), (branch, 95, 93)):
        with prefixes.open(text[:length], _rules(text)) as visit:
            assert visit.cached == stored
            assert list(visit.read(16))[-1:] in ([length - 1], [])
            cold = open_sequence(*pair_of(name), _rules(text).sampler)
            cold.prefill(text[:length], 2048, lambda done, total: None)
            for drafts in (0, 3, [*text[length + 2 : length + 5], 0]):
                mine, theirs = visit.sequence.round(drafts), cold.round(drafts)
                assert mine.tokens == theirs.tokens and mine.accepted == theirs.accepted
                assert gap(mine.logprobs[: len(mine.tokens)], theirs.logprobs[: len(mine.tokens)]) < EXACT
            visit.sequence.keep(2)  # a stop inside an accepted run
    assert prefixes.usage.hits == 4


def test_the_last_token_of_a_prompt_is_always_read_again() -> None:
    prefixes = Prefixes(_pair(), PLENTY, near=1)
    assert [_read(prefixes, TEXT[:100]) for _ in range(2)] == [0, 99]
    assert _read(prefixes, TEXT[:101]) == 99
    assert _read(prefixes, TEXT[:99]) == 0, "of a ring there is no earlier state"
    assert _read(prefixes, TEXT[:1]) == _read(prefixes, TEXT[:1]) == 0
    usage = prefixes.usage
    assert (usage.texts, usage.hits, usage.tokens, usage.saved) == (6, 2, 402, 198)
    assert usage.snapshots == len(_held(prefixes)) and usage.nbytes == prefixes.nbytes > 0


def test_the_place_where_two_texts_part_is_stored_when_the_second_is_read() -> None:
    prefixes = Prefixes(_pair(), PLENTY, near=10)
    others = [TEXT[:80] + varied_tokens(40, seed=seed) for seed in range(3)]
    assert [_read(prefixes, other) for other in others] == [0, 0, 80]
    assert _read(prefixes, others[0]) == 119
    assert _held(prefixes) == [80, 119, 119, 119]


def test_a_caller_says_where_texts_may_part() -> None:
    prefixes = Prefixes(_pair(), PLENTY, near=10)
    _read(prefixes, TEXT[:120], marks=(0, 50, 114, 119, 500))
    assert _held(prefixes) == [50, 114]  # the end of the prompt is too near
    assert _read(prefixes, [*TEXT[:50], 1, 2, 3]) == 50
    assert _read(prefixes, [*TEXT[:114], 1, 2, 3]) == 114


def test_a_reply_is_there_for_the_next_turn() -> None:
    prefixes = Prefixes(_pair(), PLENTY, near=10)
    with prefixes.open(TEXT[:40], _rules(TEXT)) as text:
        list(text.read(32))
        for drafts in (0, *[3] * 11):
            text.sequence.round(drafts)
        said = text.sequence.text
    assert said == TEXT[: len(said)] and len(said) > 50
    assert _read(prefixes, [*said, 1, 2, 3]) == len(said) - 1


def test_a_long_prompt_leaves_waypoints_on_a_grid_that_others_find() -> None:
    prefixes = Prefixes(_pair(), PLENTY, every=20, near=10)
    _read(prefixes, TEXT[:101])
    assert _held(prefixes) == [20, 40, 60, 80, 100]
    assert _read(prefixes, TEXT[:75]) == 60
    prefixes = Prefixes(_pair(), PLENTY, every=10, near=1)
    _read(prefixes, TEXT[:400])
    assert _held(prefixes) == [80, 160, 240, 320, 399] and len(_held(prefixes)) <= WAYPOINTS + 1


def test_a_prompt_that_is_broken_off_goes_on_at_its_last_chunk() -> None:
    prefixes = Prefixes(_pair(), PLENTY, near=10)
    with prefixes.open(TEXT[:200], Rules()) as text:
        for done in text.read(32):
            if done >= 64:
                break
    assert _read(prefixes, TEXT[:200]) == 64
    with pytest.raises(KeyboardInterrupt), prefixes.open(TEXT[:300], Rules()) as text:
        for _ in text.read(32):
            raise KeyboardInterrupt
    assert _read(prefixes, TEXT[:300]) == 199 + 32
    with pytest.raises(ValueError), prefixes.open(TEXT[:400], Rules()) as text:
        for _ in text.read(32):
            raise ValueError
    assert _read(prefixes, TEXT[:400]) == 299, "nobody knows what an error has left"
    assert not prefixes._texts


def _room_for(snapshots: float) -> int:
    """Bytes of so many snapshots of 100 tokens that share nothing."""
    prefixes = Prefixes(_pair(), PLENTY)
    _read(prefixes, TEXT[:101])
    return int(snapshots * prefixes.nbytes)


def test_what_was_not_used_for_longest_goes_first() -> None:
    prefixes = Prefixes(_pair(), _room_for(3.5))
    texts = [varied_tokens(101, seed=seed) for seed in range(5)]
    for text in texts[:3]:
        _read(prefixes, text)
    assert _read(prefixes, texts[0]) == 100
    _read(prefixes, texts[3])
    assert [_read(prefixes, [*text, 1]) for text in (texts[1],)] == [0]  # evicted; it takes the place of texts[2]
    assert [prefixes._trie.get(text[:100]) is not None for text in texts] == [True, False, False, True, False]
    assert prefixes.usage.evicted == 2 and prefixes.nbytes <= prefixes.budget


def test_what_a_text_goes_on_from_stays_while_it_is_read() -> None:
    prefixes = Prefixes(_pair(), _room_for(2.5))
    _read(prefixes, TEXT[:101])
    with prefixes.open(TEXT[:101], Rules()) as text:
        assert text.cached == 100
        for seed in range(4):
            _read(prefixes, varied_tokens(101, seed=seed + 50))
            assert prefixes._trie.get(TEXT[:100]) is not None
        with prefixes.open(varied_tokens(101, seed=50 + 3), Rules()) as other:
            assert other.cached == 100
            assert _read(prefixes, varied_tokens(101, seed=60)) == 0
            assert _held(prefixes) == [100, 100], "no room: everything is in use"
    _read(prefixes, varied_tokens(101, seed=61))
    assert prefixes._trie.get(TEXT[:100]) is None


def test_waypoints_go_before_ends_and_never_in_their_place() -> None:
    prefixes = Prefixes(_pair(), _room_for(3.5), every=40)
    _read(prefixes, TEXT[:101])  # a waypoint at 80
    assert _held(prefixes) == [80]
    _read(prefixes, varied_tokens(81, seed=1))
    prefixes.every = 1000
    _read(prefixes, varied_tokens(101, seed=2))
    assert _held(prefixes) == [80, 80, 100]
    _read(prefixes, varied_tokens(101, seed=3))
    assert _held(prefixes) == [80, 100, 100] and prefixes._trie.get(TEXT[:80]) is None
    prefixes.every = 70
    _read(prefixes, varied_tokens(110, seed=4))  # a waypoint at 70 finds no room, so there is one for the end
    assert _held(prefixes) == [100, 100, 109]


def test_a_waypoint_that_was_of_use_is_no_less_than_an_end() -> None:
    prefixes = Prefixes(_pair(), _room_for(2.1), every=40)
    _read(prefixes, varied_tokens(71, seed=1))
    _read(prefixes, TEXT[:101])  # a waypoint at 80
    assert _read(prefixes, [*TEXT[:80], 1, 2, 3]) == 80
    _read(prefixes, varied_tokens(75, seed=2))
    assert _held(prefixes) == [74, 80]


def test_what_does_not_fit_at_all_evicts_nothing() -> None:
    prefixes = Prefixes(_pair(), _room_for(1.2))
    _read(prefixes, TEXT[:101])
    _read(prefixes, varied_tokens(350, seed=1))
    assert _held(prefixes) == [100] and prefixes.usage.evicted == 0


def test_a_conversation_goes_on_where_there_is_room_for_its_newest_turn_only() -> None:
    prefixes = Prefixes(_pair(), _room_for(1.9))
    for turn, cached in ((101, 0), (171, 100), (241, 170)):
        assert _read(prefixes, TEXT[:turn]) == cached
    assert len(_held(prefixes)) == 1 and prefixes.nbytes <= prefixes.budget


def test_texts_that_begin_alike_share_their_rows() -> None:
    """Of a conversation of 20 turns with full attention only, hardly more is held than of its longest text."""
    pair = Pair(Toy((FullCache(),), 512), NOBODY)
    prefixes = Prefixes(pair, PLENTY)
    row = 2 * 4 * 128 * 4
    for turn in range(1, 21):
        _toy_read(prefixes, [token % 320 for token in range(70 * turn + 1)])
    assert len(_held(prefixes)) == 20
    assert 1400 * row <= prefixes.nbytes <= (1400 + 19 * 32) * row
    alone = sum(entry.snapshot.nbytes for entry in prefixes._entries)
    assert alone > 9 * prefixes.nbytes


def _toy_read(prefixes: Prefixes, prompt: list[int]) -> int:
    target = prefixes.pair.target
    assert isinstance(target, Toy)
    target.layers = (FullCache(),)
    with prefixes.open(prompt, Rules()) as text:
        list(text.read(64))
        return text.cached


def test_keys_and_values_of_full_attention_are_cut_at_any_token() -> None:
    model, _ = tiny_pair("gemma4_keqv")
    assert isinstance(model, Gemma4)
    kinds = ("full_attention",) * len(model.config.layer_types)
    heads, sizes = model.config.kv_heads[-1], model.config.head_dims[-1]
    config = replace(model.config, layer_types=kinds, kv_heads=(heads,) * len(kinds), head_dims=(sizes,) * len(kinds))
    mx.random.seed(1)
    target = Gemma4(config)
    prefixes = Prefixes(Pair(target, NOBODY, PROGRAMS), PLENTY, near=10)
    assert [_read(prefixes, TEXT[:n]) for n in (150, 50, 121, 300)] == [0, 49, 120, 149]
    for cut in (20, 120, 160, 250):
        prompt = TEXT[:cut] + varied_tokens(9, seed=cut)
        with prefixes.open(prompt, Rules()) as text:
            assert text.cached == cut
            list(text.read(4))
            cold = open_sequence(target, NOBODY, Rules().sampler)
            cold.prefill(prompt, 2048, lambda done, total: None)
            assert gap(text.sequence.round(0).logprobs, cold.round(0).logprobs) < EXACT


@pytest.mark.parametrize("name", ["gemma4_keqv", "qwen3_5_tied"])
def test_the_budget_holds_whatever_is_done(name: str) -> None:
    """Random conversations, side by side, with branches and texts that are broken off."""
    rng, pair = random.Random(1), _pair(name)
    trial = Prefixes(pair, PLENTY)
    _read(trial, TEXT[:101])
    prefixes = Prefixes(pair, int(trial.nbytes * 6.5), every=48, near=16)
    texts, running = [varied_tokens(20, seed=9)], list[Text]()
    for _ in range(60):
        if running and rng.random() < 0.5:
            text = running.pop(rng.randrange(len(running)))
            for _ in text.read(24, [rng.randrange(1, 200)]):
                _check(prefixes)
                if rng.random() < 0.2:
                    break
            texts.append(text.sequence.text or text.prompt)
            text.__exit__(ValueError if rng.random() < 0.1 else None)
        else:
            base = rng.choice(texts[-4:])
            prompt = base[: rng.choice((len(base), rng.randint(1, len(base))))] + [
                rng.randrange(4, 320) for _ in range(rng.randint(1, 70))
            ]
            text = prefixes.open(prompt[:300], Rules())
            assert text.sequence.text == (prompt[: text.cached + 1] if text.cached else []) and text.cached < len(
                prompt
            )
            running.append(text)
        _check(prefixes)
    assert prefixes.usage.hits > 5 and prefixes.usage.evicted > 5
    for entry in prefixes._entries[-3:]:
        prompt = [*entry.snapshot.tokens, 7]
        restored, cold = prefixes.open(prompt, Rules()), Sequence(pair, Rules())
        assert restored.cached == len(prompt) - 1
        cold.prefill(prompt, 2048, lambda done, total: None)
        assert gap(restored.sequence.round(0).logprobs, cold.round(0).logprobs) < EXACT


def test_what_texts_have_been_promised_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = Prefixes(_pair(), PLENTY, near=1)
    _read(prefixes, TEXT[:100])
    held = prefixes.nbytes
    with prefixes.open(TEXT[:101], Rules(), promised=10**9) as text:
        claims = prefixes.claims
        assert claims.held == text.sequence.cache.nbytes and claims.held + claims.due == 10**9
        assert prefixes.evictable == 0, "the text goes on from what is held"
        monkeypatch.setattr(memory, "free_bytes", lambda: claims.due)
        assert _read(prefixes, TEXT[300:350]) == 0 and prefixes.nbytes == held, "there is no room beside it"
        text.promised = 0
        assert prefixes.claims.due == 0 and _read(prefixes, TEXT[300:350]) == 0 and prefixes.nbytes > held
    assert prefixes.evictable == prefixes.nbytes and prefixes.claims == (0, 0)


def _check(prefixes: Prefixes) -> None:
    assert prefixes.nbytes <= prefixes.budget
    for entry in prefixes._entries:
        assert prefixes._trie.get(entry.snapshot.tokens) is entry
    for text in prefixes._texts:
        assert text.entry is None or text.entry in prefixes._entries


def test_the_bytes_counted_are_the_bytes_held() -> None:
    pair = Pair(Toy((FullCache(),), 8192), Reader())
    prefixes = Prefixes(pair, PLENTY, every=512, near=NEAR)
    before = mx.get_active_memory()
    for length in (2000, 2100, 3000):
        assert isinstance(pair.target, Toy)
        pair.target.layers = (FullCache(),)
        with prefixes.open([token % 320 for token in range(length)], Rules()) as text:
            list(text.read(512))
        del text
        pair.target.layers = ()
    mx.clear_cache()
    assert mx.get_active_memory() - before == pytest.approx(prefixes.nbytes, rel=0.02)


def test_a_sequence_is_given_room_for_the_whole_prompt_at_once() -> None:
    prefixes = Prefixes(_pair(), PLENTY, every=16, near=1)
    for length, room in ((200, 256), (400, 512)):
        with prefixes.open(TEXT[:length], Rules()) as text:
            capacity = text.sequence.cache.capacity
            list(text.read(16))
            assert isinstance(text.sequence, Sequence) and text.sequence.cache.capacity == capacity == room
