"""Chat templates: Jinja2 programs that come with a model, run in Jinja's immutable sandbox.

The environment offers what Hugging Face's does (`raise_exception`, `strftime_now`, `tojson`, loop controls, the
`generation` tag), because templates on the Hub are written against it. The program is the model's, its data the user's:
the sandbox keeps it from attributes and from changing what it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import ConfigError
from tandem.errors import InvalidRequestError


class ChatTemplate:
    """A compiled template. `special_tokens` (`bos_token` …) are names the program may use. Thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Raises ConfigError when the program does not parse."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: {error}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's next turn; each message has `role` and `content`.

        Raises InvalidRequestError when the template refuses the conversation (for instance roles out of order).
        """
        context = {**self._special_tokens, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._template.render(messages=[dict(m) for m in messages], **context)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise InvalidRequestError(
                f"the model's chat template failed on these messages ({type(error).__name__}: {error}); "
                "check the roles and their order"
            ) from None


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks assistant text for training; here it just renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
