"""litellm against a server: python use_litellm.py GIVEN, as use_openai.py."""

import json
import sys
import time
from importlib.metadata import version

import httpx
import litellm

given = json.loads(sys.argv[1])
settings = {"model": "openai/" + given["model"], "api_base": given["url"] + "/v1", "api_key": "x", "num_retries": 0}
user = [{"role": "user", "content": "Hello?"}]
properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
parameters = {"type": "object", "properties": properties, "required": ["city", "days"]}
tools = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": parameters}}]

answer = litellm.completion(messages=user, **settings)
assert answer.choices[0].message.content == given["text"], answer
assert answer.choices[0].message.reasoning_content.strip() == given["thought"]

chunks = list(litellm.completion(messages=user, stream=True, stream_options={"include_usage": True}, **settings))
whole = litellm.stream_chunk_builder(chunks)
assert whole.choices[0].message.content == given["text"] and whole.choices[0].finish_reason == "stop", whole
assert whole.choices[0].message.reasoning_content.strip() == given["thought"]
assert whole.usage.prompt_tokens_details.cached_tokens > 0, whole.usage

called = litellm.stream_chunk_builder(list(litellm.completion(messages=user, tools=tools, stream=True, **settings)))
said = called.choices[0].message
assert called.choices[0].finish_reason == "tool_calls" and said.content == given["call_text"], called
assert json.loads(said.tool_calls[0].function.arguments) == given["arguments"]
result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny, 21"}
after = litellm.completion(messages=[*user, said.model_dump(), result], tools=tools, **settings)
assert after.choices[0].message.content == given["after"], after

try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 400000}], **settings)
    raise AssertionError("a prompt longer than the context was accepted")
except litellm.ContextWindowExceededError:
    pass  # so litellm has understood why

stream = litellm.completion(messages=[{"role": "user", "content": "for ever"}], stream=True, **settings)
for number, _ in enumerate(stream):
    if number == 5:
        break
stream.completion_stream.response.close()
until = time.monotonic() + 15
while (load := httpx.get(given["url"] + "/health").json())["live"]:
    assert time.monotonic() < until, load
    time.sleep(0.05)

report = {"version": version("litellm"), "streams": "yes", "stops": "yes", "calls": "yes", "continues": "yes"}
print(json.dumps(report | {"remarks": "a prompt that is too long is told as such"}))
