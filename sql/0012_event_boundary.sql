-- The moment at which the first monthly partition of events begins: the second month after this one, in UTC.
--
-- Why: migration 14 makes events a table of monthly partitions, and its rows so far a partition that ends at this moment. With this
-- constraint, valid, it need not read them. Migration 13 makes it valid.
-- Old code meanwhile: it reads and writes as before. No event's time is a month ahead.
-- Locks: ACCESS EXCLUSIVE on events, for a change of the catalogue alone.

DO $$
BEGIN
    EXECUTE format(
        'ALTER TABLE events ADD CONSTRAINT events_before CHECK (at < %L) NOT VALID',
        (date_trunc('month', now() AT TIME ZONE 'UTC') + interval '2 months') AT TIME ZONE 'UTC'
    );
END
$$;
