"""langchain-openai against a server: python use_langchain.py GIVEN, as use_openai.py."""

import json
import sys
import time
from importlib.metadata import version

import httpx
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

given = json.loads(sys.argv[1])
chat = ChatOpenAI(
    base_url=given["url"] + "/v1", api_key="x", model=given["model"], max_retries=0, use_responses_api=False
)
user = HumanMessage("Hello?")


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@tool
def weather(city: str, days: int) -> str:
    """The weather in a city."""
    return f"{city}, {days}: sunny"


answer = chat.invoke([user])
assert answer.content == given["text"], answer
assert answer.usage_metadata["output_tokens"] > 0

chunks = list(chat.stream([user], stream_usage=True))
assert len(chunks) > 5 and "".join(chunk.content for chunk in chunks) == given["text"]

bound = chat.bind_tools([weather])
whole = None
for chunk in bound.stream([user]):
    whole = chunk if whole is None else whole + chunk
assert whole.content == given["call_text"], whole
(call,) = whole.tool_calls
assert call["name"] == "weather" and call["args"] == given["arguments"]
after = bound.invoke([user, whole, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])])
assert after.content == given["after"], after

person = chat.with_structured_output(Person, method="json_schema").invoke([user])
assert person == Person(**given["person"])

stream = chat.stream([HumanMessage("for ever")])
for number, _ in enumerate(stream):
    if number == 5:
        break
stream.close()
until = time.monotonic() + 15
while (load := httpx.get(given["url"] + "/health").json())["live"]:
    assert time.monotonic() < until, load
    time.sleep(0.05)

report = {"version": version("langchain-openai"), "streams": "yes", "stops": "yes", "calls": "yes", "continues": "yes"}
print(json.dumps(report | {"remarks": "json_schema; reasoning is not passed on by it"}))
