"""A local server that speaks the OpenAI chat completions API: scripted, streaming, failing, slow, and counting.

The script is a function of the request, so that the same conversation gets the same answers from any process and after any crash.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server says to a request.

    Attributes:
        text: Of the assistant.
        tools: Tool calls as (id, name, arguments).
        status: Other than 200 to fail with an error body.
        delay: Seconds before the answer.
        breaks_after: Chunks of a stream after which the connection breaks, or `None`.
    """

    text: str = ""
    tools: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    status: int = 200
    delay: float = 0
    breaks_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


Script = Callable[[dict[str, Any]], Answer]


class OpenAIServer:
    """The server; `requests` holds every request body it got, `base_url` is what a client takes."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a killed client is no error of the server
                    super().handle()

            def do_POST(self) -> None:
                owner._serve(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, name="openai-server", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._http.shutdown()
        self._http.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(request)
        number = len(request["messages"])  # told by the conversation, like all that is said
        answer = self.script(request)
        time.sleep(answer.delay)
        if answer.status != 200:
            error = {"error": {"message": f"status {answer.status}", "type": "scripted", "code": None}}
            _send(handler, answer.status, json.dumps(error).encode(), "application/json", answer.headers)
        elif request.get("stream"):
            _stream(handler, request, answer, number)
        else:
            body = json.dumps(_completion(request, answer, number)).encode()
            _send(handler, 200, body, "application/json", answer.headers)


def _completion(request: dict[str, Any], answer: Answer, number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None}
    if answer.tools:
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for call_id, name, arguments in answer.tools
        ]
    finish = "tool_calls" if answer.tools else "stop"
    return {
        "id": f"chatcmpl-{number}", "object": "chat.completion", "created": 1_700_000_000, "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": _usage(request, answer),
    }  # fmt: skip


def _usage(request: dict[str, Any], answer: Answer) -> dict[str, int]:
    asked = 10 * len(request["messages"])
    said = max(1, len(answer.text) // 4) + 5 * len(answer.tools)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _stream(handler: BaseHTTPRequestHandler, request: dict[str, Any], answer: Answer, number: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")  # so that a broken stream shows
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in re.findall(r"\S+\s*", answer.text)]
    for index, (call_id, name, arguments) in enumerate(answer.tools):
        function = {"name": name, "arguments": ""}
        deltas.append({"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]})
        deltas.append({"tool_calls": [{"index": index, "function": {"arguments": json.dumps(arguments)}}]})
    chunk = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": request["model"]}
    for sent, delta in enumerate(deltas):
        if answer.breaks_after is not None and sent >= answer.breaks_after:
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        _event(handler, {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    finish = "tool_calls" if answer.tools else "stop"
    _event(handler, {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    _event(handler, {**chunk, "choices": [], "usage": _usage(request, answer)})
    _chunk(handler, b"data: [DONE]\n\n")
    _chunk(handler, b"")


def _event(handler: BaseHTTPRequestHandler, data: dict[str, Any]) -> None:
    _chunk(handler, f"data: {json.dumps(data)}\n\n".encode())


def _chunk(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    handler.wfile.flush()


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
    handler.send_response(status)
    # A kept connection belongs to the event loop that made it; tests use a client in one loop after another.
    handler.close_connection = True
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@contextlib.contextmanager
def serving(script: Script) -> Iterator[OpenAIServer]:
    """A server for as long as the block lasts."""
    server = OpenAIServer(script)
    try:
        yield server
    finally:
        server.close()


def texts(request: dict[str, Any], role: str) -> list[str]:
    """What was said in a role, in order."""
    return [str(m.get("content")) for m in request["messages"] if m["role"] == role]
