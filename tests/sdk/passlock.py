"""What stands in for Passlock's SDKs, which can't be installed for a test: `jose` in Node, which
verifies its id_tokens, and the page's part.

The page's part is `BROWSER_SDK`, one ES module that does over `@simplewebauthn/browser` and the
Signal API what the vendor's browser SDK does, and reads answers as strictly: an error's body only
where the content type is exactly `application/json`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tests.sdk.node import Script

BROWSER_SDK = b"""
import { startAuthentication, startRegistration } from "./library.js";

export class Passlock {
  constructor({ tenancyId, endpoint, version = "v2/" }) {
    this.base = new URL(`${version}${tenancyId}/`, endpoint + "/");
  }

  async request(path, body) {
    const response = await fetch(new URL(path, this.base), {
      method: body === undefined ? "GET" : "POST",
      headers: { Accept: "application/json", "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    if (response.ok) return response.json();
    if (response.headers.get("content-type") !== "application/json") throw new Error(await response.text());
    throw await response.json();
  }

  async registerPasskey(options) {
    const { sessionToken, optionsJSON } = await this.request("passkey/registration/options", options);
    const response = await startRegistration({ optionsJSON });
    return this.request("passkey/registration/verification", { sessionToken, response });
  }

  async authenticatePasskey(options) {
    const { sessionToken, optionsJSON, mediation } = await this.request("passkey/authentication/options", options);
    const useBrowserAutofill = mediation === "conditional";
    const response = await startAuthentication({ optionsJSON, useBrowserAutofill });
    return this.request("passkey/authentication/verification", { sessionToken, response });
  }

  async updatePasskeys(options) {
    const told = await this.request("passkeys/update/exchange", options);
    for (const { rpId, userId, username, displayName } of told.instructions)
      await PublicKeyCredential.signalCurrentUserDetails({ rpId, userId, name: username, displayName });
    return told;
  }

  async deletePasskeys(options) {
    const told = await this.request("passkeys/delete/exchange", options);
    for (const { rpId, credentialId } of told.instructions)
      await PublicKeyCredential.signalUnknownCredential({ rpId, credentialId });
    return told;
  }

  async prunePasskeys(options) {
    const told = await this.request("passkeys/prune/exchange", options);
    for (const { rpId, userId, allAcceptedCredentialIds } of told.instructions)
      await PublicKeyCredential.signalAllAcceptedCredentials({ rpId, userId, allAcceptedCredentialIds });
    return told;
  }

  async deleteOrphanedPasskey({ rpId, credentialId }) {
    await PublicKeyCredential.signalUnknownCredential({ rpId, credentialId });
  }

  async deletePasskey({ passkeyId }) {
    const { rpId, credentialId } = await this.request(`credential/${passkeyId}`);
    await PublicKeyCredential.signalUnknownCredential({ rpId, credentialId });
  }
}
"""


@dataclass(slots=True)
class Jose:
    """`jose` behind jose.mjs."""

    script: Script

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls) -> AsyncIterator[Jose]:
        """Start Node, end it afterwards.

        Raises:
            MissingPart: Node, or a package of tests/sdk, is not there.
        """
        async with Script.open("jose.mjs", packages={"jose": "6.2.17"}) as script:
            yield cls(script)

    async def verify(self, url: str, token: str, audience: str) -> dict[str, Any]:
        """`{claims, algorithm}` or `{code, claim?}`; keys from `url`, issuer and audience as the
        vendor's SDK compares them.
        """
        return await self.script.ask({"url": url, "token": token, "audience": audience})
