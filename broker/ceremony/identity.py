"""User handles and AAGUIDs: the two identities that an authenticator claims.

A user handle returns in one of three encodings. B is the handle's text, and S = base64url(B) the
text of `user.id` in the options.

    S              browsers and Android; iOS for a passkey made on iOS
    B              iOS for a passkey made on the web
    base64url(S)   browsers for a passkey made on iOS, because iOS takes `user.id` for plain text

Source: Passage Flex contract, authenticate finish. All three are accepted. That is safe: each
encoding is one-to-one, and no two of our handles (43 characters of base64url) share an encoding,
because the three have 43, 58 and 78 characters.

An AAGUID names a model of authenticator. It is a claim: any client can send any AAGUID, and only a
chain to a root proves it.
"""

from __future__ import annotations

from broker.model import base64url


def user_handle_matches(returned: str, handle: str) -> bool:
    """True if `userHandle` of an answer, as received, stands for `handle`, the text whose UTF-8
    bytes were registered.

    WebAuthn L3 §7.2 "verify that response.userHandle equals the user handle of the user account".
    Neither is a secret, so the time of the comparison tells nothing.
    """
    if returned == handle:
        return True
    once, bare = _base64url(handle), returned.rstrip("=")
    return bare == once or bare == _base64url(once)


def _base64url(text: str) -> str:
    return base64url(text.encode())


_NAMES = {
    "fbfc3007-154e-4ecc-8c0b-6e020557d7bd": "iCloud Keychain",
    "dd4ec289-e01d-41c9-bb89-70fa845d4bf2": "iCloud Keychain (managed)",
    "ea9b8d66-4d01-1d21-3ce4-b6b48cb575d4": "Google Password Manager",
    "adce0002-35bc-c60a-648b-0b25f1f05503": "Chrome on Mac",
    "b5397666-4885-aa6b-cebf-e52262a439a2": "Chromium",
    "771b48fd-d3d4-4f74-9232-fc157ab0507a": "Edge on Mac",
    "08987058-cadc-4b81-b6e1-30de50dcbe96": "Windows Hello",
    "9ddd1817-af5a-4672-a2b9-3e3dd95000a9": "Windows Hello",
    "6028b017-b1d4-4c02-b4b3-afcdafc96bb2": "Windows Hello",
    "90a3ccdf-635c-4729-a248-9b709135078f": "Microsoft Authenticator",
    "de1e552d-db1d-4423-a619-566b625cdc84": "Microsoft Authenticator",
    "53414d53-554e-4700-0000-000000000000": "Samsung Pass",
    "bada5566-a7aa-401f-bd96-45619a55120d": "1Password",
    "d548826e-79b4-db40-a3d8-11116f7e8349": "Bitwarden",
    "531126d6-e717-415c-9320-3d9aa6981239": "Dashlane",
    "f3809540-7f14-49c1-a8b3-8f813b225541": "Enpass",
    "fdb141b2-5d84-443e-8a35-4698c205a502": "KeePassXC",
    "0ea242b4-43c4-4a1b-8b17-dd6d0b6baec6": "Keeper",
    "b84e4048-15dc-4dd0-8640-f4f60813c8af": "NordPass",
    "50726f74-6f6e-5061-7373-50726f746f6e": "Proton Pass",
    "cb69481e-8ff7-4039-93ec-0a2729a154a8": "YubiKey 5",
    "ee882879-721c-4913-9775-3dfcce97072a": "YubiKey 5",
    "fa2b99dc-9e39-4257-8f92-4a30d23c4118": "YubiKey 5 NFC",
    "2fc0579f-8113-47ea-b116-bb5a8db9202a": "YubiKey 5 NFC",
    "c5ef55ff-ad9a-4b9f-b580-adebafe026d0": "YubiKey 5Ci",
}


def authenticator_name(aaguid: str) -> str | None:
    """The common name of a model of authenticator, by its AAGUID (8-4-4-4-12 hexadecimal).

    None if our short list lacks it.
    """
    return _NAMES.get(aaguid.lower())
