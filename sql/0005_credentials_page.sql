-- no transaction
-- The index of an app's lists of passkeys, by age.
--
-- Why: migration 3 built it under locks that kept everybody from signing in, 11 s at 600,000 passkeys; here it is built while they do.
-- A database that migration 3 left with the index keeps it.
-- Old code meanwhile: it reads and writes as before; lists of an app with very many passkeys take longer until the index is there.
-- Locks: SHARE UPDATE EXCLUSIVE on credentials, which no request waits for.

CREATE INDEX CONCURRENTLY IF NOT EXISTS credentials_page ON credentials (app_id, created_at, id);
