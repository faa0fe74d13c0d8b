// The openai package for Node against a server: node use_openai.mjs GIVEN, as use_openai.py.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);
const OpenAI = require("openai");
const { VERSION: version } = require("openai/version");

const given = JSON.parse(process.argv[2]);
const { model } = given;
const client = new OpenAI({ baseURL: `${given.url}/v1`, apiKey: "x", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello?" }];
const object = (properties) => ({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });
const parameters = object({ city: { type: "string" }, days: { type: "integer" } });
const tools = [{ type: "function", function: { name: "weather", description: "The weather in a city.", parameters } }];

assert((await client.models.list()).data.some(({ id }) => id === model));

const answer = await client.chat.completions.create({ model, messages });
assert.equal(answer.choices[0].message.content, given.text);

let content = "", finish = null, usage = null;
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true, stream_options: { include_usage: true } })) {
  content += chunk.choices[0]?.delta.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}
assert.equal(content, given.text);
assert.equal(finish, "stop");
assert(usage.prompt_tokens_details.cached_tokens > 0);

const streamed = await client.chat.completions.stream({ model, messages, tools }).finalChatCompletion();
const said = streamed.choices[0].message;
assert.equal(streamed.choices[0].finish_reason, "tool_calls");
assert.deepEqual(JSON.parse(said.tool_calls[0].function.arguments), given.arguments);
const result = { role: "tool", tool_call_id: said.tool_calls[0].id, content: "sunny, 21" };
const after = await client.chat.completions.create({ model, messages: [...messages, said, result], tools });
assert.equal(after.choices[0].message.content, given.after);
assert(after.usage.prompt_tokens_details.cached_tokens > 0);

// The SDK calls the function itself and goes on.
const asked = [];
const runner = client.chat.completions.runTools({
  model,
  messages,
  tools: [{ type: "function", function: { ...tools[0].function, parse: JSON.parse, function: (read) => (asked.push(read), "sunny, 21") } }],
});
assert.equal(await runner.finalContent(), given.after);
assert.deepEqual(asked, [given.arguments]);

const schema = object({ name: { type: "string" }, age: { type: "integer" } });
const response_format = { type: "json_schema", json_schema: { name: "person", strict: true, schema } };
const shaped = await client.chat.completions.create({ model, messages, response_format });
assert.deepEqual(JSON.parse(shaped.choices[0].message.content), given.person);

assert.equal((await client.completions.create({ model, prompt: "# add\n" })).choices[0].text, given.completion);
await assert.rejects(client.chat.completions.create({ model: "another", messages }), OpenAI.NotFoundError);

const endless = await client.chat.completions.create({ model, messages: [{ role: "user", content: "for ever" }], stream: true });
let seen = 0;
for await (const _ of endless) if (++seen === 5) break;
const until = Date.now() + 15000;
while ((await (await fetch(`${given.url}/health`)).json()).live) {
  assert(Date.now() < until, "the server goes on writing");
  await new Promise((resolve) => setTimeout(resolve, 50));
}

const remarks = "models, json_schema, completions, runTools, errors";
console.log(JSON.stringify({ version, streams: "yes", stops: "yes", calls: "yes", continues: "yes", remarks }));
