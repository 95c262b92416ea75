"""A token of each kind, made up here from its parts: no file of this repository has one that a scanner would find."""

from __future__ import annotations

import random
import string

HEX = "0123456789abcdef"
WORD = string.ascii_letters + string.digits
UPPER = string.ascii_uppercase + string.digits

# The mark, and how many letters of which alphabet come after it; several such parts in a row.
_PARTS: dict[str, list[tuple[str, str, int]]] = {
    "aws-key-id": [("AK" + "IA", UPPER, 16)],
    "aws-session": [("AS" + "IA", UPPER, 16)],
    "github-classic": [("gh" + "p_", WORD, 36)],
    "github-oauth": [("gh" + "o_", WORD, 36)],
    "github-app": [("gh" + "s_", WORD, 36)],
    "github-fine": [("github" + "_pat_", WORD, 82)],
    "gitlab": [("gl" + "pat-", WORD, 20)],
    "gitlab-deploy": [("gl" + "dt-", WORD, 20)],
    "gitlab-trigger": [("gl" + "ptt-", HEX, 40)],
    "gitlab-ci": [("glc" + "bt-", HEX, 2), ("_", WORD, 20)],
    "gitlab-runner": [("GR13" + "48941", WORD, 20)],
    "bitbucket": [("AT" + "BB", WORD, 32)],
    "atlassian": [("ATA" + "TT3", WORD, 180)],
    "pypi": [("pypi" + "-AgEIcHlwaS5vcmc", WORD, 90)],
    "npm": [("np" + "m_", WORD, 36)],
    "rubygems": [("ruby" + "gems_", HEX, 48)],
    "crates": [("ci" + "o", WORD, 32)],
    "docker": [("dckr" + "_pat_", WORD, 27)],
    "artifactory": [("AK" + "Cp", WORD, 69)],
    "hugging-face": [("h" + "f_", WORD, 34)],
    "hugging-face-org": [("api" + "_org_", WORD, 34)],
    "openai": [("s" + "k-", WORD, 20), ("T3Blbk" + "FJ", WORD, 20)],
    "openai-project": [("sk-" + "proj-", WORD, 120)],
    "anthropic": [("sk-" + "ant-api03-", WORD, 93)],
    "nvidia": [("nv" + "api-", WORD, 64)],
    "wandb": [("wandb" + "_v1_", WORD, 40)],
    "replicate": [("r" + "8_", WORD, 37)],
    "groq": [("gs" + "k_", WORD, 52)],
    "xai": [("xa" + "i-", WORD, 80)],
    "perplexity": [("pp" + "lx-", WORD, 48)],
    "together": [("tgp" + "_v1_", WORD, 43)],
    "langsmith": [("lsv2" + "_pt_", HEX, 32), ("_", HEX, 10)],
    "databricks": [("da" + "pi", HEX, 32)],
    "kaggle": [("KG" + "AT_", HEX, 32)],
    "azure-client": [("aB3", "8", 1), ("Q" + "~", WORD, 34)],
    "gcp-key": [("AI" + "za", WORD, 35)],
    "gcp-oauth": [("ya" + "29.", WORD, 120)],
    "gcp-client": [("GOC" + "SPX-", WORD, 28)],
    "digitalocean": [("dop" + "_v1_", HEX, 64)],
    "heroku": [("HR" + "KU-", WORD, 36)],
    "netlify": [("nf" + "p_", WORD, 36)],
    "fly": [("fm" + "2_", WORD, 140)],
    "supabase": [("sb" + "p_", HEX, 40)],
    "planetscale": [("pscale" + "_tkn_", WORD, 43)],
    "alibaba": [("LT" + "AI", WORD, 20)],
    "tencent": [("AK" + "ID", WORD, 32)],
    "vault": [("hv" + "s.", WORD, 90)],
    "terraform": [("", WORD, 14), (".atlas" + "v1.", WORD, 67)],
    "doppler": [("dp" + ".pt.", WORD, 43)],
    "one-password": [("ops" + "_eyJ", WORD, 250)],
    "age": [("AGE-SECRET" + "-KEY-1", UPPER, 58)],
    "pulumi": [("pu" + "l-", HEX, 40)],
    "grafana": [("gl" + "sa_", WORD, 32), ("_", HEX, 8)],
    "new-relic": [("NR" + "AK-", UPPER, 27)],
    "sentry": [("sntr" + "ys_", WORD, 90)],
    "dynatrace": [("dt0" + "c01.", UPPER, 24), (".", UPPER, 64)],
    "slack-bot": [("xo" + "xb-", string.digits, 12), ("-", string.digits, 12), ("-", WORD, 24)],
    "slack-app": [("xa" + "pp-1-A", UPPER, 10), ("-", string.digits, 13), ("-", HEX, 64)],
    "discord": [("M", WORD, 23), (".", WORD, 6), (".", WORD, 27)],
    "telegram": [("", "123456789", 9), (":A" + "A", WORD, 33)],
    "stripe": [("sk" + "_live_", WORD, 24)],
    "stripe-restricted": [("rk" + "_live_", WORD, 24)],
    "square": [("sq0" + "csp-", WORD, 43)],
    "shopify": [("shp" + "at_", HEX, 32)],
    "twilio": [("S" + "K", HEX, 32)],
    "sendgrid": [("S" + "G.", WORD, 22), (".", WORD, 43)],
    "mailchimp": [("", HEX, 32), ("-u" + "s", "12", 1)],
    "mailgun": [("ke" + "y-", HEX, 32)],
    "postman": [("PM" + "AK-", HEX, 24), ("-", HEX, 34)],
    "linear": [("lin" + "_api_", WORD, 40)],
    "notion": [("nt" + "n_", WORD, 46)],
    "figma": [("fig" + "d_", WORD, 40)],
    "airtable": [("pa" + "t", WORD, 14), (".", HEX, 64)],
    "json-web-token": [("e" + "yJhbGciOi", WORD, 20), (".e" + "yJzdWIiOi", WORD, 40), (".", WORD, 43)],
}
_WHOLE: dict[str, tuple[str, str]] = {
    "password-in-address": ("postgres://ada:", "@db.example.org/x"),
    "authorization": ("Authorization: Basic ", ""),
    "bearer": ("curl -H 'X: Bearer ", "'"),
    "azure-account": ("AccountName=a;Account" + "Key=", "==;EndpointSuffix=core"),
    "aws-signature": ("https://b.s3.amazonaws.com/o?X-Amz-Expires=9&X-Amz-Signature=", ""),
    "azure-signature": ("https://a.blob.core.windows.net/c?sv=2024&sig=", ""),
    "slack-webhook": ("https://hooks.slack.com/services/T0/B0/", ""),
    "discord-webhook": ("https://discord.com/api/webhooks/1234567890/", ""),
    "variable": ("export WANDB_API_KEY=", ""),
    "variable-in-quotes": ("export AWS_SECRET_ACCESS_KEY='", "'"),
    "json": ('{"client_secret": "', '", "x": 1}'),
    "yaml": ("password: ", ""),
    "flag": ("login --password ", " --user x"),
    "flag-with-sign": ("--auth-token=", ""),
    "npm-registry": ("//registry.npmjs.org/:_authToken=", ""),
}


def tokens(seed: int) -> dict[str, tuple[str, str]]:
    """By kind: a text with a secret, and the secret."""
    generator = random.Random(seed)

    def some(letters: str, count: int) -> str:
        drawn = "".join(generator.choices(letters, k=count))
        # At least one letter and one digit, as in any that was drawn well.
        return (
            drawn
            if count < 8
            else f"{drawn[:-2]}a7"
            if "a" in letters
            else f"{drawn[:-2]}A7"
            if "A" in letters
            else drawn
        )

    found = {}
    for kind, parts in _PARTS.items():
        token = "".join(mark + some(letters, count) for mark, letters, count in parts)
        found[kind] = (token, token)
    for kind, (before, after) in _WHOLE.items():
        token = some(WORD, 44)
        found[kind] = (before + token + after, token)
    key = "\n".join(some(WORD + "+/", 64) for _ in range(4))
    for name in ("RSA ", "OPENSSH ", "EC ", "", "ENCRYPTED "):
        begin = f"-----BEGIN {name}PRIVATE" + " KEY-----"
        found[f"private-key {name}"] = (f"{begin}\n{key}\n{begin.replace('BEGIN', 'END')}", key)
    return found
