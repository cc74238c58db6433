"""No secret in a file or on the terminal: by the name of its key, in a URL, or from the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from boxed import Box

from llmfoundry.private import HIDDEN, cleaned, disclosed, is_secret
from llmfoundry.settings import load_settings, read_resolved, write_resolved

SECRETS = {"FAULTS_TOKEN": "tok-3f9a1c77", "FAULTS_PLAIN": "plain-5d21e0b4", "FAULTS_NAME": "named-8c8c1d9e"}


def _leaks(folder: Path, *secrets: str) -> list[str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [f"{file}: {secret}" for file in files for secret in secrets if secret.encode() in file.read_bytes()]


def test_no_secret_in_anything_that_a_run_leaves(box: Box, place: Path, run: Path) -> None:
    words = (
        "variables={hub: '${oc.env:FAULTS_TOKEN}'}", "tokenizer.kwargs={token: '${variables.hub}'}",
        "tokenizer.kwargs.note='${oc.env:FAULTS_PLAIN}'", "tokenizer.kwargs.api_key=key-77e1",
        "tokenizer.kwargs.proxy='http://user:pass-19af@host:80/x'", "run_name='x-${oc.env:FAULTS_NAME}'",
        "loggers={tensorboard: {}}", "save_folder=secrets",
    )  # fmt: skip
    secrets = (*SECRETS.values(), "key-77e1", "pass-19af")
    ended = box.run("train", place / "small.yaml", *words, env=SECRETS)
    assert ended.code == 0, ended.err
    again = box.run("train", place / "small.yaml", *words, "max_duration=8ba", env=SECRETS)  # resumed: nothing differs
    assert again.code == 0 and "kwargs" not in again.err, again.err
    exported = box.run("convert", "to-hf", "secrets", "secrets-hf")
    assert exported.code == 0, exported.err
    said = [ended.err, ended.out, again.err, again.out]
    assert _leaks(place / "secrets", *secrets) + _leaks(place / "secrets-hf", *secrets) == []
    assert [secret for secret in secrets for text in said if secret in text] == []
    config = (place / "secrets" / "config.yaml").read_text()
    for written in ("token: ${oc.env:FAULTS_TOKEN}", "note: ${oc.env:FAULTS_PLAIN}", f"api_key: {HIDDEN}",
                    f"proxy: http://{HIDDEN}@host:80/x", "run_name: x-${oc.env:FAULTS_NAME}"):  # fmt: skip
        assert written in config
    # Elsewhere, without these variables, the checkpoint opens.
    opened = box.run("generate", "--checkpoint", "secrets", "--prompt", "a", "--max-new-tokens", "1")
    assert opened.code == 0, opened.err


def test_no_secret_in_a_plan_or_a_mistake(box: Box, place: Path, run: Path) -> None:
    plan = box.run("train", place / "small.yaml", "--dry-run", "tokenizer.kwargs.token=tok-3f9a", "save_folder=x")
    assert plan.code == 0 and "tok-3f9a" not in plan.out + plan.err and f"token: {HIDDEN}" in plan.out
    for word in ("tokenizer.kwargs.token=[tok-3f9a]", "seed.api_key=tok-3f9a", "load_path=s3://me:tok-3f9a@host/x"):
        ended = box.run("train", place / "small.yaml", word, "save_folder=x")
        assert ended.code == 2 and "tok-3f9a" not in ended.err, ended.err


@pytest.mark.parametrize("key", ["token", "hub_token", "hubToken", "api_key", "APIKey", "secret", "password", "db_pwd"])
def test_secret_keys(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key", ["eos_token", "text_key", "max_new_tokens", "tokenizer", "keys", "bos_token_id", "path"]
)
def test_other_keys(key: str) -> None:
    assert not is_secret(key)


def test_special_tokens_are_no_secrets() -> None:
    data = {"kwargs": {"my_token": "<|user|>", "tool_token": "[TOOL]"}}
    assert disclosed(data, {}) == data


def test_what_came_from_the_environment_is_written_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS_ROOT", "/somewhere/else")
    file = tmp_path / "run.yaml"
    file.write_text(
        "variables: {root: '${oc.env:FAULTS_ROOT}/a'}\na: {b: '${root}/c'}\nd: ${a}\ne: '\\${oc.env:X}'\nf: 1"
    )
    found = load_settings(file)
    assert found.data == {
        "a": {"b": "/somewhere/else/a/c"},
        "d": {"b": "/somewhere/else/a/c"},
        "e": "${oc.env:X}",
        "f": 1,
    }
    text = write_resolved(disclosed(found.data, found.environment))
    (tmp_path / "config.yaml").write_text(text)
    assert "/somewhere" not in text
    assert load_settings(tmp_path / "config.yaml").data == found.data
    raw = read_resolved(tmp_path / "config.yaml")
    assert raw["a"] == {"b": "${oc.env:FAULTS_ROOT}/a/c"} and raw["e"] == "${oc.env:X}"


def test_a_file_of_others_reads_no_secret_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    monkeypatch.setenv("FAULTS_ROOT", "/here")
    file = tmp_path / "config.yaml"
    file.write_text("a: ${oc.env:HF_TOKEN}\nb: ${oc.env:FAULTS_ROOT}\nc: ${oc.env:NO_SUCH}\nd: ${oc.env:NO_SUCH,x}")
    found = load_settings(file, is_users=False).data
    assert found == {"a": "${oc.env:HF_TOKEN}", "b": "/here", "c": "${oc.env:NO_SUCH}", "d": "x"}


def test_messages_are_cleaned() -> None:
    assert cleaned("a.token=abc: no") == f"a.token={HIDDEN} no"
    assert cleaned("expected key=value, key:=value or ~key") == "expected key=value, key:=value or ~key"
    assert cleaned("s3://me:pw@host/x?y") == f"s3://{HIDDEN}@host/x?y"
    assert json.loads(cleaned(json.dumps({"eos_token": "</s>"}))) == {"eos_token": "</s>"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://me:p@ss@host/x", f"s3://{HIDDEN}@host/x"),
        ("https://host/x?X-Amz-Date=1&X-Amz-Signature=ab12", f"https://host/x?{HIDDEN}"),
        ("https://host/x?sv=1&sig=ab%2F12 is away", f"https://host/x?{HIDDEN} is away"),
        ("https://host/x?access_token=ab12", f"https://host/x?{HIDDEN}"),
        ("https://host/x?page=2", "https://host/x?page=2"),
        ("memory://a@b/c", f"memory://{HIDDEN}@b/c"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_passwords_and_signatures_of_urls_are_left_out(url: str, shown: str) -> None:
    """Of a password with an @ in it, the second half was told, and signed URLs were."""
    assert disclosed({"load_path": url}, {}) == {"load_path": shown}
    assert cleaned(url) == shown or HIDDEN in cleaned(url)
