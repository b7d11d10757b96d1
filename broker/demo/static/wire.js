/**
 * The sequence diagram that grows: who called whom, with what, and what came back.
 *
 * An exchange is one thing the visitor did; its hops are the calls it caused. The page reports its own calls as it makes them,
 * the backend tells of its calls to the broker in the `trace` of its answers, and the calls that the SDK makes are seen by
 * `watchFetch`, which is the one thing here that a site of yours has no need for.
 *
 * Text only: everything that comes from a visitor or a server is set as text, never as markup.
 */

const NAMES = { page: "This page", backend: "Its backend", broker: "Broker" };
const COLOURS = { transaction: "t-transaction", nonce: "t-nonce", "external id": "t-external" };

/** Enough of a token to recognise it by, never enough to use it. @param {string} token */
export function short(token) {
  return token.length > 14 ? `${token.slice(0, 8)}…${token.slice(-2)}` : token;
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
   * Begin to show one thing that the visitor did; what came before is folded. What is not `open` waits quietly in the background.
   *
   * @param {string} title
   * @param {boolean} [open]
   */
  exchange(title, open = true) {
    if (open) this.flow.querySelectorAll("details").forEach((details) => (details.open = false));
    const exchange = new Exchange(this, title, open);
    this.flow.append(exchange.details);
    this.refresh();
    return exchange;
  }

  refresh() {
    this.empty.hidden = this.flow.querySelector("details:not(.quiet)") !== null;
    this.clear.disabled = !this.empty.hidden;
  }

  follow() {
    this.flow.scrollTop = this.flow.scrollHeight;
  }
}

class Exchange {
  #calls = 0;

  /** @param {Wire} wire @param {string} title @param {boolean} open */
  constructor(wire, title, open) {
    this.wire = wire;
    this.heading = element("h3", "", title);
    this.sum = element("span", "sum");
    this.list = element("ol", "hops");
    this.details = /** @type {HTMLDetailsElement} */ (
      element("details", open ? "exchange" : "exchange quiet", element("summary", "", this.heading, this.sum), this.list)
    );
    this.details.open = open;
  }

  /**
   * Show a call; the function returned shows its answer.
   *
   * @param {"page"|"backend"} from
   * @param {"backend"|"broker"} to
   * @param {string} method
   * @param {string} path
   * @param {Record<string, string>} [facts]
   * @returns {(status: number|string, facts?: Record<string, string>) => void}
   */
  call(from, to, method, path, facts = {}) {
    this.#calls += 1;
    this.sum.textContent = `${this.#calls} ${this.#calls === 1 ? "call" : "calls"}`;
    const what = element("p", "what", element("span", "vh", `${NAMES[from]} to ${NAMES[to].toLowerCase()}: `));
    what.append(element("span", "method", method), " ", pathOf(path));
    const hop = element("li", `hop ${from}-${to} from-${from} waiting`, what, ...written(facts), arrow());
    this.#show(hop);
    return (status, got = {}) => {
      hop.classList.remove("waiting");
      const failed = typeof status !== "number" || status >= 400;
      const back = element("p", "what", element("span", "vh", `${NAMES[to]} to ${NAMES[from].toLowerCase()}: `));
      back.append(element("span", "method status", String(status)));
      this.#show(element("li", `hop back ${from}-${to} from-${to}${failed ? " bad" : ""}`, back, ...written(got), arrow()));
    };
  }

  /** Show what the backend says it did. @param {Array<any>} trace */
  hops(trace) {
    for (const { method, path, status, sent, got } of trace) this.call("backend", "broker", method, path, sent)(status, got);
  }

  /** Show what the visitor's device does; the function returned replaces the words. @param {string} words */
  device(words) {
    const text = element("span", "", words);
    const note = element("li", "note", drawing("device"), text);
    this.#show(note);
    return (/** @type {string} */ words, bad = false) => {
      text.textContent = words;
      note.classList.toggle("bad", bad);
    };
  }

  /** @param {string} words */
  verdict(words) {
    this.#show(element("li", "verdict", words));
  }

  /** Show an exchange that began folded, as the newest. */
  open() {
    this.details.classList.remove("quiet");
    this.wire.refresh();
    this.wire.flow.append(this.details);
    this.wire.flow.querySelectorAll("details").forEach((details) => (details.open = details === this.details));
  }

  /** @param {boolean} good */
  end(good) {
    this.details.classList.toggle("bad", !good);
    this.sum.textContent += good ? ", done" : ", stopped";
  }

  /** Forget an exchange that came to nothing. */
  discard() {
    this.details.remove();
    this.wire.refresh();
  }

  /** @param {Node} row */
  #show(row) {
    this.list.append(row);
    this.wire.follow();
  }
}

/** @param {Record<string, string>} facts */
function written(facts) {
  const pairs = Object.entries(facts).filter(([, value]) => value !== "");
  if (!pairs.length) return [];
  const rows = pairs.map(([name, value]) => element("div", "", element("dt", "", name), element("dd", COLOURS[name] ?? "", value)));
  return [element("dl", "facts", ...rows)];
}

/** A path that may break after its slashes. @param {string} path */
function pathOf(path) {
  const parts = path.split(/(?<=\/)/);
  return element("code", "", ...parts.flatMap((part) => [part, document.createElement("wbr")]));
}

function arrow() {
  const line = element("div", "arrow");
  line.ariaHidden = "true";
  return line;
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
 * Report the SDK's calls to the broker to whichever exchange `current` names when a call begins.
 *
 * @param {string} base path of the app's public API, like "/v1/apps/…"
 * @param {() => Exchange|undefined} current
 */
export function watchFetch(base, current) {
  const real = globalThis.fetch;
  /** @type {WeakMap<Exchange, (words: string, bad?: boolean) => void>} */
  const devices = new WeakMap();
  globalThis.fetch = async (resource, init) => {
    const exchange = current();
    const { pathname } = new URL(String(resource), location.href);
    if (!exchange || !pathname.startsWith(base)) return real(resource, init);
    const registering = pathname.includes("/register/");
    const ending = pathname.endsWith("/finish");
    const sent = JSON.parse(String(init?.body ?? "{}"));
    if (ending) devices.get(exchange)?.(registering ? "Your device made a passkey and signed the challenge." : "Your device signed the challenge.");
    const transaction = sent.transaction_id ? short(sent.transaction_id) : ending ? "" : "none needed";
    const answered = exchange.call("page", "broker", init?.method ?? "GET", pathname.slice(base.length), {
      transaction,
      ...(ending && { answer: "signed by the passkey" }),
    });
    try {
      const response = await real(resource, init);
      const got = await response.clone().json().catch(() => ({}));
      answered(response.status, {
        ...(got.handshake && { challenge: short(got.handshake.challenge?.publicKey?.challenge ?? "") }),
        ...(got.nonce && { nonce: short(got.nonce) }),
        ...(got.code && { code: got.code }),
      });
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
      devices.get(exchange)?.(words, true);
    },
  };
}
