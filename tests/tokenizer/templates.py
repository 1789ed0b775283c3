"""One chat template of each style that checkpoints use, written for these tests, with the tokens it needs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STYLES", "Style"]


@dataclass(frozen=True)
class Style:
    """A template, its BOS, EOS and end-of-turn tokens, and what it can say."""

    template: str
    bos: str
    eos: str
    end_of_turn: str
    system: bool = True


_CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ default }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA3 = """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set year = strftime_now('%Y') %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set rest = messages[1:] -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- else -%}
    {%- set rest = messages -%}
    {%- set system = '' -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate user and assistant') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

_MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- set last = messages | length - (2 if messages[-1]['role'] == 'assistant' else 1) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' and loop.index0 == last and system %}
        {{- '[INST]' + system + '\\n\\n' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

_ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

_GEMMA = """\
{{ bos_token }}
{%- for message in messages -%}
    {%- if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' }}
    {%- generation %}{{ message['content'] | trim + '<end_of_turn>\\n' }}{% endgeneration -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""

STYLES = {
    "chatml": Style(_CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "default system": Style(
        _CHATML.replace("{{ default }}", "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"),
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "llama3": Style(_LLAMA3, "<|begin_of_text|>", "<|endoftext|>", "<|eot_id|>"),
    "llama2": Style(_LLAMA2, "<s>", "</s>", "</s>"),
    "mistral": Style(_MISTRAL, "<s>", "</s>", "</s>"),
    "zephyr": Style(_ZEPHYR, "<s>", "</s>", "</s>"),
    "gemma": Style(_GEMMA, "<bos>", "<|endoftext|>", "<end_of_turn>", system=False),
}

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
)
"""Special tokens of all styles, so that one vocabulary serves them all."""
