-- Second factors, passkeys without an owner, approvals; lists of an app's passkeys.
--
-- Why: keyed callers may register a passkey that counts only as a second factor, let a page register one before its owner is
-- known, and have a user approve something by signing it.
-- Old code meanwhile: it reads and writes as before. A second factor signs in like any passkey there, and a user without an
-- external id has no name in lists; neither exists before new code makes one.

ALTER TABLE users ALTER COLUMN external_id DROP NOT NULL; -- NULL: nobody owns this user's passkey yet

ALTER TABLE credentials ADD COLUMN second_factor boolean NOT NULL DEFAULT false;
CREATE INDEX credentials_page ON credentials (app_id, created_at, id);

CREATE TABLE approvals (
    id          text        PRIMARY KEY,
    app_id      text        NOT NULL REFERENCES relying_parties ON DELETE CASCADE,
    user_id     text        NOT NULL REFERENCES users ON DELETE CASCADE,
    identifier  text        NOT NULL COLLATE "C",
    data        text        NOT NULL,
    created_at  timestamptz NOT NULL,
    approved_at timestamptz,
    UNIQUE (app_id, identifier)
);
CREATE INDEX approvals_user ON approvals (user_id, created_at, id);
