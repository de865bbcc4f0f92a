"""Detached OpenSSF signatures of folders, with a plain elliptic-curve key and without any network.

Whose public key to trust, and how it reaches the reader, is left to the owner. The signing library loads
many packages, so it is imported only when a signature is made or checked."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ot_ray.artifacts.manifest import SIGNATURE
from ot_ray.errors import AlreadyExistsError, SignatureError
from ot_ray.store.partial import disk_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey


def generate_key(folder: str | Path) -> tuple[Path, Path]:
    """Make a P-256 key pair: `private.pem`, readable by its owner alone, and `public.pem`.

    Returns:
        The two paths, private first.

    Raises:
        AlreadyExistsError: one of the files is there; a key is never replaced.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = Path(folder)
    private, public = folder / "private.pem", folder / "public.pem"
    for path in (private, public):
        if path.exists():
            raise AlreadyExistsError(f"{path} is already there, and a key is never replaced; choose another folder")
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with disk_errors(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        public.write_bytes(_pem(key.public_key()))
    return private, public


def key_id(key: str | Path) -> str:
    """The sha256, in hexadecimal, of a public key's PEM text; a private key's file gives that of its public half.

    Raises:
        SignatureError: the file is missing, or holds no unencrypted elliptic-curve key.
    """
    return hashlib.sha256(_pem(_public_half(Path(key)))).hexdigest()


def sign_folder(folder: str | Path, private_key: str | Path) -> Path:
    """Sign all files of a folder into its `model.sig`, in the in-toto format of OpenSSF model signing.

    Returns:
        The signature's path.

    Raises:
        SignatureError: the key cannot be used.
    """
    from model_signing import hashing, signing

    folder = Path(folder)
    key_id(private_key)
    signature = folder / SIGNATURE
    every_file = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    config = signing.Config().set_hashing_config(every_file)
    try:
        config.use_elliptic_key_signer(private_key=Path(private_key)).sign(folder, signature)
    except (ValueError, TypeError, AttributeError) as error:
        signature.unlink(missing_ok=True)
        raise SignatureError(
            f"{private_key} cannot sign {folder}: {error}; use the private.pem of generate_key"
        ) from error
    return signature


def verify_folder(folder: str | Path, public_key: str | Path) -> None:
    """Check that `model.sig` covers exactly the files of a folder and was made with the key's private half.

    Raises:
        SignatureError: there is no signature, it belongs to another key, or a file differs from what was signed.
    """
    from model_signing import hashing, verifying

    folder = Path(folder)
    key_id(public_key)
    signature = folder / SIGNATURE
    if signature.is_symlink() or not signature.is_file():
        raise SignatureError(f"{folder} is not signed: it has no {SIGNATURE}; ask the owner for a signed bundle")
    every_file = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    config = verifying.Config().set_hashing_config(every_file)
    try:
        config.use_elliptic_key_verifier(public_key=Path(public_key)).verify(folder, signature)
    # The signature is untrusted bytes under several parsers, each with errors of its own.
    except Exception as error:
        raise SignatureError(
            f"{SIGNATURE} does not belong to these files and {public_key}: {str(error) or 'the signature is wrong'}; "
            "fetch the bundle again, and check the key with the owner"
        ) from error


def _public_half(path: Path) -> EllipticCurvePublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        text = path.read_bytes()
        if b"PRIVATE KEY" in text:
            key = serialization.load_pem_private_key(text, password=None).public_key()
        else:
            key = serialization.load_pem_public_key(text)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path} holds no key: {error}; use a PEM file of generate_key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise SignatureError(f"{path} holds no elliptic-curve key; use a PEM file of generate_key")
    return key


def _pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
