"""Chat templates in the manner of the usual ones, with what the assistant says marked; `plain` takes the marks out."""

from __future__ import annotations

import re

MARKED = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ (m.content or '') + '<|im_end|>\\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Texts are trimmed, and a token begins the text.
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ (m.content or '') | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # Another name for the assistant, and no system message.
    "gemma": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ (m.content or '') | trim + '<end_of_turn>\\n' }}"
        "{% endgeneration %}{% else %}{{ m.content | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Thoughts before the last question go; after it an empty thought comes; calls and answers of tools have marks.
    "qwen": (
        "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
        "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}"
        "{% for call in m.tool_calls or [] %}{{ '\\n' if said or not loop.first }}"
        "{{ '<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}"
        "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
        "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endgeneration %}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' }}"
        "{{ m.content + '</tool_response><|im_end|>\\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # The system message comes first, wherever it stood; the thought is begun for the model, and arguments are texts.
    "deepseek": (
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
        "{% elif m.role == 'tool' %}{{ '<|end|>' + m.content + '<|end|>' }}"
        "{% elif m.role == 'assistant' %}{% if loop.previtem is not defined or loop.previtem.role != 'tool' %}"
        "{{ '<|assistant|>' }}{% endif %}{% generation %}{{ (m.content or '').split('</think>')[-1] }}"
        "{% for call in m.tool_calls or [] %}{{ '<|system|>' + call.function.name + '\\n' + call.function.arguments }}"
        "{% endfor %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|assistant|><think>\\n' }}{% endif %}"
    ),
    # Nothing opens an answer, and tools and the system message stand before the last question.
    "mistral": (
        "{% set ns = namespace(last=-1, system='') %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% elif m.role == 'system' %}{% set ns.system = m.content + '\\n' %}"
        "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == ns.last %}{{ '[TOOLS]' + tools | tojson }}{% endif %}"
        "{{ '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + (m.content or '') }}{% if m.tool_calls %}"
        "{% for call in m.tool_calls %}{{ '[CALL]' + call.function.name + call.function.arguments | tojson }}"
        "{% endfor %}{% endif %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    # A conversation ends with a token of its own.
    "harmony": (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|end_header_id|>' + (m.content or '') + ('<|end|>' if not loop.last else '<|eot_id|>') }}"
        "{% endgeneration %}{% else %}{{ '<|end_header_id|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant' }}{% endif %}"
    ),
}  # fmt: skip


def plain(name: str) -> str:
    """The template without its marks: what it renders is the same."""
    return re.sub(r"\{% (end)?generation %\}", "", MARKED[name])
