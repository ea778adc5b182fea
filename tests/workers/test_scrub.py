"""Secrets are taken out of text, whatever way they are known."""

import pytest

from workers.scrub import scrub, secrets


def test_values_of_variables_named_like_secrets_are_known() -> None:
    environ = {
        "HF_TOKEN": "abcdef123",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "DB_PASSWORD": "correct horse",
        "PATH": "/usr/bin:/bin",
        "KEYBOARD": "qwerty-layout",
    }
    assert set(secrets(environ)) >= {"abcdef123", "wJalrXUtnFEMI/K7MDENG", "AKIAEXAMPLE", "correct horse"}
    assert not {"/usr/bin:/bin", "qwerty-layout"} & set(secrets(environ))


def test_passwords_of_urls_are_known_as_written_and_as_meant() -> None:
    known = secrets({"SQUEEZE_BROKER_URL": "redis://:p%40ssword1@host/0"}, ["postgresql://me:anotherone@host/db"])
    assert {"p%40ssword1", "p@ssword1", "anotherone"} <= set(known)


def test_short_values_are_not_taken_for_secrets_or_ordinary_words_would_vanish() -> None:
    assert "yes" not in secrets({"USE_TOKEN": "yes"})


def test_a_secret_that_holds_another_goes_whole() -> None:
    known = secrets({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-and-more"})
    assert scrub("abcdefgh-and-more, abcdefgh", known) == "[hidden], [hidden]"


@pytest.mark.parametrize(
    "text",
    [
        "token hf_AbCdEfGhIjKlMn",
        "Authorization: Bearer abc.def.ghi",
        "postgresql://user:hunter22@host/db",
        "key sq-0123456789abcdefghij",
    ],
)
def test_what_has_the_shape_of_a_secret_goes_even_when_nobody_knew_it(text: str) -> None:
    shown = scrub(text, ())
    assert "[hidden]" in shown
    assert not any(part in shown for part in ("hf_AbC", "abc.def", "hunter22", "sq-0123"))


def test_ordinary_text_stays() -> None:
    text = "model.layers.0.self_attn.q_proj at http://127.0.0.1:8000/v1/jobs"
    assert scrub(text, ()) == text
