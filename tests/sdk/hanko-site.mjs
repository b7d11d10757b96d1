// A site on a free port of this machine, which it prints: README's backend for Hanko's SDK (the first argument, a module) with a
// session of one person, and README's page (the second, a bundle).
import { readFileSync } from "node:fs";
import { createServer } from "node:http";

const [module, bundle] = process.argv.slice(2);
const backend = await import(module);
const session = { account: "user-11" };
const page = `<!doctype html><title>Fixture: README</title><script>${readFileSync(bundle)}</script>`;

const posts = {
  "/begin-adding-a-passkey": ({ name }) => backend.beginAddingAPasskey(session, name),
  "/finish-adding-a-passkey": (answer) => backend.finishAddingAPasskey(answer),
  "/finish-sign-in": async ({ token }) => {
    delete session.account;
    await backend.finishSignIn(session, token);
    return session;
  },
};

const server = createServer(async (request, response) => {
  if (request.method === "GET") return response.setHeader("Content-Type", "text/html").end(page);
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  let status = 200;
  let body;
  try {
    body = await posts[request.url](JSON.parse(Buffer.concat(pieces)));
  } catch (error) {
    status = 403;
    body = { details: error.message };
  }
  response.writeHead(status, { "Content-Type": "application/json" }).end(JSON.stringify(body));
});
server.listen(0, "localhost", () => console.log(server.address().port));
