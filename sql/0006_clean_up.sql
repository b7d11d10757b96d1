-- What the periodic clean-up and the limit of passkeys rest on: when a registration was last opened for a user, and a count that the
-- statement which adds a passkey can trust.
--
-- Why: a user who never gets a passkey ends a day after the last registration was opened for them; a passkey that was never confirmed
-- does not count to max_passkeys any more once its nonce can't be redeemed.
-- Old code meanwhile: it reads and writes as before, and does not say when it opens a registration: a pending user who is older than a
-- day may end while one of its registrations is open, which is then refused.
-- Locks: ACCESS EXCLUSIVE on users, for a change of the catalogue alone.

ALTER TABLE users ADD COLUMN opened_at timestamptz; -- of a pending user; NULL: not since this column is here

-- VOLATILE, so with a snapshot of its own: called when the user's row is locked it sees every passkey that was added before.
CREATE FUNCTION counted_passkeys(owner text, since timestamptz) RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT count(*) FROM credentials WHERE user_id = owner AND (live OR created_at > since)
$$;
