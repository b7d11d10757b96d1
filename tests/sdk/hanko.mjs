// The vendor's own Node SDK, unmodified, driven from standard input: one JSON object a line, answered by one line.
//   {path: [["user", "ann"], "mfa", "login", "initialize"], arguments: []}   walks the SDK's object; a pair is a call on the way
//   {verify: token, audience}                                                verifies a token with jose, the keys taken from the broker
// The arguments are the broker's address, the tenant's id and a key ("": none).
import { createInterface } from "node:readline";
import { tenant } from "@teamhanko/passkeys-sdk";
import { createRemoteJWKSet, jwtVerify } from "jose";

const [baseUrl, tenantId, apiKey] = process.argv.slice(2);
const client = tenant({ baseUrl, tenantId, apiKey: apiKey || undefined });
const keys = createRemoteJWKSet(new URL(`${baseUrl}/${tenantId}/.well-known/jwks.json`));

async function run({ path, arguments: given, verify, audience }) {
  if (verify) return jwtVerify(verify, keys, { audience, algorithms: ["RS256"] });
  const method = path.pop();
  const holder = path.reduce((at, step) => (Array.isArray(step) ? at[step[0]](step[1]) : at[step]), client);
  return typeof holder[method] === "function" ? holder[method](...given) : holder[method];
}

for await (const line of createInterface({ input: process.stdin })) {
  let result;
  try {
    const data = await run(JSON.parse(line));
    result = { ok: true, data, undefined: data === undefined };
  } catch (error) {
    result = { ok: false, error: { message: error.message, code: error.code, originalError: error.originalError } };
  }
  console.log(JSON.stringify(result));
}
