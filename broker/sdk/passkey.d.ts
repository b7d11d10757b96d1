/** Why a ceremony gave no nonce; stable words, for programs. */
export type PasskeyErrorCode =
  /** The prompt ended without a passkey: the person closed it, or no passkey fits. Trying again may help. */
  | "cancelled"
  /** This browser can't do it, or not in the way that was asked for; trying again won't help. */
  | "unsupported"
  /** The page's domain is not the app's RP ID or below it, or the page is not https. */
  | "wrong_domain"
  /** No authenticator here can do what the app's policy asks, like user verification. */
  | "not_supported_by_device"
  /** This authenticator already has a passkey of this user: not an error to fear. */
  | "already_registered"
  /** The broker said no; `refusal` says which no. */
  | "refused"
  /** The broker has trouble; `retry`, where given, says where to start again. */
  | "unavailable"
  /** No answer: offline, blocked, or later than 15 seconds. */
  | "network"
  /** Another ceremony began in this page, or the caller's signal was aborted. */
  | "aborted"
  /** The page called with an argument of another type, like a transaction id that is undefined; no request was sent. */
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
  /** The browser's own error, where there was one. */
  readonly cause?: unknown;
  /** The broker's code, like "transaction_not_found"; for "refused" and "unavailable". */
  readonly refusal: string | undefined;
  /** The HTTP status that came with it. */
  readonly status: number | undefined;
  /** After "unavailable": call again ("page"), or begin with a new transaction ("backend"). */
  readonly retry: "page" | "backend" | undefined;
}

export interface RegisterOptions {
  /** Which authenticators to offer; the app's policy decides where it is left out. */
  authenticatorAttachment?: "platform" | "cross-platform" | "any";
  /**
   * Conditional create: make the passkey without a prompt, right after a sign-in with a saved
   * password. Rejects with "cancelled" where the browser decides against it, and with "unsupported",
   * before any request, where it lacks the capability `conditionalCreate`.
   */
  autoRegister?: boolean;
  /** Ends the ceremony, which then rejects with "aborted". */
  signal?: AbortSignal;
}

export interface AuthenticateOptions {
  /**
   * From the backend, for a known user. Left out, whoever the chosen passkey belongs to signs in; present, it must be a
   * non-empty string, else the call is refused with "invalid_argument".
   */
  transactionId?: string;
  /** Wait for a choice in the autofill of an `<input autocomplete="username webauthn">`. */
  conditional?: boolean;
  /**
   * Offer only passkeys that the browser has at hand, and reject with "cancelled" at once where it
   * has none. Needs user activation (a click, a key press) and neither `transactionId` nor
   * `conditional`, else the call is refused with "invalid_argument". Rejects with "unsupported",
   * before any request, where the browser lacks the capability `immediateGet`.
   */
  immediate?: boolean;
  /** Ends the ceremony, which then rejects with "aborted". */
  signal?: AbortSignal;
}

export interface AppliedSignals {
  /** Whether this browser has the method; where it hasn't, no request was made and the ticket is as good as before. */
  supported: boolean;
  /** How many passkeys or users the authenticator was told of. */
  applied: number;
  /** How many the browser would not take. */
  failed: number;
}

/**
 * What the browser says that it can do, by the names of `PublicKeyCredential.getClientCapabilities`
 * (WebAuthn L3 §5.1.7). A name that is absent is unknown.
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
  /** @param baseUrl where the broker is, like "https://broker.example"; "" for the page's own origin */
  constructor(baseUrl: string, appId: string);
  /** Make a passkey. Resolves with the nonce. @throws {PasskeyError} */
  register(transactionId: string, options?: RegisterOptions): Promise<string>;
  /** Sign in with a passkey. Resolves with the nonce. @throws {PasskeyError} */
  authenticate(options?: AuthenticateOptions): Promise<string>;
  /**
   * Tell the authenticator of names that changed (update), passkeys that are gone (delete), or those that still count (prune).
   * The ticket comes from the backend and is good once. @throws {PasskeyError}
   */
  applySignals(
    kind: "update" | "delete" | "prune",
    ticket: string,
    options?: { signal?: AbortSignal },
  ): Promise<AppliedSignals>;
  /** Whether this page can make passkeys. */
  canRegister(): Promise<boolean>;
  /** Whether `authenticate({ conditional: true })` can work in this browser. */
  canAutofill(): Promise<boolean>;
  /** What this browser can do; never rejects, makes no request. */
  capabilities(): Promise<Capabilities>;
}
