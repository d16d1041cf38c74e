"""
Keys are checked before they are needed, and what they encrypt only they can read.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from celerykit import ciphers
from celerykit.ciphers import HOW_TO_MAKE, Cipher, Undecipherable, cipher_of, is_encrypted, keys_in

OLD, NEW = "b2xkIGtleXMgYXJlIGtlcHQgdW50aWwgdGhleSBnbz8=", "bmV3IGtleXMgZW5jcnlwdCB3aGF0IGlzIHNlbnQgbm8="


@given(st.binary())
def test_what_is_encrypted_is_decrypted_with_the_same_key(data: bytes) -> None:
    text = Cipher([NEW]).encrypt(data)

    assert is_encrypted(text)
    assert Cipher([NEW]).decrypt(text) == data


def test_the_same_data_is_another_text_each_time() -> None:
    cipher = Cipher([NEW])

    assert cipher.encrypt(b"secret") != cipher.encrypt(b"secret")


def test_the_first_key_encrypts_and_all_of_them_decrypt() -> None:
    before, between, after = Cipher([OLD]), Cipher([NEW, OLD]), Cipher([NEW])

    assert between.decrypt(before.encrypt(b"secret")) == b"secret"
    assert after.decrypt(between.encrypt(b"secret")) == b"secret"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:50] + ("A" if text[50] == "B" else "B") + text[51:],
        lambda text: text[:40],
        lambda text: "ck1:gAAAA\u00e9",
    ],
)
def test_what_was_changed_or_has_another_key_cannot_be_read(spoil: object) -> None:
    text = Cipher([OLD]).encrypt(b"secret")

    with pytest.raises(Undecipherable, match="CELERYKIT_SECRET_KEYS"):
        Cipher([NEW]).decrypt(text)
    with pytest.raises(Undecipherable):
        Cipher([OLD]).decrypt(spoil(text))  # type: ignore[operator]


@pytest.mark.parametrize("value", ["", "ck1:", "ck1:hello", "gAAAAABh", 1, None, b"ck1:gAAAAABh"])
def test_what_was_not_encrypted_does_not_look_like_it(value: object) -> None:
    assert not is_encrypted(value)


def test_keys_are_separated_by_commas() -> None:
    assert keys_in(f" {NEW}, {OLD}\n") == [NEW, OLD]


@pytest.mark.parametrize(
    ("text", "which"),
    [
        ("", "it is empty"),
        ("hunter2", "it is no Fernet key"),
        (f"{NEW},hunter2,{OLD}", "key 2 of 3 is no Fernet key"),
        (f"{NEW},", "key 2 of 2 is empty"),
        (NEW[:-1], "it is no Fernet key"),
    ],
)
def test_a_wrong_key_is_named_by_its_place_and_never_shown(text: str, which: str) -> None:
    with pytest.raises(ValueError, match=which) as told:
        keys_in(text)

    assert HOW_TO_MAKE in str(told.value)
    assert "hunter2" not in str(told.value)
    assert NEW[:-1] not in str(told.value)


def test_how_to_make_a_key_makes_one() -> None:
    command = HOW_TO_MAKE.replace("python", sys.executable, 1)

    made = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30, check=True).stdout

    assert keys_in(made.strip())


def test_keys_without_the_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ciphers, "find_spec", lambda name: None)

    with pytest.raises(ValueError, match=r"pip install 'celerykit\[crypto\]'"):
        keys_in(NEW)


def test_nobody_sees_the_keys() -> None:
    assert repr(cipher_of(SecretStr(f"{NEW},{OLD}"))) == "<Cipher with 2 keys>"
    assert cipher_of(None) is None


def test_the_package_is_imported_with_the_first_secret() -> None:
    code = (
        "import sys, celerykit; from celerykit.ciphers import cipher_of; from pydantic import SecretStr\n"
        f"cipher = cipher_of(SecretStr({NEW!r})); assert 'cryptography' not in sys.modules\n"
        "cipher.encrypt(b''); assert 'cryptography' in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)
