"""Small chat templates with the traps of those that are released, and tokenizers to go with them."""

from functools import cache
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mtp_mlx.conversation import Conversations
from mtp_mlx.dialects import find_dialect

# Qwen's traps: the system first or never, reasoning only after the last question and opened in the prompt, arguments
# as an object, everything stripped, results as turns of the user.
TAGS = """
{%- macro strip(content) %}{{- content | trim }}{% endmacro %}
{%- if tools %}
{{- '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}{{- '\n</tools>' }}
{%- if messages[0].role == 'system' %}{{- '\n\n' + strip(messages[0].content) }}{% endif %}{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + strip(messages[0].content) + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if ns.last < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}
{%- for message in messages %}
{%- set content = strip(message.content) %}
{%- if message.role == 'system' %}
{%- if not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
{%- elif message.role == 'user' %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set thought = '<think>\n' + (message.reasoning_content or '') | trim + '\n</think>\n\n' %}
{{- '<|im_start|>assistant\n' + (thought if loop.index0 > ns.last or preserve_thinking else '') + content }}
{%- for call in message.tool_calls or [] %}
{{- ('\n\n' if loop.first and content else '' if loop.first else '\n') + '<tool_call>\n<function=' }}
{{- call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
{%- else %}{{ raise_exception('Unexpected message role.') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n') }}
{%- endif %}"""

# Gemma's traps: schemas spelled word by word, sorted; every node needs a type and a description; arguments sorted;
# results go on with the turn that called; reasoning only where tools are called after the last question.
BRACES = """
{%- macro value(given) -%}
{%- if given is string %}{{- '<|"|>' + given + '<|"|>' }}
{%- elif given is boolean %}{{- 'true' if given else 'false' }}
{%- elif given is mapping %}{{- '{' + pairs(given) + '}' }}
{%- elif given is sequence -%}[{% for item in given %}{{ value(item) }}{{ ',' if not loop.last }}{% endfor %}]
{%- else %}{{- given }}{% endif -%}
{%- endmacro -%}
{%- macro pairs(given) -%}
{%- for key, item in given | dictsort %}{{- key + ':' + value(item) }}{{- ',' if not loop.last }}{% endfor -%}
{%- endmacro -%}
{%- macro schema(node) -%}
{%- if node is string %}{{ raise_exception('a schema is an object') }}{% endif %}
{%- for key, child in node.properties | dictsort -%}
{{- key + ':{description:' + value(child.description + '') + ',type:' + value(child.type.upper()) }}
{%- if child.nullable %},nullable:true{% endif %}
{%- if child.enum %},enum:{{ value(child.enum) }}{% endif %}
{%- if child.type == 'object' %},properties:{ {{- schema(child) -}} }{% endif %}
{%- if child.type == 'array' %},items:{type:{{ value(child['items'].type.upper()) }}}{% endif -%}
}{{ ',' if not loop.last }}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token }}
{%- set rest = messages %}
{%- if enable_thinking or tools or messages[0]['role'] == 'system' %}
{{- '<|turn>system\n' + ('<|think|>\n' if enable_thinking else '') }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{% set rest = messages[1:] %}{% endif %}
{%- for tool in tools or [] -%}
{{- '<|tool>declaration:' + tool.function.name + '{description:' + value(tool.function.description + '') }}
{{- ',parameters:{properties:{' + schema(tool.function.parameters) + '}}}<tool|>' }}
{%- endfor %}
{{- '<turn|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1, open=false) %}
{%- for message in rest %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in rest %}
{%- if message.role == 'tool' %}
{{- '<|tool_response>response:' + message.name + '{value:' + value(message.content) + '}<tool_response|>' }}
{%- else %}
{%- if not (ns.open and message.role == 'assistant') %}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{%- endif %}
{%- if message.reasoning and message.tool_calls and loop.index0 > ns.last %}
{{- '<|channel>thought\n' + message.reasoning + '\n<channel|>' }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<|tool_call>call:' + call.function.name + '{' + pairs(call.function.arguments) + '}<tool_call|>' }}
{%- endfor %}
{{- message.content | trim }}
{%- set ns.open = message.tool_calls | length > 0 if message.tool_calls else false %}
{%- if not ns.open %}{{- '<turn|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.open %}{{- '<|turn>model\n' }}{% endif %}"""

# An old template: no system, strictly in turns, no tools.
STRICT = """{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<|turn>' + message['role'] + '\n' + message['content'] + '<turn|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"""

# Arguments as JSON, results beside the calls.
FIELDS = """
{%- for message in messages %}
{%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function.arguments + '</tool_call>' }}{% endfor %}
{%- for result in message.tool_responses or [] %}{{- '[' + result.name + ': ' + result.response + ']' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

MARKERS = [
    *("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>"),
    *("<tool_call|>", "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>'),
]
_QWENS = MARKERS[:10]
_GEMMAS = [*MARKERS[:2], *MARKERS[10:]]
_SAMPLE = ["system user assistant model thought the answer is hello world weather in Paris, thinking of calls\n\n"] * 3


@cache
def tokenizer(template: str | None = TAGS, size: int = 340) -> TokenizerWrapper:
    """A byte-level BPE tokenizer with a few merges, a template, and the markers of that template's family."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(_SAMPLE, trainer)
    markers = _QWENS if template in (TAGS, FIELDS) else _GEMMAS
    made.add_tokens([AddedToken(marker, normalized=False, special=marker.endswith("os>")) for marker in markers])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return TokenizerWrapper(fast)


def conversations(template: str | None = TAGS) -> Conversations:
    wrapper = tokenizer(template)
    return Conversations(wrapper, find_dialect(wrapper.get_vocab()))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any, name: str = "weather", key: str = "call_1") -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: Any, key: str = "call_1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": key, "content": content}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "its name"}, "days": {"type": "integer"}},
    "required": ["city"],
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY},
}
