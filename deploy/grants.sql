-- Two roles: `broker_owner` owns the tables and runs `broker migrate`; `broker_service` owns nothing
-- and runs `broker serve`. A leaked password of the service can't change the schema.
--
-- Run it once as a superuser in the broker's database, before the first `broker migrate`, or later:
-- grants cover the tables that are there and those to come. Then give both a password (\password).
--
--   psql --dbname=broker --file=grants.sql

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['broker_owner', 'broker_service'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE', name);
        END IF;
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), name);
    END LOOP;
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
END
$$;

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO broker_owner;
GRANT USAGE ON SCHEMA public TO broker_service;

-- Tables of an installation whose service owned them: change their owner first.
--   REASSIGN OWNED BY old_role TO broker_owner;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO broker_service;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO broker_service;
-- Two functions make and drop months of events with the rights of their owner.
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO broker_service;
ALTER DEFAULT PRIVILEGES FOR ROLE broker_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO broker_service;
ALTER DEFAULT PRIVILEGES FOR ROLE broker_owner IN SCHEMA public
    GRANT USAGE, SELECT ON SEQUENCES TO broker_service;
ALTER DEFAULT PRIVILEGES FOR ROLE broker_owner REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
ALTER DEFAULT PRIVILEGES FOR ROLE broker_owner IN SCHEMA public
    GRANT EXECUTE ON FUNCTIONS TO broker_service;

-- The service empties the ledger of one-time values by TRUNCATE, hour by hour, and no other table. The
-- migration that makes the ledger's rights gives it where this file ran before.
REVOKE TRUNCATE ON ALL TABLES IN SCHEMA public FROM broker_service;
ALTER DEFAULT PRIVILEGES FOR ROLE broker_owner IN SCHEMA public
    REVOKE TRUNCATE ON TABLES FROM broker_service;
DO $$
DECLARE
    part regclass;
BEGIN
    FOR part IN SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass('one_time_spent') LOOP
        EXECUTE format('GRANT TRUNCATE ON %s TO broker_service', part);
    END LOOP;
END
$$;
