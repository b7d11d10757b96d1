"""What the sample site remembers: accounts, sessions, begun ceremonies and the names people give
their passkeys.

Theory of operation. One SQLite file (mode 0600, write-ahead log) holds it all, so that accounts and
sessions survive a restart. Its calls take well under a millisecond, except that a commit waits for
the disk; therefore they run on one thread of their own (`Accounts.call`), which also makes every
verb below atomic towards every other. The write decides: a name belongs to whoever's INSERT
succeeded, and a begun ceremony is read by the DELETE that spends it.

- The broker knows an account by its `external_id`, a random UUID. It is never the name: a name may
  be given up and taken by somebody else, and must not carry the old passkeys along.
- A name is taken for good by its first passkey. Until then it is reserved for the session that
  asked, for `RESERVATION` seconds, which is longer than a register transaction lives (10 minutes):
  nobody else can take the name under a sign-up that can still finish, and nobody can keep a name
  without finishing.
- A session is a random token of which only the SHA-256 is stored. It begins before sign-in (to
  remember what this browser asked for) and gets a new token whenever a sign-up or sign-in begins,
  and at sign-in. So a token that somebody planted in the browser (session fixation) is worth
  nothing from then on, and neither is what it began: a retried sign-up gets a new external id.
- A ceremony row says what a session expects: purpose, transaction and external id. It is spent by
  the first answer, right or wrong. A transaction id is a bearer right as long as it lives, so only
  its SHA-256 is stored; the page names the transaction when it finishes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sqlite3
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from broker.errors import Fault

Kind = Literal["sign-up", "sign-in", "add"]
P = ParamSpec("P")
T = TypeVar("T")

CEREMONY = (
    15 * 60
)  # seconds a begun ceremony is remembered; the broker's transaction inside it lives 10 minutes
RESERVATION = 15 * 60  # seconds a name is held for an unfinished sign-up
VISIT = 60 * 60  # seconds a session lives before sign-in
SESSION = 12 * 60 * 60  # seconds a session lives after sign-in, used or not
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
    """A live session; `account` is None before sign-in. `token_hash` finds it, the token itself is
    only in the cookie.
    """

    token_hash: str
    account: Account | None
    passkey_id: str | None


@dataclass(frozen=True, slots=True)
class Ceremony:
    """What a session expects the next nonce of this kind to prove."""

    external_id: str
    transaction_hash: str


class AccountsFault(Fault):
    """The file can't be opened: damaged, not an accounts file, or not ours to write."""


class NameTaken(Exception):
    """The name belongs to an account, or to another session's unfinished sign-up."""


class InvalidName(ValueError):
    """The text can't be a name; its message is a sentence for the person who typed it."""


def parse_name(text: str) -> tuple[str, str]:
    """`text` as it is shown, and the key by which names are compared (Unicode NFKC, then without
    case, then NFKC again).

    1 to 64 characters: letters, marks, digits and a little punctuation of any script, at least one
    letter or digit. Control and format characters are refused (they make two names look alike, or
    turn the direction of the text around them).
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
    """SHA-256 of a session token or a transaction id, in hex. No salt: they have 256 random
    bits.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def _drop_old_ceremonies(db: sqlite3.Connection) -> None:
    """Older files hold whole transaction ids. They go with the ceremonies, also from the file's
    free pages; nobody is signed out.
    """
    if any(column[1] == "transaction_id" for column in db.execute("PRAGMA table_info(ceremony)")):
        db.execute("DROP TABLE ceremony")
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class Accounts:
    """The file, opened by the first `call` and closed by `close`. Verbs are synchronous; `call`
    runs them on the one thread.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="demo-accounts")
        self._db: sqlite3.Connection | None = None

    async def call(self, verb: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `verb`, one of this object's methods, on the file's own thread. `sqlite3.Error` when
        the file can't be used.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, partial(verb, *args, **kwargs)
        )

    def open(self) -> None:
        """Make or open the file.

        Raises:
            AccountsFault: that is not possible; the sentence names the file and says what to do.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Never through a link: as root, the folder may belong to the stores' user. SQLite gives
            # its side files the same mode.
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.fchmod(file, 0o600)
            finally:
                os.close(file)
            self._db = sqlite3.connect(self._path, isolation_level=None, timeout=5)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            _drop_old_ceremonies(self._db)
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as fault:
            reason = (fault.strerror if isinstance(fault, OSError) else None) or fault
            raise AccountsFault(
                f"The demo's accounts file {self._path} can't be used ({reason}); "
                "move it away and start again, then the demo begins a new one."
            ) from None

    async def close(self) -> None:
        """Close the file and end its thread."""
        if self._db is not None:
            await self.call(self._db.close)
        self._thread.shutdown()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        assert self._db is not None, "open() comes first"
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # Sessions

    def session(self, token: str) -> Session | None:
        """The live session of a cookie's token."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT s.token_hash, s.passkey_id, a.external_id, a.name, a.created_at, a.opened_at IS NOT NULL"
                " FROM session s LEFT JOIN account a ON a.external_id = s.external_id"
                " WHERE s.token_hash = ? AND s.expires_at > ?",
                (hash_token(token), self._clock()),
            ).fetchone()
        if row is None:
            return None
        account = Account(row[2], row[3], row[4], bool(row[5])) if row[2] is not None else None
        return Session(row[0], account, row[1])

    def renew(self, old: Session | None) -> tuple[str, Session]:
        """End `old` and begin a session: its token for the cookie, and itself. What has expired is
        removed on the way.

        Whoever was signed in stays so, until the same time. Begun ceremonies and a reserved name
        end with `old`, which somebody else may know.
        """
        token = secrets.token_urlsafe(32)
        fresh = Session(
            hash_token(token), old.account if old else None, old.passkey_id if old else None
        )
        now = self._clock()
        with self._transaction() as db:
            db.execute("DELETE FROM session WHERE expires_at <= ?", (now,))
            ended = (
                old
                and db.execute(
                    "DELETE FROM session WHERE token_hash = ? RETURNING expires_at",
                    (old.token_hash,),
                ).fetchone()
            )
            db.execute(
                "DELETE FROM account WHERE opened_at IS NULL AND (reserved_until <= ? OR reserved_by = ?)",
                (now, old.token_hash if old else None),
            )
            if ended is None or fresh.account is None:
                fresh = Session(fresh.token_hash, None, None)
            db.execute(
                "INSERT INTO session (token_hash, external_id, passkey_id, expires_at) VALUES (?, ?, ?, ?)",
                (
                    fresh.token_hash,
                    fresh.account.external_id if fresh.account else None,
                    fresh.passkey_id,
                    ended[0] if ended and fresh.account else now + VISIT,
                ),
            )
        return token, fresh

    def sign_in(self, old: Session | None, external_id: str, passkey_id: str) -> str | None:
        """End `old` and begin a session of the account under a new token, which is returned; None
        when there is no such account.

        The first proof of a passkey opens the account: that is the end of a sign-up.
        """
        token = secrets.token_urlsafe(32)
        now = self._clock()
        with self._transaction() as db:
            opened = db.execute(
                "UPDATE account SET opened_at = coalesce(opened_at, ?), reserved_by = NULL, reserved_until = NULL"
                " WHERE external_id = ?",
                (now, external_id),
            )
            if opened.rowcount == 0:
                return None
            if old is not None:
                db.execute("DELETE FROM session WHERE token_hash = ?", (old.token_hash,))
            db.execute(
                "INSERT INTO session (token_hash, external_id, passkey_id, expires_at) VALUES (?, ?, ?, ?)",
                (hash_token(token), external_id, passkey_id, now + SESSION),
            )
        return token

    def sign_out(self, session: Session) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM session WHERE token_hash = ?", (session.token_hash,))

    def end_sessions_of_passkey(self, external_id: str, passkey_id: str, *, keep: Session) -> int:
        """A revoked passkey's sessions end on every other browser; returns how many did."""
        with self._transaction() as db:
            return db.execute(
                "DELETE FROM session WHERE external_id = ? AND passkey_id = ? AND token_hash <> ?",
                (external_id, passkey_id, keep.token_hash),
            ).rowcount

    # Accounts

    def reserve(self, name: str, key: str, session: Session) -> Account:
        """Hold a name for this session's sign-up. Raises NameTaken."""
        now = self._clock()
        with self._transaction() as db:
            db.execute(
                "DELETE FROM account WHERE opened_at IS NULL AND reserved_until <= ?", (now,)
            )
            row = db.execute(
                "INSERT INTO account (external_id, name, name_key, created_at, reserved_by, reserved_until)"
                " VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (name_key) DO NOTHING"
                " RETURNING external_id, name, created_at",
                (str(uuid.uuid4()), name, key, now, session.token_hash, now + RESERVATION),
            ).fetchone()
        if row is None:
            raise NameTaken(name)
        return Account(row[0], row[1], row[2], open=False)

    def find(self, key: str) -> Account | None:
        """The finished account of a name's key."""
        return self._account(
            "SELECT external_id, name, created_at FROM account WHERE name_key = ? AND opened_at IS NOT NULL",
            key,
        )

    def owner(self, external_id: str) -> Account | None:
        """The finished account of an external id."""
        return self._account(
            "SELECT external_id, name, created_at FROM account WHERE external_id = ? AND opened_at IS NOT NULL",
            external_id,
        )

    def _account(self, query: str, value: str) -> Account | None:
        with self._transaction() as db:
            row = db.execute(query, (value,)).fetchone()
        return None if row is None else Account(row[0], row[1], row[2], open=True)

    # Ceremonies

    def expect(self, session: Session, kind: Kind, external_id: str, transaction_id: str) -> None:
        """Remember what the session has begun; a later begin of the same kind replaces it."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO ceremony (token_hash, kind, external_id, transaction_hash, expires_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (
                    session.token_hash,
                    kind,
                    external_id,
                    hash_token(transaction_id),
                    self._clock() + CEREMONY,
                ),
            )

    def take(self, session: Session, kind: Kind) -> Ceremony | None:
        """Spend what the session has begun: the second caller finds nothing."""
        with self._transaction() as db:
            row = db.execute(
                "DELETE FROM ceremony WHERE token_hash = ? AND kind = ?"
                " RETURNING external_id, transaction_hash, expires_at",
                (session.token_hash, kind),
            ).fetchone()
        if row is None or row[2] <= self._clock():
            return None
        return Ceremony(row[0], row[1])

    # Labels

    def labels(self, external_id: str) -> dict[str, str]:
        """Passkey id -> the name its owner gave it."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT passkey_id, label FROM label WHERE external_id = ?", (external_id,)
            ).fetchall()
        return dict(rows)

    def set_label(self, external_id: str, passkey_id: str, label: str) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO label (external_id, passkey_id, label) VALUES (?, ?, ?)",
                (external_id, passkey_id, label),
            )

    def drop_label(self, external_id: str, passkey_id: str) -> None:
        with self._transaction() as db:
            db.execute(
                "DELETE FROM label WHERE external_id = ? AND passkey_id = ?",
                (external_id, passkey_id),
            )
