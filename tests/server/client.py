"""Someone who uses ComfyUI over HTTP and its websocket, as the browser does."""

from __future__ import annotations

import io
import json
import queue
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import websocket
from comfy_server import Server
from PIL import Image

TEXT, PREVIEW = 3, 4
"""Binary events of ComfyUI's protocol."""
ENDS = {"execution_success", "execution_error", "execution_interrupted"}
PATIENCE = 300.0
"""Seconds without a single message after which a test gives up."""


@dataclass(frozen=True)
class Event:
    """A message of the websocket, with the moment of its arrival. data: JSON, or a line of text."""

    at: float
    kind: str
    data: Any
    picture: bytes = b""


class RefusedError(Exception):
    """POST /prompt said no. The answer is what the browser shows."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer, ensure_ascii=False))
        self.answer = answer


class Client:
    """One user with one websocket."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = uuid.uuid4().hex
        self._socket = websocket.create_connection(
            f"ws://127.0.0.1:{server.port}/ws?clientId={self.name}", timeout=PATIENCE
        )
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        self._socket.send(json.dumps(flags))
        self._events: queue.Queue[Event] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _listen(self) -> None:
        # A thread of its own: the moments of arrival do not depend on what the test does meanwhile.
        try:
            while message := self._socket.recv():
                self._events.put(_read(message, time.monotonic()))
        except (websocket.WebSocketException, OSError):
            pass

    def post(self, route: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.server.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt, return its id. Raises RefusedError with the server's answer."""
        try:
            return str(self.post("/prompt", {"prompt": prompt, "client_id": self.name})["prompt_id"])
        except urllib.error.HTTPError as error:
            raise RefusedError(json.loads(error.read())) from None

    def events(self, prompt_id: str) -> Iterator[Event]:
        """Yield what arrives until the prompt ends, its end included."""
        while True:
            event = self._events.get(timeout=PATIENCE)
            yield event
            if event.kind in ENDS and event.data["prompt_id"] == prompt_id:
                return

    def run(self, prompt: dict[str, Any]) -> Run:
        """Run a prompt to its end, whatever that is."""
        return self.follow(self.queue(prompt))

    def follow(self, prompt_id: str, at: Callable[[Event], None] = lambda event: None) -> Run:
        """Wait for a prompt's end; `at` sees every event as it comes."""
        events = []
        for event in self.events(prompt_id):
            events.append(event)
            at(event)
        return Run(self, prompt_id, events)

    def alive(self, *, collect: bool = False) -> dict[str, int]:
        """Say what lives in the server's process."""
        return dict(self.server.get("/star_test/alive" + ("?collect=1" if collect else "")))

    def rest(self) -> None:
        """Wait until the worker waits for prompts again.

        It says that a prompt has ended while it is still inside it. A /free at that moment is done on the spot,
        with the prompt's results still in its hands, and not again before the next one.
        """
        end = time.monotonic() + 20
        while self.server.get("/prompt")["exec_info"]["queue_remaining"] and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)

    def free(self) -> dict[str, int]:
        """Do what the browser's button does, and wait until the server has done it; return what lives on."""
        self.rest()
        self.post("/free", {"unload_models": True, "free_memory": True})
        # The server collects garbage once, there and then. Looking at what lives holds everything for a moment:
        # what is looked at during the collection survives it. So look seldom.
        end = time.monotonic() + 40
        while True:
            time.sleep(3)
            left = self.alive()
            if not left["Networks"] or time.monotonic() > end:
                break
        return left


@dataclass(frozen=True)
class Run:
    """A prompt that has ended."""

    client: Client
    prompt_id: str
    events: list[Event]

    @property
    def ended(self) -> str:
        return self.events[-1].kind

    @property
    def texts(self) -> list[str]:
        """What was written into the sampling node."""
        return [e.data[1] for e in self.events if e.kind == "text" and e.data[0] == "sample"]

    @property
    def history(self) -> dict[str, Any]:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            record = self.client.server.get(f"/history/{self.prompt_id}")
            if self.prompt_id in record:
                return dict(record[self.prompt_id])
            time.sleep(0.05)
        raise TimeoutError(f"no history of {self.prompt_id}")

    def files(self) -> list[bytes]:
        """Fetch the saved pictures."""
        history = self.history
        assert history["status"]["status_str"] == "success", json.dumps(history["status"])[-3000:]
        files = []
        for place in history["outputs"]["save"]["images"]:
            with urllib.request.urlopen(
                f"{self.client.server.url}/view?{urllib.parse.urlencode(place)}", timeout=60
            ) as answer:
                files.append(answer.read())
        return files

    def pictures(self) -> list[bytes]:
        """Return the pixels of the saved pictures."""
        return [Image.open(io.BytesIO(file)).convert("RGB").tobytes() for file in self.files()]


def _read(message: str | bytes, at: float) -> Event:
    if isinstance(message, str):
        content = json.loads(message)
        return Event(at, content["type"], content.get("data"))
    (kind,) = struct.unpack(">I", message[:4])
    if kind not in (TEXT, PREVIEW):
        return Event(at, f"binary {kind}", None)
    (length,) = struct.unpack(">I", message[4:8])
    head, rest = message[8 : 8 + length].decode(), message[8 + length :]
    if kind == TEXT:
        return Event(at, "text", (head, rest.decode()))
    return Event(at, "preview", json.loads(head), rest)
