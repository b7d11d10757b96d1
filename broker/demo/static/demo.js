/**
 * The page's side of each ceremony, in three lines: ask the backend for a transaction, run the ceremony with the SDK, hand the
 * nonce to the backend. The rest of this file is the page: forms, focus, sentences, and the diagram of wire.js.
 */

import { Passkeys, PasskeyError } from "/sdk/passkey.js";
import { SiteError, UNSUPPORTED, ago, isCalm, wordsFor } from "/demo/static/words.js";
import { Wire, copy, drawing, element, redacted, short, watchFetch } from "/demo/static/wire.js";

const API = "/demo/api";
const TOUR = "passkey-demo-tour";
/** Refusals that concern a field: their sentence appears under it. */
const FIELD_CODES = ["invalid_name", "name_taken", "unknown_name", "no_passkeys"];
/** The SDK's codes for a page or a device without passkeys. */
const UNABLE_CODES = ["unsupported", "wrong_domain", "not_supported_by_device"];
const ICONS = { good: "check", bad: "warning" };

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

const wire = new Wire({ flow: byId("flow"), empty: byId("wire-empty"), clear: byId("clear") });

/** @type {Passkeys} */
let passkeys;
/** @type {ReturnType<typeof watchFetch>} */
let watch;
/** Path of the app's API at the broker. */
let appPath = "";
/** The exchange to which the SDK's calls belong. @type {any} */
let running;
/** The exchange of the autofill request that is pending. @type {any} */
let waiting;
/** @type {{name: string, external_id: string, since: number}|null} */
let account = null;
/** The passkey that the open dialog names. @type {any} */
let naming;
let autofillWorks = false;
let autofillArmed = false;

// The backend

/**
 * Call the backend and show the call. Throws SiteError with a sentence for the visitor.
 *
 * @param {string} method
 * @param {string} path
 * @param {object|undefined} body
 * @param {any} [exchange]
 */
async function backend(method, path, body, exchange) {
  const call = { from: "page", to: "backend", method, url: location.origin + API + path, shown: API + path };
  const answered = exchange?.call({ ...call, facts: facts(body ?? {}), body: redacted(body) });
  const begun = performance.now();
  let response, answer;
  try {
    response = await fetch(API + path, {
      method,
      headers: body && { "Content-Type": "application/json" },
      body: body && JSON.stringify(body),
    });
    answer = await response.json();
  } catch {
    answered?.("no answer");
    throw new SiteError("offline", "This site can't be reached. Check the connection, then try again.");
  }
  const ms = performance.now() - begun;
  const { trace, ...fields } = answer;
  exchange?.hops(appPath, trace);
  answered?.(response.status, { facts: facts(fields), body: redacted(fields), ms });
  if (response.ok) return answer;
  if (answer.code === "not_signed_in") show(null, { notice: answer.error });
  throw new SiteError(answer.code, answer.error);
}

/** The values of a body that the diagram shows. @param {any} body */
function facts({ name, nonce, transaction_id, account, code, label, passkeys }) {
  return {
    ...(name && { name }),
    ...(label && { label }),
    ...(transaction_id && { transaction: short(transaction_id) }),
    ...(nonce && { nonce: short(nonce) }),
    ...(account && { "external id": short(account.external_id), session: "new cookie" }),
    ...(passkeys && { passkeys: String(passkeys.length) }),
    ...(code && { code }),
  };
}

// Ceremonies

/**
 * Run one step with a diagram of its own. A fault gets one sentence; notices of earlier steps disappear; a second click has no effect.
 *
 * @param {{step: string, title: string, button?: HTMLElement, notice: HTMLElement, input?: HTMLInputElement}} about
 * @param {(exchange: any) => Promise<void>} work
 */
async function run({ step, title, button, notice, input }, work) {
  if (button?.ariaBusy === "true") return;
  if (button) button.ariaBusy = "true";
  clearNotices();
  const exchange = (running = wire.exchange(title));
  try {
    await work(exchange);
    exchange.end("done");
    done(step);
  } catch (error) {
    const words = wordsFor(error, step, exchange.cancelled);
    const calm = isCalm(error);
    if (exchange.cancelled) watch.refused(exchange, "You cancelled, and the prompt was taken back.");
    else if (calm || (error instanceof PasskeyError && UNABLE_CODES.includes(error.code)))
      watch.refused(exchange, `Your device gave no passkey: ${error.code.replaceAll("_", " ")}.`);
    exchange.end(calm ? "stopped" : "failed");
    tell(notice, words, calm ? "" : "bad");
    if (input && error instanceof SiteError && FIELD_CODES.includes(error.code)) {
      input.ariaInvalid = "true";
      input.focus();
    }
  } finally {
    if (button) button.ariaBusy = "false";
    if (running === exchange) running = undefined;
    if (!account) void armAutofill();
  }
}

/**
 * Run a ceremony. While the device is asked, its card shows that, with a button that aborts the ceremony. The button disappears
 * when the device has answered.
 *
 * @param {any} exchange
 * @param {HTMLElement} place an element of the card
 * @param {(signal: AbortSignal) => Promise<string>} ceremony
 */
async function withDevice(exchange, place, ceremony) {
  const card = /** @type {HTMLElement} */ (place.closest(".card"));
  const covered = [...card.children];
  const panel = byId("waiting").content.firstElementChild.cloneNode(true);
  const cancel = panel.querySelector("button");
  const began = /** @type {HTMLElement} */ (document.activeElement);
  const stop = new AbortController();
  const cover = (/** @type {boolean} */ on) => covered.forEach((/** @type {any} */ child) => (child.inert = on));
  const uncover = () => {
    if (!panel.isConnected) return;
    const focused = panel.contains(document.activeElement);
    panel.remove();
    cover(false);
    if (focused) began.focus();
  };
  cancel.addEventListener("click", () => {
    exchange.cancelled = true;
    stop.abort();
  });
  exchange.answered = uncover;
  cover(true);
  card.append(panel);
  cancel.focus();
  byId("announcer").textContent = "Waiting for your device.";
  try {
    return await ceremony(stop.signal);
  } finally {
    uncover();
  }
}

async function signUp() {
  const input = byId("sign-up-name");
  const about = { step: "sign-up", title: "Sign up", button: byId("sign-up-form"), notice: byId("sign-up-notice"), input };
  await run(about, async (exchange) => {
    const { transaction_id } = await backend("POST", "/sign-up/start", { name: input.value }, exchange);
    const nonce = await withDevice(exchange, input, (signal) => passkeys.register(transaction_id, { authenticatorAttachment: "any", signal }));
    const answer = await backend("POST", "/sign-up/finish", { nonce, transaction_id }, exchange);
    input.value = "";
    welcome(answer, exchange, "Your account is open and its first passkey is kept.");
  });
}

async function signInByName() {
  const input = byId("sign-in-name");
  const about = { step: "by-name", title: "Sign in by name", button: byId("sign-in-form"), notice: byId("sign-in-notice"), input };
  await run(about, async (exchange) => {
    const { transaction_id } = await backend("POST", "/sign-in/start", { name: input.value }, exchange);
    const nonce = await withDevice(exchange, input, (signal) => passkeys.authenticate({ transactionId: transaction_id, signal }));
    const answer = await backend("POST", "/sign-in/finish", { nonce, transaction_id }, exchange);
    welcome(answer, exchange, "You signed in by name.");
  });
}

async function signInWithoutName() {
  const button = byId("without-name");
  const about = { step: "without-name", title: "Sign in without a name", button, notice: byId("without-name-notice") };
  await run(about, async (exchange) => {
    const nonce = await withDevice(exchange, button, (signal) => passkeys.authenticate({ signal }));
    const answer = await backend("POST", "/sign-in/discoverable", { nonce }, exchange);
    welcome(answer, exchange, "You signed in without typing a name.");
  });
}

/**
 * Offer passkeys in the name field's autofill, until a passkey is chosen or another ceremony begins. The visitor has not asked for
 * it, so a fault appears in the hint below the field and replaces no other sentence.
 */
async function armAutofill() {
  if (!autofillWorks || autofillArmed || account || running) return;
  autofillArmed = true;
  const hint = byId("autofill-text");
  hint.textContent = "Click the field: your browser suggests your passkeys in it.";
  const exchange = (waiting = wire.exchange("Autofill, waiting for a choice", false));
  let chosen = false;
  exchange.answered = () => {
    chosen = true;
    clearNotices();
    exchange.heading.textContent = "Sign in from autofill";
    exchange.open();
  };
  try {
    const nonce = await passkeys.authenticate({ conditional: true });
    const answer = await backend("POST", "/sign-in/discoverable", { nonce }, exchange);
    welcome(answer, exchange, "You signed in from the field’s autofill.");
    exchange.end("done");
    done("autofill");
  } catch (error) {
    if (chosen) {
      exchange.end("failed");
      tell(byId("sign-in-notice"), wordsFor(error, "autofill"), "bad");
    } else {
      if (!(error instanceof PasskeyError)) throw error;
      exchange.discard();
    }
    if (!(error instanceof PasskeyError) || error.code !== "aborted")
      hint.textContent = "Nothing to suggest right now. Click the field to look again.";
  } finally {
    autofillArmed = false;
    waiting = undefined;
  }
}

async function addPasskey() {
  const button = byId("add");
  await run({ step: "second", title: "Add a passkey", button, notice: byId("passkeys-notice") }, async (exchange) => {
    const { transaction_id } = await backend("POST", "/passkeys/start", {}, exchange);
    const nonce = await withDevice(exchange, button, (signal) => passkeys.register(transaction_id, { authenticatorAttachment: "any", signal }));
    const answer = await backend("POST", "/passkeys/finish", { nonce, transaction_id }, exchange);
    showPasskeys(answer.passkeys);
    showReceipt(answer.receipt);
    tell(byId("passkeys-notice"), "Added. You can sign in with either passkey now.", "good");
    exchange.verdict("The passkey belongs to this account.");
  });
}

/** Show that a stolen nonce is worthless: the backend redeems the last nonce again. The broker refuses, and raises its replay alarm. */
async function redeemAgain() {
  const notice = byId("again-notice");
  await run({ step: "again", title: "Redeem the nonce again", button: byId("again"), notice }, async (exchange) => {
    const { refusal, alarm } = await backend("POST", "/redeem-again", {}, exchange);
    const words = `Refused, as it should be: ${refusal.status} ${refusal.code}. A nonce is good once.`;
    const [first, again] = [alarm?.first_at, alarm?.again_at].map((at) => new Date(at).toLocaleTimeString());
    const alarmed = alarm ? `Replay alarm: this nonce was redeemed at ${first} and again at ${again}. A real site ends that first session now.` : "";
    tell(byId("alarm-notice"), alarmed, "bad");
    tell(notice, words, "good");
    byId("announcer").textContent = `${words} ${alarmed}`;
    exchange.verdict("The broker refused: this nonce was redeemed before.");
  });
}

// Managing passkeys

/** @param {any} key @param {number} count */
async function revoke(key, count) {
  const dialog = byId("revoke-dialog");
  byId("revoke-text").textContent = `“${key.shown}” stops working at once, also where it is signed in elsewhere. Your device may keep showing it.`;
  byId("revoke-last").hidden = count > 1;
  if ((await ask(dialog)) !== "confirm") return;
  await run({ step: "revoke", title: "Revoke a passkey", notice: byId("passkeys-notice") }, async (exchange) => {
    const answer = await backend("POST", `/passkeys/${key.id}/revoke`, { last: count === 1 }, exchange);
    showPasskeys(answer.passkeys);
    const words = answer.passkeys.length ? `“${key.shown}” is revoked.` : `“${key.shown}” is revoked. Add a new passkey before you sign out, or this account is closed for good.`;
    tell(byId("passkeys-notice"), words, answer.passkeys.length ? "good" : "bad");
    byId("passkeys-title").focus();
  });
}

/** @param {any} key */
function rename(key) {
  naming = key;
  clearNotices();
  byId("label-text").value = key.shown;
  byId("label-dialog").showModal();
}

/** The dialog stays open until the name is stored; a fault appears at its field. */
async function saveLabel() {
  const { id } = naming;
  const input = byId("label-text");
  const about = { step: "rename", title: "Name a passkey", button: byId("label-form"), notice: byId("label-notice"), input };
  await run(about, async (exchange) => {
    const answer = await backend("POST", `/passkeys/${id}/label`, { label: input.value }, exchange);
    byId("label-dialog").close();
    showPasskeys(answer.passkeys);
    tell(byId("passkeys-notice"), "Renamed.", "good");
    document.querySelector(`[data-passkey="${id}"] button`)?.focus();
  });
}

/** Show a dialog; resolves with the value of the button that closed it, "" for Escape. @param {HTMLDialogElement} dialog */
function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

async function signOut() {
  await run({ step: "sign-out", title: "Sign out", button: byId("sign-out"), notice: byId("account-notice") }, async (exchange) => {
    await backend("POST", "/sign-out", {}, exchange);
    show(null, { notice: "You're signed out. Your passkeys still work.", kind: "good" });
    byId("sign-in-title").focus();
  });
}

// The page

/** @param {any} answer @param {any} exchange @param {string} words */
function welcome(answer, exchange, words) {
  exchange.verdict(`Redeemed: the backend knows that this is ${answer.account.name}.`);
  show(answer.account, { receipt: answer.receipt, notice: words, kind: "good", exchange });
  byId("account-title").focus();
}

/**
 * Switch between the signed-out and the signed-in page.
 *
 * @param {typeof account} person
 * @param {{receipt?: any, notice?: string, kind?: string, exchange?: any}} [about]
 */
function show(person, { receipt, notice = "", kind = "bad", exchange } = {}) {
  account = person;
  byId("steps").ariaBusy = "false";
  for (const section of document.querySelectorAll("[data-when]"))
    section.toggleAttribute("hidden", (section.getAttribute("data-when") === "signed-in") !== Boolean(person));
  clearNotices();
  tell(byId(person ? "account-notice" : "visit-notice"), notice, kind);
  if (!person) {
    byId("keys").replaceChildren();
    byId("label-dialog").close();
    return;
  }
  byId("account-title").textContent = `Hello, ${person.name}`;
  byId("avatar").textContent = [...person.name][0].toLocaleUpperCase();
  byId("external-id").textContent = person.external_id;
  showReceipt(receipt);
  void listPasskeys(exchange);
}

/** The list and the button below it appear together, so that the button does not move. @param {any} [exchange] */
async function listPasskeys(exchange) {
  byId("passkeys").ariaBusy = "true";
  byId("keys").replaceChildren(element("li", "key-place"));
  try {
    showPasskeys((await backend("GET", "/passkeys", undefined, exchange)).passkeys);
  } catch (error) {
    byId("keys").replaceChildren();
    tell(byId("passkeys-notice"), wordsFor(error, "list"), "bad");
  } finally {
    byId("passkeys").ariaBusy = "false";
  }
}

/** @param {any} receipt */
function showReceipt(receipt) {
  byId("receipt").hidden = byId("replay").hidden = !receipt;
  if (!receipt) return;
  const yes = (/** @type {string} */ text) => element("li", "yes", drawing("check"), text);
  const plain = (/** @type {string} */ text) => element("li", "", text);
  byId("receipt-facts").replaceChildren(
    plain(receipt.purpose === "register" ? "Proves a new passkey" : "Proves a sign-in"),
    receipt.user_verified ? yes("Person verified by the device") : plain("Person present, not verified"),
    receipt.backed_up ? yes("Synced between devices") : plain(receipt.backup_eligible ? "Can be synced" : "Stays on one device"),
    plain(`From ${receipt.origin}`),
    plain(`Attestation: ${receipt.attestation}`),
    ...(receipt.authenticator ? [plain(`Claims to be ${receipt.authenticator}`)] : []),
  );
}

const KINDS = { platform: "Device passkey", security_key: "Security key", passkey: "Passkey" };

/** The owner's label, or the passkey's name unless it is only the account's name. @param {any} key */
const plainName = (key) => key.label || (key.name !== account?.name && key.name) || KINDS[key.kind] || KINDS.passkey;

/** A distinct name for each passkey. @param {Array<any>} keys */
function nameAll(keys) {
  const used = new Map();
  for (const key of keys) {
    const name = plainName(key);
    used.set(name, (used.get(name) ?? 0) + 1);
    key.shown = used.get(name) > 1 ? `${name} ${used.get(name)}` : name;
  }
}

/** @param {Array<any>} keys */
function showPasskeys(keys) {
  nameAll(keys);
  byId("keys").replaceChildren(
    ...(keys.length ? keys.map((key) => passkeyRow(key, keys.length)) : [element("li", "nothing", "No passkeys left. Add one before you sign out.")]),
  );
}

/** @param {any} key @param {number} count */
function passkeyRow(key, count) {
  const title = element("h3", "", key.shown);
  if (key.current) title.append(element("span", "tag", "signed in with"));
  if (key.backed_up) title.append(element("span", "tag", "synced"));
  const about = element("p", "", "Made ", moment(key.created_at));
  if (key.last_used_at) about.append(", last used ", moment(key.last_used_at));
  else about.append(", not used to sign in yet");
  const pencil = tool("pencil", `Rename ${key.shown}`, () => rename(key));
  const bin = tool("bin", `Revoke ${key.shown}`, () => revoke(key, count));
  const row = element("li", "key", drawing(key.kind === "security_key" ? "stick" : key.kind === "platform" ? "device" : "key"));
  row.append(element("div", "", title, about), element("div", "tools", pencil, bin));
  row.dataset.passkey = key.id;
  return row;
}

/** @param {string} icon @param {string} label @param {() => void} work */
function tool(icon, label, work) {
  const button = element("button", "", drawing(icon));
  button.setAttribute("type", "button");
  button.ariaLabel = label;
  button.title = label;
  button.addEventListener("click", work);
  return button;
}

/** @param {string} when */
function moment(when) {
  const time = /** @type {HTMLTimeElement} */ (element("time", "", ago(new Date(when))));
  time.dateTime = when;
  time.title = new Date(when).toLocaleString("en");
  return time;
}

/**
 * Show a notice, and announce it to screen readers through one permanent live region: a notice may lie in a part of the page that
 * appears with it.
 *
 * @param {HTMLElement} notice
 * @param {string} words "" removes the notice
 * @param {string} [kind]
 */
function tell(notice, words, kind = "") {
  notice.className = `notice ${kind}`;
  notice.replaceChildren(...(words ? [drawing(ICONS[kind] ?? "info"), element("span", "", words)] : []));
  byId("announcer").textContent = words;
}

/** Remove the notices of earlier steps, and the marks on their fields. */
function clearNotices() {
  for (const notice of document.querySelectorAll(".notice")) tell(/** @type {HTMLElement} */ (notice), "");
  for (const input of document.querySelectorAll("input[aria-invalid='true']")) input.ariaInvalid = "false";
}

// The tour

/** @returns {Set<string>} */
function tried() {
  try {
    return new Set(JSON.parse(localStorage.getItem(TOUR) ?? "[]"));
  } catch {
    return new Set();
  }
}

/** @param {string} [step] */
function done(step) {
  const steps = tried();
  if (step) steps.add(step);
  try {
    localStorage.setItem(TOUR, JSON.stringify([...steps]));
  } catch {
    // Without storage the ticks last as long as the page.
  }
  const items = [...document.querySelectorAll("#tour li")];
  let count = 0;
  for (const item of items) {
    const ticked = item.classList.contains("done") || steps.has(item.dataset.step);
    item.classList.toggle("done", ticked);
    if (ticked && !item.querySelector(".vh")) item.firstElementChild?.append(element("span", "vh", ", done"));
    count += Number(ticked);
  }
  byId("tour-count").textContent = `${count} of ${items.length} done`;
  const next = items.find((item) => !item.classList.contains("done"));
  for (const item of items) item.firstElementChild.ariaCurrent = item === next ? "step" : null;
  byId("tour-next").textContent = next ? `Next: ${next.querySelector("span").textContent}` : "All done.";
}

/** Explain what to do first, on a link to a step that is hidden now. @param {MouseEvent} event */
function followLink(event) {
  const link = /** @type {Element} */ (event.target).closest("a[href^='#']");
  const target = link && byId(link.getAttribute("href").slice(1));
  if (!target) return;
  if (target.hidden) {
    event.preventDefault();
    tell(byId(account ? "account-notice" : "sign-up-notice"), account ? "Sign out first, then try this." : "Sign up or sign in first, then try this.");
    const heading = byId(account ? "account-title" : "sign-up-title");
    heading.focus();
    heading.scrollIntoView({ block: "center" });
  } else target.querySelector("h2[tabindex], h1")?.focus({ preventScroll: true });
}

/** Show the example code in this language. @param {string} language */
function showCode(language) {
  for (const button of byId("language").children) button.ariaPressed = String(button.value === language);
  for (const code of document.querySelectorAll("pre[data-lang]")) code.toggleAttribute("hidden", code.getAttribute("data-lang") !== language);
}

async function start() {
  done();
  document.addEventListener("click", followLink);
  const forms = [
    ["sign-up-form", signUp],
    ["sign-in-form", signInByName],
    ["label-form", saveLabel],
  ];
  for (const [id, work] of forms)
    byId(id).addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      void work();
    });
  byId("without-name").addEventListener("click", signInWithoutName);
  byId("add").addEventListener("click", addPasskey);
  byId("again").addEventListener("click", redeemAgain);
  byId("sign-out").addEventListener("click", signOut);
  byId("language").addEventListener("click", (/** @type {any} */ { target }) => target.value && showCode(target.value));
  for (const button of document.querySelectorAll("#code .copy"))
    button.addEventListener("click", () => copy(button, button.closest("figure").querySelector("pre:not([hidden])").textContent));
  byId("label-cancel").addEventListener("click", () => byId("label-dialog").close());
  byId("sign-in-name").addEventListener("focus", armAutofill);

  let state;
  try {
    state = await backend("GET", "/state", undefined);
  } catch (error) {
    if (!(error instanceof SiteError)) throw error;
    show(null, { notice: error.message });
    return;
  }
  appPath = `/v1/apps/${state.app_id}`;
  passkeys = new Passkeys(location.origin, state.app_id);
  watch = watchFetch(appPath, () => running ?? waiting);
  show(state.account);
  if (!(await passkeys.canRegister())) {
    byId("unsupported").textContent = UNSUPPORTED;
    byId("unsupported").hidden = false;
    for (const control of document.querySelectorAll(".steps :is(.primary, #without-name, #add)")) control.disabled = true;
  }
  autofillWorks = await passkeys.canAutofill();
  if (!autofillWorks) byId("autofill-text").textContent = "This browser doesn't suggest passkeys in fields; the other two ways work without it.";
  if (!account) void armAutofill();
}

await start();
