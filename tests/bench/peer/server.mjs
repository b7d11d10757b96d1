// The peer: the two requests of a login, options and verify, as a small Node service writes them. The challenge is in Redis with a
// life, credentials are in Postgres, the counter is written where it rose. `POST /seed` gives it its users.

import { generateAuthenticationOptions, verifyAuthenticationResponse } from "@simplewebauthn/server";
import fastify from "fastify";
import { Redis } from "ioredis";
import pg from "pg";

const ORIGIN = "https://example.org";
const RP_ID = "example.org";
const LIFE = 300; // seconds

const redis = new Redis(process.env.REDIS_URL.replace(/^unix:\/\//, "")); // a path is a socket of the machine
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 16 });
await pool.query(
  "CREATE TABLE IF NOT EXISTS peer_credentials (credential_id text PRIMARY KEY, user_id text NOT NULL, public_key bytea NOT NULL, counter bigint NOT NULL)",
);
await pool.query("CREATE INDEX IF NOT EXISTS peer_user ON peer_credentials (user_id)");

const app = fastify({ logger: false });

app.get("/health", async () => ({ ok: true }));

app.post("/seed", async (request) => {
  const { userId, credentialId, publicKey } = request.body;
  await pool.query("INSERT INTO peer_credentials VALUES ($1, $2, $3, 0)", [
    credentialId,
    userId,
    Buffer.from(publicKey, "base64url"),
  ]);
  return {};
});

app.post("/options", async (request) => {
  const { userId } = request.body;
  const { rows } = await pool.query({
    name: "offered",
    text: "SELECT credential_id FROM peer_credentials WHERE user_id = $1",
    values: [userId],
  });
  const options = await generateAuthenticationOptions({
    rpID: RP_ID,
    userVerification: "required",
    allowCredentials: rows.map((row) => ({ id: row.credential_id })),
  });
  await redis.set(`challenge:${userId}`, options.challenge, "EX", LIFE);
  return options;
});

app.post("/verify", async (request, reply) => {
  const { userId, response } = request.body;
  const challenge = await redis.getdel(`challenge:${userId}`);
  const { rows } = await pool.query({
    name: "held",
    text: "SELECT public_key, counter FROM peer_credentials WHERE credential_id = $1 AND user_id = $2",
    values: [response.id, userId],
  });
  if (challenge === null || rows.length === 0) return reply.code(400).send({ verified: false });
  const { verified, authenticationInfo } = await verifyAuthenticationResponse({
    response,
    expectedChallenge: challenge,
    expectedOrigin: ORIGIN,
    expectedRPID: RP_ID,
    requireUserVerification: true,
    credential: { id: response.id, publicKey: new Uint8Array(rows[0].public_key), counter: Number(rows[0].counter) },
  });
  if (!verified) return reply.code(401).send({ verified });
  await pool.query({
    name: "used",
    text: "UPDATE peer_credentials SET counter = $2 WHERE credential_id = $1 AND counter < $2",
    values: [response.id, authenticationInfo.newCounter],
  });
  return { verified };
});

await app.listen({ host: "127.0.0.1", port: Number(process.env.PORT) });
