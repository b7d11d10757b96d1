-- Keys that sign tokens: one row a key, the private half sealed, the public half as it is published.
--
-- Why: tokens that are checked offline need keys which every instance shares and which can change while old tokens still live.
-- Old code: does not know the table and signs nothing; it deletes an app's keys with the app (ON DELETE CASCADE).
--
-- `generation` numbers the keys of one set and one algorithm; that no number occurs twice decides whose first key it is when two
-- instances make one at once. The newest key that `signs_from` has let in signs. A key is published from its first moment until
-- `retires_at` (NULL: while none follows it).

CREATE TABLE signing_keys (
    id         text        PRIMARY KEY,  -- the "kid" of tokens and of the key set
    app_id     text        REFERENCES relying_parties ON DELETE CASCADE,  -- NULL: the broker's own set
    scope      text        NOT NULL GENERATED ALWAYS AS (coalesce(app_id, '')) STORED,
    algorithm  text        NOT NULL,
    generation integer     NOT NULL,
    sealed     bytea       NOT NULL,
    public     jsonb       NOT NULL,
    created_at timestamptz NOT NULL,
    signs_from timestamptz NOT NULL,
    retires_at timestamptz,
    UNIQUE (scope, algorithm, generation)
);
CREATE INDEX signing_keys_app ON signing_keys (app_id); -- for deleting an app
