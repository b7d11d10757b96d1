-- The right TRUNCATE on the partitions of the ledger, for each role that may delete there.
--
-- Why: the clean-up truncates partitions. The rights of tables to come (deploy/grants.sql) have no TRUNCATE: it would empty any table.
-- Old code meanwhile: it reads and writes as before.
-- Locks: none on tables that are in use.

DO $$
DECLARE
    role text;
BEGIN
    FOR role IN
        SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
        FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = 'one_time_spent'::regclass AND a.privilege_type = 'DELETE'
    LOOP
        EXECUTE format(
            'GRANT TRUNCATE ON one_time_spent_0, one_time_spent_1, one_time_spent_2, one_time_spent_3 TO %s', role
        );
    END LOOP;
END
$$;
