"""What an operator may set: policies by key and text, origins, RP IDs. Every refusal is one
sentence that names the fault.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import orjson
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker.dialects import policy_keys
from broker.errors import InvalidSetting
from broker.model import ALGORITHMS, Policy, RelyingParty, as_dict, web_origin

ANDROID = "android:apk-key-hash:" + "Ab-_" * 10 + "xyz"


def certificate(name: str = "Root") -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM).decode()


ROOTS = (certificate("One"), certificate("Two"))
KEYS = {key.name: key for key in policy_keys()}

# -- policy ----------------------------------------------------------------------------------------

GOOD: list[tuple[str, str, object]] = [
    ("user_verification", "preferred", "preferred"),
    ("attestation", "direct", "direct"),
    ("attestation_required", "none", "none"),
    ("attestation_roots", "", ()),
    (
        "attestation_roots",
        "some text\n" + "".join(ROOTS) + ROOTS[0],
        tuple(r.strip() for r in ROOTS),
    ),
    ("algorithms", "ES256", (-7,)),
    ("algorithms", "Ed448, ES256,-257", (-53, -7, -257)),
    ("hints", "", ()),
    ("hints", "hybrid,security-key,hybrid", ("hybrid", "security-key")),
    ("authenticator_attachment", "cross-platform", "cross-platform"),
    ("allow_cross_origin", "true", True),
    ("allow_cross_origin", "false", False),
    ("top_origins", "", ()),
    (
        "top_origins",
        "https://Shop.example:443/,http://localhost:80",
        ("https://shop.example", "http://localhost"),
    ),
    ("counter", "flag", "flag"),
    ("live_at", "redemption", "redemption"),
    ("transaction_life", "10", 10),
    ("transaction_life", "600", 600),
    ("ceremony_life", "0600", 600),
    ("nonce_life", "5", 5),
    ("discoverable_limit", "1000000", 1_000_000),
    ("decoys", "true", True),
    ("begin_rate", "default", "default"),
    ("begin_rate", "600/min:300", "600/min:300"),
    ("discoverable_rate", "0", "0"),
    ("keyed_rate", "1000/s:1", "1000/s:1"),
    ("unknown_finish_rate", "1/min:999999999", "1/min:999999999"),
    ("max_passkeys", "1000", 1000),
    ("binding_required", "true", True),
    ("allow_weaker", "true", True),
    ("second_factor_user_verification", "discouraged", "discouraged"),
    ("second_factor_attachment", "any", "any"),
    ("hanko_algorithm", "EdDSA", "EdDSA"),
    ("passlock_open_registration", "true", True),
]
BAD: list[tuple[str, str, str]] = [
    (
        "user_verification",
        "yes",
        "user_verification is one of required, preferred, discouraged, not 'yes'.",
    ),
    ("attestation", "", "attestation is one of none, indirect, direct, enterprise, not ''."),
    (
        "attestation_required",
        "direct",
        "attestation_required is one of none, any, verified, not 'direct'.",
    ),
    ("attestation_roots", "root.pem", "attestation_roots takes X.509 certificates in PEM"),
    (
        "attestation_roots",
        ROOTS[0] + ROOTS[1].replace("M", "A"),
        "attestation_roots takes X.509 certificates in PEM",
    ),
    (
        "attestation_roots",
        "-----BEGIN CERTIFICATE-----\né\n-----END CERTIFICATE-----",
        "attestation_roots takes X.509",
    ),
    ("algorithms", "", "algorithms is a list of ES256, EdDSA, RS256, ES384, ES512, Ed448, not ''."),
    ("algorithms", "ES256,ES256", "algorithms is a list of"),
    ("algorithms", "ES256,-7", "algorithms is a list of"),
    ("algorithms", "RS1", "algorithms is a list of"),
    ("algorithms", "-65535", "algorithms is a list of"),
    ("algorithms", "9" * 5000, "algorithms is a list of"),
    ("hints", "phone", "hints is a list of security-key, client-device, hybrid, not 'phone'."),
    ("authenticator_attachment", "both", "authenticator_attachment is one of"),
    ("allow_cross_origin", "True", "allow_cross_origin is true or false, not 'True'."),
    ("top_origins", "shop.example", "'shop.example' is not an origin like https://example.com."),
    ("counter", "ignore", "counter is one of refuse, flag, not 'ignore'."),
    ("live_at", "begin", "live_at is one of finish, redemption, not 'begin'."),
    ("transaction_life", "9", "transaction_life is a whole number from 10 to 600, not '9'."),
    ("transaction_life", "601", "transaction_life is a whole number from 10 to 600, not '601'."),
    ("ceremony_life", "-60", "ceremony_life is a whole number"),
    ("ceremony_life", "60.0", "ceremony_life is a whole number"),
    ("nonce_life", "4", "nonce_life is a whole number from 5 to 600, not '4'."),
    ("nonce_life", "٦٠", "nonce_life is a whole number"),
    ("nonce_life", "9" * 5000, "nonce_life is a whole number"),
    ("discoverable_limit", "0", "discoverable_limit is a whole number from 1 to 1000000, not '0'."),
    ("decoys", "on", "decoys is true or false, not 'on'."),
    *(
        (f"{name}_rate", text, f"{name}_rate is a rate with its burst like 600/min:300 or")
        for name in ("begin", "discoverable", "keyed", "unknown_finish")
        for text in ("", "10", "10/s", "10/s:0", "0/s:1", "1001/s:1", "60001/min:1", "1/h:1", "-1")
    ),
    ("max_passkeys", "0", "max_passkeys is a whole number from 1 to 1000, not '0'."),
    ("max_passkeys", "1001", "max_passkeys is a whole number from 1 to 1000, not '1001'."),
    ("binding_required", "yes", "binding_required is true or false, not 'yes'."),
    ("allow_weaker", "yes", "allow_weaker is true or false, not 'yes'."),
    (
        "second_factor_user_verification",
        "",
        "second_factor_user_verification is one of required, preferred, discouraged, not ''.",
    ),
    (
        "second_factor_attachment",
        "usb",
        "second_factor_attachment is one of any, platform, cross-platform, not 'usb'.",
    ),
    (
        "hanko_algorithm",
        "none",
        "hanko_algorithm is one of RS256, PS256, ES256, EdDSA, not 'none'.",
    ),
    ("passlock_open_registration", "1", "passlock_open_registration is true or false, not '1'."),
]


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_a_policy_key_takes(key: str, text: str, value: object) -> None:
    policy = Policy().set(key, text, policy_keys())
    assert policy[KEYS[key]] == value
    assert Policy.load({k: v for k, v in policy.dump().items() if k != key}) == Policy()


@pytest.mark.parametrize(("key", "text", "sentence"), BAD)
def test_a_policy_key_refuses(key: str, text: str, sentence: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Policy().set(key, text, policy_keys())
    assert caught.value.sentence.startswith(sentence)


# keys together -> how the refusal begins, None where they fit
TOGETHER: list[tuple[dict[str, str], str | None]] = [
    ({"attestation_required": "any"}, "attestation_required=any needs attestation=direct"),
    (
        {"attestation_required": "verified", "attestation_roots": ROOTS[0]},
        "attestation_required=verified needs attestation=direct",
    ),
    (
        {"attestation_required": "verified", "attestation": "direct"},
        "attestation_required=verified needs attestation_roots",
    ),
    ({"attestation_required": "any", "attestation": "indirect"}, None),
    (
        {
            "attestation_required": "verified",
            "attestation": "enterprise",
            "attestation_roots": ROOTS[0],
        },
        None,
    ),
    ({"attestation": "direct", "attestation_roots": ROOTS[0]}, None),
]


@pytest.mark.parametrize(("keys", "sentence"), TOGETHER)
def test_policy_keys_fit_each_other(keys: dict[str, str], sentence: str | None) -> None:
    """In whatever order they are set: an app is judged with all of them, made or changed."""
    for order in (keys.items(), reversed(keys.items())):
        policy = Policy()
        for key, text in order:
            policy = policy.set(key, text, policy_keys())
        app = RelyingParty(
            "A" * 24, "Example", "example.org", ("https://example.org",), policy=policy
        )
        if sentence is None:
            assert app.checked().policy == policy
            continue
        with pytest.raises(InvalidSetting) as caught:
            app.checked()
        assert caught.value.sentence.startswith(sentence)


def test_the_tables_have_every_key() -> None:
    assert {key for key, *_ in GOOD} == set(KEYS)
    assert {key for key, *_ in BAD} == set(KEYS)


def test_an_unknown_key_is_answered_with_those_there_are() -> None:
    with pytest.raises(InvalidSetting) as caught:
        Policy().set("nonce_live", "60", policy_keys())
    assert caught.value.sentence.startswith("There is no policy key 'nonce_live'; there are ")
    assert all(key in caught.value.sentence for key in KEYS)


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_dump_and_load_are_a_round_trip(key: str, text: str, value: object) -> None:
    policy = Policy().set(key, text, policy_keys())
    stored = orjson.loads(orjson.dumps(policy.dump()))
    assert Policy.load(stored) == policy
    assert stored.keys() == ({key} if value != KEYS[key].default else set())


def test_everything_at_once_is_a_round_trip() -> None:
    policy = Policy()
    for key, text, _ in GOOD:
        policy = policy.set(key, text, policy_keys())
    assert Policy.load(orjson.loads(orjson.dumps(policy.dump()))) == policy
    assert policy != Policy()


def test_load_takes_what_other_versions_stored() -> None:
    assert Policy.load({}) == Policy()
    stored = {"nonce_life": 30, "of_newer_code": [1]}
    assert replace(Policy.load(stored), declared={}) == Policy(nonce_life=30)
    assert Policy.load(stored).set("nonce_life", "40").dump() == {**stored, "nonce_life": 40}


def test_every_algorithm_may_be_offered_by_name_and_number() -> None:
    for number, name in ALGORITHMS.items():
        assert Policy().set("algorithms", name) == Policy().set("algorithms", str(number))


# -- origins ---------------------------------------------------------------------------------------

CANONICAL = {
    "https://example.com": "https://example.com",
    "https://example.com/": "https://example.com",
    "HTTPS://Example.COM": "https://example.com",
    "https://example.com:443": "https://example.com",
    "https://example.com:8443": "https://example.com:8443",
    "https://example.com:08443": "https://example.com:8443",
    "https://example.com:": "https://example.com",
    "http://localhost": "http://localhost",
    "http://localhost:80": "http://localhost",
    "http://localhost:443": "http://localhost:443",
    "https://localhost:80": "https://localhost:80",
    "http://app.localhost:3000": "http://app.localhost:3000",
    "https://bücher.example": "https://xn--bcher-kva.example",
    "https://BÜCHER.example": "https://xn--bcher-kva.example",
    "https://bu\u0308cher.example": "https://xn--bcher-kva.example",
    "https://例え.テスト": "https://xn--r8jz45g.xn--zckzah",
    "https://xn--strae-oqa.de": "https://xn--strae-oqa.de",
    "https://1a.2b": "https://1a.2b",
}
NOT_AN_ORIGIN = "is not an origin like https://example.com."
NOT_A_DOMAIN = "is not a domain."
AN_ADDRESS = "is an IP address; passkeys need a domain."
UNSAFE = "can't be converted safely; give its ASCII form (xn--…)."
PLAIN = "is plain http, which browsers allow on localhost only."
REFUSED = {
    "": NOT_AN_ORIGIN,
    "example.com": NOT_AN_ORIGIN,
    "//example.com": NOT_AN_ORIGIN,
    "null": NOT_AN_ORIGIN,
    "*": NOT_AN_ORIGIN,
    "ftp://example.com": NOT_AN_ORIGIN,
    "https://": NOT_AN_ORIGIN,
    "https://:443": NOT_AN_ORIGIN,
    "https://example.com/login": NOT_AN_ORIGIN,
    "https://example.com//": NOT_AN_ORIGIN,
    "https://example.com?": NOT_AN_ORIGIN,
    "https://example.com?a=b": NOT_AN_ORIGIN,
    "https://example.com#": NOT_AN_ORIGIN,
    "https://user@example.com": NOT_AN_ORIGIN,
    "https://user:pass@example.com": NOT_AN_ORIGIN,
    "https://@example.com": NOT_AN_ORIGIN,
    "https://example.com:x": NOT_AN_ORIGIN,
    "https://example.com:65536": NOT_AN_ORIGIN,
    "https://example.com\n": NOT_AN_ORIGIN,
    "https://exam\tple.com": NOT_AN_ORIGIN,
    "https://[::1": NOT_AN_ORIGIN,
    "https://a\u200db.de": NOT_AN_ORIGIN,
    ANDROID: NOT_AN_ORIGIN,
    "https://example.com.": NOT_A_DOMAIN,
    "https://.example.com": NOT_A_DOMAIN,
    "https://a..b": NOT_A_DOMAIN,
    "https://*.example.com": NOT_A_DOMAIN,
    "https://-a.example": NOT_A_DOMAIN,
    "https://a_b.example": NOT_A_DOMAIN,
    "https://exam ple.com": NOT_A_DOMAIN,
    "https://example.com\\evil": NOT_A_DOMAIN,
    "https://" + "a" * 64 + ".example": NOT_A_DOMAIN,
    "https://" + "a." * 127 + "example": NOT_A_DOMAIN,
    "https://192.0.2.1": AN_ADDRESS,
    "https://192.0.2.1:8443": AN_ADDRESS,
    "https://[2001:db8::1]": AN_ADDRESS,
    "http://127.0.0.1:8080": AN_ADDRESS,
    "http://[::1]:8080": AN_ADDRESS,
    "https://127.1": AN_ADDRESS,
    "https://2130706433": AN_ADDRESS,
    "https://0x7f000001": AN_ADDRESS,
    "https://a.0x": AN_ADDRESS,
    "https://example.1": AN_ADDRESS,
    "https://straße.de": UNSAFE,
    "https://\uff45xample.com": UNSAFE,
    "https://example。com": UNSAFE,
    "https://ü..b": UNSAFE,
    "http://example.com": PLAIN,
    "http://notlocalhost": PLAIN,
    "http://localhost.example.com": PLAIN,
}


@pytest.mark.parametrize(("text", "origin"), CANONICAL.items())
def test_web_origin_is_canonical(text: str, origin: str) -> None:
    assert web_origin(text) == origin
    assert web_origin(origin) == origin


@pytest.mark.parametrize(("text", "sentence"), REFUSED.items())
def test_web_origin_refuses(text: str, sentence: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        web_origin(text)
    assert caught.value.sentence.endswith(sentence)


# -- relying parties -------------------------------------------------------------------------------


def party(**changes: object) -> RelyingParty:
    app = RelyingParty("A" * 24, "Example", "example.com", ("https://example.com",))
    return replace(app, **changes)  # type: ignore[arg-type]  # a table's values


def test_checked_makes_canonical_and_drops_doubles() -> None:
    app = party(
        rp_id="Example.COM",
        origins=(
            "https://EXAMPLE.com/",
            "https://example.com:443",
            "https://login.example.com",
            ANDROID,
        ),
        related_origins=("https://Example.de", "https://example.de/"),
    ).checked()
    assert app.rp_id == "example.com"
    assert app.origins == ("https://example.com", "https://login.example.com", ANDROID)
    assert app.related_origins == ("https://example.de",)
    assert app.accepted_origins == (*app.origins, "https://example.de")
    assert app.web_origins == (
        "https://example.com",
        "https://login.example.com",
        "https://example.de",
    )
    assert app.checked() == app


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": ""}, "The name has 1 to 128 characters."),
        ({"name": "x" * 129}, "The name has 1 to 128 characters."),
        ({"name": "a\nb"}, "The name has a control character."),
        ({"name": "a\x1b[2Jb"}, "The name has a control character."),
        ({"name": "a\udcffb"}, "The name has a control character."),
        ({"rp_id": ""}, "The RP ID '' is not a domain."),
        ({"rp_id": "https://example.com"}, "The RP ID 'https://example.com' is not a domain."),
        ({"rp_id": "example.com:443"}, "The RP ID 'example.com:443' is not a domain."),
        ({"rp_id": "example.com/"}, "The RP ID 'example.com/' is not a domain."),
        ({"rp_id": "192.0.2.1"}, "The RP ID '192.0.2.1' is an IP address; passkeys need a domain."),
        ({"rp_id": "::1"}, "The RP ID '::1' is an IP address; passkeys need a domain."),
        ({"rp_id": "straße.de"}, "The RP ID 'straße.de' can't be converted safely"),
        ({"origins": ()}, "An app needs at least one origin, like https://example.com."),
        (
            {"origins": ("https://example.org",)},
            "The host of https://example.org is neither example.com nor below it;",
        ),
        (
            {"origins": ("https://notexample.com",)},
            "The host of https://notexample.com is neither example.com nor",
        ),
        (
            {"origins": ("https://com",)},
            "The host of https://com is neither example.com nor below it;",
        ),
        (
            {"rp_id": "login.example.com"},
            "The host of https://example.com is neither login.example.com nor below it;",
        ),
        ({"origins": ("http://example.com",)}, "http://example.com is plain http"),
        (
            {"origins": ("https://example.com", "https://example.com/x")},
            "'https://example.com/x' is not an",
        ),
        (
            {"origins": ("android:apk-key-hash:short",)},
            "'android:apk-key-hash:short' is not android:apk-key",
        ),
        ({"origins": (ANDROID + "=",)}, f"'{ANDROID}=' is not android:apk-key-hash:<43"),
        (
            {"origins": ("android:com.example",)},
            "'android:com.example' is not android:apk-key-hash:<43",
        ),
        (
            {"related_origins": (ANDROID,)},
            f"'{ANDROID}' is not an origin like https://example.com.",
        ),
        ({"related_origins": ("http://example.org",)}, "http://example.org is plain http"),
    ],
)
def test_checked_refuses(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        party(**changes).checked()
    assert caught.value.sentence.startswith(sentence)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x" * 128},
        {"name": "Bücher & Söhne 👩‍🚀"},
        {"rp_id": "localhost", "origins": ("http://localhost:8080", "http://app.localhost")},
        {"rp_id": "bücher.example", "origins": ("https://shop.bücher.example",)},
        {"origins": (ANDROID,)},
        {"origins": (), "related_origins": ("https://example.org",)},
        {"origins": (ANDROID.replace("hash:", "hash-sha256:"),)},
    ],
)
def test_checked_takes(changes: dict[str, object]) -> None:
    assert party(**changes).checked().accepted_origins


def test_fields_of_is_shallow() -> None:
    app = party()
    assert as_dict(app)["policy"] is app.policy
    assert list(as_dict(app))[:3] == ["id", "name", "rp_id"]
