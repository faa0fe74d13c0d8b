"""The openai package against a server: python use_openai.py GIVEN, where GIVEN is JSON of what the model will say."""

import json
import sys
import time

import httpx
import openai

given = json.loads(sys.argv[1])
client = openai.OpenAI(base_url=given["url"] + "/v1", api_key="x", max_retries=0)
model = given["model"]
user = [{"role": "user", "content": "Hello?"}]
tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}

assert model in [each.id for each in client.models.list()]
assert client.models.retrieve(model).id == model

# One body.
answer = client.chat.completions.create(model=model, messages=user)
assert answer.choices[0].message.content == given["text"], answer
assert answer.choices[0].message.reasoning_content.strip() == given["thought"]
assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 0

# A stream.
content, thoughts, finish, usage, roles = "", "", None, None, 0
with client.chat.completions.create(
    model=model, messages=user, stream=True, stream_options={"include_usage": True}
) as stream:
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thoughts += choice.delta.model_extra.get("reasoning_content") or ""
            roles += choice.delta.role is not None
            finish = choice.finish_reason or finish
assert content == given["text"] and thoughts.strip() == given["thought"], (content, thoughts)
assert finish == "stop" and roles == 1
assert usage.prompt_tokens_details.cached_tokens > 0, usage

# Limits.
cut = client.chat.completions.create(model=model, messages=user, max_completion_tokens=3)
assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
assert (
    client.completions.create(model=model, prompt="x", stop=["\n"]).choices[0].text
    == given["completion"].split("\n")[0]
)

# A call and what follows it, as one body and as a stream that the SDK puts together.
called = client.chat.completions.create(model=model, messages=user, tools=[tool], tool_choice="auto").choices[0]
assert called.finish_reason == "tool_calls" and called.message.content == given["call_text"]
(call,) = called.message.tool_calls
assert call.function.name == "weather" and json.loads(call.function.arguments) == given["arguments"]
with client.chat.completions.stream(model=model, messages=user, tools=[tool]) as stream:
    kinds = {event.type for event in stream}
    streamed = stream.get_final_completion().choices[0]
assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done", "content.delta"} <= kinds, kinds
assert json.loads(streamed.message.tool_calls[0].function.arguments) == given["arguments"]
for said in (called.message, streamed.message):
    turn = [*user, said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny, 21"}]
    after = client.chat.completions.create(model=model, messages=turn, tools=[tool])
    assert after.choices[0].message.content == given["after"], after
    assert after.usage.prompt_tokens_details.cached_tokens > 0

# A schema.
schema = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
shaped = client.chat.completions.create(
    model=model,
    messages=user,
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
)
assert json.loads(shaped.choices[0].message.content) == given["person"], shaped

# Raw text.
assert client.completions.create(model=model, prompt="# add\n").choices[0].text == given["completion"]
pieces = client.completions.create(model=model, prompt="# add\n", stream=True)
assert "".join(choice.text for piece in pieces for choice in piece.choices) == given["completion"]

# What is refused says why.
try:
    client.chat.completions.create(model="another", messages=user)
    raise AssertionError("another model was accepted")
except openai.NotFoundError as error:
    assert "another" in error.message and error.code == "model_not_found"
try:
    client.chat.completions.create(model=model, messages=user, temperature=-1)
    raise AssertionError("a temperature below 0 was accepted")
except openai.BadRequestError as error:
    assert error.param == "temperature"

# A stream that is left is not written on.
with client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "for ever"}], stream=True
) as stream:
    for number, _ in enumerate(stream):
        if number == 5:
            break
until = time.monotonic() + 15
while (load := httpx.get(given["url"] + "/health").json())["live"]:
    assert time.monotonic() < until, load
    time.sleep(0.05)

remarks = "models, json_schema, completions, stop words, limits, errors"
report = {"version": openai.__version__, "streams": "yes", "stops": "yes", "calls": "yes", "continues": "yes"}
print(json.dumps(report | {"remarks": remarks}))
