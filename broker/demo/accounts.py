"""Accounts of the sample site: names, sessions, begun ceremonies and labels of passkeys, in SQLite.

One file (mode 0600, write-ahead log) holds everything, so accounts and sessions survive a restart.
A call takes well under a millisecond, except that a commit waits for the disk. So every method runs
on one thread of its own, each as one transaction. The write decides: a name belongs to the sign-up
whose INSERT succeeded, and a begun ceremony is read by the DELETE that spends it.

- **Account.** The broker knows an account by its `external_id`, a random UUID. It is never the
  name: a name can be given up and taken by another person, who must not get the old passkeys.
- **Name.** The first passkey takes a name for good. Before that, the name is reserved for the
  session of the sign-up, for `RESERVATION_LIFE` seconds. That is longer than the life of a register
  transaction (10 minutes), so no other sign-up can take the name while this one can still finish,
  and an abandoned sign-up gives it up.
- **Session.** A session is a random token, stored as its SHA-256. It begins before sign-in, to hold
  the begun ceremony of a browser. It gets a new token when a sign-up or sign-in begins, and at
  sign-in. So a token that an attacker planted in the browser (session fixation) and the ceremonies
  begun with it are worth nothing from then on. A retried sign-up gets a new external id.
- **Ceremony.** A row holds what a session expects: purpose, transaction and external id. The first
  answer spends it, right or wrong. A transaction id is a bearer right as long as it lives, so only
  its SHA-256 is stored. The page names the transaction when it finishes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sqlite3
import unicodedata
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from broker.errors import Fault

Kind = Literal["sign-up", "sign-in", "add"]
P = ParamSpec("P")
T = TypeVar("T")

# Seconds.
CEREMONY_LIFE = 15 * 60  # the broker's transaction in it lives 10 minutes
RESERVATION_LIFE = 15 * 60
VISIT_LIFE = 60 * 60  # a session before sign-in
SESSION_LIFE = 12 * 60 * 60  # a session after sign-in, used or not

NAME_LIMIT = 64  # characters of a name or a label

_PUNCTUATION = frozenset(" ._-'\u2019@+&()")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS account (
  external_id    TEXT PRIMARY KEY,
  name           TEXT NOT NULL,
  name_key       TEXT NOT NULL UNIQUE,
  created_at     REAL NOT NULL,
  opened_at      REAL,              -- first passkey; NULL while the sign-up is unfinished
  reserved_by    TEXT,              -- token hash of the session that is signing up
  reserved_until REAL
);
CREATE TABLE IF NOT EXISTS session (
  token_hash  TEXT PRIMARY KEY,
  external_id TEXT REFERENCES account (external_id) ON DELETE CASCADE,  -- NULL before sign-in
  passkey_id  TEXT,                 -- which passkey opened it; revoking that passkey ends it
  expires_at  REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS ceremony (
  token_hash       TEXT NOT NULL REFERENCES session (token_hash) ON DELETE CASCADE,
  kind             TEXT NOT NULL,
  external_id      TEXT NOT NULL,
  transaction_hash TEXT NOT NULL,
  expires_at       REAL NOT NULL,
  PRIMARY KEY (token_hash, kind)
);
CREATE TABLE IF NOT EXISTS label (
  external_id TEXT NOT NULL REFERENCES account (external_id) ON DELETE CASCADE,
  passkey_id  TEXT NOT NULL,
  label       TEXT NOT NULL,
  PRIMARY KEY (external_id, passkey_id)
);
"""


@dataclass(frozen=True, slots=True)
class Account:
    """`created_at` in seconds since 1970. `open` is false until the first passkey is proved."""

    external_id: str
    name: str
    created_at: float
    open: bool


@dataclass(frozen=True, slots=True)
class Session:
    """A live session. `account` is None before sign-in. Only the cookie holds the token itself."""

    token_hash: str
    account: Account | None
    passkey_id: str | None


@dataclass(frozen=True, slots=True)
class Ceremony:
    """The claims that a session expects the next nonce of this kind to prove."""

    external_id: str
    transaction_hash: str


class AccountsFault(Fault):
    """The accounts file can't be opened: damaged, of another format, or not writable."""


class NameTaken(Exception):
    """The name belongs to an account, or to another session's unfinished sign-up."""


class InvalidName(ValueError):
    """The text can't be a name. The message is a sentence for the visitor."""


def parse_name(text: str) -> tuple[str, str]:
    """`text` in its displayed form, and the key that compares names (Unicode NFKC, case folding,
    NFKC).

    1 to 64 characters: letters, marks, digits and a little punctuation of any script, at least one
    letter or digit. Control and format characters are refused: they make two names look alike, or
    turn the direction of the text around them.
    """
    shown = " ".join(unicodedata.normalize("NFKC", text).split())
    if not shown:
        raise InvalidName("Type a name first.")
    if len(shown) > NAME_LIMIT:
        raise InvalidName(f"That's too long: a name has at most {NAME_LIMIT} characters.")
    if any(unicodedata.category(c)[0] not in "LMN" and c not in _PUNCTUATION for c in shown):
        raise InvalidName("Use letters, digits, spaces and simple punctuation like . - ' @ only.")
    if not any(unicodedata.category(c)[0] in "LN" for c in shown):
        raise InvalidName("A name needs at least one letter or digit.")
    return shown, unicodedata.normalize("NFKC", shown.casefold())


def hash_token(token: str) -> str:
    """SHA-256 of a session token or a transaction id, in hex. No salt: both have 256 random
    bits.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def _drop_old_ceremonies(db: sqlite3.Connection) -> None:
    """Erase the ceremonies of an older file, which hold whole transaction ids, also from its free
    pages. Sessions stay.
    """
    if any(column[1] == "transaction_id" for column in db.execute("PRAGMA table_info(ceremony)")):
        db.execute("DROP TABLE ceremony")
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _transaction(
    method: Callable[Concatenate[Accounts, sqlite3.Connection, P], T],
) -> Callable[Concatenate[Accounts, P], Coroutine[Any, Any, T]]:
    """Run a method as one transaction on the file's thread. Raises `sqlite3.Error`."""

    @wraps(method)
    async def run(accounts: Accounts, /, *args: P.args, **kwargs: P.kwargs) -> T:
        def work() -> T:
            with accounts.db as db:  # commits, or rolls back
                db.execute("BEGIN IMMEDIATE")
                return method(accounts, db, *args, **kwargs)

        return await accounts.on_thread(work)

    return run


class Accounts:
    """The accounts file, between `open` and `close`."""

    db: sqlite3.Connection

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="demo-accounts")

    async def on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def open(self) -> None:
        """Make or open the file.

        Raises:
            AccountsFault: the file can't be used. The sentence names it and says what to do.
        """
        try:
            await self.on_thread(self._connect)
        except (OSError, sqlite3.Error) as fault:
            reason = (fault.strerror if isinstance(fault, OSError) else None) or fault
            raise AccountsFault(
                f"The demo's accounts file {self._path} can't be used ({reason}); "
                "move it away and start again, then the demo begins a new one."
            ) from None

    def _connect(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # O_NOFOLLOW: if root runs the broker, the folder may belong to the stores' user. SQLite
        # gives its side files the same mode.
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(file, 0o600)
        finally:
            os.close(file)
        self.db = sqlite3.connect(self._path, isolation_level=None, timeout=5)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA foreign_keys = ON")
        _drop_old_ceremonies(self.db)
        self.db.executescript(_SCHEMA)

    async def close(self) -> None:
        """Close the file, if it is open, and end its thread."""
        if hasattr(self, "db"):
            await self.on_thread(self.db.close)
        self._thread.shutdown()

    # Sessions

    @_transaction
    def session(self, db: sqlite3.Connection, token: str) -> Session | None:
        """The live session of a cookie's token."""
        row = db.execute(
            "SELECT s.token_hash, s.passkey_id, a.external_id, a.name, a.created_at,"
            " a.opened_at IS NOT NULL"
            " FROM session s LEFT JOIN account a ON a.external_id = s.external_id"
            " WHERE s.token_hash = ? AND s.expires_at > ?",
            (hash_token(token), self._clock()),
        ).fetchone()
        if row is None:
            return None
        account = Account(row[2], row[3], row[4], bool(row[5])) if row[2] is not None else None
        return Session(row[0], account, row[1])

    @_transaction
    def renew(self, db: sqlite3.Connection, old: Session | None) -> tuple[str, Session]:
        """End `old` and begin a session; return its token and the session. Removes expired rows.

        A sign-in carries over, until the same time. Begun ceremonies and a reserved name end with
        `old`, whose token an attacker may know.
        """
        token, now = secrets.token_urlsafe(32), self._clock()
        old_hash = old.token_hash if old else None
        db.execute("DELETE FROM session WHERE expires_at <= ?", (now,))
        ended = db.execute(
            "DELETE FROM session WHERE token_hash = ? RETURNING expires_at", (old_hash,)
        ).fetchone()
        db.execute(
            "DELETE FROM account WHERE opened_at IS NULL"
            " AND (reserved_until <= ? OR reserved_by = ?)",
            (now, old_hash),
        )
        account, passkey_id, end = None, None, now + VISIT_LIFE
        if old and old.account and ended:
            account, passkey_id, end = old.account, old.passkey_id, ended[0]
        _insert_session(db, token, account.external_id if account else None, passkey_id, end)
        return token, Session(hash_token(token), account, passkey_id)

    @_transaction
    def sign_in(
        self, db: sqlite3.Connection, old: Session | None, external_id: str, passkey_id: str
    ) -> str | None:
        """End `old` and begin a session of the account; return its token. None: there is no such
        account.

        The first proof of a passkey opens the account and so ends its sign-up.
        """
        token, now = secrets.token_urlsafe(32), self._clock()
        opened = db.execute(
            "UPDATE account"
            " SET opened_at = coalesce(opened_at, ?), reserved_by = NULL, reserved_until = NULL"
            " WHERE external_id = ?",
            (now, external_id),
        )
        if opened.rowcount == 0:
            return None
        if old is not None:
            db.execute("DELETE FROM session WHERE token_hash = ?", (old.token_hash,))
        _insert_session(db, token, external_id, passkey_id, now + SESSION_LIFE)
        return token

    @_transaction
    def sign_out(self, db: sqlite3.Connection, session: Session) -> None:
        db.execute("DELETE FROM session WHERE token_hash = ?", (session.token_hash,))

    @_transaction
    def end_sessions_of_passkey(
        self, db: sqlite3.Connection, external_id: str, passkey_id: str, *, keep: Session
    ) -> int:
        """End a revoked passkey's sessions on every other browser; return their number."""
        return db.execute(
            "DELETE FROM session WHERE external_id = ? AND passkey_id = ? AND token_hash <> ?",
            (external_id, passkey_id, keep.token_hash),
        ).rowcount

    # Accounts

    @_transaction
    def reserve(self, db: sqlite3.Connection, name: str, key: str, session: Session) -> Account:
        """Reserve a name for this session's sign-up. Raises NameTaken."""
        now = self._clock()
        db.execute("DELETE FROM account WHERE opened_at IS NULL AND reserved_until <= ?", (now,))
        row = db.execute(
            "INSERT INTO account"
            " (external_id, name, name_key, created_at, reserved_by, reserved_until)"
            " VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (name_key) DO NOTHING"
            " RETURNING external_id, name, created_at",
            (str(uuid.uuid4()), name, key, now, session.token_hash, now + RESERVATION_LIFE),
        ).fetchone()
        if row is None:
            raise NameTaken(name)
        return Account(row[0], row[1], row[2], open=False)

    @_transaction
    def find(self, db: sqlite3.Connection, key: str) -> Account | None:
        """The open account of a name's key."""
        return _open_account(db, "name_key", key)

    @_transaction
    def owner(self, db: sqlite3.Connection, external_id: str) -> Account | None:
        """The open account of an external id."""
        return _open_account(db, "external_id", external_id)

    # Ceremonies

    @_transaction
    def expect(
        self,
        db: sqlite3.Connection,
        session: Session,
        kind: Kind,
        external_id: str,
        transaction_id: str,
    ) -> None:
        """Store a begun ceremony of the session. A later one of the same kind replaces it."""
        db.execute(
            "INSERT OR REPLACE INTO ceremony"
            " (token_hash, kind, external_id, transaction_hash, expires_at)"
            " VALUES (?, ?, ?, ?, ?)",
            (
                session.token_hash,
                kind,
                external_id,
                hash_token(transaction_id),
                self._clock() + CEREMONY_LIFE,
            ),
        )

    @_transaction
    def take(self, db: sqlite3.Connection, session: Session, kind: Kind) -> Ceremony | None:
        """Spend a begun ceremony of the session: a second call finds none."""
        row = db.execute(
            "DELETE FROM ceremony WHERE token_hash = ? AND kind = ?"
            " RETURNING external_id, transaction_hash, expires_at",
            (session.token_hash, kind),
        ).fetchone()
        return Ceremony(row[0], row[1]) if row and row[2] > self._clock() else None

    # Labels

    @_transaction
    def labels(self, db: sqlite3.Connection, external_id: str) -> dict[str, str]:
        """The labels of an account's passkeys, by passkey id."""
        rows = db.execute(
            "SELECT passkey_id, label FROM label WHERE external_id = ?", (external_id,)
        )
        return dict(rows.fetchall())

    @_transaction
    def set_label(
        self, db: sqlite3.Connection, external_id: str, passkey_id: str, label: str
    ) -> None:
        db.execute(
            "INSERT OR REPLACE INTO label (external_id, passkey_id, label) VALUES (?, ?, ?)",
            (external_id, passkey_id, label),
        )

    @_transaction
    def drop_label(self, db: sqlite3.Connection, external_id: str, passkey_id: str) -> None:
        db.execute(
            "DELETE FROM label WHERE external_id = ? AND passkey_id = ?", (external_id, passkey_id)
        )


def _insert_session(
    db: sqlite3.Connection,
    token: str,
    external_id: str | None,
    passkey_id: str | None,
    expires_at: float,
) -> None:
    db.execute(
        "INSERT INTO session (token_hash, external_id, passkey_id, expires_at) VALUES (?, ?, ?, ?)",
        (hash_token(token), external_id, passkey_id, expires_at),
    )


def _open_account(
    db: sqlite3.Connection, column: Literal["name_key", "external_id"], value: str
) -> Account | None:
    open_accounts = "SELECT external_id, name, created_at FROM account WHERE opened_at IS NOT NULL"
    row = db.execute(f"{open_accounts} AND {column} = ?", (value,)).fetchone()
    return None if row is None else Account(row[0], row[1], row[2], open=True)
