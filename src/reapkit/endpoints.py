"""Servers that speak OpenAI's chat completions: asking one, and saying plainly when it is not there or dies."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from reapkit.errors import EndpointError, UsageError

# Where a server wants a key, it is taken from here, so that none stands on a command line.
KEY_VARIABLE = "REAPKIT_API_KEY"
# A long chain of thought on a busy server takes minutes; a server that is gone is noticed at once whatever this is.
REPLY_SECONDS = 3600.0
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        url: the base, such as http://localhost:8000/v1.
        model: the name that the server gives it.
        max_length: tokens of prompt and reply that the server takes; None where it does not say.
    """

    url: str
    model: str
    max_length: int | None = None


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def require_no_secret(url: str) -> None:
    """Refuse an address with a user, a password or a query: addresses are shown and written, and none of these would be sent.

    Raises:
        UsageError: it has one; the address itself is not repeated.
    """
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"the address of {parts.netloc.rpartition('@')[2]} holds a user, a password or a query",
            hint=f"give it without; the server's key is read from the environment: {KEY_VARIABLE}",
        )


def connect(url: str) -> Endpoint:
    """The model behind a URL.

    Raises:
        UsageError: the address holds a user, a password or a query.
        EndpointError: nothing answers, or what answers serves no model or several.
    """
    require_no_secret(url)
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    answer = _exchange(f"{base}/models", None, seconds=CONNECT_SECONDS)
    served = answer.get("data") if isinstance(answer, Mapping) else None
    if (
        not isinstance(served, list)
        or not served
        or not all(isinstance(row, Mapping) and "id" in row for row in served)
    ):
        raise EndpointError(
            f"{url} lists no model", hint="give the base URL of an OpenAI-compatible server, which ends in /v1"
        )
    # A server may give one model several names, and adapters beside it: these name it as their root or parent.
    base_models = {row.get("root") or row["id"]: row for row in reversed(served) if not row.get("parent")}
    if len(base_models) > 1:
        raise EndpointError(f"{url} serves {len(base_models)} models: {', '.join(sorted(row['id'] for row in served))}",
                            hint="give a server that serves one")  # fmt: skip
    row = next(iter(base_models.values()), served[0])
    return Endpoint(base, row["id"], row.get("max_model_len"))


def complete(endpoint: Endpoint, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
    """One chat completion: the first choice and the usage of the server's answer, as it is.

    Args:
        endpoint: whom to ask.
        messages: the conversation so far.
        options: what else goes into the request, such as `temperature` and `tools`.

    Raises:
        EndpointError: the server is gone, refuses, or answers something else.
    """
    body = {"model": endpoint.model, "messages": list(messages), **options}
    answer = _exchange(f"{endpoint.url}/chat/completions", body, seconds=REPLY_SECONDS)
    try:
        return {"choice": answer["choices"][0], "usage": answer["usage"]}
    except (KeyError, IndexError, TypeError):
        raise EndpointError(
            f"{endpoint.url} answered a request for a chat with no completion: {json.dumps(answer)[:200]}"
        ) from None


def _exchange(url: str, body: Mapping[str, Any] | None, *, seconds: float) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=seconds) as stream:
            return json.loads(stream.read())
    except urllib.error.HTTPError as error:
        said = error.read(1000).decode(errors="replace").strip()
        hint = f"put the server's key into the environment: {KEY_VARIABLE}" if error.code in (401, 403) else None
        raise EndpointError(f"{url} answered {error.code} {error.reason}: {said}", hint=hint) from None
    except (OSError, HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise EndpointError(
            f"no server answers at {url}: {reason}", hint="look at the server's log; it may have died"
        ) from None
    except ValueError:
        raise EndpointError(f"{url} answered with something that is not JSON") from None
