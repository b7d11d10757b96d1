"""What a policy demands of a new passkey, and what the options asked for, judged at finish: in
every dialect, for passkeys and second factors.

Each way to register is driven to its last answer, which is a refusal or not; metric, log line and
event say why, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from broker.ceremony import finish_registration, parse_registration
from broker.errors import CeremonyRefused
from broker.model import CeremonyOptions, Policy
from tests.conftest import OpenApp, Started
from tests.support.authenticator import Attestation, Authenticator, Authority
from tests.support.byo import Byo
from tests.support.ceremonies import ORIGIN as COM
from tests.support.ceremonies import creation_options, pending_registration, register, relying_party
from tests.support.hanko import REGISTRATION, SECOND_REGISTRATION, Hanko
from tests.support.passlock import Passlock
from tests.support.signals import counted, refused
from tests.support.wire import ORIGIN, Answer, Wire

ROOT, STRANGER = Authority("Root"), Authority("Somebody else")
MODEL = bytes.fromhex("cb69481e8ff7403993ec0a2729a154a8")  # the AAGUID of a certified security key

# The last answer of a registration of "ann", or of nobody.
Way = Callable[..., Awaitable[Answer]]


async def _page(
    wire: Wire,
    device: Authenticator,
    *,
    second_factor: bool = False,
    wanted: str | None = None,
    **how: Any,
) -> Answer:
    body = {"external_id": "ann", "passkey_display_name": "Ann", "second_factor": second_factor}
    transaction = (await wire.keyed("POST", "/transactions/register", body)).json["transaction_id"]
    named = {"authenticator_attachment": wanted} if wanted else {}
    handle, options = await wire.begin("register", transaction, **named)
    return await wire.finish(
        "register", handle, device.register(options, ORIGIN, **how), transaction
    )


async def _keyed(
    wire: Wire, device: Authenticator, *, wanted: str | None = None, **how: Any
) -> Answer:
    body = {"external_id": "ann", "user_name": "ann", "authenticator_attachment": wanted}
    begun = await wire.keyed("POST", "/register/start", body)
    made = device.register(begun.json["options"], ORIGIN, **how)
    return await wire.keyed("POST", "/register/finish", {"external_id": "ann", "credential": made})


async def _by_challenge(
    wire: Wire,
    device: Authenticator,
    *,
    second_factor: bool = False,
    wanted: str | None = None,
    **how: Any,
) -> Answer:
    body = {"external_id": "ann", "user_name": "ann", "second_factor": second_factor}
    body |= {"authenticator_attachment": wanted}
    begun = await wire.keyed("POST", "/ceremonies/register/start", body)
    given = {"credential": device.register(begun.json["options"], ORIGIN, **how)}
    return await wire.keyed(
        "POST", "/ceremonies/register/finish", given | {"second_factor": second_factor}
    )


async def _hanko(wire: Wire, device: Authenticator, at: str = REGISTRATION, **how: Any) -> Answer:
    hanko = Hanko(wire)
    made = device.register(await hanko.begin_registration("ann", at=at), ORIGIN, **how)
    return await hanko.send("POST", at + "/finalize", made)


async def _passlock(wire: Wire, device: Authenticator, **how: Any) -> Answer:
    passlock = Passlock(wire)
    token = await passlock.authorize_registration("ann")
    session, options = await passlock.begin("registration", {"registrationToken": token})
    return await passlock.finish("registration", session, device.register(options, ORIGIN, **how))


async def _passlocks_page(wire: Wire, device: Authenticator, **how: Any) -> Answer:
    """Of nobody yet."""
    passlock = Passlock(wire, "")
    session, options = await passlock.begin("registration", {"username": "ann"})
    return await passlock.finish("registration", session, device.register(options, ORIGIN, **how))


async def _propelauth(wire: Wire, device: Authenticator, **how: Any) -> Answer:
    byo = Byo(wire)
    made = device.register(await byo.begin_registration("ann"), ORIGIN, **how)
    return await byo.run("FinishPasskeyRegistration", userId="ann", publicKey=made)


PASSKEYS: dict[str, Way] = {
    "flex": _page,
    "flex, keyed": _keyed,
    "flex, by challenge": _by_challenge,
    "hanko": _hanko,
    "passlock": _passlock,
    "passlock, of nobody": _passlocks_page,
    "propelauth": _propelauth,
}
SECOND_FACTORS: dict[str, Way] = {
    "flex": partial(_page, second_factor=True),
    "flex, by challenge": partial(_by_challenge, second_factor=True),
    "hanko": partial(_hanko, at=SECOND_REGISTRATION),
}
WAYS = [pytest.param(way, False, id=name) for name, way in PASSKEYS.items()]
WAYS += [
    pytest.param(way, True, id=f"{name}, second factor") for name, way in SECOND_FACTORS.items()
]


async def is_refused(
    broker: Started,
    wire: Wire,
    way: Way,
    device: Authenticator,
    reason: str,
    *,
    second_factor: bool,
    **how: Any,
) -> None:
    with (
        refused(broker, "webauthn_login_failed", reason),
        counted(
            broker, "broker_ceremonies_total", kind="register", step="finish", result="refused"
        ),
    ):
        answer = await way(wire, device, **how)
    assert answer.status >= 400
    if (
        way is not _passlocks_page
    ):  # where nobody was named anybody can have answers refused, and no event tells
        action = "second_factor.registered" if second_factor else "passkey.registered"
        assert (await broker.events(wire.app_id))[-1] == (action, "refused", reason)
    assert (await wire.keyed("GET", "/passkeys")).json["total"] == 0


# -- attestation -----------------------------------------------------------------------------------


def demanding(required: str, **more: Any) -> dict[str, Any]:
    return {
        "attestation": "direct",
        "attestation_roots": (ROOT.pem,),
        "attestation_required": required,
        "passlock_open_registration": True,
    } | more


def attesting(form: Attestation, authority: Authority = ROOT) -> Authenticator:
    """It claims to be the certified model, whoever vouches for it."""
    return Authenticator(attestation=form, authority=authority, aaguid=MODEL, attachment=None)


# required, format, who issued its certificate -> trust, or the reason of a refusal
ATTESTATIONS: list[tuple[str, Attestation, Authority, str]] = [
    ("none", "none", ROOT, "none"),
    ("none", "packed-self", ROOT, "claimed"),
    ("none", "packed", ROOT, "verified"),
    ("none", "packed", STRANGER, "attestation_trust"),
    ("any", "none", ROOT, "attestation_missing"),
    ("any", "packed-self", ROOT, "claimed"),
    ("any", "packed", ROOT, "verified"),
    ("any", "packed", STRANGER, "attestation_trust"),
    ("verified", "none", ROOT, "attestation_missing"),
    ("verified", "packed-self", ROOT, "attestation_unverified"),
    ("verified", "packed", ROOT, "verified"),
    ("verified", "packed", STRANGER, "attestation_trust"),
    *(
        ("verified", form, authority, outcome)
        for authority, outcome in ((ROOT, "verified"), (STRANGER, "attestation_trust"))
        for form in ("fido-u2f", "android-key", "apple", "tpm")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("required", "form", "authority", "outcome"), ATTESTATIONS)
def test_attestation_by_policy(
    required: str, form: Attestation, authority: Authority, outcome: str
) -> None:
    rp = relying_party(**demanding(required))
    answer = attesting(form, authority).register(creation_options(rp), COM)
    if outcome in ("none", "claimed", "verified"):
        assert register(rp, answer).attestation_trust == outcome
        return
    with pytest.raises(CeremonyRefused) as refusal:
        register(rp, answer)
    assert refusal.value.reason == outcome


def test_a_signature_with_sha1_is_not_verified() -> None:
    """Of an old TPM, with a chain to a root: never more than claimed."""
    answer = attesting("tpm").register(
        creation_options(relying_party()), COM, certificate={"rs1": True}
    )
    assert register(relying_party(**demanding("any")), answer).attestation_trust == "claimed"
    with pytest.raises(CeremonyRefused) as refusal:
        register(relying_party(**demanding("verified")), answer)
    assert refusal.value.reason == "attestation_unverified"


def test_what_a_policy_can_not_demand_nobody_fulfils() -> None:
    """A policy that no command lets through, say of a row written by hand: it fails closed."""
    for missing in ({"attestation_roots": ()}, {"attestation": "none", "attestation_roots": ()}):
        rp = relying_party(**demanding("verified", **missing))
        with pytest.raises(CeremonyRefused) as refusal:
            register(rp, attesting("packed").register(creation_options(rp), COM))
        assert refusal.value.reason == "attestation_unverified"


@pytest.mark.parametrize(("way", "second_factor"), WAYS)
async def test_attestation_is_demanded_in_every_dialect(
    broker: Started, open_app: OpenApp, way: Way, second_factor: bool
) -> None:
    wire = await open_app(replace(Policy(), **demanding("verified")))
    missing: list[tuple[Attestation, str]] = [
        ("none", "attestation_missing"),
        ("packed-self", "attestation_unverified"),
    ]
    for form, reason in missing:
        await is_refused(broker, wire, way, attesting(form), reason, second_factor=second_factor)
    assert (await way(wire, attesting("packed"))).status == 200
    [passkey] = (await wire.keyed("GET", "/passkeys")).json["passkeys"]
    assert (passkey["attestation"], passkey["aaguid"]) == (
        "verified",
        "cb69481e-8ff7-4039-93ec-0a2729a154a8",
    )


async def test_an_aaguid_that_nobody_vouches_for_is_a_claim(open_app: OpenApp) -> None:
    """Self attestation with the AAGUID of a certified model, where any attestation will do: the
    receipt says what it is.
    """
    wire = await open_app(replace(Policy(), **demanding("any")))
    nonce = await wire.register(await wire.open_registration("ann"), attesting("packed-self"))
    receipt = (await wire.redeem(nonce, purpose="register")).json
    assert (receipt["attestation"], receipt["authenticator_name_claimed"]) == (
        "claimed",
        "YubiKey 5",
    )


# -- attachment and discoverability ----------------------------------------------------------------

# asked for, said -> whether it registers
ATTACHMENTS: list[tuple[str | None, object, bool]] = [
    (None, None, True),
    (None, "platform", True),
    (None, "cross-platform", True),
    ("platform", None, True),
    ("platform", "platform", True),
    ("platform", "cross-platform", False),
    ("cross-platform", None, True),
    ("cross-platform", "cross-platform", True),
    ("cross-platform", "platform", False),
    ("platform", "something newer", True),
]
# a second factor, what the answer says of extensions -> whether it registers
EXTENSIONS: list[tuple[bool, object, bool]] = [
    (False, {"credProps": {"rk": True}}, True),
    (False, {"credProps": {"rk": False}}, False),
    (False, {"credProps": {}}, True),
    (False, {"credProps": {"rk": None}}, True),
    (False, {"credProps": "no"}, True),
    (False, {"credProps": {"rk": 0}}, True),
    (False, {}, True),
    (False, None, True),
    (True, {"credProps": {"rk": True}}, True),
    (True, {"credProps": {"rk": False}}, True),
]


def judged(pending: Any, reason: str, said: dict[str, Any], *, good: bool) -> None:
    rp = relying_party()
    made = Authenticator(attachment=None).register(creation_options(rp), COM, answer=said)
    answer = parse_registration(made)
    if good:
        assert finish_registration(pending, rp, answer).user_present
        return
    with pytest.raises(CeremonyRefused) as refusal:
        finish_registration(pending, rp, answer)
    assert refusal.value.reason == reason


@pytest.mark.parametrize(("wanted", "said", "good"), ATTACHMENTS)
def test_attachment_by_what_was_asked(wanted: Any, said: object, good: bool) -> None:
    pending = pending_registration(relying_party())._replace(attachment=wanted)
    judged(
        pending, "attachment", {} if said is None else {"authenticatorAttachment": said}, good=good
    )


@pytest.mark.parametrize(("second_factor", "said", "good"), EXTENSIONS)
def test_discoverability_by_what_was_asked(second_factor: bool, said: object, good: bool) -> None:
    pending = pending_registration(relying_party())._replace(
        options=CeremonyOptions(second_factor=second_factor)
    )
    judged(pending, "resident_key", {"clientExtensionResults": said}, good=good)


@pytest.mark.parametrize(
    ("asked", "lie"), [("platform", "cross-platform"), ("cross-platform", "platform")]
)
@pytest.mark.parametrize(("way", "second_factor"), WAYS)
async def test_the_policys_attachment_holds_in_every_dialect(
    broker: Started, open_app: OpenApp, way: Way, second_factor: bool, asked: Any, lie: str
) -> None:
    key = "second_factor_attachment" if second_factor else "authenticator_attachment"
    wire = await open_app(replace(Policy(passlock_open_registration=True), **{key: asked}))
    lying: Any = {"answer": {"authenticatorAttachment": lie}}
    await is_refused(
        broker, wire, way, Authenticator(), "attachment", second_factor=second_factor, **lying
    )
    silent, honest = Authenticator(attachment=None), Authenticator(attachment=lie)
    assert (await way(wire, silent)).status == 200, "pages of many SDKs don't tell it"
    assert (await way(wire, honest)).status == 200, "asked for the other, it is the other"


@pytest.mark.parametrize(
    ("wanted", "lie"), [("platform", "cross-platform"), ("cross-platform", "platform")]
)
@pytest.mark.parametrize(("way", "second_factor"), [way for way in WAYS if "flex" in str(way.id)])
async def test_the_attachment_that_a_caller_names_holds(
    broker: Started, wire: Wire, way: Way, wanted: str, lie: str, second_factor: bool
) -> None:
    """The policy asks for none, or for a second factor for another. Vendors' dialects have no word
    for it.
    """
    lying: Any = {"answer": {"authenticatorAttachment": lie}, "wanted": wanted}
    await is_refused(
        broker, wire, way, Authenticator(), "attachment", second_factor=second_factor, **lying
    )
    for device in (Authenticator(), Authenticator(attachment=None)):
        assert (await way(wire, device, wanted=wanted)).status == 200


@pytest.mark.parametrize(("way", "second_factor"), WAYS)
async def test_a_passkey_is_discoverable_in_every_dialect(
    broker: Started, open_app: OpenApp, way: Way, second_factor: bool
) -> None:
    """And a second factor need not be."""
    wire = await open_app(Policy(passlock_open_registration=True))
    no: Any = {"answer": {"clientExtensionResults": {"credProps": {"rk": False}}}}
    yes: Any = {"answer": {"clientExtensionResults": {"credProps": {"rk": True}}}}
    if second_factor:
        assert (await way(wire, Authenticator(), **no)).status == 200
        return
    await is_refused(broker, wire, way, Authenticator(), "resident_key", second_factor=False, **no)
    empty: Any = {}
    for said in (yes, empty):
        assert (await way(wire, Authenticator(), **said)).status == 200
