/**
 * WebAuthn in a page: `register` and `authenticate`, with one class of errors.
 *
 *     import { Passkeys, PasskeyError } from "https://broker.example/sdk/passkey.js";
 *     const passkeys = new Passkeys("https://broker.example", "app id");
 *     const nonce = await passkeys.register(transactionId);            // transaction and nonce go through your backend
 *     const nonce = await passkeys.authenticate({ transactionId });    // a known user
 *     const nonce = await passkeys.authenticate();                     // the owner of the chosen passkey
 *     const nonce = await passkeys.authenticate({ conditional: true }) // from autofill: <input autocomplete="username webauthn">
 *     const nonce = await passkeys.authenticate({ immediate: true })   // passkeys at hand only, else "cancelled" at once
 *     const nonce = await passkeys.register(transactionId, { autoRegister: true }) // without a prompt, after a password
 *     await passkeys.applySignals("delete", ticket);                   // the ticket comes from your backend
 *
 * A page has one passkey prompt, so a new ceremony ends the last one, also that of another `Passkeys`; the ended ceremony rejects
 * with code "aborted". Each ceremony has an AbortController of its own, so autofill works again afterwards.
 *
 * A conditional ceremony lasts as long as the page is open, and a challenge lives some minutes. So the challenge is renewed before
 * it expires, without a prompt, and only while the page is visible.
 *
 * Nothing is sent twice: an answer to the broker is one-time. After "unavailable" or "network" the person starts over.
 *
 * A transaction id that is present but no text is refused with "invalid_argument", before any request and before the running
 * ceremony ends: `authenticate({ transactionId: undefined })` would otherwise sign in the owner of the chosen passkey.
 */

/** Time limit of one request to the broker, its body included (milliseconds). */
const REQUEST_LIFE = 15_000;
/** The life of a challenge whose options have no timeout (milliseconds). */
const CHALLENGE_LIFE = 300_000;

/** The platform's method for each kind of signals (WebAuthn L3 §5.1.10). */
const SIGNALS = {
  update: "signalCurrentUserDetails",
  delete: "signalUnknownCredential",
  prune: "signalAllAcceptedCredentials",
};

/** The options of `authenticate`. Another name is refused: it may be a misspelt transaction. */
const AUTHENTICATE_OPTIONS = ["transactionId", "conditional", "immediate", "bindingChallenge", "signal"];

/** Form fields whose autofill offers passkeys (HTML §4.10.18.7.1). */
const AUTOFILL_FIELDS = '[autocomplete~="webauthn" i]';

/**
 * @typedef {"cancelled"|"unsupported"|"wrong_domain"|"not_supported_by_device"|"already_registered"
 *   |"refused"|"unavailable"|"network"|"aborted"|"invalid_argument"} Code
 */

/** @type {Record<Code, string>} */
const SENTENCES = {
  cancelled: "The passkey prompt ended without a passkey.",
  unsupported: "This browser can't use passkeys here, or not in the way that was asked for.",
  wrong_domain: "The page's domain is not the app's RP ID or below it, or the page is not https.",
  not_supported_by_device: "No authenticator of this device can make or use such a passkey.",
  already_registered: "This device already has a passkey for this account.",
  refused: "The request was refused.",
  unavailable: "The service is briefly unavailable.",
  network: "The service can't be reached.",
  aborted: "Another passkey request began, or the page ended this one.",
  invalid_argument: "The page called the passkey SDK with an argument that it can't use.",
};

/** The fault of a ceremony. `code` is stable and for programs, `message` is English and for developers. */
export class PasskeyError extends Error {
  /**
   * @param {Code} code
   * @param {{message?: string, cause?: unknown, refusal?: string, status?: number, retry?: "page"|"backend"}} [details]
   */
  constructor(code, { message, cause, refusal, status, retry } = {}) {
    super(message || SENTENCES[code], { cause });
    this.name = "PasskeyError";
    this.code = code;
    /** The broker's own code, like "transaction_not_found"; for "refused" and "unavailable". */
    this.refusal = refusal;
    /** The HTTP status of the answer. */
    this.status = status;
    /** Where to start again after "unavailable": call again ("page"), or with a new transaction ("backend"). */
    this.retry = retry;
  }
}

/** One app's passkeys. Makes no request until a verb is called. */
export class Passkeys {
  /** @type {string} */
  #app;

  /**
   * @param {string} baseUrl the broker's URL, like "https://broker.example"; "" for the page's own origin
   * @param {string} appId
   */
  constructor(baseUrl, appId) {
    this.#app = `${baseUrl.replace(/\/+$/, "")}/v1/apps/${encodeURIComponent(appId)}`;
  }

  /**
   * Make a passkey for the user of a register transaction. Resolves with the nonce.
   *
   * `autoRegister` is a conditional create: the browser makes the passkey without a prompt, right
   * after a sign-in with a saved password, or rejects with "cancelled". A browser without
   * conditional create gets "unsupported" before any request.
   *
   * @param {string} transactionId
   * @param {{authenticatorAttachment?: "platform"|"cross-platform"|"any", autoRegister?: boolean,
   *   signal?: AbortSignal}} [options]
   * @returns {Promise<string>}
   */
  async register(transactionId, { authenticatorAttachment, autoRegister = false, signal } = {}) {
    requireText(transactionId, "register: transactionId");
    return ceremony(signal, async (ended) => {
      if (autoRegister) await this.#requireCapability("conditionalCreate");
      const begun = await this.#begin("register", transactionId, ended, {
        authenticator_attachment: authenticatorAttachment,
      });
      const how = autoRegister ? { mediation: "conditional" } : {};
      return this.#finish(begun, await prompt("create", begun.options, ended, how), ended);
    });
  }

  /**
   * Sign in with a passkey. Resolves with the nonce. `conditional` waits for a choice in the autofill of a form field. Without
   * `transactionId` the owner of the chosen passkey signs in; a value that is no text is refused.
   *
   * `immediate` offers only passkeys that the browser has at hand, and rejects with "cancelled" at
   * once where there is none. It needs a click or a key press just before. A browser without it
   * gets "unsupported" before any request.
   *
   * `bindingChallenge` binds the nonce of a sign-in without a transaction to the browser session:
   * the backend keeps the verifier, and redeems the nonce with it.
   *
   * @param {{transactionId?: string, conditional?: boolean, immediate?: boolean,
   *   bindingChallenge?: string, signal?: AbortSignal}} [options]
   * @returns {Promise<string>}
   */
  async authenticate(options = {}) {
    if (typeof options !== "object" || options === null) throw invalid("authenticate: the argument is not an object of options.");
    const unknown = Object.keys(options).find((name) => !AUTHENTICATE_OPTIONS.includes(name));
    if (unknown !== undefined) throw invalid(`authenticate: there is no option ${unknown}.`);
    if ("transactionId" in options) requireText(options.transactionId, "authenticate: transactionId");
    if ("bindingChallenge" in options) requireText(options.bindingChallenge, "authenticate: bindingChallenge");
    const { transactionId, conditional = false, immediate = false, bindingChallenge, signal } = options;
    if (transactionId !== undefined && bindingChallenge !== undefined)
      throw invalid("authenticate: bindingChallenge is for a sign-in without a transaction.");
    if (immediate) requireImmediate(transactionId, conditional);
    const binding = { binding_challenge: bindingChallenge };
    return ceremony(signal, async (ended) => {
      if (conditional) return this.#autofill(transactionId, ended, binding);
      if (immediate) await this.#requireCapability("immediateGet");
      const begun = await this.#begin("authenticate", transactionId, ended, binding);
      const how = immediate ? { uiMode: "immediate" } : {};
      return this.#finish(begun, await prompt("get", begun.options, ended, how), ended);
    });
  }

  /**
   * Update the authenticator's list of passkeys (Signal API): exchange a ticket that the backend prepared, and pass each of its
   * calls to the browser. No prompt, and a running ceremony goes on. `supported` is false in a browser without the method, which
   * spends no ticket.
   *
   * @param {"update"|"delete"|"prune"} kind what the ticket was prepared for
   * @param {string} ticket
   * @param {{signal?: AbortSignal}} [options]
   * @returns {Promise<{supported: boolean, applied: number, failed: number}>}
   */
  async applySignals(kind, ticket, { signal } = {}) {
    if (!Object.hasOwn(SIGNALS, kind)) throw invalid("applySignals: kind is not update, delete or prune.");
    requireText(ticket, "applySignals: ticket");
    const method = SIGNALS[kind];
    const done = { supported: typeof globalThis.PublicKeyCredential?.[method] === "function", applied: 0, failed: 0 };
    if (!done.supported) return done;
    const ended = follow(signal);
    try {
      ended.signal.throwIfAborted();
      const { calls } = await this.#post("signals/exchange", { kind, ticket }, ended.signal);
      if (!Array.isArray(calls)) throw new PasskeyError("unavailable", { message: "The service gave an answer without calls." });
      for (const call of calls)
        await Promise.resolve()
          .then(() => PublicKeyCredential[method](call))
          .then(
            () => done.applied++,
            () => done.failed++,
          );
      return done;
    } catch (cause) {
      throw cause instanceof PasskeyError ? cause : new PasskeyError("aborted", { cause });
    } finally {
      ended.abort();
    }
  }

  /** True if this page can make passkeys. Only the API is needed: a phone or a security key can be the authenticator. */
  async canRegister() {
    return typeof PublicKeyCredential === "function" && typeof navigator.credentials?.create === "function";
  }

  /** True if this browser supports `authenticate({conditional: true})`. @returns {Promise<boolean>} */
  async canAutofill() {
    return (await this.capabilities()).conditionalGet ?? false;
  }

  /**
   * The client capabilities of this browser, by the names of `getClientCapabilities` (WebAuthn L3
   * §5.1.7). Older methods fill in autofill, screen lock and signals where it lacks them. A name
   * that is absent is unknown. No request.
   *
   * @returns {Promise<Record<string, boolean|undefined>>}
   */
  async capabilities() {
    if (!(await this.canRegister())) return {};
    const platform = PublicKeyCredential;
    try {
      const found = { ...(await platform.getClientCapabilities?.()) };
      found.conditionalGet ??= await platform.isConditionalMediationAvailable?.();
      found.userVerifyingPlatformAuthenticator ??=
        await platform.isUserVerifyingPlatformAuthenticatorAvailable?.();
      for (const method of Object.values(SIGNALS))
        found[method] ??= typeof platform[method] === "function";
      return Object.fromEntries(Object.entries(found).filter(([, can]) => can !== undefined));
    } catch {
      return {};
    }
  }

  /** @param {"conditionalCreate"|"immediateGet"} name */
  async #requireCapability(name) {
    if ((await this.capabilities())[name]) return;
    throw new PasskeyError("unsupported", { message: `This browser has no ${name}.` });
  }

  /**
   * Offer passkeys in autofill until one is chosen, with a fresh challenge whenever four fifths of the last one's life are over.
   * @param {string|undefined} transactionId @param {AbortSignal} ended @param {object} binding
   */
  async #autofill(transactionId, ended, binding) {
    if (!(await this.canAutofill())) throw new PasskeyError("unsupported");
    warnWithoutField();
    let life = 0;
    for (;;) {
      let begun;
      try {
        begun = await this.#begin("authenticate", transactionId, ended, binding);
      } catch (error) {
        if (!life || !passes(error)) throw error;
        await pause(Math.max(1000, Math.min(10_000, life / 5)), ended);
        continue;
      }
      life = begun.options.timeout || CHALLENGE_LIFE;
      const round = follow(ended);
      const renewal = pause(Math.max(1000, life * 0.8), round.signal).then(() => seen(round.signal));
      const credential = await Promise.race([prompt("get", begun.options, round.signal, { mediation: "conditional" }), renewal]);
      round.abort();
      if (credential) return this.#finish(begun, credential, ended);
    }
  }

  /** @param {string} purpose @param {string|undefined} transactionId @param {AbortSignal} ended @param {object} [more] */
  async #begin(purpose, transactionId, ended, more) {
    const path = `${purpose}/transactions/webauthn/`;
    const { handshake } = await this.#post(path + "start", { transaction_id: transactionId, ...more }, ended);
    const options = handshake?.challenge?.publicKey;
    if (!options) throw new PasskeyError("unavailable", { message: "The service gave an answer without a challenge." });
    return { path, transactionId, handshake: handshake.id, options };
  }

  /**
   * @param {{path: string, transactionId?: string, handshake: string}} begun
   * @param {Credential} credential @param {AbortSignal} ended
   */
  async #finish({ path, transactionId, handshake }, credential, ended) {
    const body = { handshake_id: handshake, handshake_response: toJSON(credential), transaction_id: transactionId };
    const { nonce } = await this.#post(path + "finish", body, ended);
    if (!nonce) throw new PasskeyError("unavailable", { message: "The service gave an answer without a nonce." });
    return nonce;
  }

  /**
   * One request, never repeated. Returns the answer's JSON object.
   * @param {string} path @param {object} body @param {AbortSignal} ended
   */
  async #post(path, body, ended) {
    const request = follow(ended);
    const clock = setTimeout(() => request.abort(new DOMException("No answer in time", "TimeoutError")), REQUEST_LIFE);
    let response, text;
    try {
      response = await fetch(`${this.#app}/${path}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        credentials: "omit",
        redirect: "error",
        signal: request.signal,
      });
      text = await response.text();
    } catch (cause) {
      throw ended.aborted ? cause : new PasskeyError("network", { cause });
    } finally {
      clearTimeout(clock);
      request.abort();
    }
    const answer = parsed(text);
    if (response.ok && answer) return answer;
    forget(answer?.signal);
    throw new PasskeyError(response.status >= 400 && response.status < 500 ? "refused" : "unavailable", {
      message: answer?.error,
      refusal: answer?.code,
      status: response.status,
      retry: answer?.retry,
    });
  }
}

/** @param {string} message */
const invalid = (message) => new PasskeyError("invalid_argument", { message, cause: new TypeError(message) });

/**
 * Refuse a value that is not a non-empty string, like a field missing from an error answer.
 * @param {unknown} value @param {string} name
 */
function requireText(value, name) {
  if (typeof value !== "string" || !value) throw invalid(`${name} is not a non-empty string.`);
}

/**
 * Refuse an immediate request that browsers refuse: with a list of allowed passkeys, with autofill,
 * or without user activation. A browser would reject each of them as "cancelled".
 * @param {string|undefined} transactionId @param {boolean} conditional
 */
function requireImmediate(transactionId, conditional) {
  const refusal = (why) => invalid(`authenticate: immediate ${why}.`);
  if (transactionId !== undefined) throw refusal("is for a sign-in without a transaction");
  if (conditional) throw refusal("and conditional exclude each other");
  if (globalThis.navigator?.userActivation?.isActive === false)
    throw refusal("needs a click or a key press of the person just before");
}

let warned = false;

/** Warn once if the document has no field for autofill (shadow roots are not searched). */
function warnWithoutField() {
  if (warned || document.querySelector(AUTOFILL_FIELDS)) return;
  warned = true;
  console.warn(
    "authenticate({ conditional: true }) offers passkeys only in the autofill of a field, and this " +
      'page has none: add <input autocomplete="username webauthn">.',
  );
}

/** The running ceremony of the page. @type {AbortController|undefined} */
let current;

/**
 * Run `steps` as the page's only ceremony.
 * @param {AbortSignal|undefined} signal @param {(ended: AbortSignal) => Promise<string>} steps
 */
async function ceremony(signal, steps) {
  if (signal?.aborted) throw new PasskeyError("aborted", { cause: signal.reason });
  current?.abort(new DOMException("Another ceremony began", "AbortError"));
  const mine = (current = follow(signal));
  try {
    // Browsers hide WebAuthn from a page that is neither https nor on localhost.
    if (typeof PublicKeyCredential !== "function")
      throw new PasskeyError(globalThis.isSecureContext === false ? "wrong_domain" : "unsupported");
    return await steps(mine.signal);
  } catch (cause) {
    if (cause instanceof PasskeyError) throw cause;
    // An aborted read of an answer raises AbortError only, in some browsers an aborted prompt too.
    const { aborted, reason } = mine.signal;
    throw aborted ? new PasskeyError("aborted", { cause: reason }) : new PasskeyError("unsupported", { cause });
  } finally {
    if (current === mine) current = undefined;
    mine.abort();
  }
}

/**
 * Call the platform. An abort ends the wait at once, also if a browser extension replaces the platform.
 * @param {"create"|"get"} verb @param {any} options in JSON form
 * @param {AbortSignal} signal
 * @param {{mediation?: CredentialMediationRequirement, uiMode?: "immediate"}} [how]
 * @returns {Promise<Credential>}
 */
async function prompt(verb, options, signal, how) {
  try {
    signal.throwIfAborted();
    const publicKey = fromJSON(verb, options);
    const credential = await new Promise((resolve, reject) => {
      signal.addEventListener("abort", () => reject(signal.reason), { once: true });
      navigator.credentials[verb]({ publicKey, signal, ...how }).then(resolve, reject);
    });
    if (!credential) throw new DOMException("No credential was returned", "NotAllowedError");
    return credential;
  } catch (cause) {
    if (signal.aborted) throw cause;
    throw new PasskeyError(platformCode(verb, cause), { cause });
  }
}

/** Exceptions with a single meaning. @type {Record<string, Code>} */
const PLATFORM_CODES = {
  AbortError: "aborted",
  SecurityError: "wrong_domain",
  // No authenticator here has the required residence or user verification.
  ConstraintError: "not_supported_by_device",
  // No algorithm in common. Chromium raises it also for a device without screen lock or discoverable keys.
  NotSupportedError: "not_supported_by_device",
};

/**
 * "cancelled" if another attempt may succeed, otherwise "unsupported". Source: WebAuthn L3 §5.1.3 and §5.1.4 (exceptions).
 * @param {"create"|"get"} verb @param {any} error @returns {Code}
 */
function platformCode(verb, error) {
  const name = error?.name;
  if (Object.hasOwn(PLATFORM_CODES, name)) return PLATFORM_CODES[name];
  if (name === "InvalidStateError") return verb === "create" ? "already_registered" : "cancelled";
  const passing = ["NotAllowedError", "OperationError", "UnknownError", "NotReadableError", "TimeoutError"];
  return passing.includes(name) ? "cancelled" : "unsupported";
}

/** True if a failed renewal may succeed soon. @param {unknown} error */
function passes(error) {
  return error instanceof PasskeyError && (["network", "unavailable"].includes(error.code) || error.status === 429);
}

/**
 * Signal a passkey that no user of the app has, so that the authenticator drops it (WebAuthn L3 §5.1.10). Never fails or waits.
 * @param {{type: string, rp_id: string, credential_id: string}|undefined} signal
 */
function forget(signal) {
  if (signal?.type !== "unknown_credential") return;
  const { rp_id: rpId, credential_id: credentialId } = signal;
  Promise.resolve()
    .then(() => PublicKeyCredential.signalUnknownCredential?.({ rpId, credentialId }))
    .catch(() => {});
}

/** A controller that also aborts when `signal` does, until it is aborted itself. @param {AbortSignal} [signal] */
function follow(signal) {
  const controller = new AbortController();
  if (signal?.aborted) controller.abort(signal.reason);
  signal?.addEventListener("abort", () => controller.abort(signal.reason), { signal: controller.signal });
  return controller;
}

/** @param {number} milliseconds @param {AbortSignal} signal @returns {Promise<void>} */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const clock = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(clock), reject(signal.reason)), { once: true });
  });
}

/** Resolves when the page is visible. @param {AbortSignal} signal @returns {Promise<void>} */
function seen(signal) {
  return new Promise((resolve) => {
    const look = () => document.visibilityState === "visible" && resolve();
    document.addEventListener("visibilitychange", look, { signal });
    look();
  });
}

/** A JSON object, or undefined. @param {string} text */
function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : undefined;
  } catch {
    return undefined;
  }
}

// The platform's JSON conversions (WebAuthn L3 §5.1.8, §5.1.9, §5.1.1 toJSON), with a fallback of our own: Safari has them since
// 18.4, and browser extensions that replace the platform return objects whose toJSON throws.

/** @param {"create"|"get"} verb @param {any} options */
function fromJSON(verb, options) {
  const method = verb === "create" ? "parseCreationOptionsFromJSON" : "parseRequestOptionsFromJSON";
  try {
    return PublicKeyCredential[method](options);
  } catch {
    const { challenge, user, excludeCredentials, allowCredentials, ...rest } = options;
    return {
      ...rest,
      challenge: bytes(challenge),
      ...(user && { user: { ...user, id: bytes(user.id) } }),
      ...(excludeCredentials && { excludeCredentials: excludeCredentials.map(descriptor) }),
      ...(allowCredentials && { allowCredentials: allowCredentials.map(descriptor) }),
    };
  }
}

/** @param {any} credential */
function toJSON(credential) {
  try {
    return credential.toJSON();
  } catch {
    const { response } = credential;
    const fields = ["clientDataJSON", "attestationObject", "authenticatorData", "signature", "userHandle"];
    const present = fields.filter((field) => response[field]).map((field) => [field, base64url(response[field])]);
    return {
      id: credential.id,
      rawId: base64url(credential.rawId),
      type: credential.type,
      authenticatorAttachment: credential.authenticatorAttachment ?? undefined,
      clientExtensionResults: credential.getClientExtensionResults?.() ?? {},
      response: { ...Object.fromEntries(present), transports: response.getTransports?.() },
    };
  }
}

/** @param {{id: string}} json */
const descriptor = (json) => ({ ...json, id: bytes(json.id) });

/** @param {string} text base64url */
const bytes = (text) =>
  Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (character) => character.charCodeAt(0));

/** @param {ArrayBuffer} buffer */
const base64url = (buffer) =>
  btoa(Array.from(new Uint8Array(buffer), (byte) => String.fromCharCode(byte)).join(""))
    .replace(/\+/g, "-")
    .replace(/\//g, "_")
    .replace(/=+$/, "");
