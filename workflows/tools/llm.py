"""`tools.llm.call`: a question to a language model, with files of the tenant as attachments.

The provider is `[llm] base_url`. Without one, and for whoever asks for the model by its name,
`local/extractive` answers, and the result says so: no model is passed off as another.

A step that is begun again after a crash or a silence asks again with the same Idempotency-Key,
so that a provider which knows such keys gives the answer that got lost. An answer that came and
was no good it would give again as well: then, and only then, the step goes on to its next key.
Which keys were used is written nowhere. Each attempt begins with the first, finds there what the
ones before found, and may go one further than they did.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from cas.config import LlmSettings
from cas.errors import InvalidToolCall, ToolFailed
from workflows.llm import local
from workflows.llm.answer import Answer
from workflows.llm.attachments import Attachments, parse_attachments
from workflows.tools.arguments import Arguments
from workflows.tools.calling import Calling

TOOL: Final = "tools.llm.call"
LOCAL: Final = "local"
_TEMPERATURE_MAX: Final = 2.0
_KEYS_MAX: Final = 4  # of one step: who answers badly so often will not do better


def call(
    calling: Calling,
    model: str,
    prompt: str,
    attachments: Any = None,
    system: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Ask a language `model` a `prompt`.

    The result is `{content, model, requested_model, provider, usage, finish_reason}`.
    `requested_model` is what the step asked for, `model` what answered, `provider` its host,
    or "local": without a provider `local/extractive` answers whatever was asked for.

    `attachments` is a list of `{"type": "storage_ref", "ref": …}`, a reference or what an upload
    or `tools.storage.store` tells of a file, and of `{"type": "text", "text": …, "name": …}`.
    `system` is the system's message, `temperature` 0 to 2, `max_tokens` the most of an answer.
    """
    given = Arguments(TOOL)
    settings = calling.settings.llm
    model, prompt = given.text("model", model), given.text("prompt", prompt)
    system = given.maybe_text("system", system)
    temperature = given.maybe_number("temperature", temperature)
    max_tokens = given.maybe_whole("max_tokens", max_tokens)
    if not prompt.strip():
        raise InvalidToolCall(TOOL, "prompt: empty")
    if temperature is not None and temperature > _TEMPERATURE_MAX:
        raise InvalidToolCall(TOOL, f"temperature: 0 to {_TEMPERATURE_MAX:g}")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidToolCall(TOOL, "max_tokens: at least 1")
    attached = Attachments(TOOL, parse_attachments(TOOL, attachments), calling.place, settings)
    if not settings.base_url or model == local.NAME:
        provider, answer = LOCAL, _local(calling, attached, prompt, max_tokens)
    else:
        provider, answer = _asked(calling, attached, prompt, system, model, temperature, max_tokens)
    return {
        "content": answer.content,
        "model": answer.model,
        "requested_model": model,
        "provider": provider,
        "usage": dict(answer.usage),
        "finish_reason": answer.finish_reason,
    }


def _local(calling: Calling, attached: Attachments, prompt: str, max_tokens: int | None) -> Answer:
    documents = attached.documents()
    _check_size(calling.settings.llm, [prompt, *(one.text for one in documents)])
    # A token is a word at most.
    return local.ask(TOOL, calling.tenant_id, prompt, documents, max_tokens)


def _asked(
    calling: Calling,
    attached: Attachments,
    prompt: str,
    system: str | None,
    model: str,
    temperature: float | None,
    max_tokens: int | None,
) -> tuple[str, Answer]:
    # Its client takes a good part of a second to import, and not every machine asks a provider.
    from workflows.llm.provider import Provider

    settings = calling.settings.llm
    content = attached.content(prompt)
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    _check_size(settings, [system or "", *texts])
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    provider = Provider(TOOL, settings)
    answer = provider.ask(
        messages, model=model, keys=_keys(calling), temperature=temperature, max_tokens=max_tokens
    )
    return provider.name, answer


def _keys(calling: Calling) -> list[str]:
    """The same for each attempt of a step, and one more for each; hashed, since names of runs
    are nobody's business."""
    count = max(1, min(calling.attempt, _KEYS_MAX))
    names = ["llm.call", *(f"llm.call/{number}" for number in range(2, count + 1))]
    keys = [calling.key(name) for name in names]
    return [
        hashlib.sha256(f"{calling.tenant_id}/{key.scope}/{key.name}".encode()).hexdigest()
        for key in keys
    ]


def _check_size(settings: LlmSettings, texts: list[str]) -> None:
    size_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    if size_bytes > settings.text_max:
        raise ToolFailed(
            TOOL, f"{size_bytes} bytes of text, over the {settings.text_max} of [llm] text_max"
        )
