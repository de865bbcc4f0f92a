from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ot_ray.artifacts import generate_key, key_id, sign_folder, verify_folder
from ot_ray.errors import AlreadyExistsError, SignatureError


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = tmp_path / "signed"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "sub" / "b.txt").write_text("two")
    sign_folder(folder, keys[0])
    return folder


def test_signature_holds_wherever_the_folder_lies(signed: Path, keys: tuple[Path, Path]) -> None:
    verify_folder(signed, keys[1])
    moved = signed.rename(signed.parent / "moved")
    verify_folder(moved, keys[1])


def test_no_socket_is_opened(signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sign_folder(signed, keys[0])
    verify_folder(signed, keys[1])


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt", ".gitignore", "new.txt"])
def test_changed_and_extra_files_are_refused(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    (signed / name).write_text("else")
    with pytest.raises(SignatureError, match=name):
        verify_folder(signed, keys[1])


def test_missing_file_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "a.txt").unlink()
    with pytest.raises(SignatureError, match="Missing files"):
        verify_folder(signed, keys[1])


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, other = generate_key(tmp_path / "other")
    with pytest.raises(SignatureError, match="check the key with the owner"):
        verify_folder(signed, other)


@pytest.mark.parametrize("text", ["", "{}", "no json", '{"verificationMaterial": {}}', "[1]"])
def test_malformed_signature_is_refused(signed: Path, keys: tuple[Path, Path], text: str) -> None:
    (signed / "model.sig").write_text(text)
    with pytest.raises(SignatureError, match=r"model\.sig does not belong"):
        verify_folder(signed, keys[1])


def test_payload_of_another_signature_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    old = json.loads((signed / "model.sig").read_text())
    (signed / "a.txt").write_text("changed")
    sign_folder(signed, keys[0])
    new = json.loads((signed / "model.sig").read_text())
    new["dsseEnvelope"]["signatures"] = old["dsseEnvelope"]["signatures"]
    (signed / "model.sig").write_text(json.dumps(new))
    with pytest.raises(SignatureError, match="the signature is wrong"):
        verify_folder(signed, keys[1])


def test_unsigned_folder_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureError, match="is not signed"):
        verify_folder(tmp_path, keys[1])


def test_private_key_is_private_and_never_replaced(tmp_path: Path) -> None:
    private, public = generate_key(tmp_path / "keys")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert key_id(private) == key_id(public)
    before = private.read_bytes()
    with pytest.raises(AlreadyExistsError, match="never replaced"):
        generate_key(tmp_path / "keys")
    assert private.read_bytes() == before


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    path = tmp_path / "rsa.pem"
    path.write_bytes(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(SignatureError, match="no elliptic-curve key"):
        key_id(path)
    path.write_text("nothing")
    with pytest.raises(SignatureError, match="holds no key"):
        key_id(path)
    with pytest.raises(SignatureError, match="holds no key"):
        key_id(tmp_path / "absent.pem")


def test_public_key_cannot_sign(signed: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureError, match="cannot sign"):
        sign_folder(signed, keys[1])


@pytest.mark.slow
def test_the_signing_library_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, ot_ray.artifacts; print(sorted({'model_signing', 'sigstore', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
