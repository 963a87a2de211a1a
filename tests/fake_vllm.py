"""A stand-in for `vllm serve`: answers on its port, forks a child that never ends, and misbehaves as its environment asks.

Its child ignores SIGTERM, and one more leaves the process group and the session. The environment:
FAKE_PIDS names a file for the process ids; FAKE_FAILS says "start" (ends at once), "later" (ends after it was healthy), "never" (never
healthy), "deaf" (ignores SIGTERM); FAKE_GREEDY names a file with a JSON list of token ids for each prompt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAILS = os.environ.get("FAKE_FAILS", "")
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    """Enough of the protocol of OpenAI's API."""

    def do_GET(self) -> None:
        if self.path == "/health":
            if FAILS == "later":
                threading.Timer(0.7, lambda: os._exit(9)).start()
            self.answer({})
        else:
            self.answer({"data": [{"id": "fake", "max_model_len": 512}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("chat/completions"):
            self.answer({"choices": [{"message": chat(asked)}]})
            return
        prompt = asked["prompt"]
        count = len(prompt) if isinstance(prompt, list) else prompt.count(" one") or len(prompt.split())
        choice: dict[str, Any] = {"text": " Paris"}
        if "FAKE_GREEDY" in os.environ:
            choice["token_ids"] = json.loads(Path(os.environ["FAKE_GREEDY"]).read_text())[json.dumps(prompt)]
        self.answer({"choices": [choice], "usage": {"prompt_tokens": count}})

    def answer(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def chat(asked: dict[str, Any]) -> dict[str, Any]:
    if "tools" not in asked:
        return {"content": "" if FAILS == "mute" else "Hello."}
    if FAILS == "unparsed":
        return {"content": "<minimax:tool_call>get_weather"}
    if FAILS == "words":
        return {"content": "It is sunny."}
    arguments = "{" if FAILS == "garbled" else '{"city": "Paris"}'
    return {"content": None, "tool_calls": [{"function": {"name": "get_weather", "arguments": arguments}}]}


def main() -> None:
    print("fake: loading", *sys.argv[1:], flush=True)
    children = [subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=own) for own in (False, True)]
    if "FAKE_PIDS" in os.environ:
        Path(os.environ["FAKE_PIDS"]).write_text(
            " ".join(str(process) for process in (os.getpid(), *(child.pid for child in children)))
        )
    if FAILS == "start":
        print("ValueError: no kernel for this card", flush=True)
        time.sleep(0.6)  # so that its children can be seen
        sys.exit(7)
    if FAILS == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if FAILS == "never":
        time.sleep(600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    print("fake: ready", flush=True)
    ThreadingHTTPServer((sys.argv[sys.argv.index("--host") + 1], port), Handler).serve_forever()


if __name__ == "__main__":
    main()
