"""A software authenticator with its browser: it answers WebAuthn options as a page would, and can
misbehave on request.

It shares no code with the broker (only `cryptography` and `cbor2`), so that a fault in the one
can't hide in the other. One `Authenticator` holds discoverable credentials by RP ID; `register` and
`authenticate` take the JSON object under `publicKey` and return the JSON of WebAuthn L3 §5.1.7 and
§5.1.8 (`RegistrationResponseJSON`, `AuthenticationResponseJSON`).

    device = Authenticator()
    answer = device.register(options["publicKey"], "https://example.com")
    answer = device.authenticate(options["publicKey"], "https://example.com")
    flex_wire_form(answer)                                     # `transports` beside `response`, as
                                                               the Flex SDKs send it

Every deviation is one keyword of `Misbehaviour`; whatever is changed before signing is signed as
changed, so that the server must find the deviation itself and not a broken signature:

    device.authenticate(options, origin, uv=False)             # user not verified
    device.authenticate(options, origin, counter=1)            # a clone: the counter went back
    device.authenticate(options, origin, challenge="AAAA")     # another challenge, correctly signed
    device.authenticate(options, origin, signature=b"no")      # not a signature
    device.register(options, origin, attestation="packed")     # with a certificate of
                                                               `device.authority`
    device.register(options, origin, key={3: -999})            # COSE key with another algorithm

As a real one it refuses (`AuthenticatorRefused`): a credential of `excludeCredentials` that it
holds, options in which it supports no algorithm, an authentication in which it has no credential.
"""

from __future__ import annotations

import hashlib
import json
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TypedDict, Unpack

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

ES256, EDDSA, RS256, ES384, ES512, ED448 = -7, -8, -257, -35, -36, -53
RS1 = -65535  # of TPM statements only
Attestation = Literal["none", "packed-self", "packed", "fido-u2f", "android-key", "apple", "tpm"]
PrivateKey = (
    ec.EllipticCurvePrivateKey
    | rsa.RSAPrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)

_CURVES: dict[int, tuple[int, ec.EllipticCurve, hashes.HashAlgorithm]] = {
    ES256: (1, ec.SECP256R1(), hashes.SHA256()),
    ES384: (2, ec.SECP384R1(), hashes.SHA384()),
    ES512: (3, ec.SECP521R1(), hashes.SHA512()),
}


class AuthenticatorRefused(Exception):
    """What a browser reports as an exception; `name` is the DOMException's."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name


class Misbehaviour(TypedDict, total=False):
    """Deviations of one call. Everything but `signature`, `statement`, `answer` and
    `attestation_object` is signed as changed.
    """

    up: bool
    uv: bool
    be: bool
    bs: bool
    flags: int  # the whole byte
    counter: int  # this value; later calls go on from the stored one
    challenge: str  # as it stands in client data
    type: str
    rp_id: str  # the one hashed into authenticator data
    cross_origin: bool | None  # None leaves the key out
    top_origin: str
    client_data: Mapping[str, Any]  # more keys, or other values
    client_data_json: bytes  # instead of all of it
    credential_id: bytes  # registration: the new id; authentication: the id answered
    user_handle: str | None  # the answered text; None leaves it out
    signature: bytes | Callable[[bytes], bytes]
    auth_data: Callable[[bytes], bytes]  # changes authenticator data
    extensions: Mapping[str, Any]  # authenticator extension outputs
    answer: Mapping[str, Any]  # more keys on top of the answer, or other values
    # registration only
    attestation: Attestation
    algorithm: int  # without asking the options
    private_key: PrivateKey  # instead of a new one
    key: Mapping[int, Any]  # COSE key members added or replaced; None removes one
    aaguid: bytes
    statement: Callable[[dict[str, Any]], Any]  # changes the attestation statement after signing
    attestation_object: Callable[
        [dict[str, Any]], Any
    ]  # what to encode instead; bytes stand for themselves
    certificate: Mapping[str, Any]  # keywords of `Authority.issue` for the attestation certificate


@dataclass(slots=True)
class HeldCredential:
    """What an authenticator stores (WebAuthn L3 §6.1, public key credential source), and its
    counter.
    """

    id: bytes
    rp_id: str
    user_handle: bytes
    user_name: str
    key: PrivateKey
    algorithm: int
    counter: int
    backup_eligible: bool

    def export(self) -> bytes:
        """The private key as PKCS #8, DER."""
        return self.key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def b64(raw: bytes) -> str:
    """Base64url without padding."""
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    """The bytes of base64url text, padding optional."""
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def flex_wire_form(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer as passage-flex-js sends it in `handshake_response`: `transports` beside
    `response`, no attachment and no extension results, and `userHandle` as `""` where there is
    none."""
    wire = {key: answer[key] for key in ("id", "rawId", "type")}
    response = dict(answer["response"])
    if "attestationObject" in response:
        wire["transports"] = response.pop("transports", [])
    else:
        response["userHandle"] = response.get("userHandle") or ""
    return {**wire, "response": response}


@lru_cache(maxsize=8)
def rsa_key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """RSA key `number` of this process: generating one costs up to a second, so they are made
    once.
    """
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def new_key(algorithm: int) -> PrivateKey:
    """A private key for a COSE algorithm identifier. RSA keys are shared within the process."""
    if algorithm in _CURVES:
        return ec.generate_private_key(_CURVES[algorithm][1])
    if algorithm == EDDSA:
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm == ED448:
        return ed448.Ed448PrivateKey.generate()
    if algorithm == RS256:
        return rsa_key()
    raise ValueError(f"no key for algorithm {algorithm}")


def cose_key(key: PrivateKey, algorithm: int) -> dict[int, Any]:
    """The public half as a COSE_Key map (RFC 9053 §7, RFC 8230 §4), members in CTAP2 canonical
    order.
    """
    if isinstance(key, ec.EllipticCurvePrivateKey):
        numbers = key.public_key().public_numbers()
        size = (key.curve.key_size + 7) // 8
        curve = {"secp256r1": 1, "secp384r1": 2, "secp521r1": 3}[key.curve.name]
        x, y = numbers.x.to_bytes(size, "big"), numbers.y.to_bytes(size, "big")
        return {1: 2, 3: algorithm, -1: curve, -2: x, -3: y}
    if isinstance(key, rsa.RSAPrivateKey):
        public = key.public_key().public_numbers()
        return {
            1: 3,
            3: algorithm,
            -1: public.n.to_bytes((public.n.bit_length() + 7) // 8, "big"),
            -2: public.e.to_bytes(3, "big"),
        }
    raw = key.public_key().public_bytes_raw()
    return {1: 1, 3: algorithm, -1: 6 if isinstance(key, ed25519.Ed25519PrivateKey) else 7, -2: raw}


def sign(key: PrivateKey, algorithm: int, data: bytes) -> bytes:
    """A signature as WebAuthn L3 §6.5.6 formats it: DER for ECDSA, raw for EdDSA, PKCS #1 v1.5 for
    RS256.
    """
    if isinstance(key, ec.EllipticCurvePrivateKey):
        digest = _CURVES[algorithm][2] if algorithm in _CURVES else hashes.SHA256()
        return key.sign(data, ec.ECDSA(digest))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(
            data, padding.PKCS1v15(), hashes.SHA1() if algorithm == RS1 else hashes.SHA256()
        )
    return key.sign(data)


def der(tag: int, *content: bytes) -> bytes:
    """One DER value. `tag` holds the identifier octets, so `0xBF853E` is [702] constructed."""
    body = b"".join(content)
    size = len(body)
    width = (size.bit_length() + 7) // 8
    length = bytes([size]) if size < 128 else bytes([0x80 | width]) + size.to_bytes(width, "big")
    return tag.to_bytes((tag.bit_length() + 7) // 8, "big") + length + body


PURPOSE_SIGN = der(0xA1, der(0x31, der(0x02, b"\x02")))  # [1] SET OF INTEGER { KM_PURPOSE_SIGN }
ORIGIN_GENERATED = der(0xBF853E, der(0x02, b"\x00"))  # [702] INTEGER KM_ORIGIN_GENERATED
ALL_APPLICATIONS = der(0xBF8458, der(0x05))  # [600] NULL


class Authority:
    """A certification authority for attestation certificates. `pem` is the root that a policy may
    name.
    """

    def __init__(self, name: str = "Test Attestation Root") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(
            self.name,
            self.key.public_key(),
            [
                (x509.BasicConstraints(ca=True, path_length=None), True),
                (
                    x509.KeyUsage(False, False, False, False, False, True, True, False, False),
                    True,
                ),
                (x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False),
            ],
            self.name,
            self.key,
        )

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def intermediate(
        self,
        name: str = "Test Attestation CA",
        *,
        ca: bool = True,
        years: tuple[int, int] = (2020, 2060),
    ) -> Authority:
        """A second authority whose certificate this one signed."""
        below = Authority(name)
        below.certificate = self._sign(
            below.name,
            below.key.public_key(),
            [
                (x509.BasicConstraints(ca=ca, path_length=0 if ca else None), True),
                (x509.SubjectKeyIdentifier.from_public_key(below.key.public_key()), False),
            ],
            self.name,
            self.key,
            years,
        )
        return below

    def issue(
        self,
        public_key: Any,
        extensions: list[tuple[x509.ExtensionType, bool]],
        *,
        subject: Mapping[ObjectIdentifier, str] | None = None,
        ca: bool | None = False,
        years: tuple[int, int] = (2020, 2060),
        drop: tuple[str, ...] = (),
    ) -> bytes:
        """A certificate for `public_key`, DER. `ca=None` leaves basic constraints out; `drop`
        leaves out extensions by OID.
        """
        names = (
            subject
            if subject is not None
            else {
                NameOID.COUNTRY_NAME: "SE",
                NameOID.ORGANIZATION_NAME: "Test",
                NameOID.ORGANIZATIONAL_UNIT_NAME: "Authenticator Attestation",
                NameOID.COMMON_NAME: "Test Authenticator",
            }
        )
        name = x509.Name([x509.NameAttribute(oid, text) for oid, text in names.items() if text])
        wanted = [pair for pair in extensions if pair[0].oid.dotted_string not in drop]
        if ca is not None:
            wanted.append((x509.BasicConstraints(ca=ca, path_length=None), True))
        certificate = self._sign(name, public_key, wanted, self.name, self.key, years)
        return certificate.public_bytes(serialization.Encoding.DER)

    @staticmethod
    def _sign(
        subject: x509.Name,
        public_key: Any,
        extensions: list[tuple[x509.ExtensionType, bool]],
        issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        years: tuple[int, int] = (2020, 2060),
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime(years[0], 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(years[1], 1, 1, tzinfo=UTC))
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False
            )
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(key, hashes.SHA256())


@lru_cache(maxsize=1)
def default_authority() -> Authority:
    """The authority of authenticators that were given none."""
    return Authority()


class Authenticator:
    """See the module. `algorithms` are those it supports; it takes the first of the options' that
    it has. As a phone, it can be reached from its own browser and from another device, so it
    registers as either `attachment`, whichever the options ask for; with None its browser says
    nothing of that."""

    def __init__(
        self,
        *,
        aaguid: bytes = bytes.fromhex("b7d3f68e88a6471e9ecf2df26d041ede"),
        attestation: Attestation = "none",
        algorithms: tuple[int, ...] = (ES256, EDDSA, RS256, ES384, ES512, ED448),
        verifies_user: bool = True,
        backup_eligible: bool = True,
        backed_up: bool = True,
        counts: bool = True,
        attachment: str | None = "platform",
        transports: tuple[str, ...] = ("internal", "hybrid"),
        authority: Authority | None = None,
    ) -> None:
        self.aaguid = aaguid
        self.attestation = attestation
        self.algorithms = algorithms
        self.verifies_user = verifies_user
        self.backup_eligible = backup_eligible
        self.backed_up = backed_up
        self.counts = counts
        self.attachment = attachment
        self.transports = transports
        self.authority = authority or default_authority()
        self.held: dict[bytes, HeldCredential] = {}

    def credentials(self, rp_id: str) -> list[HeldCredential]:
        """Its credentials for an RP ID, newest first."""
        return [c for c in reversed(self.held.values()) if c.rp_id == rp_id]

    def register(
        self, options: Mapping[str, Any], origin: str, **how: Unpack[Misbehaviour]
    ) -> dict[str, Any]:
        """Answer `PublicKeyCredentialCreationOptionsJSON` as `navigator.credentials.create()`
        would, and keep the credential.

        Raises:
            AuthenticatorRefused: `InvalidStateError` for an excluded credential,
                `NotSupportedError` for no common algorithm.
        """
        rp_id = options["rp"].get("id") or origin.split("//")[1].split(":")[0]
        if any(unb64(d["id"]) in self.held for d in options.get("excludeCredentials", [])):
            raise AuthenticatorRefused(
                "InvalidStateError", "a credential of excludeCredentials is held"
            )
        algorithm = how.get("algorithm")
        if algorithm is None:
            offered = [p["alg"] for p in options["pubKeyCredParams"] if p["type"] == "public-key"]
            algorithm = next((a for a in offered if a in self.algorithms), None)
        if algorithm is None:
            raise AuthenticatorRefused("NotSupportedError", "no algorithm in common")
        key = how.get("private_key") or new_key(algorithm)
        credential = HeldCredential(
            id=how["credential_id"] if "credential_id" in how else os.urandom(32),
            rp_id=rp_id,
            user_handle=unb64(options["user"]["id"]),
            user_name=options["user"]["name"],
            key=key,
            algorithm=algorithm,
            counter=1 if self.counts else 0,
            backup_eligible=self.backup_eligible,
        )
        for other in self.credentials(rp_id):
            if other.user_handle == credential.user_handle:
                del self.held[
                    other.id
                ]  # as §6.3.2: one discoverable credential for each RP ID and user handle
        self.held[credential.id] = credential

        client_data = self._client_data("webauthn.create", options["challenge"], origin, how)
        cose = cose_key(key, algorithm)
        for member, value in how.get("key", {}).items():
            if value is None:
                cose.pop(member, None)
            else:
                cose[member] = value
        attested = (
            how.get("aaguid", self.aaguid)
            + len(credential.id).to_bytes(2, "big")
            + credential.id
            + cbor2.dumps(cose)
        )
        data = self._auth_data(credential, how, attested=attested)
        form = how.get("attestation", self.attestation)
        statement: Any = self._statement(form, credential, cose, data, client_data, how)
        if "signature" in how and "sig" in statement:
            statement["sig"] = _changed(how["signature"], statement["sig"])
        if change := how.get("statement"):
            statement = change(statement)
        whole: Any = {
            "fmt": "packed" if form == "packed-self" else form,
            "attStmt": statement,
            "authData": data,
        }
        if replace := how.get("attestation_object"):
            whole = replace(whole)
        response = {
            "clientDataJSON": b64(client_data),
            "attestationObject": b64(whole if isinstance(whole, bytes) else cbor2.dumps(whole)),
            "transports": list(self.transports),
        }
        wanted = options.get("authenticatorSelection", {}).get("authenticatorAttachment")
        return self._answer(
            credential.id, response, how, self.attachment and (wanted or self.attachment)
        )

    def authenticate(
        self, options: Mapping[str, Any], origin: str, **how: Unpack[Misbehaviour]
    ) -> dict[str, Any]:
        """Answer `PublicKeyCredentialRequestOptionsJSON` as `navigator.credentials.get()` would,
        with its newest credential.

        Raises:
            AuthenticatorRefused: `NotAllowedError` when it holds no credential that the options
                allow.
        """
        rp_id = options.get("rpId") or origin.split("//")[1].split(":")[0]
        allowed = [unb64(d["id"]) for d in options.get("allowCredentials") or []]
        usable = [c for c in self.credentials(rp_id) if not allowed or c.id in allowed]
        if not usable:
            raise AuthenticatorRefused("NotAllowedError", "no credential for these options")
        credential = usable[0]
        if self.counts:
            credential.counter += 1
        client_data = self._client_data("webauthn.get", options["challenge"], origin, how)
        data = self._auth_data(credential, how)
        signature = sign(
            credential.key, credential.algorithm, data + hashlib.sha256(client_data).digest()
        )
        if "signature" in how:
            signature = _changed(how["signature"], signature)
        handle = how["user_handle"] if "user_handle" in how else b64(credential.user_handle)
        response = {
            "clientDataJSON": b64(client_data),
            "authenticatorData": b64(data),
            "signature": b64(signature),
        }
        if handle is not None:
            response["userHandle"] = handle
        return self._answer(how.get("credential_id", credential.id), response, how, self.attachment)

    def _answer(
        self, id_: bytes, response: Mapping[str, Any], how: Misbehaviour, attachment: str | None
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "id": b64(id_),
            "rawId": b64(id_),
            "type": "public-key",
            "response": response,
            "clientExtensionResults": {},
        }
        if attachment is not None:
            answer["authenticatorAttachment"] = attachment
        return {**answer, **how.get("answer", {})}

    @staticmethod
    def _client_data(kind: str, challenge: str, origin: str, how: Misbehaviour) -> bytes:
        if "client_data_json" in how:
            return how["client_data_json"]
        data: dict[str, Any] = {
            "type": how.get("type", kind),
            "challenge": how.get("challenge", challenge),
            "origin": origin,
        }
        crossing = how.get("cross_origin", False)
        if crossing is not None:
            data["crossOrigin"] = crossing
        if "top_origin" in how:
            data["topOrigin"] = how["top_origin"]
        data.update(how.get("client_data", {}))
        return json.dumps(data, separators=(",", ":")).encode()

    def _auth_data(
        self, credential: HeldCredential, how: Misbehaviour, attested: bytes | None = None
    ) -> bytes:
        """Authenticator data, WebAuthn L3 §6.1: RP ID hash, flags, counter, attested credential
        data, extensions.
        """
        eligible = how.get("be", credential.backup_eligible)
        bits = (
            (how.get("up", True), 0x01),
            (how.get("uv", self.verifies_user), 0x04),
            (eligible, 0x08),
            (how.get("bs", self.backed_up and eligible), 0x10),
            (attested is not None, 0x40),
            ("extensions" in how, 0x80),
        )
        flags = how.get("flags", sum(bit for on, bit in bits if on))
        data = hashlib.sha256(how.get("rp_id", credential.rp_id).encode()).digest()
        data += bytes([flags]) + how.get("counter", credential.counter).to_bytes(4, "big")
        data += attested or b""
        if "extensions" in how:
            data += cbor2.dumps(how["extensions"])
        return how["auth_data"](data) if "auth_data" in how else data

    def _statement(
        self,
        form: Attestation,
        credential: HeldCredential,
        cose: Mapping[int, Any],
        data: bytes,
        client_data: bytes,
        how: Misbehaviour,
    ) -> dict[str, Any]:
        """The attestation statement of WebAuthn L3 §8.2 to §8.8 over `data` and the client data's
        hash.
        """
        digest = hashlib.sha256(client_data).digest()
        signed = data + digest
        certificate: dict[str, Any] = dict(how.get("certificate", {}))
        public = credential.key.public_key()
        if form == "packed-self":
            return {
                "alg": credential.algorithm,
                "sig": sign(credential.key, credential.algorithm, signed),
            }
        if form == "packed":
            key = new_key(ES256)
            aaguid = der(0x04, how.get("aaguid", self.aaguid))
            leaf = self.authority.issue(
                key.public_key(), [_unknown("1.3.6.1.4.1.45724.1.1.4", aaguid)], **certificate
            )
            return {"alg": ES256, "sig": sign(key, ES256, signed), "x5c": [leaf]}
        if form == "fido-u2f":
            key = new_key(ES256)
            point = b"\x04" + cose[-2] + cose[-3]
            message = b"\x00" + data[:32] + digest + credential.id + point
            leaf = self.authority.issue(key.public_key(), [], **{"ca": None, **certificate})
            return {"sig": sign(key, ES256, message), "x5c": [leaf]}
        if form == "android-key":
            description = certificate.pop("description", key_description(digest))
            leaf = self.authority.issue(
                public, [_unknown("1.3.6.1.4.1.11129.2.1.17", description)], **certificate
            )
            signature = sign(credential.key, credential.algorithm, signed)
            return {"alg": credential.algorithm, "sig": signature, "x5c": [leaf]}
        if form == "apple":
            nonce = der(0x30, der(0xA1, der(0x04, hashlib.sha256(signed).digest())))
            nonce = certificate.pop("nonce", nonce)
            return {
                "x5c": [
                    self.authority.issue(
                        public, [_unknown("1.2.840.113635.100.8.2", nonce)], **certificate
                    )
                ]
            }
        if form == "tpm":
            return self._tpm(cose, signed, certificate)
        return {}

    def _tpm(
        self, cose: Mapping[int, Any], signed: bytes, certificate: dict[str, Any]
    ) -> dict[str, Any]:
        """A TPM 2.0 attestation of an ES256 or RS256 key (§8.3): pubArea, and certInfo that names
        it.
        """
        area = certificate.pop("pub_area", None) or tpm_public_area(cose)
        magic = certificate.pop("magic", b"\xff\x54\x43\x47")
        kind = certificate.pop("kind", b"\x80\x17")
        digest = hashlib.sha1 if certificate.get("rs1") else hashlib.sha256
        extra = certificate.pop("extra", digest(signed).digest())
        name = certificate.pop("name", b"\x00\x0b" + hashlib.sha256(area).digest())
        info = (
            magic
            + kind
            + _sized(b"")
            + _sized(extra)
            + bytes(17)
            + bytes(8)
            + _sized(name)
            + _sized(b"")
        )
        rs1 = certificate.pop("rs1", False)
        key = rsa_key(1) if rs1 else new_key(ES256)
        maker = certificate.pop("manufacturer", "id:4E544300")
        usages = certificate.pop("usage", ["2.23.133.8.3"])
        about = x509.Name(
            [
                x509.NameAttribute(ObjectIdentifier(oid), text)
                for oid, text in (
                    ("2.23.133.2.1", maker),
                    ("2.23.133.2.2", "model"),
                    ("2.23.133.2.3", "id:1"),
                )
                if text
            ]
        )
        names = certificate.pop("names", [x509.DirectoryName(about)])
        leaf = self.authority.issue(
            key.public_key(),
            [
                (x509.SubjectAlternativeName(names), True),
                (x509.ExtendedKeyUsage([ObjectIdentifier(usage) for usage in usages]), False),
            ],
            **{"subject": {}, **certificate},
        )
        return {
            "ver": "2.0",
            "alg": RS1 if rs1 else ES256,
            "x5c": [leaf],
            "sig": sign(key, RS1 if rs1 else ES256, info),
            "certInfo": info,
            "pubArea": area,
        }


def key_description(
    challenge: bytes, *, software: bytes = b"", hardware: bytes | None = None
) -> bytes:
    """Android's KeyDescription (DER), both authorization lists as given. Default: purpose SIGN,
    origin GENERATED.
    """
    if hardware is None:
        hardware = PURPOSE_SIGN + ORIGIN_GENERATED
    return der(
        0x30,
        der(0x02, b"\x03"),
        der(0x0A, b"\x01"),
        der(0x02, b"\x04"),
        der(0x0A, b"\x01"),
        der(0x04, challenge),
        der(0x04, b""),
        der(0x30, software),
        der(0x30, hardware),
    )


def _sized(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content


def tpm_public_area(cose: Mapping[int, Any]) -> bytes:
    """TPMT_PUBLIC of a P-256 or RSA key (TPM 2.0 Part 2 §12.2.4), name algorithm SHA-256."""
    if cose[1] == 3:
        head, size = b"\x00\x01", len(cose[-1]) * 8
        parameters = b"\x00\x10\x00\x10" + size.to_bytes(2, "big") + bytes(4)
        unique = _sized(cose[-1])
    else:
        head = b"\x00\x23"
        parameters = b"\x00\x10\x00\x10\x00\x03\x00\x10"
        unique = _sized(cose[-2]) + _sized(cose[-3])
    return head + b"\x00\x0b" + b"\x00\x06\x04\x72" + _sized(b"") + parameters + unique


def _unknown(oid: str, value: bytes) -> tuple[x509.ExtensionType, bool]:
    return x509.UnrecognizedExtension(ObjectIdentifier(oid), value), False


def _changed(change: bytes | Callable[[bytes], bytes], signature: bytes) -> bytes:
    return change(signature) if callable(change) else change
