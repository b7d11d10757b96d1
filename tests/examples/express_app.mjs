// Express and plain fetch. Run it beside page.html: `node express_app.mjs 8081`.

import { randomBytes } from "node:crypto";
import { fileURLToPath } from "node:url";
import express from "express";

const { PASSKEYS_URL: url, PASSKEYS_APP_ID: app, PASSKEYS_KEY: key } = process.env;
const accounts = new Map(); // yours: a database
const sessions = new Map();
const site = express().use(express.json());

/** A request to the broker, sent once. Throws its refusal. */
async function broker(path, body) {
  const response = await fetch(`${url}/v1/apps/${app}/${path}`, {
    method: "POST",
    headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
    body: JSON.stringify(body),
    redirect: "error",
    signal: AbortSignal.timeout(10_000),
  });
  const answer = await response.json();
  if (response.ok) return answer;
  throw Object.assign(new Error(answer.error), { status: response.status >= 500 ? 503 : 409 });
}

/** With a new session each time, so that nobody can plant one. */
function answer(response, body, session) {
  const id = randomBytes(32).toString("base64url");
  sessions.set(id, session);
  response.cookie("session", id, { httpOnly: true, sameSite: "strict" }).json(body);
}

site.get("/", (_, response) => response.sendFile(fileURLToPath(new URL("page.html", import.meta.url))));
site.get("/broker", (_, response) => response.json({ url, app }));

site.post("/begin-sign-up", async ({ body: { name } }, response) => {
  // Nobody adds a passkey to an account by typing its name.
  if (typeof name !== "string" || !name || accounts.has(name)) return response.status(409).send("Choose another name.");
  const account = `user-${randomBytes(8).toString("hex")}`;
  const opened = await broker("transactions/register", { external_id: account, passkey_display_name: name });
  const expected = { purpose: "register", transaction_id: opened.transaction_id, external_id: account };
  answer(response, { transaction: opened.transaction_id }, { name, expected });
});

site.post("/begin-sign-in", async ({ body: { name } }, response) => {
  const account = accounts.get(name);
  if (!account) return response.status(404).send("There is no account of this name.");
  const opened = await broker("transactions/authenticate", { external_id: account });
  const expected = { purpose: "authenticate", transaction_id: opened.transaction_id, external_id: account };
  answer(response, { transaction: opened.transaction_id }, { expected });
});

site.post("/finish", async ({ body: { nonce }, headers }, response) => {
  const id = /(?:^|; )session=([^;]*)/.exec(headers.cookie ?? "")?.[1];
  const session = sessions.get(id) ?? {};
  sessions.delete(id);
  const receipt = await broker("authenticate/verify", { nonce, ...(session.expected ?? { purpose: "authenticate" }) });
  if (receipt.purpose === "register") accounts.set(session.name, receipt.external_id);
  answer(response, { account: receipt.external_id }, { account: receipt.external_id });
});

// Four arguments make it the error handler.
site.use((error, _, response, __) => response.status(error.status ?? 500).send(error.status ? error.message : "A defect."));
site.listen(Number(process.argv[2]), "localhost");
