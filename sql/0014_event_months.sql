-- Events by month: a table that is partitioned by the time of the event.
--
-- Why: a month that is older than the retention is dropped at once and its space returns to the disk, however many events it has. Indexes
-- stay small.
-- Old code meanwhile: it reads and writes as before, and makes no months. Those that are made here last for at least two more.
-- Locks: ACCESS EXCLUSIVE on events, for changes of the catalogue alone: migration 13 has read the rows.
--
-- Partitions: events_first, with what there was; a month, events_YYYY_MM (UTC); events_default, for any other time. Each has a primary
-- key of its own. The identity's sequence alone keeps ids apart across partitions: a primary key of events would need the time too.
-- A role that owns nothing makes and drops months by functions, which run with the rights of the owner of events. They name the schema of
-- format: one that another role made for two texts would be a better match than that of Postgres.

LOCK TABLE events;
ALTER TABLE events RENAME TO events_first;
ALTER TABLE events_first RENAME CONSTRAINT events_pkey TO events_first_pkey;
ALTER INDEX events_app RENAME TO events_first_app;
ALTER INDEX events_user RENAME TO events_first_user;

CREATE TABLE events (
    id          bigint      NOT NULL,
    at          timestamptz NOT NULL,
    app_id      text        NOT NULL,
    actor       text        NOT NULL,
    action      text        NOT NULL,
    user_id     text,
    passkey_id  text,
    result      text        NOT NULL,
    reason      text,
    request_id  text        NOT NULL,
    payload     jsonb,
    address     text,
    user_agent  text
) PARTITION BY RANGE (at);
CREATE INDEX events_app ON events (app_id, id);
CREATE INDEX events_user ON events (user_id) WHERE user_id IS NOT NULL;

DO $$
DECLARE
    next bigint := nextval(pg_get_serial_sequence('events_first', 'id'));
    ends timestamptz;
BEGIN
    SELECT substring(pg_get_constraintdef(oid) FROM '''(.+)''') INTO STRICT ends
        FROM pg_constraint WHERE conrelid = 'events_first'::regclass AND conname = 'events_before';
    ALTER TABLE events_first ALTER COLUMN id DROP IDENTITY;
    EXECUTE format('ALTER TABLE events ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (START %s)', next);
    EXECUTE format('ALTER TABLE events ATTACH PARTITION events_first FOR VALUES FROM (MINVALUE) TO (%L)', ends);
    ALTER TABLE events_first DROP CONSTRAINT events_before;
END
$$;
CREATE TABLE events_default PARTITION OF events (PRIMARY KEY (id)) DEFAULT;

-- CASE: bounds of other tables' partitions need not be times, and a condition on "ends" alone would be tried on them too.
CREATE VIEW event_months AS
    SELECT c.relname::text AS name,
        CASE WHEN i.inhparent = 'events'::regclass
            THEN substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \(''(.+)''\)')::timestamptz END AS ends
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'events'::regclass AND c.relname <> 'events_default';

-- Makes the months that begin within three months, and returns their names. Inserts of this moment don't wait for it; a reader may, for
-- 100 ms at most. Events of such a month that are in events_default move to it. A month with more than 10,000 of them stays there.
CREATE FUNCTION make_event_months() RETURNS SETOF text
    LANGUAGE plpgsql SECURITY DEFINER SET timezone = 'UTC' SET lock_timeout = '100ms' AS $$
DECLARE
    starts timestamptz := greatest(date_trunc('month', now()), (SELECT max(m.ends) FROM event_months m));
    ends timestamptz;
    name text;
BEGIN
    WHILE starts < now() + interval '3 months' LOOP
        ends := starts + interval '1 month';
        name := to_char(starts, '"events_"YYYY_MM');
        LOCK TABLE events_default;
        IF (SELECT count(*) FROM (SELECT FROM events_default WHERE at >= starts AND at < ends LIMIT 10001) AS astray) <= 10000 THEN
            EXECUTE pg_catalog.format('CREATE TABLE %I (LIKE events, PRIMARY KEY (id))', name);
            EXECUTE pg_catalog.format(
                'WITH moved AS (DELETE FROM events_default WHERE at >= %L AND at < %L RETURNING *) INSERT INTO %I SELECT * FROM moved',
                starts, ends, name
            );
            EXECUTE pg_catalog.format('ALTER TABLE events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, starts, ends);
            RETURN NEXT name;
        END IF;
        starts := ends;
    END LOOP;
END
$$;

-- Drops the months that ended before the retention, by the clock of Postgres, and returns their names.
CREATE FUNCTION drop_event_months(retention interval) RETURNS SETOF text
    LANGUAGE plpgsql SECURITY DEFINER SET timezone = 'UTC' SET lock_timeout = '100ms' AS $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT m.name FROM event_months m WHERE m.ends <= now() - greatest(retention, interval '0') ORDER BY m.ends LOOP
        EXECUTE pg_catalog.format('DROP TABLE %I', name);
        RETURN NEXT name;
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION make_event_months(), drop_event_months(interval) FROM PUBLIC;

-- The owner of events, and the rights of each role on it.
DO $$
DECLARE
    owner text := (SELECT relowner::regrole FROM pg_class WHERE oid = 'events_first'::regclass);
    name text;
    had record;
BEGIN
    FOREACH name IN ARRAY ARRAY['TABLE events', 'TABLE events_default', 'VIEW event_months'] LOOP
        EXECUTE format('ALTER %s OWNER TO %s', name, owner);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['make_event_months()', 'drop_event_months(interval)'] LOOP
        EXECUTE format('ALTER FUNCTION %s OWNER TO %s', name, owner);
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', name, current_schema());
    END LOOP;
    FOR had IN
        SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS role, a.privilege_type AS privilege
        FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = 'events_first'::regclass
    LOOP
        EXECUTE format('GRANT %s ON events, events_default, event_months TO %s', had.privilege, had.role);
        IF had.privilege = 'DELETE' THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION make_event_months(), drop_event_months(interval) TO %s', had.role);
        END IF;
    END LOOP;
END
$$;

SELECT make_event_months();
