-- The ledger of spent one-time values, and the mode of one-time values.
--
-- Why: where the term of Redis can't be read (BROKER_ONE_TIME=postgres), a take is decided by the insert of the value's digest. All
-- instances have one mode, so it is recorded here. The stamp is drawn with the mode postgres, and values carry it.
-- Old code meanwhile: it reads and writes none of this.
-- Locks: none on tables that are in use.

CREATE TABLE one_time_mode (
    id boolean PRIMARY KEY DEFAULT true CHECK (id), -- one row
    mode text NOT NULL CHECK (mode IN ('term', 'postgres')),
    stamp text NOT NULL -- 16 hex digits; '' in the mode term
);
INSERT INTO one_time_mode (mode, stamp) VALUES ('term', '');

-- A ring: the slot is the hour in which a value ends, modulo 4. A value lives below an hour, so the slot of two hours ago holds no
-- value that could be taken, and is emptied.
CREATE TABLE one_time_spent (
    slot smallint NOT NULL,
    digest bytea NOT NULL, -- SHA-256 of the value's key and end
    PRIMARY KEY (slot, digest)
) PARTITION BY LIST (slot);
CREATE TABLE one_time_spent_0 PARTITION OF one_time_spent FOR VALUES IN (0);
CREATE TABLE one_time_spent_1 PARTITION OF one_time_spent FOR VALUES IN (1);
CREATE TABLE one_time_spent_2 PARTITION OF one_time_spent FOR VALUES IN (2);
CREATE TABLE one_time_spent_3 PARTITION OF one_time_spent FOR VALUES IN (3);
