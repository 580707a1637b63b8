"""Training text: the sources of the standard library of the Python that runs this.

Three kinds of document are made of them: whole files, single functions and classes, and
chat exchanges in which a function or class answers a request built from its name,
signature and docstring. Whole files are held out, by a rule on their names.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

# Tables and generated text, which would only teach the model to recite them.
SKIPPED = ("site-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3/tests/data")
MAX_FILE_BYTES = 250_000
MAX_SNIPPET_CHARS = 2400
TEST_FILES_KEPT = 0.4  # share of test/, which is larger than the library itself
HELD_OUT_EVERY = 40

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful Python programming assistant.",
    "Answer with Python code.",
)
VERBS = """
Add Append Apply Build Call Check Close Compute Convert Copy Count Create Decode Delete Determine Encode
Execute Find Format Generate Get Give Handle Insert Iterate List Load Make Open Parse Perform Print Process
Raise Read Remove Replace Return Run Search Send Set Show Sort Split Start Stop Test Update Wait Write Yield
"""

Message = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Source:
    """One file of the standard library."""

    name: str
    text: str

    @property
    def key(self) -> int:
        return zlib.crc32(self.name.encode())

    @property
    def held_out(self) -> bool:
        return self.key % HELD_OUT_EVERY == 0

    @property
    def is_test(self) -> bool:
        return any(part in ("test", "tests", "idle_test") for part in self.name.split("/"))


@dataclass(frozen=True)
class Snippet:
    """One function or class, dedented."""

    kind: str
    name: str
    signature: str
    summary: str
    code: str


def standard_library() -> list[Source]:
    """Every file to be used, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(f"{part}/" in name for part in SKIPPED):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip("\n") + "\n"
        except UnicodeDecodeError:
            continue
        source = Source(name, text)
        wanted = not source.is_test or source.key // HELD_OUT_EVERY % 100 < TEST_FILES_KEPT * 100
        if 200 < len(text) <= MAX_FILE_BYTES and wanted:
            sources.append(source)
    return sources


def snippets(source: Source) -> Iterator[Snippet]:
    """The functions and classes of a file that are short enough to be answers."""
    try:
        tree = ast.parse(source.text)
    except (SyntaxError, ValueError):
        return
    lines = source.text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        code = textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno])).strip("\n")
        if code.count("\n") < 2 or len(code) > MAX_SNIPPET_CHARS or code[:1].isspace():
            continue
        summary = (ast.get_docstring(node) or "").split("\n\n")[0]
        if isinstance(node, ast.ClassDef):
            kind, signature = "class", node.name
        else:
            kind, signature = "function", f"{node.name}({ast.unparse(node.args)})"
        yield Snippet(kind, node.name, signature, " ".join(summary.split())[:200], code)


def third_person(summary: str) -> str | None:
    """``Return the sum.`` as ``returns the sum``, when it starts with a known verb."""
    verb, _, rest = summary.partition(" ")
    if verb not in VERBS.split() or not rest:
        return None
    verb = verb.lower()
    return f"{verb}{'es' if verb.endswith(('s', 'ch', 'sh')) else 's'} {rest.rstrip('.')}"


def request(snippet: Snippet, rng: Random) -> str:
    """What a user might have asked to be answered with this code."""
    kind, name, summary = snippet.kind, snippet.name, snippet.summary
    options = [
        f"Write a Python {kind} called {name}.",
        f"Write a {kind} {name}",
        f"Implement {snippet.signature}",
    ]
    if summary:
        options = [
            summary,
            f"Write a {kind}: {summary}",
            f"Write a Python {kind} called {name}. {summary}",
            f"Implement {snippet.signature}. {summary}",
        ]
        if does := third_person(summary):
            options += [
                f"Write a {kind} that {does}.",
                f"Write a Python {kind} {name} that {does}.",
            ]
    return rng.choice(options)


def exchanges(source: Source) -> Iterator[list[Message]]:
    """Chats made of a file; a few have a system message or a second turn."""
    rng = Random(source.key)
    found = list(snippets(source))
    for index, snippet in enumerate(found):
        if not snippet.summary and rng.random() > 0.35:
            continue
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages.append(("system", rng.choice(SYSTEM_PROMPTS)))
        turns = [snippet]
        if rng.random() < 0.1 and index:
            turns.insert(0, found[index - 1])
        for turn in turns:
            messages += [("user", request(turn, rng)), ("assistant", turn.code)]
        yield messages


def fragments(source: Source) -> Iterator[str]:
    """Functions and classes that stand alone, for prompts that start with ``def``."""
    rng = Random(source.key + 1)
    for snippet in snippets(source):
        if rng.random() < (0.25 if snippet.summary else 0.6):
            yield snippet.code + "\n"
