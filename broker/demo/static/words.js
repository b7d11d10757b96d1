/**
 * Sentences for visitors about the passkey prompt and the network. The backend's refusals bring their own.
 */

import { PasskeyError } from "/sdk/passkey.js";

export class SiteError extends Error {
  /** @param {string} code @param {string} sentence */
  constructor(code, sentence) {
    super(sentence);
    this.code = code;
  }
}

const CLOSED = {
  "sign-up": "No passkey was made: the prompt was closed or timed out. Your name is still held for you, so just try again.",
  "by-name": "No passkey was used: the prompt was closed or timed out, or this device has none for that name.",
  "without-name": "No passkey was used: the prompt was closed or timed out, or this device has none for this site.",
  autofill: "No passkey was used. Pick one from the field again, or sign in another way.",
  second: "No passkey was added: the prompt was closed or timed out.",
};

/** The visitor pressed Cancel in the page. */
const STOPPED = {
  "sign-up": "Cancelled, no passkey was made. Your name is still held for you.",
  second: "Cancelled, no passkey was added.",
};

const ALREADY = {
  "sign-up": "This device already made a passkey for this name. Choose “Sign in without a name” to finish.",
  second: "This device already has a passkey for this account. Use another device or a security key for the second one.",
};

const UNREACHABLE = "The passkey service can't be reached right now. Wait a moment, then try again.";

/** Ceremonies that the broker refused, by its code. */
const REFUSED = {
  webauthn_login_failed: "This passkey isn't accepted here; it may have been revoked. Use another passkey, or sign up.",
  discoverable_login_failed: "This passkey isn't accepted here; it may have been revoked. Use another passkey, or sign up.",
  transaction_not_found: "That took too long. Start again.",
  operation_not_allowed: "Passkeys aren't set up for this address. Open the demo at the address that was printed when it started.",
  too_many_requests: "Many people are signing in at once. Try again in a few seconds.",
};

/** A registration that the broker refused. */
const REFUSED_NEW = "The passkey couldn't be verified, so it wasn't kept. Try again, or use another device.";

/** A browser without passkeys. */
export const UNSUPPORTED =
  "This browser can't use passkeys here. Try an up-to-date browser on a device with a screen lock, or plug in a security key.";

/**
 * The sentence for the visitor; "" if another ceremony replaced this one.
 *
 * @param {unknown} error
 * @param {string} step
 * @param {boolean} [cancelled] by the visitor, in the page
 */
export function wordsFor(error, step, cancelled = false) {
  if (error instanceof SiteError) return error.message;
  if (!(error instanceof PasskeyError)) throw error;
  switch (error.code) {
    case "aborted":
      return cancelled ? (STOPPED[step] ?? "Cancelled, no passkey was used.") : "";
    case "cancelled":
      return CLOSED[step] ?? "The passkey prompt was closed or timed out.";
    case "already_registered":
      return ALREADY[step] ?? ALREADY.second;
    case "unsupported":
    case "wrong_domain":
    case "not_supported_by_device":
      return UNSUPPORTED;
    case "network":
    case "unavailable":
      return UNREACHABLE;
    default:
      if (error.refusal === "webauthn_login_failed" && ["sign-up", "second"].includes(step)) return REFUSED_NEW;
      return REFUSED[error.refusal ?? ""] ?? "The passkey service refused this. Start again.";
  }
}

/** True if this is no fault: the visitor declined, or has a passkey already. @param {unknown} error */
export function isCalm(error) {
  return error instanceof PasskeyError && ["cancelled", "aborted", "already_registered"].includes(error.code);
}

/**
 * "just now", "5 minutes ago", "12 March".
 *
 * @param {Date} then
 */
export function ago(then) {
  const seconds = (Date.now() - then.getTime()) / 1000;
  if (seconds < 60) return "just now";
  const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  if (seconds < 3600) return relative.format(-Math.floor(seconds / 60), "minute");
  if (seconds < 86_400) return relative.format(-Math.floor(seconds / 3600), "hour");
  if (seconds < 7 * 86_400) return relative.format(-Math.floor(seconds / 86_400), "day");
  return new Intl.DateTimeFormat("en", { day: "numeric", month: "long", year: "numeric" }).format(then);
}
