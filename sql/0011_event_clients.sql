-- Address and user agent of the client whose request made an event.
--
-- Why: an operator who looks into an account must see from where it was used.
-- Old code meanwhile: it reads and writes as before, and leaves both columns NULL.
-- Locks: ACCESS EXCLUSIVE on events, for a change of the catalogue alone.

ALTER TABLE events ADD COLUMN address text, ADD COLUMN user_agent text; -- erased when the user is deleted
