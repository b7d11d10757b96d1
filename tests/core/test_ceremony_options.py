"""Ceremony options: within the policy, never past it; and second factors, which sign in only where
the options ask for them.

Most tests call the verbs, so they hold for every wire format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from broker.broker import Nonce
from broker.ceremony import parse_authentication, parse_registration
from broker.errors import (
    CeremonyRefused,
    DiscoverableRefused,
    InvalidRequest,
    NoPasskeys,
    UnknownNonce,
    UnknownTransaction,
)
from broker.model import (
    ANYONE,
    Anyone,
    ByChallenge,
    ByTransaction,
    ByUser,
    Caller,
    CeremonyOptions,
    ExpectedCeremony,
    ExpectedReceipt,
    Names,
    Policy,
    Proof,
    Receipt,
    RelyingParty,
    UserVerification,
)
from tests.conftest import SKEW, OpenApp, Started
from tests.support.authenticator import Authenticator, unb64
from tests.support.verbs import KEYED, PAGE, by_handle, keyed, nonce_of
from tests.support.wire import ORIGIN, RP_ID

ORDINARY, SECOND = CeremonyOptions(), CeremonyOptions(second_factor=True)
AppWith = Callable[..., Any]


@pytest.fixture
def app_with(broker: Started) -> AppWith:
    """Make an app with a policy."""

    async def make(**policy: Any) -> RelyingParty:
        app, _ = await broker.parts.directory.create_app(
            "App", RP_ID, [ORIGIN], policy=Policy(**policy)
        )
        return app

    return make


async def register(
    broker: Started,
    app: RelyingParty,
    user: str,
    device: Authenticator,
    options: CeremonyOptions = ORDINARY,
    **how: Any,
) -> Receipt:
    public_key = (
        await broker.parts.broker.begin_registration(
            keyed(app), ByChallenge(user), "keyed", names=Names(user, user), options=options
        )
    ).public_key
    answer = parse_registration(device.register(public_key, ORIGIN, **how))
    return (
        await broker.parts.broker.finish_registration(
            keyed(app),
            ByChallenge(),
            answer,
            ExpectedCeremony(("keyed",), second_factor=options.second_factor),
        )
    ).receipt


async def sign_in(
    broker: Started,
    app: RelyingParty,
    user: str | Anyone,
    device: Authenticator,
    options: CeremonyOptions = ORDINARY,
    *,
    shown: dict[str, Any] | None = None,
    **how: Any,
) -> Receipt:
    """By the challenge. `shown` replaces members of the options for the device."""
    public_key = (
        await broker.parts.broker.begin_authentication(
            keyed(app), ByChallenge(user), "keyed", options=options
        )
    ).public_key
    answer = parse_authentication(device.authenticate(public_key | (shown or {}), ORIGIN, **how))
    return (
        await broker.parts.broker.finish_authentication(
            keyed(app),
            ByChallenge(),
            answer,
            ExpectedCeremony(("keyed",), second_factor=options.second_factor),
        )
    ).receipt


# -- user verification -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "wish", "weaker", "given"),
    [
        ("preferred", "required", False, "required"),
        ("discouraged", "preferred", False, "preferred"),
        ("required", "preferred", False, "required"),
        ("required", "discouraged", False, "required"),
        ("preferred", "discouraged", False, "preferred"),
        ("required", "preferred", True, "preferred"),
        ("required", "discouraged", True, "discouraged"),
        ("preferred", "required", True, "required"),
        ("preferred", None, True, "preferred"),
    ],
)
async def test_user_verification_is_raised_and_lowered_only_where_that_is_allowed(
    broker: Started,
    app_with: AppWith,
    policy: UserVerification,
    wish: UserVerification | None,
    weaker: bool,
    given: UserVerification,
) -> None:
    """Options and judgement agree: an answer without it passes exactly where it was not
    required.
    """
    app = await app_with(user_verification=policy, allow_weaker=weaker)
    options, device = CeremonyOptions(user_verification=wish), Authenticator()
    public_key = (
        await broker.parts.broker.begin_registration(
            keyed(app), ByUser("ann"), "keyed", names=Names("ann", "ann"), options=options
        )
    ).public_key
    assert public_key["authenticatorSelection"]["userVerification"] == given
    await register(broker, app, "ann", device)
    public_key = (
        await broker.parts.broker.begin_authentication(
            keyed(app), ByUser("ann"), "keyed", options=options
        )
    ).public_key
    assert public_key["userVerification"] == given
    if given == "required":
        with pytest.raises(CeremonyRefused) as caught:
            await sign_in(broker, app, "ann", device, options, uv=False)
        assert caught.value.reason == "user_verification"
        with pytest.raises(CeremonyRefused):
            await register(broker, app, "ann", Authenticator(), options, uv=False)
    else:
        assert not (await sign_in(broker, app, "ann", device, options, uv=False)).user_verified
        await register(broker, app, "ann", Authenticator(), options, uv=False)


@pytest.mark.parametrize(
    "options", [CeremonyOptions(), CeremonyOptions(user_verification="discouraged"), SECOND]
)
async def test_a_policy_made_stricter_applies_to_what_is_open(
    broker: Started, app_with: AppWith, options: CeremonyOptions
) -> None:
    loose: dict[str, Any] = dict.fromkeys(
        ("user_verification", "second_factor_user_verification"), "preferred"
    )
    app = await app_with(**loose, allow_weaker=True)
    device = Authenticator()
    await register(broker, app, "ann", device)
    public_key = (
        await broker.parts.broker.begin_authentication(
            keyed(app), ByChallenge("ann"), "keyed", options=options
        )
    ).public_key
    strict: dict[str, Any] = dict.fromkeys(loose, "required")
    app = await broker.parts.directory.update_app(replace(app, policy=Policy(**strict)))
    answer = parse_authentication(device.authenticate(public_key, ORIGIN, uv=False))
    with pytest.raises(CeremonyRefused) as caught:
        await broker.parts.broker.finish_authentication(
            keyed(app),
            ByChallenge(),
            answer,
            ExpectedCeremony(("keyed",), second_factor=options.second_factor),
        )
    assert caught.value.reason == "user_verification"


async def test_what_was_required_stays_required_under_a_looser_policy(
    broker: Started, app_with: AppWith
) -> None:
    app, device = await app_with(), Authenticator()
    await register(broker, app, "ann", device)
    public_key = (
        await broker.parts.broker.begin_authentication(keyed(app), ByChallenge("ann"), "keyed")
    ).public_key
    app = await broker.parts.directory.update_app(
        replace(app, policy=Policy(user_verification="discouraged"))
    )
    answer = parse_authentication(device.authenticate(public_key, ORIGIN, uv=False))
    with pytest.raises(CeremonyRefused):
        await broker.parts.broker.finish_authentication(keyed(app), ByChallenge(), answer, KEYED)


# -- life ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "given"), [(None, 60), (30.0, 30), (60.0, 60), (600.0, 60), (0.5, 0.5)]
)
async def test_a_life_is_capped_by_the_policy(
    broker: Started, app_with: AppWith, wish: float | None, given: float
) -> None:
    """Of either ceremony, with a transaction and without one: `timeout` says it, and the server
    keeps to it.
    """
    app, device, options = (
        await app_with(ceremony_life=60),
        Authenticator(),
        CeremonyOptions(life=wish),
    )
    await register(broker, app, "ann", device)
    verbs = broker.parts.broker
    registration = (
        await verbs.begin_registration(
            keyed(app), ByChallenge("ann"), "keyed", names=Names("ann", "ann"), options=options
        )
    ).public_key
    authentication = (
        await verbs.begin_authentication(keyed(app), ByChallenge("ann"), "keyed", options=options)
    ).public_key
    transaction = await verbs.open_authentication(keyed(app), "ann", options)
    begun = await verbs.begin_authentication(Caller(app), ByTransaction(transaction), "page")
    for public_key in (registration, authentication, begun.public_key):
        assert given * 1000 - 1 <= public_key["timeout"] <= given * 1000
    answer = parse_authentication(device.authenticate(authentication, ORIGIN))
    broker.clock.ahead += given + SKEW
    with pytest.raises(UnknownTransaction):
        await verbs.finish_authentication(keyed(app), ByChallenge(), answer, KEYED)


# -- which passkeys --------------------------------------------------------------------------------


async def test_exclusions_are_added_to_the_users_own(broker: Started, app_with: AppWith) -> None:
    app, elsewhere = await app_with(), await app_with()
    own = await register(broker, app, "ann", Authenticator())
    other = await register(broker, app, "bob", Authenticator())
    foreign = await register(broker, elsewhere, "ann", Authenticator())
    for wish, more in (
        (None, []),
        ((other.passkey_id,), [other]),
        ((own.passkey_id,), []),
        ((foreign.passkey_id, "x" * 24), []),
    ):
        public_key = (
            await broker.parts.broker.begin_registration(
                keyed(app),
                ByUser("ann"),
                "keyed",
                names=Names("ann", "ann"),
                options=CeremonyOptions(exclude=wish),
            )
        ).public_key
        excluded = [unb64(c["id"]) for c in public_key["excludeCredentials"]]
        assert sorted(excluded) == sorted(r.credential_id for r in (own, *more))


async def test_an_allow_list_narrows(broker: Started, app_with: AppWith) -> None:
    """By options and by judgement, for a known user and for whoever answers, with a transaction and
    without one.
    """
    app, first, second = await app_with(), Authenticator(), Authenticator()
    mine = await register(broker, app, "ann", first)
    await register(broker, app, "ann", second)
    bobs = await register(broker, app, "bob", Authenticator())
    options = CeremonyOptions(allow=(mine.passkey_id, bobs.passkey_id))
    verbs = broker.parts.broker
    for user, offered in (("ann", [mine]), (ANYONE, [mine, bobs])):
        public_key = (
            await verbs.begin_authentication(
                keyed(app), ByChallenge(user), "keyed", options=options
            )
        ).public_key
        assert [unb64(c["id"]) for c in public_key["allowCredentials"]] == [
            r.credential_id for r in offered
        ]
        begun = await verbs.begin_authentication(
            Caller(app),
            ByTransaction(await verbs.open_authentication(keyed(app), user, options)),
            "page",
        )
        assert begun.public_key["allowCredentials"] == public_key["allowCredentials"]
        assert (await sign_in(broker, app, user, first, options)).passkey_id == mine.passkey_id
        with pytest.raises(CeremonyRefused) as caught:
            await sign_in(broker, app, user, second, options, shown={"allowCredentials": []})
        assert caught.value.reason == "not_offered"
    begun = await verbs.begin_authentication(Caller(app), ANYONE, "page", options=options)
    assert "allowCredentials" not in begun.public_key, "a page alone learns nothing of credentials"
    answer = parse_authentication(second.authenticate(begun.public_key, ORIGIN))
    with pytest.raises(DiscoverableRefused) as caught:
        await verbs.finish_authentication(Caller(app), by_handle(begun), answer, PAGE, Nonce())
    assert caught.value.reason == "not_offered"


async def test_an_emptied_allow_list_never_means_any(broker: Started, app_with: AppWith) -> None:
    """Empty, of ids that nobody has, of another user or app, of a passkey revoked before or
    meanwhile, of a second factor.
    """
    app, elsewhere, device = await app_with(), await app_with(), Authenticator()
    mine = await register(broker, app, "ann", device)
    gone = await register(broker, app, "ann", Authenticator())
    bobs = await register(broker, app, "bob", Authenticator())
    foreign = await register(broker, elsewhere, "ann", Authenticator())
    fob = await register(broker, app, "ann", Authenticator(), SECOND)
    verbs, directory = broker.parts.broker, broker.parts.directory
    await directory.revoke_passkey(app, gone.passkey_id)
    empty: list[tuple[str, ...]] = [
        (),
        ("x" * 24,),
        (gone.passkey_id,),
        (foreign.passkey_id,),
        (fob.passkey_id,),
    ]
    for allow in empty:
        options = CeremonyOptions(allow=allow)
        for user in ("ann", ANYONE):
            with pytest.raises(NoPasskeys):
                await verbs.open_authentication(keyed(app), user, options)
            with pytest.raises(NoPasskeys):
                await verbs.begin_authentication(
                    keyed(app), ByChallenge(user), "keyed", options=options
                )
        if allow:
            begun = await verbs.begin_authentication(Caller(app), ANYONE, "page", options=options)
            answer = parse_authentication(device.authenticate(begun.public_key, ORIGIN))
            with pytest.raises(DiscoverableRefused):
                await verbs.finish_authentication(
                    Caller(app), by_handle(begun), answer, PAGE, Nonce()
                )
        else:
            with pytest.raises(InvalidRequest):
                await verbs.begin_authentication(Caller(app), ANYONE, "page", options=options)
    with pytest.raises(NoPasskeys):
        await verbs.open_authentication(
            keyed(app), "ann", CeremonyOptions(allow=(bobs.passkey_id,))
        )

    for user in ("ann", ANYONE):
        transaction = await verbs.open_authentication(
            keyed(app), user, CeremonyOptions(allow=(mine.passkey_id,))
        )
        begun = await verbs.begin_authentication(Caller(app), ByTransaction(transaction), "page")
        await directory.revoke_passkey(app, mine.passkey_id)
        if user is ANYONE:
            with pytest.raises(UnknownTransaction) as unknown:
                await verbs.begin_authentication(Caller(app), ByTransaction(transaction), "page")
            assert unknown.value.reason == "no_passkey_left"
        else:
            begun = await verbs.begin_authentication(
                Caller(app), ByTransaction(transaction), "page"
            )
            assert len(begun.public_key["allowCredentials"]) == 1, (
                "what was offered when it was opened"
            )
        answer = parse_authentication(device.authenticate(begun.public_key, ORIGIN))
        with pytest.raises(CeremonyRefused) as caught:
            await verbs.finish_authentication(Caller(app), by_handle(begun), answer, PAGE, Nonce())
        assert caught.value.reason == (
            "revoked_or_counter" if user is not ANYONE else "unknown_credential"
        )
        mine = await register(broker, app, "ann", device)


# -- second factors --------------------------------------------------------------------------------


async def test_a_second_factor_follows_its_own_policy(broker: Started, app_with: AppWith) -> None:
    app = await app_with(
        second_factor_user_verification="discouraged", second_factor_attachment="any"
    )
    verbs = broker.parts.broker
    public_key = (
        await verbs.begin_registration(
            keyed(app), ByUser("ann"), "keyed", names=Names("ann", "ann"), options=SECOND
        )
    ).public_key
    assert public_key["authenticatorSelection"] == {
        "residentKey": "discouraged",
        "requireResidentKey": False,
        "userVerification": "discouraged",
    }
    ordinary = (
        await verbs.begin_registration(
            keyed(app), ByUser("ann"), "keyed", names=Names("ann", "ann")
        )
    ).public_key
    assert ordinary["authenticatorSelection"]["userVerification"] == "required"
    options = SECOND._replace(user_verification="required")
    public_key = (
        await verbs.begin_registration(
            keyed(app),
            ByUser("ann"),
            "keyed",
            names=Names("ann", "ann"),
            attachment="cross-platform",
            options=options,
        )
    ).public_key
    assert public_key["authenticatorSelection"]["userVerification"] == "required"
    assert public_key["authenticatorSelection"]["authenticatorAttachment"] == "cross-platform"


@pytest.mark.parametrize(
    ("options", "named", "wanted"),
    [
        (ORDINARY, None, "platform"),
        (ORDINARY, "any", None),
        (ORDINARY, "cross-platform", "cross-platform"),
        (SECOND, None, "cross-platform"),
        (SECOND, "any", None),
        (SECOND, "platform", "platform"),
    ],
)
async def test_attachment_is_what_the_caller_names_or_the_policy_of_its_kind(
    open_app: OpenApp, options: CeremonyOptions, named: str | None, wanted: str | None
) -> None:
    """At the page with a transaction, and for a keyed caller."""
    wire = await open_app(Policy(authenticator_attachment="platform"))
    fields = {"second_factor": True} if options.second_factor else {}
    more = {} if named is None else {"authenticator_attachment": named}
    body = {"external_id": "ann", "passkey_display_name": "Ann", **fields}
    transaction = (await wire.keyed("POST", "/transactions/register", body)).json["transaction_id"]
    _, begun = await wire.begin("register", transaction, **more)
    keyed_body = {"external_id": "ann", "user_name": "ann", **fields, **more}
    answer = await wire.keyed("POST", "/ceremonies/register/start", keyed_body)
    for public_key in (begun, answer.json["options"]):
        assert public_key["authenticatorSelection"].get("authenticatorAttachment") == wanted


async def test_a_second_factor_signs_in_only_where_it_is_asked_for(
    broker: Started, app_with: AppWith
) -> None:
    """Not offered and not accepted in ordinary sign-ins: of the user, of nobody in particular, by
    an allow list, with a transaction.
    """
    app, device, fob = await app_with(), Authenticator(), Authenticator()
    mine = await register(broker, app, "ann", device)
    second = await register(broker, app, "ann", fob, SECOND)
    assert (mine.second_factor, second.second_factor) == (False, True)
    verbs = broker.parts.broker

    for user in ("ann", ANYONE):
        with pytest.raises(CeremonyRefused) as caught:
            await sign_in(broker, app, user, fob, shown={"allowCredentials": []})
        assert caught.value.reason == "second_factor"
    begun = await verbs.begin_authentication(
        Caller(app), ByTransaction(await verbs.open_authentication(keyed(app), "ann")), "page"
    )
    assert [unb64(c["id"]) for c in begun.public_key["allowCredentials"]] == [mine.credential_id]
    begun = await verbs.begin_authentication(Caller(app), ANYONE, "page")
    answer = parse_authentication(fob.authenticate(begun.public_key, ORIGIN))
    with pytest.raises(DiscoverableRefused) as caught:
        await verbs.finish_authentication(Caller(app), by_handle(begun), answer, PAGE, Nonce())
    assert (caught.value.reason, caught.value.signal) == ("second_factor", None)

    assert (await sign_in(broker, app, "ann", fob, SECOND)).second_factor
    proved = await sign_in(broker, app, "ann", device, SECOND)
    assert proved.proof == "authenticate_second_factor", (
        "an ordinary passkey does as well, and proves no more"
    )
    ann = await broker.parts.directory.user(app, external_id="ann")
    listed = await broker.parts.directory.credentials(app, ann)
    assert [c.second_factor for c in listed] == [False, True]


async def test_a_user_with_second_factors_only_can_not_sign_in_by_them(
    broker: Started, app_with: AppWith
) -> None:
    app, fob = await app_with(), Authenticator()
    await register(broker, app, "ann", fob, SECOND)
    verbs = broker.parts.broker
    with pytest.raises(NoPasskeys):
        await verbs.open_authentication(keyed(app), "ann")
    with pytest.raises(NoPasskeys):
        await verbs.begin_authentication(keyed(app), ByUser("ann"), "keyed")
    own: Proof = "authenticate_second_factor"
    for proofs in ((own,), ("authenticate",), ExpectedReceipt().proofs):
        transaction = await verbs.open_authentication(keyed(app), "ann", SECOND)
        begun = await verbs.begin_authentication(Caller(app), ByTransaction(transaction), "page")
        answer = parse_authentication(fob.authenticate(begun.public_key, ORIGIN))
        nonce = nonce_of(
            await verbs.finish_authentication(Caller(app), by_handle(begun), answer, PAGE, Nonce())
        )
        expect = ExpectedReceipt(proofs, transaction_id=transaction)
        if proofs == (own,):
            receipt = (await verbs.redeem(keyed(app), nonce, expect)).receipt
            assert (receipt.external_id, receipt.proof) == ("ann", own)
        else:
            with pytest.raises(UnknownNonce):
                await verbs.redeem(keyed(app), nonce, expect)


async def test_finish_says_which_kind_it_is_for(broker: Started, app_with: AppWith) -> None:
    """A ceremony about second factors finishes nothing else, and the other way round; another kind
    of finish takes nothing.
    """
    app, device = await app_with(), Authenticator()
    await register(broker, app, "ann", device)
    verbs = broker.parts.broker
    for options in (CeremonyOptions(), SECOND):
        public_key = (
            await verbs.begin_authentication(
                keyed(app), ByChallenge("ann"), "keyed", options=options
            )
        ).public_key
        answer = parse_authentication(device.authenticate(public_key, ORIGIN))
        other, own = not options.second_factor, options.second_factor
        with pytest.raises(UnknownTransaction) as caught:
            await verbs.finish_authentication(
                keyed(app),
                ByChallenge(),
                answer,
                ExpectedCeremony(("keyed",), second_factor=other),
            )
        assert caught.value.reason == "other_finish"
        await verbs.finish_authentication(
            keyed(app), ByChallenge(), answer, ExpectedCeremony(("keyed",), second_factor=own)
        )
        public_key = (
            await verbs.begin_registration(
                keyed(app), ByChallenge("eve"), "keyed", names=Names("eve", "eve"), options=options
            )
        ).public_key
        made = parse_registration(Authenticator().register(public_key, ORIGIN))
        with pytest.raises(UnknownTransaction) as caught:
            await verbs.finish_registration(
                keyed(app),
                ByChallenge(),
                made,
                ExpectedCeremony(("keyed",), second_factor=other),
            )
        assert caught.value.reason == "other_finish"
        await verbs.finish_registration(
            keyed(app), ByChallenge(), made, ExpectedCeremony(("keyed",), second_factor=own)
        )


async def test_a_finish_by_handle_takes_no_other_kind(broker: Started, app_with: AppWith) -> None:
    """A second factor that a page began is not stored by a finish that expects a passkey; its
    ceremony is spent.
    """
    app, verbs = await app_with(), broker.parts.broker
    transaction = await verbs.open_registration(keyed(app), "ann", Names("ann", "Ann"), SECOND)
    begun = await verbs.begin_registration(Caller(app), ByTransaction(transaction), "page")
    answer = parse_registration(Authenticator().register(begun.public_key, ORIGIN))
    for reason in ("other_finish", "handle_unknown"):
        with pytest.raises(UnknownTransaction) as caught:
            await verbs.finish_registration(
                Caller(app), by_handle(begun), answer, ExpectedCeremony(("page",)), Nonce()
            )
        assert caught.value.reason == reason
    user = await broker.parts.directory.user(app, external_id="ann")
    assert await broker.parts.directory.credentials(app, user) == []
