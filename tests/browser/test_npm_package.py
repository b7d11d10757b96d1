"""`passkey-broker-browser`, the npm package of the page SDK: what it holds, its types, and its
bundles in a real Chromium.
"""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from broker import __version__
from tests.browser.chromium import Authenticator, Page
from tests.conftest import OpenApp, Started
from tests.sdk.npm import NAME, SDK, Project
from tests.support.signals import lines
from tests.support.wire import Wire

INDEX = """<!doctype html>
<title>Consumer</title>
<label>Name <input autocomplete="username webauthn"></label>
<script type="module" src="./ENTRY"></script>
"""
# Uses every name of the package. What must not compile stands below @ts-expect-error, which fails
# where it does compile.
CONSUMER = """
import {
  Passkeys,
  PasskeyError,
  type AppliedSignals,
  type AuthenticateOptions,
  type Capabilities,
  type PasskeyErrorCode,
  type RegisterOptions,
} from "passkey-broker-browser";

const place = new URLSearchParams(location.search);
const passkeys: Passkeys = new Passkeys(place.get("broker") ?? "", place.get("app") ?? "");

type Told = { nonce: string } | { code: PasskeyErrorCode; refusal: string | undefined };

function hint(code: PasskeyErrorCode): string {
  switch (code) {
    case "cancelled":
    case "unsupported":
    case "wrong_domain":
    case "not_supported_by_device":
    case "already_registered":
    case "refused":
    case "unavailable":
    case "network":
    case "aborted":
    case "invalid_argument":
      return code;
    default: {
      const nothing: never = code;
      return nothing;
    }
  }
}

async function told(ceremony: Promise<string>): Promise<Told> {
  try {
    return { nonce: await ceremony };
  } catch (error) {
    if (!(error instanceof PasskeyError)) throw error;
    const status: number | undefined = error.status;
    const retry: "page" | "backend" | undefined = error.retry;
    hint(error.code);
    return { code: error.code, refusal: status || retry ? error.refusal : undefined };
  }
}

const consumer = {
  register: (id: string, options?: RegisterOptions): Promise<Told> => told(passkeys.register(id, options)),
  authenticate: (options?: AuthenticateOptions): Promise<Told> => told(passkeys.authenticate(options)),
  signals: (ticket: string): Promise<AppliedSignals> => passkeys.applySignals("prune", ticket),
  async can(): Promise<[boolean, boolean, boolean | undefined]> {
    const capabilities: Capabilities = await passkeys.capabilities();
    const prf: boolean | undefined = capabilities["extension:prf"];
    return [await passkeys.canRegister(), await passkeys.canAutofill(), prf];
  },
};
Object.assign(window, { consumer, ready: true });

export async function mistakes(): Promise<void> {
  // @ts-expect-error
  await passkeys.register();
  // @ts-expect-error
  await passkeys.register("pbt_x", { autoRegister: "yes" });
  // @ts-expect-error
  await passkeys.authenticate("pbt_x");
  // @ts-expect-error
  await passkeys.authenticate({ transaction: "pbt_x" });
  // @ts-expect-error
  await passkeys.applySignals("remove", "pbs_x");
  // @ts-expect-error
  new Passkeys("https://broker.example");
  // @ts-expect-error
  new PasskeyError("strange");
}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(tmp_path_factory.mktemp("consumer"))
    project.write(main__ts=CONSUMER, index__html=INDEX.replace("ENTRY", "main.ts"))
    return project


def test_the_package_is_the_brokers_version_and_needs_nothing() -> None:
    package = json.loads((SDK / "package.json").read_text())
    assert (package["name"], package["version"]) == (NAME, __version__)
    assert package["type"] == "module"
    assert package["sideEffects"] is False
    assert not {"dependencies", "peerDependencies", "scripts", "bin"} & package.keys()
    assert (SDK / "LICENSE").read_bytes() == (SDK.parents[1] / "LICENSE").read_bytes()


def test_the_tarball_holds_the_module_and_its_types(project: Project) -> None:
    (packed,) = project.folder.glob("*.tgz")
    assert packed.name == f"{NAME}-{__version__}.tgz"
    with tarfile.open(packed) as tarball:
        names = {member.name.removeprefix("package/") for member in tarball.getmembers()}
    assert names == {"package.json", "passkey.js", "passkey.d.ts", "README.md", "LICENSE"}
    installed = project.folder / "node_modules" / NAME
    for name in names:
        assert (installed / name).read_bytes() == (SDK / name).read_bytes()


@pytest.mark.parametrize("resolution", ["bundler", "nodenext"])
def test_a_strict_consumer_compiles(project: Project, resolution: str) -> None:
    module = "esnext" if resolution == "bundler" else "nodenext"
    options = ("--module", module, "--moduleResolution", resolution, "--target", "es2022")
    assert project.tsc(*options, "--lib", "es2022,dom", "--skipLibCheck", "false", "main.ts") == ""


def test_a_bundler_leaves_out_what_is_not_used(project: Project) -> None:
    project.write(idle__js=f'import "{NAME}"; import * as all from "{NAME}"; console.log("idle");')
    assert project.esbuild("idle.js", "idle.out.js").decode().splitlines()[1:] == [
        'console.log("idle");'
    ]


def built(project: Project, bundler: str) -> Path:
    """The folder of the built site."""
    if bundler == "vite":
        return project.vite("vite")
    site = project.folder / "esbuild"
    project.esbuild("main.ts", "esbuild/main.js", "--minify")
    (site / "index.html").write_text(INDEX.replace("ENTRY", "main.js"))
    return site


@pytest.fixture(params=["esbuild", "vite"])
async def origin(request: pytest.FixtureRequest, project: Project) -> AsyncIterator[str]:
    """The origin of the bundled site."""
    app = web.Application()
    app.router.add_static("/", await asyncio.to_thread(built, project, request.param))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://localhost:{runner.addresses[0][1]}"
    await runner.cleanup()


async def redeemed(wire: Wire, told: dict[str, Any], **expected: str) -> None:
    assert list(told) == ["nonce"], told
    answer = await wire.redeem(told["nonce"], **expected)
    assert answer.status == 200, answer.body


async def test_the_bundle_registers_and_signs_in(
    broker: Started, page: Page, origin: str, open_app: OpenApp
) -> None:
    """Each way to sign in, a refusal with its codes, and that nothing but the broker is
    spoken to.
    """
    device: Authenticator = await asyncio.to_thread(page.authenticator)
    wire = await open_app(rp_id="localhost", origins=(origin,))
    await asyncio.to_thread(page.goto, f"{origin}/index.html?broker={wire.url}&app={wire.app_id}")
    await asyncio.to_thread(page.wait_until, "window.ready")

    async def js(call: str) -> Any:
        return await asyncio.to_thread(page.js, f"consumer.{call}")

    assert await js("can()") == [True, True, True]
    transaction = await wire.open_registration("ann")
    told = await js(f"register('{transaction}')")
    await redeemed(wire, told, purpose="register", transaction_id=transaction, external_id="ann")
    assert len(device.credentials()) == 1
    transaction = await wire.open_authentication("ann")
    calls = {f"{{transactionId: '{transaction}'}}": {"transaction_id": transaction}}
    calls |= {way: {} for way in ("", "{conditional: true}", "{immediate: true}")}
    for options, more in calls.items():
        told = await js(f"authenticate({options})")
        await redeemed(wire, told, purpose="authenticate", external_id="ann", **more)
    told = await js(f"register('pbt_{'a' * 43}')")
    assert told == {"code": "refused", "refusal": "transaction_not_found"}
    assert lines(broker, code="transaction_not_found", status=404)
    assert {request.url.split("/")[2] for request in page.requests if request.type == "Fetch"} == {
        wire.url.removeprefix("http://")
    }
