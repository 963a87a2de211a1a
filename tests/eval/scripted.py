"""Stands in for `vllm serve MODEL --host H --port P`: healthy, one model, and every reply `\\boxed{2}`. Requests are printed."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Chats(BaseHTTPRequestHandler):
    """A server of one model; what is said to a chat is for those that inherit to change."""

    model = "scripted"

    def reply(self, body: dict[str, Any]) -> str | None:
        """What is said; None closes the connection."""
        return "\\boxed{2}"

    def do_GET(self) -> None:
        self._send({"data": [{"id": self.model, "max_model_len": 32768}]})

    def do_POST(self) -> None:
        text = self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if text is None:
            self.connection.close()
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        head = {"id": "x", "object": "chat.completion", "created": 1, "model": self.model}
        self._send({**head, "choices": [choice], "usage": usage})

    def _send(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    Chats.model = sys.argv[2]
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Chats).serve_forever()
