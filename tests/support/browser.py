"""Headless Chromium, driven through its DevTools protocol: pages are tested as a person uses them.

    with Browser() as page:
        page.open("http://127.0.0.1:8000")
        page.type("#question", "What is this?")
        page.press("Enter")
        page.wait("document.querySelector('.answer').textContent")

It needs the program ``chromium`` (Debian: apt-get install chromium) or another of ``PROGRAMS``.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# As root, in a container without a GPU, and without asking anything but the page's server.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32, "ArrowRight": 39, "ArrowLeft": 37}


class Browser:
    """One page of a browser of its own.

    Attributes:
      errors: messages of errors and warnings on the page's console, exceptions of its scripts, requests that failed.
      requested: addresses of everything that the page has loaded.
    """

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            raise RuntimeError(f"this test needs a browser, one of {', '.join(PROGRAMS)}: apt-get install chromium")
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [program, *FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._loop, self._size = asyncio.new_event_loop(), (width, height)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._ids, self._waiting = itertools.count(1), dict[int, asyncio.Future]()
        self.errors: list[str] = []
        self.requested: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._connect())
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.send(f"{domain}.enable")
        self.resize(*self._size)
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _connect(self) -> None:
        file = Path(self._folder.name, "DevToolsActivePort")
        end = time.monotonic() + 60
        while not (file.exists() and file.read_text().count("\n")):
            assert self._process.poll() is None and time.monotonic() < end, "the browser did not start"
            await asyncio.sleep(0.05)
        port = file.read_text().split("\n")[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as reply:
            page = next(target for target in await reply.json() if target["type"] == "page")
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=2**28)
        self._reader = asyncio.ensure_future(self._read())

    async def _close(self) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._session.close()

    async def _read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._waiting.pop(data["id"]).set_result(data)
            else:
                self._note(data["method"], data["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))

    async def _send(self, method: str, params: dict[str, Any]) -> Any:
        number = next(self._ids)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await self._waiting[number]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        data = self._run(self._send(method, params))
        assert "error" not in data, (method, data)
        return data["result"]

    # -- what a person does -------------------------------------------------------------------------------------------

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page; a promise is awaited."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} did not come true"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'nearest'}})")
        box = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key of ``KEYS``; modifiers: 8 is Shift."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        event = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, modifiers=modifiers, **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **event)

    def choose_files(self, selector: str, *files: Path) -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def transfer(self, event: str, selector: str, png: bytes) -> None:
        """Drop or paste an image file on an element."""
        kind, key = ("ClipboardEvent", "clipboardData") if event == "paste" else ("DragEvent", "dataTransfer")
        self.evaluate(
            f"(() => {{ const bytes = Uint8Array.from(atob('{base64.b64encode(png).decode()}'), c => c.charCodeAt(0));"
            " const data = new DataTransfer(); data.items.add(new File([bytes], 'a.png', {type: 'image/png'}));"
            f" document.querySelector({json.dumps(selector)}).dispatchEvent("
            f" new {kind}('{event}', {{bubbles: true, cancelable: true, {key}: data}})); }})()"
        )

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
