-- A payload of events.
--
-- Why: who is told of an event needs more of it than kind and ids.
-- Old code meanwhile: it reads and writes as before, and leaves the column NULL.
-- Locks: ACCESS EXCLUSIVE on events, for a change of the catalogue alone.

ALTER TABLE events ADD COLUMN payload jsonb; -- erased when the user is deleted
