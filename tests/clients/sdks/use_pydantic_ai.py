"""pydantic-ai against a server: python use_pydantic_ai.py GIVEN, as use_openai.py."""

import asyncio
import json
import sys
from importlib.metadata import version

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

given = json.loads(sys.argv[1])
model = OpenAIChatModel(given["model"], provider=OpenAIProvider(base_url=given["url"] + "/v1", api_key="x"))


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


async def use() -> None:
    async with Agent(model).run_stream("Hello?") as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 5 and "".join(pieces).strip() == given["text"].strip(), pieces

    asked = []
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str, days: int) -> str:
        """The weather in a city."""
        asked.append({"city": city, "days": days})
        return "sunny, 21"

    assert (await agent.run("Hello?")).output == given["after"]
    assert asked == [given["arguments"]]

    shaped = await Agent(model, output_type=NativeOutput(Person)).run("Who?")
    assert shaped.output == Person(**given["person"])


asyncio.run(use())
report = {"version": version("pydantic-ai-slim"), "streams": "yes", "stops": "-", "calls": "yes", "continues": "yes"}
print(json.dumps(report | {"remarks": "NativeOutput"}))
