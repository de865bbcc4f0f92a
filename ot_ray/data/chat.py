"""How a conversation becomes one text: the tokenizer's own chat template, or a plain layout where it has none.

Training and serving both call `render`, so that a tuned model is asked in the words it was tuned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ot_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ (eos_token or '') if message['role'] == 'assistant' else '' }}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\n' if add_generation_prompt else '' }}"
)
"""``User:``, a line break, what was said, an empty line. The assistant's turns end in the end-of-sequence token.

A base model's tokenizer has no template of its own, and no token that tells turns apart, so what somebody says can
look like the beginning of a turn."""


def render(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    where: str = "messages",
    *,
    reply: bool = False,
) -> str:
    """Lay a conversation out; to be tokenised without further special tokens.

    A template is a program from outside: Transformers runs it in Jinja's sandbox.

    Args:
        messages: `role` and `content` of each turn.
        where: file and line, for error messages.
        reply: end with the beginning of the assistant's next turn.

    Raises:
        DataError: the template refuses the conversation.
    """
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False, add_generation_prompt=reply)  # type: ignore[arg-type]
        )
    except Exception as error:
        # A template is a program: it raises its own errors and any that Jinja or Python know.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: the chat template refuses the conversation: {reason}") from None
