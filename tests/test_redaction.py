"""Secrets are found by their forms and names, in any surroundings; what is none stays to the letter."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from detect_secrets.core.scan import scan_line
from detect_secrets.settings import transient_settings

from dfmspec.redaction import (
    KINDS,
    MASK,
    known_here,
    masked,
    names_a_secret,
    redacted,
    remember,
    secrets_in,
    without_secrets,
)
from tests.conftest import ROOT
from tests.tokens import tokens

SEEDS = (1, 2, 3)
SURROUNDINGS = (
    "{}",
    "a {} b",
    "'{}'",
    '"{}",',
    "({})",
    "x={};",
    "--comment={}",
    "[{}]",
    "\n{}\n",
    "https://h/?q={}&r=1",
)
PEER = (
    *(
        "AWSKeyDetector",
        "ArtifactoryDetector",
        "AzureStorageKeyDetector",
        "BasicAuthDetector",
        "DiscordBotTokenDetector",
    ),
    *("GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector", "NpmDetector"),
    *("OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector"),
    *("SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector"),
)
"""Detectors of another tool that look for the form of a token."""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_secret_of_every_kind_is_taken_out_wherever_it_stands(seed: int) -> None:
    made = tokens(seed)

    assert len(made) >= 60
    for kind, (text, secret) in made.items():
        for around in SURROUNDINGS:
            clean = redacted(around.format(text))
            assert secret not in clean, (kind, around)
            assert secret[len(secret) // 2 :] not in clean, (kind, around)
            assert MASK in clean


def test_every_form_is_met_by_a_token_of_another_hand() -> None:
    found = {secret.kind for text, _ in tokens(1).values() for secret in secrets_in(text)}

    assert {*KINDS} - found == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_another_tool_finds_is_found_and_nothing_is_left_for_it(seed: int) -> None:
    found_by_peer = 0
    with transient_settings({"plugins_used": [{"name": name} for name in PEER]}):
        for kind, (text, _) in tokens(seed).items():
            found_by_peer += any(list(scan_line(line)) for line in text.splitlines())
            for line in redacted(text).splitlines():
                left = [secret for secret in scan_line(line) if MASK not in (secret.secret_value or "")]
                # Of a key's block the first line, which says what it is, stays.
                assert not left or "PRIVATE KEY" in line, kind

    assert found_by_peer >= 20


def test_many_in_one_text_are_taken_out_and_the_rest_stays() -> None:
    made = tokens(4)
    text = " | ".join(f"<{kind}> {text}" for kind, (text, _) in made.items())
    clean = redacted(text)

    assert all(secret not in clean for _, secret in made.values())
    assert all(f"<{kind}>" in clean for kind in made)
    assert redacted(clean) == clean


MADE_UP = ("tests/test_redaction.py", "tests/record/test_attestation.py", "tests/run/test_secrets.py")
"""Tests that have to write one down."""


def _own_texts() -> list[Path]:
    """What is kept here of bundles, logs, specs, documents and code."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if (ROOT / name).is_file()]


def test_no_letter_of_this_repository_is_taken_for_a_secret() -> None:
    wrong = []
    for file in _own_texts():
        text = file.read_bytes().decode(errors="surrogateescape")
        name = file.relative_to(ROOT).as_posix()
        wrong += [f"{name}: {text[each.start : each.end][:60]} ({each.kind})" for each in secrets_in(text)]

    assert [each for each in wrong if not each.startswith(MADE_UP)] == []


@pytest.mark.parametrize(
    "text",
    [
        "pad_token=123456ab next_token: abcdef12 eos_token='</s>abc'",
        "tokenizer_type: NullTokenizer; use_cls_token: true_or_not",
        "[INFO] Iteration 1/10, Loss: 0.993, LR: 5e-05, grad norm: 0.166, 114,916 tokens/s",
        "WANDB_API_KEY=$WANDB_API_KEY HF_TOKEN=${HF_TOKEN:-} TOKEN=$(cat /x) --token env:HF_TOKEN",
        "HF_TOKEN_PATH=/secrets/huggingface/token password: null token: 1234567",
        "{'HF_TOKEN': {'secret': 'env:HF_TOKEN'}}",
        "sha256:9a9fc4812a86d3c0f0f3b5c0ef6ce0c6d2f7cbdd1c3d0a5d5a7cf0b6a1e2d3c4",
        "nvcr.io/nvidia/dfm@sha256:9a9fc4812a86d3c0f0f3b5c0ef6ce0c6d2f7cbdd1c3d0a5d5a7cf0b6a1e2d3c4",
        "https://user@host/path s3://bucket/key?x=1 ssh://git@github.com:22/x",
        "risk-free task-encoder disk-based sk-learn asterisk-",
        "20261201-092223-9a9fc481-2a86 f806bcac2ed74e726eee5f9b20e8561b52241e5df583727385589f6932afe5e0",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("HF_TOKEN", "WANDB_API_KEY", "token", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")),
        *((name, False) for name in ("HF_TOKEN_PATH", "use_cls_token", "pad_token", "TOKENIZERS_PARALLELISM", "KEY")),
    ],
)
def test_names(name: str, is_secret: bool) -> None:
    assert names_a_secret(name) is is_secret


def test_what_is_known_is_taken_out_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery")
    monkeypatch.setenv("SHORT_TOKEN", "short")
    monkeypatch.setattr("dfmspec.redaction._remembered", set())
    remember("first line\nsecond line of it")

    known = known_here()

    assert redacted("it is correct horse battery, in short", known) == f"it is {MASK}, in short"
    assert without_secrets({"a": ["second line of it", 3], "b": None}, known) == {"a": [MASK, 3], "b": None}


def test_stars_keep_every_line_and_column() -> None:
    text = "a: 1\n" + "\n".join(text for text, _ in tokens(5).values()) + "\nb: 2"
    stars = masked(text)

    assert [len(line) for line in stars.splitlines()] == [len(line) for line in text.splitlines()]
    assert not any(secret in stars for _, secret in tokens(5).values())


@pytest.mark.parametrize(
    "line",
    [
        "wandb login 0123456789abcdef0123456789abcdef01234567",
        "wandb login --relogin 0123456789abcdef0123456789abcdef01234567",
        "docker login -u x -p hunter2abc nvcr.io",
        "curl -s -u bob:hunter2abc https://x",
        "sshpass -p hunter2abc ssh x",
        "mysqldump -uada -phunter2abc x",
        "export DB_PASSWORD=48291734",
        "x_ghp_" + "aB3d" * 9,
    ],
)
def test_logins_and_numbers_are_found(line: str) -> None:
    assert MASK in redacted(line)
    assert "hunter2abc" not in redacted(line)


@pytest.mark.parametrize(
    "line",
    [
        "sk-sweep-learning-rate-warmup-cosine-20k",
        "/data/sk-butterflies-512px-webdataset-v2",
        "glpat-for-everyone-in-the-team",
        "docker run -p 8080:80 x; ssh -p 2222 host; mkdir -p /a/b; wandb login",
        "curl -u $USER:$PASSWORD https://x",
        "docker login -u x -p $PASSWORD",
    ],
)
def test_words_with_hyphens_ports_and_variables_are_none(line: str) -> None:
    assert redacted(line) == line
