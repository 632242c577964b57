"""Who made a bundle: an Ed25519 signature (RFC 8032) of its manifest, which holds the hashes of everything else.

`manifest.sig` is the bare 64 bytes, over the bytes of manifest.json as they lie there, so that any tool can check it:

    openssl genpkey -algorithm ed25519 -out key.pem        the private key: stays with whoever makes bundles
    openssl pkey -in key.pem -pubout -out key.pub          the public key: goes to the devices
    openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in manifest.json -sigfile manifest.sig

What the manifest does not name is not signed: timings.json, report.html, and files whose names begin with a dot.
Nothing here takes a verdict from any of them. A program, model.pyz, has a signature over the whole file beside it,
because it cannot vouch for itself: whoever may change its model may change its check, too.

    openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in model.pyz -sigfile model.pyz.sig

Needs the package `cryptography` (the extra "sign") for signing and for checking, and for nothing else.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cspdeploy.core.bundle import MANIFEST_FILE, SIGNATURE_FILE, check_hashes, read_manifest
from cspdeploy.core.errors import InputError, MissingExtraError, TamperedError
from cspdeploy.core.json_file import read_json_bytes
from cspdeploy.core.types import Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = [
    "FILE_SUFFIX",
    "SIGNATURE_BYTES",
    "check_private_key",
    "sign_file",
    "sign_folder",
    "verify_folder",
    "verify_manifest",
]

SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 1 << 16
"""A key in PEM has about 120 bytes; this bounds what a wrong file makes us read."""
FILE_SUFFIX = ".sig"
"""Of a signature over one whole file, beside it: model.pyz.sig."""
_MAKE_KEY = "openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_PUBLIC_KEY = "openssl pkey -in key.pem -pubout -out key.pub"
_COPY_KEY = "copy the public key (key.pub) of whoever made it"


def sign_folder(folder: Path, key: Path) -> str:
    """Write manifest.sig beside manifest.json, in place of an older one.

    Args:
        key: file of an Ed25519 private key in PEM (PKCS #8), without a password.

    Returns:
        The fingerprint of the key's public half: SHA-256 of its 32 bytes, in hexadecimal.

    Raises:
        InputError: the key's file is missing, or holds something else.
        MissingExtraError: `cryptography` is not installed.
    """
    private = _read_private_key(key)
    signature = private.sign((folder / MANIFEST_FILE).read_bytes())
    (folder / SIGNATURE_FILE).write_bytes(signature)
    return _fingerprint(private.public_key())


def check_private_key(key: Path) -> None:
    """Whether `sign_folder` will take the key: asked before the long work.

    Raises:
        InputError, MissingExtraError: as `sign_folder`.
    """
    _read_private_key(key)


def sign_file(path: Path, key: Path) -> Path:
    """Write the signature of a whole file beside it, in place of an older one, and tell where.

    Raises:
        InputError, MissingExtraError: as `sign_folder`.
    """
    place = path.with_name(path.name + FILE_SUFFIX)
    place.write_bytes(_read_private_key(key).sign(path.read_bytes()))
    return place


def verify_folder(folder: Path, key: Path) -> str:
    """Check the signature of a bundle, and then every file of it against the manifest that was signed.

    Args:
        key: file of the Ed25519 public key in PEM of whoever is meant to have made the bundle.

    Returns:
        The key's fingerprint, as `sign_folder` gives it.

    Raises:
        InputError: the key's file is missing or holds something else, such as the private key; not a bundle.
        TamperedError: there is no signature, it was made with another key, or the manifest or a file has changed since.
        MissingExtraError: `cryptography` is not installed.
    """
    manifest, fingerprint = verify_manifest(folder, key)
    check_hashes(folder, manifest)
    return fingerprint


def verify_manifest(folder: Path, key: Path, *, data: bytes | None = None) -> tuple[Manifest, str]:
    """Check the signature of a bundle's manifest, and give the manifest that was signed: parsed of those very bytes.

    No file is compared with its hash here: `check_hashes` does that, with the manifest that this gives.

    Args:
        key: as in `verify_folder`.
        data: the bytes of manifest.json, where they have been read already.

    Returns:
        The manifest, and the key's fingerprint.

    Raises:
        InputError, MissingExtraError: as `verify_folder`.
        TamperedError: there is no signature, it was made with another key, or the manifest has changed since.
    """
    public = _read_public_key(key)
    from cryptography.exceptions import InvalidSignature

    signed = read_json_bytes(folder / MANIFEST_FILE) if data is None else data
    try:
        public.verify(_read_signature(folder), signed)
    except InvalidSignature as error:
        raise TamperedError(
            f"{folder}: {MANIFEST_FILE} is not what was signed with the private half of {key}",
            fix="do not use it: it was changed, or signed with another key",
        ) from error
    return read_manifest(folder, data=signed), _fingerprint(public)


def _read_signature(folder: Path) -> bytes:
    path = folder / SIGNATURE_FILE
    if not path.is_file() or path.is_symlink():
        raise TamperedError(
            f"{folder}: is not signed (no {SIGNATURE_FILE})",
            fix="ask whoever made it for a signed one: cspdeploy package BUNDLE -o model.zip --sign key.pem",
        )
    signature = _read_bounded(path, MAX_KEY_BYTES, fix="fetch the package again")
    if len(signature) != SIGNATURE_BYTES:
        raise TamperedError(
            f"{path}: got {len(signature)} bytes, expected an Ed25519 signature of {SIGNATURE_BYTES}",
            fix="fetch the package again from where it was made",
        )
    return signature


def _fingerprint(public: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    _require_cryptography("signing", fix="")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read_key(path, fix=_MAKE_KEY)
    if b"PUBLIC KEY-----" in data:
        raise InputError(f"{path}: is a public key, expected the private one", fix="--sign key.pem")
    try:
        key: Any = load_pem_private_key(data, password=None)
    except TypeError as error:  # so says the library of a key with a password
        raise InputError(f"{path}: is locked with a password", fix="openssl pkey -in KEY -out key.pem") from error
    except Exception as error:  # of many kinds, some of them private to the library
        raise InputError(f"{path}: not a private key in PEM", fix=_MAKE_KEY) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: a private key of another sort, expected Ed25519", fix=_MAKE_KEY)
    return key


def _read_public_key(path: Path) -> Ed25519PublicKey:
    _require_cryptography("checking a signature", fix="pip install cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read_key(path, fix=_COPY_KEY)
    if b"PRIVATE KEY-----" in data:
        raise InputError(
            f"{path}: is a private key, expected the public one: a private key has no business on a device",
            fix=_MAKE_PUBLIC_KEY,
        )
    try:
        key: Any = load_pem_public_key(data)
    except Exception as error:  # of many kinds, some of them private to the library
        raise InputError(f"{path}: not a public key in PEM", fix=_COPY_KEY) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: a public key of another sort, expected Ed25519", fix=_COPY_KEY)
    return key


def _require_cryptography(needed_for: str, *, fix: str) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        missing = MissingExtraError("cryptography", extra="sign", needed_for=needed_for)
        missing.fix = fix or missing.fix  # a device need not have cspdeploy as a package, of which that is an extra
        raise missing from error


def _read_key(path: Path, *, fix: str) -> bytes:
    data = _read_bounded(path, MAX_KEY_BYTES, fix=fix)
    if b"PRIVATE KEY-----" in data and b"PUBLIC KEY-----" in data:
        raise InputError(f"{path}: holds a private key and a public one, expected one alone", fix=_MAKE_PUBLIC_KEY)
    return data


def _read_bounded(path: Path, limit: int, *, fix: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", fix=fix) from error
    if len(data) > limit:
        raise InputError(f"{path}: more than {limit} bytes", fix=fix)
    return data
