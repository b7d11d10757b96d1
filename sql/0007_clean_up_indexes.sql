-- no transaction
-- The indexes by which the periodic clean-up finds passkeys that were never confirmed and users who never got one.
--
-- Why: both are few among very many rows.
-- Old code meanwhile: it reads and writes as before. Neither index has a column that a sign-in changes.
-- Locks: SHARE UPDATE EXCLUSIVE on credentials and on users, which no request waits for.

CREATE INDEX CONCURRENTLY IF NOT EXISTS credentials_unconfirmed ON credentials (created_at) WHERE NOT live;
CREATE INDEX CONCURRENTLY IF NOT EXISTS users_pending ON users (coalesce(opened_at, created_at)) WHERE status = 'pending';
