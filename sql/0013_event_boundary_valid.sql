-- The constraint of migration 12 becomes valid: all events are read once.
--
-- Why: see there. A transaction of its own, because it takes longer the more events there are.
-- Old code meanwhile: it reads and writes as before.
-- Locks: SHARE UPDATE EXCLUSIVE on events, which no request waits for.

ALTER TABLE events VALIDATE CONSTRAINT events_before;
