-- The first schema: relying parties, their API keys, users, credentials, events.
--
-- Why: everything durable. Old code: there is none.
-- Text that callers chose is compared byte for byte (COLLATE "C"). Uniqueness is what decides who was first:
-- one user per (app, external id), one credential id per app.

CREATE TABLE relying_parties (
    id              text        PRIMARY KEY,
    name            text        NOT NULL,
    rp_id           text        NOT NULL,
    origins         text[]      NOT NULL,
    related_origins text[]      NOT NULL DEFAULT '{}',
    policy          jsonb       NOT NULL DEFAULT '{}',
    created_at      timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL
);

CREATE INDEX relying_parties_rp_id ON relying_parties (rp_id); -- which apps an authenticator takes for one

CREATE TABLE api_keys (
    id         text        PRIMARY KEY,
    app_id     text        NOT NULL REFERENCES relying_parties ON DELETE CASCADE,
    hash       bytea       NOT NULL UNIQUE,
    hint       text        NOT NULL,
    name       text        NOT NULL,
    created_at timestamptz NOT NULL,
    revoked_at timestamptz
);
CREATE INDEX api_keys_app ON api_keys (app_id);

CREATE TABLE users (
    id            text        PRIMARY KEY,
    app_id        text        NOT NULL REFERENCES relying_parties ON DELETE CASCADE,
    external_id   text        NOT NULL COLLATE "C",
    handle        text        NOT NULL,
    status        text        NOT NULL CHECK (status IN ('pending', 'active')),
    -- What passkeys revoked since had counted; the others' counts are added when the user is read.
    past_logins   bigint      NOT NULL DEFAULT 0,
    past_login_at timestamptz,
    created_at    timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL,
    UNIQUE (app_id, external_id),
    UNIQUE (app_id, handle)
);
CREATE INDEX users_page ON users (app_id, created_at, id);

CREATE TABLE credentials (
    id                 text        PRIMARY KEY,
    app_id             text        NOT NULL REFERENCES relying_parties ON DELETE CASCADE,
    user_id            text        NOT NULL REFERENCES users ON DELETE CASCADE,
    credential_id      bytea       NOT NULL CHECK (length(credential_id) BETWEEN 1 AND 1023),
    user_handle        text        NOT NULL,
    public_key         bytea       NOT NULL,
    algorithm          integer     NOT NULL,
    sign_count         bigint      NOT NULL,
    backup_eligible    boolean     NOT NULL,
    backed_up          boolean     NOT NULL,
    transports         text[]      NOT NULL,
    attachment         text,
    aaguid             text        NOT NULL,
    attestation_format text        NOT NULL,
    attestation_trust  text        NOT NULL,
    user_name          text        NOT NULL,
    user_display_name  text        NOT NULL,
    nickname           text        NOT NULL,
    live               boolean     NOT NULL,
    confirmed_at       timestamptz,
    created_at         timestamptz NOT NULL,
    updated_at         timestamptz NOT NULL,
    last_used_at       timestamptz,
    use_count          bigint      NOT NULL DEFAULT 0,
    UNIQUE (app_id, credential_id)
) WITH (fillfactor = 80); -- room for HOT updates: every sign-in writes sign_count, last_used_at and use_count, none indexed
CREATE INDEX credentials_user ON credentials (user_id);

CREATE TABLE events (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,
    app_id      text        NOT NULL,
    actor       text        NOT NULL,
    action      text        NOT NULL,
    user_id     text,
    passkey_id  text,
    result      text        NOT NULL,
    reason      text,
    request_id  text        NOT NULL
);
CREATE INDEX events_app ON events (app_id, id);
CREATE INDEX events_user ON events (user_id) WHERE user_id IS NOT NULL;
