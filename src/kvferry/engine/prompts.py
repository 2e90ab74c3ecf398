"""What users pass as prompts, told apart by type: text, token ids, vLLM's mappings, tokenizers' output, messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

from jinja2 import TemplateError

from kvferry.errors import ConfigError

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}`, `{"prompt_token_ids": ids}` (both may have a `cache_salt`), or what a tokenizer
returns (a BatchEncoding with `input_ids`)."""

_ACCEPTED = (
    'a prompt is text, a list of token ids, {"prompt": text}, {"prompt_token_ids": ids} or what a tokenizer returns '
    "(a mapping with input_ids); several of them go into one list"
)
_KEYS = {
    "prompt_token_ids": {"prompt_token_ids", "prompt", "cache_salt"},
    "prompt": {"prompt", "cache_salt"},
    "input_ids": {"input_ids", "attention_mask", "token_type_ids"},
}
"""The key that says what a mapping is -> the keys it may have."""


@dataclass(frozen=True, slots=True)
class PromptInput:
    """One prompt: its text, its token ids, or both (the ids count then)."""

    text: str | None = None
    token_ids: list[Any] | None = None
    cache_salt: str | None = None


def read_prompts(prompts: object) -> list[PromptInput]:
    """One prompt or a list of them. ConfigError, naming the type, for anything that is neither."""
    value = _as_list(prompts)
    if isinstance(value, list) and not _is_token_ids(value):
        return [prompt for index, item in enumerate(value) for prompt in _read(item, f"prompts[{index}]")]
    return _read(prompts, "the prompt")


def read_prompt(prompt: object) -> PromptInput:
    """One prompt. ConfigError when it is something else, or more than one."""
    found = _read(prompt, "the prompt")
    if len(found) != 1:
        raise ConfigError(f"one prompt is wanted here, not {len(found)}")
    return found[0]


def render_messages(tokenizer: Any, messages: object, **template_settings: Any) -> list[int]:
    """Token ids of a conversation, as the tokenizer's chat template writes it.

    `template_settings` go to the template (`add_generation_prompt`, ...). ConfigError when there is no template, or
    when it refuses the messages.
    """
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, so it has no chat template: give token ids to generate")
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model has no chat template: write the prompt yourself, and give it to generate")
    turns = [_turn(message, index) for index, message in enumerate(_messages(messages))]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **template_settings)
    except (TemplateError, TypeError, ValueError) as err:
        raise ConfigError(f"the model's chat template refuses the messages: {err}") from err
    # The template has written the special tokens already.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def is_conversation(messages: object) -> bool:
    """True for the messages of one conversation, False for a list of conversations."""
    return isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Mapping)


def _read(value: object, where: str) -> list[PromptInput]:
    if isinstance(value, str):
        return [PromptInput(text=value)]
    if isinstance(value, Mapping):
        return _read_mapping(value, where)
    listed = _as_list(value)
    if isinstance(listed, list) and _is_token_ids(listed):
        return [PromptInput(token_ids=listed)]
    if listed == []:
        raise ConfigError(f"{where} is empty")
    if isinstance(listed, list) and all(isinstance(row, list) for row in listed) and not isinstance(value, list):
        return [PromptInput(token_ids=row) for row in listed]  # an array of several rows
    raise ConfigError(f"{where} is of type {type(value).__name__}: {_ACCEPTED}")


def _read_mapping(value: Mapping[str, Any], where: str) -> list[PromptInput]:
    if "role" in value:
        raise ConfigError(f"{where} is a message of a conversation (it has a role): give messages to LLM.chat")
    kind = next((key for key in _KEYS if value.get(key) is not None), None)
    if kind is None:
        raise ConfigError(f"{where} is a mapping with the keys {sorted(map(str, value))}: {_ACCEPTED}")
    for key in value:
        if key not in _KEYS[kind] and value[key] is not None:
            raise ConfigError(f"{where} has the key {key!r} beside {kind!r}, which this engine does not support")
    if kind == "input_ids":
        return [PromptInput(token_ids=row) for row in _unpadded(value, where)]
    text, salt = value.get("prompt"), value.get("cache_salt")
    for key, item in (("prompt", text), ("cache_salt", salt)):
        if item is not None and not isinstance(item, str):
            raise ConfigError(f"{where} has {key!r} of type {type(item).__name__}: it must be text")
    ids = None if kind == "prompt" else _as_list(value[kind])
    if kind == "prompt_token_ids" and not isinstance(ids, list):
        raise ConfigError(f"{where} has {kind!r} of type {type(value[kind]).__name__}: it must be a list of token ids")
    return [PromptInput(text, ids, salt)]


def _unpadded(value: Mapping[str, Any], where: str) -> list[list[Any]]:
    """Rows of `input_ids`, without the places that the attention mask leaves out."""
    rows, masks = _as_list(value["input_ids"]), _as_list(value.get("attention_mask"))
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where} has 'input_ids' that are no list of token ids, or empty")
    if not isinstance(rows[0], list | tuple):
        rows, masks = [rows], None if masks is None else [masks]
    if masks is None:
        return [list(row) for row in rows]
    if not isinstance(masks, list) or [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise ConfigError(f"{where} has an 'attention_mask' of another shape than its 'input_ids'")
    return [
        [token for token, counts in zip(row, mask, strict=True) if counts]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _as_list(value: object) -> Any:
    """Lists of what is like a list: arrays and tensors (nested), tuples and other sequences; all else as it is."""
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return list(value)
    return value


def _is_token_ids(value: list[Any]) -> bool:
    return len(value) > 0 and isinstance(value[0], Integral)


def _messages(messages: object) -> Sequence[Any]:
    if not is_conversation(messages):
        raise ConfigError(
            f"messages of type {type(messages).__name__} are no conversation: give a list of messages such as "
            '{"role": "user", "content": "..."}'
        )
    return messages  # type: ignore[return-value]


def _turn(message: object, index: int) -> dict[str, Any]:
    """A message as chat templates know it: content in parts is joined, for these models read text alone."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(f"messages[{index}]={message!r} must be a mapping with a role and its content")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ConfigError(
                    f'messages[{index}] has the part {part!r}; only {{"type": "text", "text": ...}} works'
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ConfigError(f"messages[{index}] has content of type {type(content).__name__}: it must be text")
    return {**message, "content": content}
