-- The epoch of a user, and users who are disabled.
--
-- Why: revoke-all, disable and delete end what was opened or begun for a user before. The user's epoch travels with a transaction, a
-- ceremony and a nonce. The write that adds a passkey compares it with the user's row, the writes that use one with the passkey's row,
-- which they lock anyway.
-- Old code meanwhile: it reads and writes as before. It lets a disabled user sign in and register, and its revoke-all raises no epoch:
-- disable users when every instance has the new code.
-- Locks: ACCESS EXCLUSIVE on users and on credentials, for changes of the catalogue alone.

ALTER TABLE users ADD COLUMN epoch bigint NOT NULL DEFAULT 0; -- raised by revoke-all, disable and enable
ALTER TABLE users ADD COLUMN disabled_at timestamptz; -- NULL: not disabled

-- The user's epoch when the passkey was added or its user was last disabled or enabled: what began in an earlier one does not use the passkey.
ALTER TABLE credentials ADD COLUMN epoch bigint NOT NULL DEFAULT 0;
