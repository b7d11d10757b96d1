"""What a caller asks of one ceremony: within the policy, never past it; and second factors, which
sign in only where they are asked for.

Most of it is asked of the verbs themselves, so it holds for every wire format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from broker.ceremony import parse_authentication, parse_registration
from broker.errors import (
    CeremonyRefused,
    DiscoverableRefused,
    InvalidRequest,
    NoPasskeys,
    UnknownNonce,
    UnknownTransaction,
)
from broker.model import CeremonyOptions, Policy, Proof, Receipt, RelyingParty, UserVerification
from tests.conftest import SKEW, Started
from tests.support.authenticator import Authenticator, unb64
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
    asked: CeremonyOptions = ORDINARY,
    **how: Any,
) -> Receipt:
    options = await broker.parts.broker.begin_registration_of(
        app, user, user_name=user, asked=asked, by="challenge", opener="keyed"
    )
    answer = parse_registration(device.register(options, ORIGIN, **how))
    return await broker.parts.broker.finish_registration_by(
        app, answer, second_factor=asked.second_factor, confirmed=True, openers=("keyed",)
    )


async def sign_in(
    broker: Started,
    app: RelyingParty,
    user: str | None,
    device: Authenticator,
    asked: CeremonyOptions = ORDINARY,
    *,
    shown: dict[str, Any] | None = None,
    **how: Any,
) -> Receipt:
    """By the challenge. `shown`: what the device is asked in place of the options."""
    options = await broker.parts.broker.begin_authentication_of(
        app, user, asked=asked, by="challenge", opener="keyed"
    )
    answer = parse_authentication(device.authenticate(options | (shown or {}), ORIGIN, **how))
    return await broker.parts.broker.finish_authentication_by(
        app, answer, second_factor=asked.second_factor, openers=("keyed",)
    )


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
    asked, device = CeremonyOptions(user_verification=wish), Authenticator()
    options = await broker.parts.broker.begin_registration_of(
        app, "ann", user_name="ann", asked=asked, opener="keyed"
    )
    assert options["authenticatorSelection"]["userVerification"] == given
    await register(broker, app, "ann", device)
    options = await broker.parts.broker.begin_authentication_of(
        app, "ann", asked=asked, opener="keyed"
    )
    assert options["userVerification"] == given
    if given == "required":
        with pytest.raises(CeremonyRefused) as caught:
            await sign_in(broker, app, "ann", device, asked, uv=False)
        assert caught.value.reason == "user_verification"
        with pytest.raises(CeremonyRefused):
            await register(broker, app, "ann", Authenticator(), asked, uv=False)
    else:
        assert not (await sign_in(broker, app, "ann", device, asked, uv=False)).user_verified
        await register(broker, app, "ann", Authenticator(), asked, uv=False)


@pytest.mark.parametrize(
    "asked", [CeremonyOptions(), CeremonyOptions(user_verification="discouraged"), SECOND]
)
async def test_a_policy_made_stricter_applies_to_what_is_open(
    broker: Started, app_with: AppWith, asked: CeremonyOptions
) -> None:
    loose: dict[str, Any] = dict.fromkeys(
        ("user_verification", "second_factor_user_verification"), "preferred"
    )
    app = await app_with(**loose, allow_weaker=True)
    device = Authenticator()
    await register(broker, app, "ann", device)
    options = await broker.parts.broker.begin_authentication_of(
        app, "ann", asked=asked, by="challenge", opener="keyed"
    )
    strict: dict[str, Any] = dict.fromkeys(loose, "required")
    app = await broker.parts.directory.update_app(replace(app, policy=Policy(**strict)))
    answer = parse_authentication(device.authenticate(options, ORIGIN, uv=False))
    with pytest.raises(CeremonyRefused) as caught:
        await broker.parts.broker.finish_authentication_by(
            app, answer, second_factor=asked.second_factor, openers=("keyed",)
        )
    assert caught.value.reason == "user_verification"


async def test_what_was_required_stays_required_under_a_looser_policy(
    broker: Started, app_with: AppWith
) -> None:
    app, device = await app_with(), Authenticator()
    await register(broker, app, "ann", device)
    options = await broker.parts.broker.begin_authentication_of(
        app, "ann", by="challenge", opener="keyed"
    )
    app = await broker.parts.directory.update_app(
        replace(app, policy=Policy(user_verification="discouraged"))
    )
    answer = parse_authentication(device.authenticate(options, ORIGIN, uv=False))
    with pytest.raises(CeremonyRefused):
        await broker.parts.broker.finish_authentication_by(app, answer, openers=("keyed",))


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
    app, device, asked = (
        await app_with(ceremony_life=60),
        Authenticator(),
        CeremonyOptions(life=wish),
    )
    await register(broker, app, "ann", device)
    verbs = broker.parts.broker
    registration = await verbs.begin_registration_of(
        app, "ann", user_name="ann", asked=asked, by="challenge", opener="keyed"
    )
    authentication = await verbs.begin_authentication_of(
        app, "ann", asked=asked, by="challenge", opener="keyed"
    )
    transaction = await verbs.open_authentication(app, "ann", asked=asked)
    begun = await verbs.begin_authentication(app, transaction, opener="page")
    for options in (registration, authentication, begun.options):
        assert given * 1000 - 1 <= options["timeout"] <= given * 1000
    answer = parse_authentication(device.authenticate(authentication, ORIGIN))
    broker.clock.ahead += given + SKEW
    with pytest.raises(UnknownTransaction):
        await verbs.finish_authentication_by(app, answer, openers=("keyed",))


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
        options = await broker.parts.broker.begin_registration_of(
            app, "ann", user_name="ann", asked=CeremonyOptions(exclude=wish), opener="keyed"
        )
        excluded = [unb64(c["id"]) for c in options["excludeCredentials"]]
        assert sorted(excluded) == sorted(r.credential_id for r in (own, *more))


async def test_an_allow_list_narrows(broker: Started, app_with: AppWith) -> None:
    """By options and by judgement, for a known user and for whoever answers, with a transaction and
    without one.
    """
    app, first, second = await app_with(), Authenticator(), Authenticator()
    mine = await register(broker, app, "ann", first)
    await register(broker, app, "ann", second)
    bobs = await register(broker, app, "bob", Authenticator())
    asked = CeremonyOptions(allow=(mine.passkey_id, bobs.passkey_id))
    verbs = broker.parts.broker
    for user, offered in (("ann", [mine]), (None, [mine, bobs])):
        options = await verbs.begin_authentication_of(
            app, user, asked=asked, by="challenge", opener="keyed"
        )
        assert [unb64(c["id"]) for c in options["allowCredentials"]] == [
            r.credential_id for r in offered
        ]
        begun = await verbs.begin_authentication(
            app, await verbs.open_authentication(app, user, asked=asked), opener="page"
        )
        assert begun.options["allowCredentials"] == options["allowCredentials"]
        assert (await sign_in(broker, app, user, first, asked)).passkey_id == mine.passkey_id
        with pytest.raises(CeremonyRefused) as caught:
            await sign_in(broker, app, user, second, asked, shown={"allowCredentials": []})
        assert caught.value.reason == "not_offered"
    begun = await verbs.begin_authentication(app, None, asked=asked, opener="page")
    assert "allowCredentials" not in begun.options, "a page alone learns nothing of credentials"
    answer = parse_authentication(second.authenticate(begun.options, ORIGIN))
    with pytest.raises(DiscoverableRefused) as caught:
        await verbs.finish_authentication(app, begun.handle, None, answer, opener="page")
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
        asked = CeremonyOptions(allow=allow)
        for user in ("ann", None):
            with pytest.raises(NoPasskeys):
                await verbs.open_authentication(app, user, asked=asked)
            with pytest.raises(NoPasskeys):
                await verbs.begin_authentication_of(
                    app, user, asked=asked, by="challenge", opener="keyed"
                )
        if allow:
            begun = await verbs.begin_authentication(app, None, asked=asked, opener="page")
            answer = parse_authentication(device.authenticate(begun.options, ORIGIN))
            with pytest.raises(DiscoverableRefused):
                await verbs.finish_authentication(app, begun.handle, None, answer, opener="page")
        else:
            with pytest.raises(InvalidRequest):
                await verbs.begin_authentication(app, None, asked=asked, opener="page")
    with pytest.raises(NoPasskeys):
        await verbs.open_authentication(app, "ann", asked=CeremonyOptions(allow=(bobs.passkey_id,)))

    for user in ("ann", None):
        transaction = await verbs.open_authentication(
            app, user, asked=CeremonyOptions(allow=(mine.passkey_id,))
        )
        begun = await verbs.begin_authentication(app, transaction, opener="page")
        await directory.revoke_passkey(app, mine.passkey_id)
        if user is None:
            with pytest.raises(UnknownTransaction) as unknown:
                await verbs.begin_authentication(app, transaction, opener="page")
            assert unknown.value.reason == "no_passkey_left"
        else:
            begun = await verbs.begin_authentication(app, transaction, opener="page")
            assert len(begun.options["allowCredentials"]) == 1, (
                "what was offered when it was opened"
            )
        answer = parse_authentication(device.authenticate(begun.options, ORIGIN))
        with pytest.raises(CeremonyRefused) as caught:
            await verbs.finish_authentication(app, begun.handle, None, answer, opener="page")
        assert caught.value.reason == ("revoked_or_counter" if user else "unknown_credential")
        mine = await register(broker, app, "ann", device)


# -- second factors --------------------------------------------------------------------------------


async def test_a_second_factor_follows_its_own_policy(broker: Started, app_with: AppWith) -> None:
    app = await app_with(
        second_factor_user_verification="discouraged", second_factor_attachment="any"
    )
    verbs = broker.parts.broker
    options = await verbs.begin_registration_of(
        app, "ann", user_name="ann", asked=SECOND, opener="keyed"
    )
    assert options["authenticatorSelection"] == {
        "residentKey": "discouraged",
        "requireResidentKey": False,
        "userVerification": "discouraged",
    }
    ordinary = await verbs.begin_registration_of(app, "ann", user_name="ann", opener="keyed")
    assert ordinary["authenticatorSelection"]["userVerification"] == "required"
    asked = SECOND._replace(user_verification="required")
    options = await verbs.begin_registration_of(
        app, "ann", user_name="ann", asked=asked, attachment="cross-platform", opener="keyed"
    )
    assert options["authenticatorSelection"]["userVerification"] == "required"
    assert options["authenticatorSelection"]["authenticatorAttachment"] == "cross-platform"


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

    for user in ("ann", None):
        with pytest.raises(CeremonyRefused) as caught:
            await sign_in(broker, app, user, fob, shown={"allowCredentials": []})
        assert caught.value.reason == "second_factor"
    begun = await verbs.begin_authentication(
        app, await verbs.open_authentication(app, "ann"), opener="page"
    )
    assert [unb64(c["id"]) for c in begun.options["allowCredentials"]] == [mine.credential_id]
    begun = await verbs.begin_authentication(app, None, opener="page")
    answer = parse_authentication(fob.authenticate(begun.options, ORIGIN))
    with pytest.raises(DiscoverableRefused) as caught:
        await verbs.finish_authentication(app, begun.handle, None, answer, opener="page")
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
        await verbs.open_authentication(app, "ann")
    with pytest.raises(NoPasskeys):
        await verbs.begin_authentication_of(app, "ann", opener="keyed")
    proofs: tuple[Proof | None, ...] = ("authenticate_second_factor", "authenticate", None)
    for purpose in proofs:
        transaction = await verbs.open_authentication(app, "ann", asked=SECOND)
        begun = await verbs.begin_authentication(app, transaction, opener="page")
        answer = parse_authentication(fob.authenticate(begun.options, ORIGIN))
        nonce = await verbs.finish_authentication(app, begun.handle, None, answer, opener="page")
        if purpose == "authenticate_second_factor":
            receipt = await verbs.redeem(app, nonce, transaction_id=transaction, purpose=purpose)
            assert (receipt.external_id, receipt.proof) == ("ann", purpose)
        else:
            with pytest.raises(UnknownNonce):
                await verbs.redeem(app, nonce, transaction_id=transaction, purpose=purpose)


async def test_finish_says_which_kind_it_is_for(broker: Started, app_with: AppWith) -> None:
    """A ceremony about second factors finishes nothing else, and the other way round; another kind
    of finish takes nothing.
    """
    app, device = await app_with(), Authenticator()
    await register(broker, app, "ann", device)
    verbs = broker.parts.broker
    for asked in (CeremonyOptions(), SECOND):
        options = await verbs.begin_authentication_of(
            app, "ann", asked=asked, by="challenge", opener="keyed"
        )
        answer = parse_authentication(device.authenticate(options, ORIGIN))
        other, own = not asked.second_factor, asked.second_factor
        with pytest.raises(UnknownTransaction) as caught:
            await verbs.finish_authentication_by(
                app, answer, second_factor=other, openers=("keyed",)
            )
        assert caught.value.reason == "other_finish"
        await verbs.finish_authentication_by(app, answer, second_factor=own, openers=("keyed",))
        options = await verbs.begin_registration_of(
            app, "eve", user_name="eve", asked=asked, by="challenge", opener="keyed"
        )
        made = parse_registration(Authenticator().register(options, ORIGIN))
        with pytest.raises(UnknownTransaction) as caught:
            await verbs.finish_registration_by(
                app, made, second_factor=other, confirmed=True, openers=("keyed",)
            )
        assert caught.value.reason == "other_finish"
        await verbs.finish_registration_by(
            app, made, second_factor=own, confirmed=True, openers=("keyed",)
        )
