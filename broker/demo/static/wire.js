/**
 * The sequence diagram of the calls between page, backend, broker and device.
 *
 * An exchange is one action of the visitor; its hops are the calls that it caused. The page reports its own calls. The backend
 * reports its calls to the broker in the `trace` of its answers. `watchFetch` reports the calls of the SDK. A site of yours needs
 * none of this.
 *
 * Text only: everything that comes from a visitor or a server is set as text, never as markup.
 */

const NAMES = { page: "This page", backend: "Its backend", broker: "Broker" };
const COLOURS = { transaction: "t-transaction", nonce: "t-nonce", "external id": "t-external" };

/** A possible token or id: base64url, hex, UUID. The backend shortens by the same rule. */
const TOKEN = /^[\w+/=.-]{20,}$/;
/** The outcomes of an exchange. */
const CUT = /^.{8}….{2}$/u;

/** Enough of a token to recognise it by, never enough to use it. @param {string} token */
export function short(token) {
  return token.length > 14 ? `${token.slice(0, 8)}…${token.slice(-2)}` : token;
}

/** A JSON value in which each text that may be a token or an id is cut. @param {any} value @returns {any} */
export function redacted(value) {
  if (typeof value === "string") return TOKEN.test(value) ? short(value) : value;
  if (Array.isArray(value)) return value.map(redacted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, redacted(inner)]));
}

/**
 * The call as a curl command. Shortened values, and secrets that no page has (API key, session), are placeholders.
 *
 * @param {{from: string, to: string, method: string, url: string, query?: Record<string, string>|null, body?: any}} call
 */
export function asCurl({ from, to, method, url, query, body }) {
  const place = (/** @type {string} */ name, /** @type {any} */ value) => (CUT.test(value) ? `<${name}>` : value);
  const asked = query ? `?${Object.entries(query).map(([name, value]) => `${name}=${place(name, value)}`).join("&")}` : "";
  const address = quoted(url.replace(/[^/]{8}…[^/]{2}/gu, "<id>") + asked);
  const lines = [`curl -X ${method} ${from === "backend" ? '"$BROKER_URL"' : ""}${address}`];
  if (from === "backend") lines.push('-H "Authorization: Bearer $BROKER_API_KEY"');
  else lines.push(`-H ${quoted(`Origin: ${location.origin}`)}`);
  const prefix = location.protocol === "https:" ? "__Host-" : "";
  if (to === "backend") lines.push(`-H "Cookie: ${prefix}demo_session=$SESSION"`);
  if (body) lines.push('-H "Content-Type: application/json"', `--data ${quoted(JSON.stringify(body, place))}`);
  return lines.join(" \\\n  ");
}

/** One word of a shell command. @param {string} text */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Copy a text, and say so on the button for a moment. @param {HTMLElement} button @param {string} text */
export async function copy(button, text) {
  const label = /** @type {Text} */ (button.lastChild);
  const before = (button.dataset.label ??= label.data);
  try {
    await navigator.clipboard.writeText(text);
    label.data = "Copied";
  } catch {
    label.data = "Not allowed";
  }
  setTimeout(() => (label.data = before), 1500);
}

/**
 * @param {string} tag
 * @param {string} [className]
 * @param {...(Node|string)} children
 */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export class Wire {
  /** @param {{flow: HTMLElement, empty: HTMLElement, clear: HTMLButtonElement}} parts */
  constructor({ flow, empty, clear }) {
    this.flow = flow;
    this.empty = empty;
    this.clear = clear;
    clear.addEventListener("click", () => {
      flow.replaceChildren(empty, ...flow.querySelectorAll(".quiet"));
      this.refresh();
      flow.focus();
    });
  }

  /**
   * Begin an exchange, and fold the earlier ones. An exchange that is not `open` stays hidden until it is shown.
   *
   * @param {string} title
   * @param {boolean} [open]
   */
  exchange(title, open = true) {
    if (open) this.#fold();
    const exchange = new Exchange(this, title, open);
    this.flow.append(exchange.details);
    this.refresh();
    return exchange;
  }

  /** Close every exchange but one. @param {HTMLDetailsElement} [kept] */
  #fold(kept) {
    for (const details of this.flow.querySelectorAll("details.exchange")) details.open = details === kept;
  }

  /** Show an exchange that began quietly, as the newest. @param {HTMLDetailsElement} details */
  raise(details) {
    details.classList.remove("quiet");
    this.refresh();
    this.flow.append(details);
    this.#fold(details);
  }

  refresh() {
    this.empty.hidden = this.flow.querySelector(".exchange:not(.quiet)") !== null;
    this.clear.disabled = !this.empty.hidden;
  }

  follow() {
    this.flow.scrollTop = this.flow.scrollHeight;
  }
}

class Exchange {
  #calls = 0;
  #outcome = "";
  /** The group of the next look-up. @type {HTMLElement|undefined} */
  #lookups;
  /** Called when the device has answered: from here the ceremony can't be cancelled. @type {(() => void)|undefined} */
  answered;
  /** True if the visitor cancelled the ceremony. */
  cancelled = false;

  /** @param {Wire} wire @param {string} title @param {boolean} open */
  constructor(wire, title, open) {
    const now = new Date();
    const time = /** @type {HTMLTimeElement} */ (element("time", "", now.toLocaleTimeString("en-GB")));
    time.dateTime = now.toISOString();
    this.wire = wire;
    this.heading = element("h3", "", title);
    this.sum = element("span", "sum");
    this.list = element("ol", "hops");
    this.details = /** @type {HTMLDetailsElement} */ (
      element("details", open ? "exchange" : "exchange quiet", element("summary", "", this.heading, element("span", "when", time, this.sum)), this.list)
    );
    this.details.open = open;
  }

  /**
   * Show a call; the returned function shows its answer. A GET goes into a folded group.
   *
   * @param {{from: "page"|"backend", to: "backend"|"broker", method: string, url: string, shown?: string, query?: Record<string, string>|null, facts?: Record<string, string>, body?: any}} call
   *   `url` for curl, `shown` for people; `body` with its tokens cut
   * @returns {(status: number|string, answer?: {facts?: Record<string, string>, body?: any, ms?: number}) => void}
   */
  call(call) {
    const { from, to, method, url, shown = url, facts = {}, body } = call;
    const list = method === "GET" ? this.#lookup() : this.list;
    if (list === this.list) this.#calls += 1;
    this.#count();
    const what = element("span", "what", element("span", "vh", `${NAMES[from]} to ${NAMES[to].toLowerCase()}: `));
    what.append(element("span", "method", method), " ", pathOf(shown));
    const button = element("button", "copy", drawing("copy"), "Copy as curl");
    button.setAttribute("type", "button");
    button.addEventListener("click", () => copy(button, asCurl(call)));
    const hop = element("li", `hop ${from}-${to} from-${from} pending`, opens(what, facts, body && json(body), button));
    this.#show(hop, list);
    return (status, { facts = {}, body, ms } = {}) => {
      hop.classList.remove("pending");
      const failed = typeof status !== "number" || status >= 400;
      const back = element("span", "what", element("span", "vh", `${NAMES[to]} to ${NAMES[from].toLowerCase()}: `));
      back.append(element("span", "method status", String(status)));
      if (ms !== undefined && ms !== null) back.append(" ", element("span", "ms", `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`));
      this.#show(element("li", `hop back ${from}-${to} from-${to}${failed ? " bad" : ""}`, opens(back, facts, body && json(body))), list);
    };
  }

  /** Show what the backend says it did. @param {string} app the app's path at the broker @param {Array<any>} trace */
  hops(app, trace) {
    for (const { method, path, query, status, ms, sent, got, body, answer } of trace) {
      const call = this.call({ from: "backend", to: "broker", method, url: app + path, shown: path, query, facts: sent, body });
      call(status, { facts: got, body: answer, ms });
    }
  }

  /** Show what the visitor's device does; the function returned replaces the words. @param {string} words */
  device(words) {
    const text = element("span", "", words);
    const note = element("li", "note", drawing("device"), text);
    this.#show(note);
    return (/** @type {string} */ words) => void (text.textContent = words);
  }

  /** @param {string} words */
  verdict(words) {
    this.#show(element("li", "verdict", words));
  }

  /** Show a hidden exchange as the newest. */
  open() {
    this.wire.raise(this.details);
  }

  /** @param {"done"|"stopped"|"failed"} outcome */
  end(outcome) {
    this.details.classList.toggle("bad", outcome === "failed");
    this.#outcome = outcome;
    this.#count();
  }

  /** Remove an exchange without a result. */
  discard() {
    this.details.remove();
    this.wire.refresh();
  }

  #count() {
    const calls = `${this.#calls} ${this.#calls === 1 ? "call" : "calls"}`;
    this.sum.textContent = this.#outcome ? `${calls}, ${this.#outcome}` : calls;
  }

  /** The list for a look-up: of the exchange's last group, or of a new one. */
  #lookup() {
    if (!this.#lookups || this.#lookups !== this.list.lastElementChild) {
      const summary = element("summary", "", "");
      this.#lookups = element("li", "lookups", element("details", "", summary, element("ol", "hops")));
      this.list.append(this.#lookups);
    }
    const list = /** @type {HTMLElement} */ (this.#lookups.querySelector("ol"));
    const count = list.querySelectorAll(".hop:not(.back)").length + 1;
    this.#lookups.querySelector("summary").textContent = count === 1 ? "1 look-up" : `${count} look-ups`;
    return list;
  }

  /** @param {Node} row @param {Element} [list] */
  #show(row, list = this.list) {
    list.append(row);
    this.wire.follow();
  }
}

/**
 * One line of the diagram, which opens to show its request and answer.
 *
 * @param {HTMLElement} what
 * @param {Record<string, string>} facts
 * @param {...(Node|undefined)} parts
 */
function opens(what, facts, ...parts) {
  const pairs = Object.entries(facts).filter(([, value]) => value !== "");
  const told = pairs.map(([name, value]) => element("span", "", `${name} `, element("span", `value ${COLOURS[name] ?? ""}`, value), " "));
  const arrow = element("span", "arrow");
  arrow.ariaHidden = "true";
  const summary = element("summary", "", what, " ", ...(told.length ? [element("span", "facts", ...told)] : []), arrow);
  const inside = parts.filter((part) => part !== undefined);
  return inside.length ? element("details", "", summary, element("div", "raw", ...inside)) : element("div", "summary", ...summary.childNodes);
}

/** @param {any} body */
function json(body) {
  const shown = element("pre", "", element("code", "", JSON.stringify(body, null, 2)));
  shown.tabIndex = 0;
  return shown;
}

/** A path that may break after its slashes. @param {string} path */
function pathOf(path) {
  const parts = path.split(/(?<=\/)/);
  return element("code", "", ...parts.flatMap((part) => [part, document.createElement("wbr")]));
}

/** One of our own drawings. @param {string} name */
export function drawing(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `/demo/static/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/**
 * Report the SDK's calls to the broker to the exchange that `current` returns when a call begins.
 *
 * @param {string} base path of the app's public API, like "/v1/apps/…"
 * @param {() => Exchange|undefined} current
 */
export function watchFetch(base, current) {
  const real = globalThis.fetch;
  /** @type {WeakMap<Exchange, (words: string) => void>} */
  const devices = new WeakMap();
  globalThis.fetch = async (resource, init) => {
    const exchange = current();
    const { href, pathname } = new URL(String(resource), location.href);
    if (!exchange || !pathname.startsWith(base)) return real(resource, init);
    const registering = pathname.includes("/register/");
    const ending = pathname.endsWith("/finish");
    const sent = JSON.parse(String(init?.body ?? "{}"));
    if (ending) {
      exchange.answered?.();
      devices.get(exchange)?.(registering ? "Your device made a passkey and signed the challenge." : "Your device signed the challenge.");
    }
    const transaction = sent.transaction_id ? short(sent.transaction_id) : ending ? "" : "none needed";
    const answered = exchange.call({
      from: "page",
      to: "broker",
      method: init?.method ?? "GET",
      url: href,
      shown: pathname.slice(base.length),
      facts: { transaction, ...(ending && { answer: "signed by the passkey" }) },
      body: redacted(sent),
    });
    const begun = performance.now();
    try {
      const response = await real(resource, init);
      const ms = performance.now() - begun;
      const got = await response.clone().json().catch(() => ({}));
      const facts = {
        ...(got.handshake && { challenge: short(got.handshake.challenge?.publicKey?.challenge ?? "") }),
        ...(got.nonce && { nonce: short(got.nonce) }),
        ...(got.code && { code: got.code }),
      };
      answered(response.status, { facts, body: redacted(got), ms });
      if (response.ok && !ending) devices.set(exchange, exchange.device(registering ? "Your device asks you to make a passkey." : "Your device asks which passkey to use."));
      return response;
    } catch (error) {
      answered("no answer");
      throw error;
    }
  };
  return {
    /** The device gave no answer. @param {Exchange} exchange @param {string} words */
    refused(exchange, words) {
      devices.get(exchange)?.(words);
    },
  };
}
