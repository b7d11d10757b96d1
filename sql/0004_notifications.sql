-- Notifications of changes to what instances remember: relying parties, API keys, signing keys.
--
-- Why: an instance may remember what it looked up for longer than a second only if it hears of every change, whoever makes it: an
-- instance, a command, or a person with psql. So the database tells, at the commit, on the channel "passkey_broker".
-- Old code meanwhile: it reads and writes as before, remembers for less than a second and listens to nothing; what it changes is
-- told to newer code all the same.
--
-- The payload is the table and the name under which a row of it is remembered (its id, its hash, its set), or the table alone for
-- all of them. What is not there is not remembered, so new relying parties and API keys need no telling. Commits that notify wait
-- for each other; no sign-in is among them. ENABLE ALWAYS: also while session_replication_role is "replica".

CREATE FUNCTION notify_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify('passkey_broker', TG_TABLE_NAME);
    ELSIF TG_TABLE_NAME = 'relying_parties' THEN
        PERFORM pg_notify('passkey_broker', TG_TABLE_NAME || ' ' || OLD.id);
    ELSIF TG_TABLE_NAME = 'api_keys' THEN
        PERFORM pg_notify('passkey_broker', TG_TABLE_NAME || ' ' || encode(OLD.hash, 'hex'));
    ELSE -- signing_keys: a further key changes its set
        IF TG_OP <> 'INSERT' THEN
            PERFORM pg_notify('passkey_broker', TG_TABLE_NAME || ' ' || OLD.scope);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            PERFORM pg_notify('passkey_broker', TG_TABLE_NAME || ' ' || NEW.scope);
        END IF;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER notify_change AFTER UPDATE OR DELETE ON relying_parties FOR EACH ROW EXECUTE FUNCTION notify_change();
CREATE TRIGGER notify_change AFTER UPDATE OR DELETE ON api_keys FOR EACH ROW EXECUTE FUNCTION notify_change();
CREATE TRIGGER notify_change AFTER INSERT OR UPDATE OR DELETE ON signing_keys FOR EACH ROW EXECUTE FUNCTION notify_change();
CREATE TRIGGER notify_truncate AFTER TRUNCATE ON relying_parties EXECUTE FUNCTION notify_change();
CREATE TRIGGER notify_truncate AFTER TRUNCATE ON api_keys EXECUTE FUNCTION notify_change();
CREATE TRIGGER notify_truncate AFTER TRUNCATE ON signing_keys EXECUTE FUNCTION notify_change();

ALTER TABLE relying_parties ENABLE ALWAYS TRIGGER notify_change, ENABLE ALWAYS TRIGGER notify_truncate;
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER notify_change, ENABLE ALWAYS TRIGGER notify_truncate;
ALTER TABLE signing_keys ENABLE ALWAYS TRIGGER notify_change, ENABLE ALWAYS TRIGGER notify_truncate;
