"""Messages and a chat template for tests."""

from __future__ import annotations

from typing import Any

# The shape of the released template: its own system prompt, only user and assistant turns, line breaks between them.
RELEASED_LIKE = """{{ '<|im_start|>system<|im_sep|>Think.<|im_end|>' }}
{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}
    {% elif message['role'] == 'assistant' %}
{{ '<|im_start|>assistant<|im_sep|>' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
