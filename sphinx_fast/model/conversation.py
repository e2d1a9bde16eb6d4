"""How a conversation is written as text: the released models' format, and the same as a chat template.

    A chat between ... questions.\\n\\n### Human: {question}\\n### Assistant: {answer}\\n### Human: ...

The stop text is "\\n###"; EOS is never trained in dialogue, so the text decides where an answer ends.
"""

from __future__ import annotations

from collections.abc import Sequence

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
)
STOP = "\n###"

# What transformers' apply_chat_template renders (law 10 of the house: the one fixed template string). Pictures are
# named first, because SPHINX puts every visual token before the text.
CHAT_TEMPLATE = (
    "{%- for message in messages if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- endfor -%}"
    "{%- set ns = namespace(system=" + repr(SYSTEM) + ") -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- if message['content'] is string -%}{%- set ns.system = message['content'] -%}"
    "{%- else -%}{%- set ns.system = message['content'] | selectattr('type', 'equalto', 'text') "
    "| map(attribute='text') | join('') -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{ ns.system }}"
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{{ '### Human: ' if message['role'] == 'user' else '### Assistant: ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}"
    "{%- endif -%}{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Assistant:' }}{%- else -%}{{ '###' }}{%- endif -%}"
)


def conversation_prompt(turns: Sequence[tuple[str, str | None]], system: str = SYSTEM) -> str:
    """Turns (question, answer) as the text to continue; the last answer is None.

    >>> conversation_prompt([("What is this?", None)], system="")
    '### Human: What is this?\\n### Assistant:'

    Raises:
        ValueError: no turn, an answer missing before the last turn, or a last answer already there.
    """
    if not turns:
        raise ValueError("a conversation needs at least one question")
    text = system
    for index, (question, answer) in enumerate(turns):
        last = index == len(turns) - 1
        if last != (answer is None):
            where = "the last turn has an answer already" if last else f"turn {index} has no answer"
            raise ValueError(f"conversation: {where}")
        text += f"### Human: {question}\n### Assistant:" + ("" if last else f" {answer}\n")
    return text


def cut_at_stop(text: str, stops: Sequence[str] = (STOP,)) -> tuple[str, bool]:
    """`text` up to the first stop text, and whether there was one."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def held_back(text: str, stops: Sequence[str] = (STOP,)) -> int:
    """How many characters at the end of `text` may still become a stop text and must not be shown yet."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                longest = max(longest, size)
                break
    return longest
