// The vendor's own Node client, unmodified, driven from standard input: one JSON object a line, {method, argument}, answered by one
// line with what the client gave back. The arguments are the broker's address and a key.
import { createInterface } from "node:readline";
import { createClient } from "@propelauth/byo-node";

const [url, integrationKey] = process.argv.slice(2);
const client = createClient({ url, integrationKey });
for await (const line of createInterface({ input: process.stdin })) {
  const { method, argument } = JSON.parse(line);
  const result = method === "ping" ? await client.ping(argument) : await client.passkeys[method](argument);
  console.log(JSON.stringify(result));
}
