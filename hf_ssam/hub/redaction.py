"""What is not published: secrets, by name and by form, user names in URLs, and paths of the machine.

One predicate, `is_secret`, serves flags, `name=value` words, the keys of JSON and the fields of an arguments class.
In doubt a name is a secret: a flag that a command lacks is soon noticed, a token that was published is gone.
"""

from __future__ import annotations

import ast
import copyreg
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

HIDDEN = "HIDDEN"

_SECRET = re.compile(
    r"passw|passphrase|secret|credential|authori[sz]ation|bearer|webhook|(api|access|private)_?key|connection_?string"
    r"|(^|_)(auth|oauth2?|pwd|creds?|jwt|cookies?|dsn|pat|sig|signature)(_|$)|^pass$|(user|db|smtp|ssh|proxy)_pass$"
)
_TOKEN_OR_KEY = re.compile(
    r"token(_|$)|(^|_)(toke?|keys?)(_\d+)?$|(access|auth|api|hub|hf|refresh|session|git|github)_?tokens(_|$)"
)
_HARMLESS = re.compile(
    r"(^|_)(pad|padding|eos|bos|unk|unknown|sep|separator|cls|class|mask|image|img|audio|video|vision|speech|start|end"
    r"|stop|boi|eoi|boa|eoa|special|prompt|think|newline|blank|delimiter|prefix|suffix|middle|per|next|num)_token(_|$)"
    r"|token_(ids?|idx|index|types?|probs?|levels?|logits?|loss|losses|masks?|counts?|limit|budget|len|lengths?|size"
    r"|dropout|classification|accuracy|weights?|embeddings?|scores?)(_|$)"
    r"|(label|text|image|audio|video|input|output|prompt|completion|query|question|answer|target|source|column|data"
    r"|dataset|sort|group|primary|foreign|metric|feature|sample|response|context|chosen|rejected|messages?|score"
    r"|reward|id|index|cache|state|batch|class|field|split|length|caption|mask|record|unique)s?_keys?(_\d+)?$"
)

_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|sk_(live|test)_\w+|A[KS]IA[A-Z0-9]{12,}|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}|npm_\w{30,}"
    r"|pypi-[\w-]{30,}|wandb_v1_\w+|eyJ[\w-]+\.[\w-]+\.[\w-]*|hooks\.slack\.com/\S+|discord(app)?\.com/api/webhooks/\S+"
    r"|[Bb]earer\s+\S+)|-----BEGIN [A-Z ]*PRIVATE KEY-----.*",
    re.DOTALL,
)
_USERINFO = re.compile(
    r"(?<=://)([^\s/?#]*|[^\s/?#:@]*:(?!\d+([/?#]|$))[^\s@]*)@|(?<![^\s,;='\"])[\w.+-]+:[^\s@/]+@(?=[\w-]+\.)"
)

_NAME = r"[A-Za-z_][\w.-]*"
_ASSIGNMENT = re.compile(
    rf"(?<![\w.-])-*(?P<name>{_NAME})\\*[\"']?\s*(=|:(?!//))\s*|(?<![\w.-])--?(?P<flag>{_NAME})\s+"
)
_VALUE = re.compile(
    r"(\"(\\.|[^\"\\])*\"|'(\\.|[^'\\])*')(?=[,;&}\])\s]|\Z)"
    rf"|.*?(?=[,;&\s]+[\"'{{(\[+-]*{_NAME}\\*[\"']?\s*[=:]|\s--?[A-Za-z]|&|\Z)",
    re.DOTALL,
)

_IN_PATH = r"[^,;:'\"=()\[\]{}\n]"
_PATH = re.compile(
    r"((?<![^\s,;:='\"@(\[{!&#])|(?<=://)|(?<=:///)|(?<=^-[A-Za-z]))"
    rf"([A-Za-z]:[\\/](?!/)|/(?![/\s])){_IN_PATH}*?[\\/]({_IN_PATH}(?!(?<=\s)[/-]))*"
)


def is_secret(name: str) -> bool:
    """Whether the value of a flag, variable, key or field of that name is a secret.

    `pad_token`, `max_new_tokens`, `label_key` and their like are not.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = re.sub(r"[^a-z0-9]+", "_", spaced).strip("_")
    if _SECRET.search(words):
        return True
    return _TOKEN_OR_KEY.search(words) is not None and _HARMLESS.search(words) is None


def cleaned(words: Iterable[str]) -> list[str]:
    """`words` of a command without secret flags and their values, and with every other word made `public`."""
    kept: list[str] = []
    dropping = False
    for word in words:
        if dropping and not re.match(r"--[A-Za-z]|-[A-Za-z]$", word):
            continue
        flag, equals, value = word.partition("=")
        is_flag = re.fullmatch(rf"--?{_NAME}", flag) is not None
        secret = is_flag and is_secret(flag)
        if not secret:
            kept.append(f"{flag}={public(value)}" if is_flag and equals else public(word))
        dropping = secret and not equals
    return kept


def public(text: str) -> str:
    """`text` without secrets, userinfo and folders of the machine; names of files stay, and so do relative paths."""
    structured = _structured(text)
    if structured != text:
        return structured
    text = hidden(text)
    if os.path.isabs(text) and "," not in text and len(_PATH.findall(text)) < 2:
        return _short_path(text)
    return _PATH.sub(lambda match: _short_path(match[0]), text)


def hidden(text: str) -> str:
    """`text` without the userinfo of URLs, what looks like a token, and what is assigned to a secret name."""
    text, pieces, done = _FORMS.sub(HIDDEN, _USERINFO.sub("", text)), [], 0
    for match in _ASSIGNMENT.finditer(text):
        if match.start() >= done and is_secret(match["name"] or match["flag"]):
            pieces += [text[done : match.end()], HIDDEN]
            value = _VALUE.match(text, match.end())
            done = match.end() if value is None else value.end()
    return "".join([*pieces, text[done:]])


def without(text: str, secrets: Sequence[str]) -> str:
    """`text` with each of `secrets` hidden, whatever stands before it."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def secret_values(args: Any) -> list[str]:
    """What an arguments object holds in its secret fields; a short value is a word that occurs anyway."""
    values = [getattr(args, field.name) for field in fields(args) if is_secret(field.name)]
    return [value for value in values if isinstance(value, str) and len(value) > 5]


def masked(values: Mapping[Any, Any], mask: Callable[[str], Any]) -> dict[Any, Any]:
    """`values` with `mask(name)` for what a secret name holds, in dictionaries within them as well."""
    return {name: mask(name) if is_secret(str(name)) else _masked_value(value, mask) for name, value in values.items()}


@contextmanager
def pickled_without_secrets(args: Any) -> Iterator[None]:
    """While it lasts, `args` is pickled with the defaults of its secret fields; the object itself keeps them.

    The Trainer pickles its arguments into each folder that it pushes, `hub_token` among them.
    """
    kind, table, newobj = type(args), copyreg.dispatch_table, copyreg.__newobj__  # type: ignore[attr-defined]
    defaults = {field.name: field.default for field in fields(args)}
    before = table.get(kind)
    table[kind] = lambda found: (newobj, (kind,), masked(found.__dict__, defaults.get))
    try:
        yield
    finally:
        del table[kind]
        table.update({kind: before} if before else {})


def _masked_value(value: Any, mask: Callable[[str], Any]) -> Any:
    if isinstance(value, dict):
        return masked(value, mask)
    return hidden(value) if type(value) is str else value


def _structured(text: str) -> str:
    """JSON or a Python literal, cleaned value by value; any other text as it is."""
    if not text.startswith(("{", "[")):
        return text
    for parse, write in ((json.loads, lambda v: json.dumps(v, ensure_ascii=False)), (ast.literal_eval, repr)):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        found = _cleaned_value(value)
        return text if found == value else write(found)
    return text


def _cleaned_value(value: Any) -> Any:
    if isinstance(value, str):
        return public(value)
    if isinstance(value, dict):
        return {
            _cleaned_value(k): HIDDEN if isinstance(k, str) and is_secret(k) else _cleaned_value(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple | set):
        words = all(isinstance(item, str) for item in value)
        return type(value)(cleaned(value) if words else map(_cleaned_value, value))
    return value


def _short_path(path: str) -> str:
    """An absolute path relative to the working folder, or its last name."""
    here, whole = os.getcwd(), os.path.normpath(path)
    if here != "/" and (whole == here or whole.startswith(here + "/")):
        return os.path.relpath(whole, here)
    return "PATH_TO/" + re.split(r"[\\/]", path.rstrip("\\/ "))[-1]
