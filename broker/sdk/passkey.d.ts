/** The code of a ceremony's fault: stable, for programs. */
export type PasskeyErrorCode =
  /** The prompt ended without a passkey: the person closed it, or no passkey fits. Another attempt may succeed. */
  | "cancelled"
  /** This browser lacks passkeys, or the requested feature; another attempt fails too. */
  | "unsupported"
  /** The page's domain is not the app's RP ID or below it, or the page is not https. */
  | "wrong_domain"
  /** No authenticator here meets the app's policy, like user verification. */
  | "not_supported_by_device"
  /** This authenticator already has a passkey of this user, which is no fault of the site. */
  | "already_registered"
  /** The broker refused; `refusal` has its code. */
  | "refused"
  /** The broker is briefly unavailable; `retry`, if given, says where to start again. */
  | "unavailable"
  /** No answer: offline, blocked, or later than 15 seconds. */
  | "network"
  /** Another ceremony began in this page, or the caller's signal was aborted. */
  | "aborted"
  /** An argument has the wrong type, like a transaction id that is undefined; no request was sent. */
  | "invalid_argument";

export interface PasskeyErrorDetails {
  message?: string;
  cause?: unknown;
  refusal?: string;
  status?: number;
  retry?: "page" | "backend";
}

export class PasskeyError extends Error {
  constructor(code: PasskeyErrorCode, details?: PasskeyErrorDetails);
  readonly name: "PasskeyError";
  readonly code: PasskeyErrorCode;
  /** The browser's own error, if there is one. */
  readonly cause?: unknown;
  /** The broker's code, like "transaction_not_found"; for "refused" and "unavailable". */
  readonly refusal: string | undefined;
  /** The HTTP status of the answer. */
  readonly status: number | undefined;
  /** After "unavailable": call again ("page"), or begin with a new transaction ("backend"). */
  readonly retry: "page" | "backend" | undefined;
}

export interface RegisterOptions {
  /** The authenticators to offer; by default the app's policy decides. */
  authenticatorAttachment?: "platform" | "cross-platform" | "any";
  /**
   * Conditional create: make the passkey without a prompt, right after a sign-in with a saved
   * password. Rejects with "cancelled" if the browser decides against it, and with "unsupported",
   * before any request, if it lacks the capability `conditionalCreate`.
   */
  autoRegister?: boolean;
  /** Ends the ceremony, which then rejects with "aborted". */
  signal?: AbortSignal;
}

export interface AuthenticateOptions {
  /**
   * From the backend, for a known user. Without it the owner of the chosen passkey signs in. If present, it must be a non-empty
   * string, else the call is refused with "invalid_argument".
   */
  transactionId?: string;
  /** Wait for a choice in the autofill of an `<input autocomplete="username webauthn">`. */
  conditional?: boolean;
  /**
   * Offer only passkeys that the browser has at hand, and reject with "cancelled" at once if it
   * has none. Needs user activation (a click, a key press) and neither `transactionId` nor
   * `conditional`, else the call is refused with "invalid_argument". Rejects with "unsupported",
   * before any request, if the browser lacks the capability `immediateGet`.
   */
  immediate?: boolean;
  /**
   * From the backend, for a sign-in without `transactionId`: the nonce is redeemed only with the
   * verifier of this challenge, which the backend keeps in the browser's session.
   */
  bindingChallenge?: string;
  /** Ends the ceremony, which then rejects with "aborted". */
  signal?: AbortSignal;
}

export interface AppliedSignals {
  /** True if this browser has the method. If false, no request was made and the ticket is still valid. */
  supported: boolean;
  /** The number of calls that the browser accepted. */
  applied: number;
  /** The number of calls that the browser rejected. */
  failed: number;
}

/**
 * Client capabilities, by the names of `PublicKeyCredential.getClientCapabilities` (WebAuthn L3
 * §5.1.7). A name that is absent is unknown.
 */
export interface Capabilities {
  /** `register(…, { autoRegister: true })` */
  readonly conditionalCreate?: boolean;
  /** `authenticate({ conditional: true })` */
  readonly conditionalGet?: boolean;
  /** `authenticate({ immediate: true })` */
  readonly immediateGet?: boolean;
  /** A phone can be asked, by a QR code. */
  readonly hybridTransport?: boolean;
  /** This device keeps passkeys, or a phone can be asked. */
  readonly passkeyPlatformAuthenticator?: boolean;
  /** This device verifies its user, by a screen lock or a fingerprint. */
  readonly userVerifyingPlatformAuthenticator?: boolean;
  /** Pages of other domains may use the passkeys of an RP ID that lists them. */
  readonly relatedOrigins?: boolean;
  /** `applySignals("prune", …)` */
  readonly signalAllAcceptedCredentials?: boolean;
  /** `applySignals("update", …)` */
  readonly signalCurrentUserDetails?: boolean;
  /** `applySignals("delete", …)` */
  readonly signalUnknownCredential?: boolean;
  /** Further names, like "extension:prf". */
  readonly [name: string]: boolean | undefined;
}

export class Passkeys {
  /** @param baseUrl the broker's URL, like "https://broker.example"; "" for the page's own origin */
  constructor(baseUrl: string, appId: string);
  /** Make a passkey. Resolves with the nonce. @throws {PasskeyError} */
  register(transactionId: string, options?: RegisterOptions): Promise<string>;
  /** Sign in with a passkey. Resolves with the nonce. @throws {PasskeyError} */
  authenticate(options?: AuthenticateOptions): Promise<string>;
  /**
   * Signal changed names (update), deleted passkeys (delete) or the current passkeys (prune) to the authenticator.
   * The ticket comes from the backend and is used once. @throws {PasskeyError}
   */
  applySignals(
    kind: "update" | "delete" | "prune",
    ticket: string,
    options?: { signal?: AbortSignal },
  ): Promise<AppliedSignals>;
  /** True if this page can make passkeys. */
  canRegister(): Promise<boolean>;
  /** True if this browser supports `authenticate({ conditional: true })`. */
  canAutofill(): Promise<boolean>;
  /** The client capabilities of this browser; never rejects, makes no request. */
  capabilities(): Promise<Capabilities>;
}
