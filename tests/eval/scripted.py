"""Stands in for `vllm serve MODEL --host H --port P`: healthy, one model, and every reply `\\boxed{2}`. Requests are printed."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = sys.argv[1:]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send({"data": [{"id": WORDS[1], "max_model_len": 32768}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "\\boxed{2}"},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        head = {"id": "x", "object": "chat.completion", "created": 1, "model": WORDS[1]}
        self._send({**head, "choices": [choice], "usage": usage})

    def _send(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    port = int(WORDS[WORDS.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
