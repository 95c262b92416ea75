"""Secrets: what one looks like, by its form or by the name before it; and texts without them.

One table of forms (KINDS), of tokens that their makers gave a mark of their own; passwords in addresses and headers;
and values that are given to a name that says it. Findings, errors, manifests and the logs of ranks go through
`redacted`. A text of which nothing is a secret stays as it is, to the letter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

REFERENCE = "secret"
"""In an entry of launcher.env: what stands behind it names where the value is."""
MASK = "[redacted]"
"""What stands in a text where a secret was."""

# What a maker's own mark begins with, and what comes after it.
KINDS: dict[str, str] = {
    # Code and packages.
    "github": r"gh[pousr]_[A-Za-z0-9]{30,255}",
    "github-fine-grained": r"github_pat_[A-Za-z0-9_]{22,255}",
    "gitlab": r"gl(?=[\w.-]*\d)(?:pat|ptt|dt|rt|ft|soat|imt|agent|oas|ffct)-[A-Za-z0-9_.-]{20,300}",
    "gitlab-ci": r"glcbt-(?:[0-9a-fA-F]{1,5}_)?[A-Za-z0-9_-]{20,50}",
    "gitlab-runner": r"GR1348941[A-Za-z0-9_-]{20,50}",
    "bitbucket": r"ATBB[A-Za-z0-9]{24,}",
    "atlassian": r"ATATT3[A-Za-z0-9_=-]{60,}",
    "pypi": r"pypi-[A-Za-z0-9_-]{50,}",
    "npm": r"npm_[A-Za-z0-9]{36}",
    "rubygems": r"rubygems_[0-9a-f]{48}",
    "crates": r"cio[A-Za-z0-9]{32}",
    "docker": r"dckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}",
    "artifactory": r"AKCp[A-Za-z0-9]{10,}",
    # Models and what trains them.
    "hugging-face": r"(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "anthropic": r"sk-ant-[A-Za-z0-9_-]{20,}",
    "openai": r"sk-(?=[\w-]*[A-Z])(?=[\w-]*\d)(?:proj-|svcacct-|admin-|None-)?[A-Za-z0-9_-]{20,}",
    "nvidia": r"nvapi-[A-Za-z0-9_-]{20,}",
    "wandb": r"wandb_v1_[A-Za-z0-9_-]{20,}",
    "replicate": r"r8_[A-Za-z0-9]{30,}",
    "groq": r"gsk_[A-Za-z0-9]{40,}",
    "xai": r"xai-[A-Za-z0-9]{40,}",
    "perplexity": r"pplx-[A-Za-z0-9]{40,}",
    "together": r"tgp_v1_[A-Za-z0-9_-]{30,}",
    "langsmith": r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}",
    "databricks": r"dapi[0-9a-f]{32}(?:-\d)?",
    "kaggle": r"KGAT_[0-9a-f]{32}",
    # Clouds.
    "aws-key-id": r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",
    "azure-client": r"[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34}",
    "gcp-key": r"AIza[A-Za-z0-9_-]{35}",
    "gcp-oauth": r"ya29\.[A-Za-z0-9_-]{20,}",
    "gcp-client": r"GOCSPX-[A-Za-z0-9_-]{28}",
    "digitalocean": r"do[opr]_v1_[0-9a-f]{64}",
    "heroku": r"HRKU-[A-Za-z0-9_-]{30,}",
    "netlify": r"nfp_[A-Za-z0-9]{36}",
    "fly": r"fm2_[A-Za-z0-9+/=_-]{100,}",
    "supabase": r"sbp_[0-9a-f]{40}",
    "planetscale": r"pscale_(?:tkn|pw|oauth)_[A-Za-z0-9_.-]{32,}",
    "alibaba": r"LTAI[A-Za-z0-9]{17,21}",
    "tencent": r"AKID[A-Za-z0-9]{32}",
    # What keeps other secrets, and what is watched by.
    "vault": r"hv[sbr]\.[A-Za-z0-9_-]{24,}",
    "terraform": r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_-]{60,}",
    "doppler": r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9._-]{40,}",
    "one-password": r"ops_eyJ[A-Za-z0-9_=-]{50,}",
    "age": r"AGE-SECRET-KEY-1[0-9A-Z]{58}",
    "pulumi": r"pul-[0-9a-f]{40}",
    "grafana": r"gls[ac]_[A-Za-z0-9_]{32,}",
    "new-relic": r"NRAK-[A-Z0-9]{27}",
    "sentry": r"sntry[su]_[A-Za-z0-9_=+/-]{40,}",
    "dynatrace": r"dt0[a-z]\d\d\.[A-Z0-9]{24}\.[A-Z0-9]{64}",
    # People and money.
    "slack": r"xox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{10,}",
    "slack-app": r"xapp-\d-[A-Z0-9]+-\d+-[0-9a-f]{30,}",
    "discord": r"[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,38}",
    "telegram": r"\d{8,10}:AA[A-Za-z0-9_-]{33}",
    "stripe": r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{20,}",
    "square": r"sq0(?:csp|atp|idp)-[A-Za-z0-9_-]{22,43}",
    "shopify": r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "twilio": r"SK[0-9a-f]{32}",
    "sendgrid": r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",
    "mailchimp": r"[0-9a-f]{32}-us\d{1,2}",
    "mailgun": r"key-[0-9a-f]{32}",
    "postman": r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}",
    "linear": r"lin_api_[A-Za-z0-9]{40}",
    "notion": r"ntn_[A-Za-z0-9]{40,}",
    "figma": r"figd_[A-Za-z0-9_-]{40,}",
    "airtable": r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}",
    "json-web-token": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
}
"""The forms of tokens, by their makers."""

# Where only a part of what is matched is secret, that part is the group "secret".
_INSIDE: dict[str, str] = {
    "private-key": (
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?P<secret>.*?)"
        r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)"
    ),
    "putty-key": r"PuTTY-User-Key-File-\d:(?P<secret>.*?)(?:Private-MAC: \S+|\Z)",
    "password-in-address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"<>$]*:(?P<secret>[^\s/@'\"<>$]+)@",
    "authorization": r"(?i)\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)\s+(?P<secret>[\w+/=.~-]{8,})",
    "bearer": r"\b[Bb]earer\s+(?P<secret>(?=[\w.~+/-]*\d)[\w.~+/-]{20,}=*)",
    "azure-account": r"AccountKey=(?P<secret>[A-Za-z0-9+/]{40,}={0,2})",
    "signature": (
        r"[?&](?:X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|sig|Signature)=(?P<secret>[\w%+/=-]{16,})"
    ),
    "slack-webhook": r"hooks\.slack\.com/(?:services|workflows|triggers)/(?P<secret>[\w/-]{20,})",
    "discord-webhook": r"discord(?:app)?\.com/api/webhooks/\d+/(?P<secret>[\w-]{30,})",
    "teams-webhook": r"webhook\.office\.com/webhookb2/(?P<secret>[\w@/-]{30,})",
    "wandb-login": r"\bwandb\s+login\s+(?:--\S+\s+)*(?P<secret>(?=\w*\d)\w{20,})",
    "registry-login": (
        r"\b(?:docker|podman|nerdctl|skopeo|oras|helm\s+registry|apptainer\s+registry)\s+login\b[^\n;|&]*?"
        r"\s-p[ =]?(?P<secret>[^\s'\"$]{4,})"
    ),
    "curl-user": r"\bcurl\b[^\n;|&]*?\s(?:-u|--user)[ =]?['\"]?[^\s:'\"$]+:(?P<secret>[^\s'\"$]{4,})",
    "sshpass": r"\bsshpass\s+-p\s*['\"]?(?P<secret>[^\s'\"$]{4,})",
    "mysql": r"\bmysql(?:dump|admin|import)?\b[^\n;|&]*?\s-p(?P<secret>[^\s'\"$]{4,})",
    "npm-registry": r":_auth(?:Token)?\s*=\s*(?P<secret>[^\s$'\"]{8,})",
}

# Names.
_SAYS_IT = (
    r"(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|account[_-]?key|auth[_-]?key|wandb_key|kaggle_key|"
    r"token|secret|password|passwd|passphrase)"
)
_SECRET_NAME = rf"(?:.*_)?{_SAYS_IT}"
_OF_TEXT = (
    r"(?:.*_)?(?:bos|class|cls|cut|end|eos|last|mask|max|min|next|num|pad|per|sep|special|start|stop|sos|unk)_token"
)
"""Tokens of text, which are no secrets."""
_VALUE = r"\\?['\"]?(?P<secret>[^\s'\"`,;&|<>(){}\[\]\\]{6,})"
_GIVEN_NAME = rf"(?P<name>(?:[A-Za-z][\w.-]{{0,60}}[._-])?{_SAYS_IT})"
_GIVEN = (
    rf"(?i)(?<![\w.-]){_GIVEN_NAME}\\?['\"]?\s*[:=]\s*{_VALUE}",
    rf"(?i)(?<![\w.-])--{_GIVEN_NAME}(?:\s+|\s*[:=]\s*){_VALUE}",
)
"""A name, and a value that is given to it: NAME=value, "name": "value"; --name value."""
_HARMLESS = r"(?i)(?:\$.*|null|none|true|false|\*+|x+|env:.*|file:.*|cmd:.*|.*\[redacted\].*|/.*|~/.*|\d+(?:\.\d*)?)"
"""Values that are no secret, whatever their name: references, paths, numbers."""


_LONG_WORD = r"[\w.~:+/=-]{20,}"


class Secret(NamedTuple):
    """A part of a text that is a secret."""

    start: int
    end: int
    kind: str


def is_a_switch(value: str) -> bool:
    """Whether a value only says yes or no, or nothing, whatever its name."""
    return value.strip().lower() in _SWITCHES


_SWITCHES = ("", "0", "1", "true", "false", "yes", "no", "on", "off", "none", "null")


@lru_cache(maxsize=4096)
def names_a_secret(name: str) -> bool:
    """Whether a variable or a key of this name holds a secret."""
    if re.fullmatch(_OF_TEXT, name, re.IGNORECASE):
        return False
    return re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) is not None


def secrets_in(text: str) -> list[Secret]:
    """The secrets of a text, by their forms and by the names before them, in their order; none overlaps another."""
    found = []
    if len(text) >= _SHORTEST:
        # Few words of a log are as long as any token, and the forms are many.
        for word in re.finditer(_LONG_WORD, text):
            for match in _forms().finditer(text, *word.span()):
                found.append(Secret(*match.span(), str(match.lastgroup).replace("_", "-")))
        for kind, pattern in _inside().items():
            found += [Secret(*match.span("secret"), kind) for match in pattern.finditer(text)]
        for match in chain.from_iterable(re.finditer(given, text) for given in _GIVEN):
            if _is_given(match):
                found.append(Secret(*match.span("secret"), "named"))
    return _apart(found)


@lru_cache(maxsize=64)
def secrets_of(text: str) -> tuple[Secret, ...]:
    """The secrets of a spec's text, which is asked for them several times."""
    return tuple(secrets_in(text))


def _is_given(match: re.Match[str]) -> bool:
    """Whether what is given to a name is a secret, and not the code or the prose of something else."""
    name = match["name"].rpartition(".")[2].replace("-", "_")
    value = match["secret"]
    is_a_number = name.isupper() and value.isdigit()
    if not names_a_secret(name) or (re.fullmatch(_HARMLESS, value) and not is_a_number):
        return False
    # A constant's name is no value of a variable.
    is_a_variable = name.isupper() and match[0].startswith(f"{match['name']}=") and not value.isupper()
    return is_a_variable or re.fullmatch(_OF_CODE, value) is None


_OF_CODE = r"[A-Za-z_-]+|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\.?"
"""A word, or names with dots between: in a traceback, `of_token = rows.of_token`."""
_SHORTEST = 8
"""A shorter text has no form to tell it by."""


@lru_cache
def _forms() -> re.Pattern[str]:
    """All forms as one pattern, each where no word goes on around it."""
    alternatives = "|".join(f"(?P<{kind.replace('-', '_')}>{form})" for kind, form in KINDS.items())
    return re.compile(f"(?<![A-Za-z0-9])(?:{alternatives})(?![A-Za-z0-9_])")


@lru_cache
def _inside() -> dict[str, re.Pattern[str]]:
    return {kind: re.compile(pattern, re.DOTALL) for kind, pattern in _INSIDE.items()}


def _apart(found: list[Secret]) -> list[Secret]:
    """Of secrets that overlap, the one that begins first and is longest."""
    kept: list[Secret] = []
    for one in sorted(found, key=lambda secret: (secret.start, -secret.end)):
        if one.end > one.start and (not kept or one.start >= kept[-1].end):
            kept.append(one)
    return kept


_remembered: set[str] = set()


def remember(value: str) -> None:
    """Keep a value out of everything that is written from now on; each line of it, where it has several."""
    _remembered.update(line for line in (value, *value.splitlines()) if len(line) >= _SHORTEST)


def redacted(text: str, known: Collection[str] = ()) -> str:
    """A text without its secrets: those that look like one, and those that are known.

    Args:
        text: what a person, a program or a machine said.
        known: values that are secret to the letter, whatever they look like: `known_here()`, where a machine speaks.
    """
    for value in known:
        if value in text:
            text = text.replace(value, MASK)
    out = []
    end = 0
    for secret in secrets_in(text):
        out.append(text[end : secret.start])
        out.append(MASK)
        end = secret.end
    out.append(text[end:])
    return "".join(out)


def masked(text: str) -> str:
    """A text with a star for each letter of its secrets: what stands after them keeps its line and column."""
    letters = list(text)
    for secret in secrets_of(text):
        for at in range(secret.start, secret.end):
            letters[at] = "\n" if letters[at] == "\n" else "*"
    return "".join(letters)


def known_here() -> list[str]:
    """Values that this process was told to remember, and those of its variables whose names say it; the longest first.

    Of fewer than eight letters they are left, since they may be words.
    """
    return sorted({*_remembered, *_values_around()}, key=len, reverse=True)


def _values_around() -> list[str]:
    """The values of this process's variables whose names say that they are secret."""
    named = [value for name, value in os.environ.items() if names_a_secret(name)]
    return [value for value in named if len(value) >= _SHORTEST and re.fullmatch(_HARMLESS, value) is None]


def without_secrets(value: Any, known: Collection[str] = ()) -> Any:
    """Data, as JSON has them, whose texts have no secrets; `known` as of `redacted`."""
    if isinstance(value, str):
        return redacted(value, known)
    if isinstance(value, dict):
        return {name: without_secrets(inner, known) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner, known) for inner in value]
    return value
