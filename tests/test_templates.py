"""What a template takes is found out by asking it, and every conversation is made to fit."""

import pytest
from talks import BRACES, FIELDS, STRICT, TAGS, WEATHER, answer, call, result, system, tokenizer, user

from mtp_mlx.errors import CheckpointError, RequestError
from mtp_mlx.messages import read_messages
from mtp_mlx.templates import Template, Traits

CALLED = [user("weather?"), answer("", tool_calls=[call('{"city": "Paris"}')]), result("sunny"), answer("It is sunny.")]
TEMPLATES = {"tags": TAGS, "braces": BRACES, "strict": STRICT, "fields": FIELDS}


def _fitted(template: str, messages: list[dict[str, object]]) -> str:
    """The text of messages after they were made to fit."""
    made = Template(tokenizer(template))
    return made.render(made.fitted(read_messages(messages)))


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("tags", Traits(True, False, True, True, False, "object", "message", True)),
        ("braces", Traits(True, True, True, True, True, "object", "message", True)),
        ("strict", Traits(False, False, False, False, True, "none", "none", False)),
        ("fields", Traits(False, False, True, False, True, "text", "field", False)),
    ],
)
def test_what_a_template_takes_is_found_out(name: str, traits: Traits) -> None:
    assert Template(tokenizer(TEMPLATES[name])).traits == traits


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_system_is_heard_wherever_it_speaks(name: str) -> None:
    messages = [system("sys1"), system("sys2"), user("ask1"), answer("say1"), system("sys3"), user("ask2")]
    text = _fitted(TEMPLATES[name], messages)
    places = [text.index(word) for word in ("sys1", "sys2", "ask1", "say1", "sys3", "ask2")]
    assert places == sorted(places)
    assert ("<system>\nsys3\n</system>" in text) == (name != "braces")
    assert ("<system>\nsys1\n\nsys2\n</system>" in text) == (name in ("strict", "fields"))


def test_turns_are_merged_only_where_they_must_alternate() -> None:
    messages = [user("a"), user("b"), answer("c"), user("d")]
    assert _fitted(TAGS, messages).count("<|im_start|>user") == 3
    text = _fitted(STRICT, messages)
    assert text.count("<|turn>user") == 2 and "a\n\nb" in text


def test_calls_are_spelled_by_the_template() -> None:
    assert "<function=weather>\n<parameter=city>\nParis\n</parameter>" in _fitted(TAGS, CALLED)
    assert '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>' in _fitted(BRACES, CALLED)
    assert '<tool_call>{"city": "Paris"}</tool_call>[weather: sunny]' in _fitted(FIELDS, CALLED)


def test_a_result_goes_on_with_the_turn_that_called() -> None:
    text = _fitted(BRACES, CALLED)
    assert "<tool_call|><|tool_response>response:weather{value:" in text
    assert text.count("<|turn>model") == 2  # that turn, and the one to come


def test_a_result_goes_where_the_template_looks_for_it() -> None:
    any_role = FIELDS.replace("message.role not in ['user', 'assistant']", "false")
    assert Template(tokenizer(any_role)).traits.results == "field"
    text = _fitted(any_role, CALLED)
    assert "</tool_call>[weather: sunny]" in text and "<|im_start|>tool" not in text


def test_a_template_without_calls_refuses_them() -> None:
    with pytest.raises(RequestError, match="no place for calls"):
        _fitted(STRICT, CALLED)
    with pytest.raises(RequestError, match="no place for tools"):
        Template(tokenizer(STRICT)).fitted_tools([WEATHER])


def test_tools_are_made_plain_only_for_a_template_that_spells_them() -> None:
    odd = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": ["null"]}}}}}
    assert Template(tokenizer(TAGS)).fitted_tools([odd]) == [odd]
    made = Template(tokenizer(BRACES))
    with pytest.raises(RequestError):
        made.render([user("a")], [odd])
    text = made.render([user("a")], made.fitted_tools([odd]))
    assert 'a:{description:<|"|><|"|>,type:<|"|>STRING<|"|>,nullable:true}' in text


def test_what_a_template_refuses_is_the_requests_fault() -> None:
    made = Template(tokenizer(TAGS))
    with pytest.raises(RequestError, match=r"refuses this conversation: No user query found in messages\.$"):
        made.render([system("a")])


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('broken\nfor all') }}", "{{ messages[0].content + 1 }}", "{% for %}", "{{ 1 / 0 }}"],
)
def test_a_template_that_refuses_everything_is_the_models_fault(template: str) -> None:
    with pytest.raises(CheckpointError, match="the model's chat template fails") as raised:
        _ = Template(tokenizer(template)).traits
    assert "\n" not in str(raised.value)


def test_a_template_is_kept_from_the_interpreter() -> None:
    made = Template(tokenizer("{{ messages[0].content.__class__.__mro__ }}"))
    with pytest.raises((RequestError, CheckpointError)):
        made.fitted([user("a")])
