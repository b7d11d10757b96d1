// jose, as Passlock's server SDK uses it: a remote key set kept for the life of the process, and a token verified with issuer and audience.
// Standard input has one JSON object a line, {url, token, audience}; each is answered by a line with the claims or jose's error code.
import { createInterface } from "node:readline";
import { createRemoteJWKSet, jwtVerify } from "jose";

const sets = new Map();
for await (const line of createInterface({ input: process.stdin })) {
  const { url, token, audience } = JSON.parse(line);
  if (!sets.has(url)) sets.set(url, createRemoteJWKSet(new URL(url)));
  let result;
  try {
    const { payload, protectedHeader } = await jwtVerify(token, sets.get(url), { issuer: "passlock.dev", audience });
    result = { claims: payload, algorithm: protectedHeader.alg };
  } catch (error) {
    result = { code: error.code, claim: error.claim };
  }
  console.log(JSON.stringify(result));
}
