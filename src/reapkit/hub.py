"""Repositories on the hub: what they hold, their small files, and byte ranges of the large ones.

Everything goes through huggingface_hub: its sessions, tokens, endpoint (`HF_ENDPOINT`), cache and file metadata. What it lacks and stands
here is reading a byte range that goes on where a connection broke. Signed addresses are credentials, so no message names one.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from reapkit.errors import CheckpointError, HubError
from reapkit.progress import Progress, silent

SCHEME = "hub://"
NO_COMMITS = (
    "what answers does not keep commits as they were: is HF_ENDPOINT the address of a hub, or of a mirror that does?"
)
RESUME = "repeat the command: it goes on where it stopped"
# Attempts without a single byte in between, and the seconds before each: half a minute in all, which outlasts a restart of a proxy
# and is short enough to be told soon. A connection that breaks after it brought something is taken up again at once.
WAITS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
# The longest that a rate limit is waited for; the hub's windows are five minutes.
LONGEST_WAIT = 330.0
# The most that the hub's listing may take to begin.
_ANSWER_SECONDS = 30.0
_TRANSIENT = {408, 429, 500, 502, 503, 504}
# What a signed address answers when its time is over: it is asked for anew.
_EXPIRED = {401, 403, 404, 410}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RepositoryFile:
    """One file as the hub lists it: its size, and its SHA-256 where it is a large one."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit.

    Attributes:
        name: `ORG/NAME`.
        revision: the commit, 40 hexadecimal digits.
        files: by path.
    """

    name: str
    revision: str
    files: Mapping[str, RepositoryFile]


def parse(text: str) -> tuple[str, str | None]:
    """Name and revision in `ORG/NAME`, `hub://ORG/NAME` or `hub://ORG/NAME@REVISION`."""
    name, separator, revision = text.removeprefix(SCHEME).partition("@")
    return (name, revision or None) if separator and text.startswith(SCHEME) else (text.removeprefix(SCHEME), None)


def find(name: str, *, revision: str | None = None) -> Repository:
    """Ask the hub for a repository: its commit and its files.

    Raises:
        HubError: no such repository or revision, no permission, or no hub to be reached; the latter is an `UnreachableError`.
    """
    from huggingface_hub import HfApi

    with explained(name, revision=revision):
        found = _persistently(
            lambda: HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_ANSWER_SECONDS)
        )
    files = {
        sibling.rfilename: RepositoryFile(sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in found.siblings or ()
    }
    if found.sha is None:
        raise HubError(f"the hub names no commit of {name}", hint="is HF_ENDPOINT the address of a hub?")
    return Repository(name, found.sha, files)


def cached(name: str, *, revision: str | None = None) -> Path | None:
    """The snapshot that earlier downloads left in the hub's cache, as whole as they left it; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def snapshot(repository: Repository, names: Sequence[str], *, progress: Progress = silent) -> Path:
    """The folder in the hub's cache that holds these files, those downloaded that are missing; other files may lie there too."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    name, revision = repository.name, repository.revision
    missing = [file for file in names if not isinstance(try_to_load_from_cache(name, file, revision=revision), str)]
    total, came, lock = sum(repository.files[file].size for file in missing), 0, threading.Lock()

    class Unseen(tqdm):
        """A bar that shows nothing; the one of all bytes that arrived tells `progress`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.pop("name", None) == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal came
            if self._counts and n:
                with lock:
                    came += int(n)
                    if came < total:
                        progress("small files", came, total, "B")

    patterns = [re.sub(r"([*?[])", r"[\1]", file) for file in names]
    with explained(name, revision=revision):
        folder: str = _persistently(
            lambda: snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=Unseen)
        )
    if absent := [file for file in names if not (Path(folder) / file).exists()]:
        raise HubError(
            f"{absent[0]} has moved: the hub gives it at another commit than {revision[:12]}", hint=NO_COMMITS
        )
    if total:
        progress("small files", total, total, "B")
    return Path(folder)


def _persistently(call: Callable[[], Answer]) -> Answer:
    """What a call of huggingface_hub returns, tried again after what may pass; ranges have a longer patience of their own."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    for wait in WAITS[1:3]:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _TRANSIENT:
                raise
            told = _told_wait(error.response)
        except (_transport_errors(), LocalEntryNotFoundError) as error:
            if isinstance(error.__cause__, OfflineModeIsEnabled):
                raise
            told = None
        if told is not None and told > LONGEST_WAIT:
            break
        time.sleep(wait if told is None else told)
    return call()


@dataclass
class Ranges:
    """Byte ranges of a repository's files; may be read by several threads.

    Attributes:
        repository: whose.
        moved: bytes received so far.
        seconds: that receiving them took, added up over threads.
    """

    repository: Repository
    moved: int = 0
    seconds: float = 0.0
    _locations: dict[str, _Location] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, file: str, start: int, stop: int, *, stopped: threading.Event | None = None) -> Iterator[bytes]:
        """The bytes of a range in pieces, in order; where a connection breaks, it goes on at the byte after the last.

        Args:
            stopped: set by whoever wants no more of it.

        Raises:
            HubError: the hub refuses, or gave not a byte in several attempts.
        """
        stopped = stopped or threading.Event()
        failures = 0
        while start < stop:
            try:
                for piece in self._attempt(file, start, stop):
                    if stopped.is_set():
                        raise HubError(f"reading {file} was stopped", hint=RESUME)
                    start += len(piece)
                    failures = 0
                    yield piece
            except _BrokenError as broken:
                failures += 1
                if failures == len(WAITS):
                    raise HubError(
                        f"{self.repository.name} did not give {file} in {failures} attempts: {broken.reason}",
                        hint=RESUME,
                    ) from None
                wait = WAITS[failures - 1] if broken.wait is None else broken.wait
                if wait > LONGEST_WAIT:
                    raise HubError(
                        f"the hub limits how much is asked of it, and says to wait {wait:,.0f} s", hint=RESUME
                    ) from None
                stopped.wait(wait)

    def _attempt(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        location = self._locate(file)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        headers |= build_hf_headers() if location.is_hub else {}
        began, left = time.monotonic(), stop - start
        try:
            with get_session().stream(
                "GET", location.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                self._check(response, location, file, start, stop)
                for piece in response.iter_raw():
                    if len(piece) > left:
                        raise HubError(f"the server sent more of {file} than the {stop - start:,} bytes asked for")
                    left -= len(piece)
                    with self._lock:
                        self.moved += len(piece)
                    yield piece
        except _network_errors() as error:
            raise _BrokenError(f"the connection broke ({type(error).__name__})") from None
        finally:
            with self._lock:
                self.seconds += time.monotonic() - began
        if left:
            raise _BrokenError(f"the connection ended {left:,} bytes early")

    def _check(self, response: Any, location: _Location, file: str, start: int, stop: int) -> None:
        """Raise unless the answer is the range that was asked for, of the file that was listed."""
        status, size = response.status_code, self.repository.files[file].size
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if status in _TRANSIENT:
            raise _BrokenError(f"the server answers {status}", wait=_told_wait(response))
        if status in _EXPIRED and not location.is_hub:
            self._locations.pop(file, None)
            raise _BrokenError(f"the storage behind the hub answers {status}")
        if status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            if match is None or int(match[1]) != start or int(match[2]) != stop - 1:
                raise HubError(
                    f"asked for the bytes {start:,} to {stop - 1:,} of {file}, the server gives "
                    f"{response.headers.get('Content-Range') or 'others'}",
                    hint="a proxy in between may not understand ranges: download the whole model, or go around the proxy",
                )
            if match[3] not in ("*", str(size)):
                raise HubError(f"{file} has {int(match[3]):,} bytes where the hub lists {size:,}", hint=RESUME)
            return
        if status == 200 and kind == "text/html":
            raise HubError(
                f"a web page came in place of {file}: a proxy, or a page to log in, stands in front of the hub",
                hint="open the hub in a browser from this machine, or set HTTPS_PROXY or HF_ENDPOINT; then " + RESUME,
            )
        if status == 200:
            if (start, stop) == (0, size):
                return
            raise HubError(
                f"the server sends {file} whole ({size:,} bytes) when asked for a part of it: it knows no ranges",
                hint="download the whole model (`hf download`), or use an endpoint that serves ranges",
            )
        if status == 416:
            raise HubError(f"{file} ends before byte {stop:,}: it is not the file of {size:,} bytes that the hub lists")
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        with explained(self.repository.name, revision=self.repository.revision):
            hf_raise_for_status(response)
        raise HubError(f"the server answers {status} when asked for {file}", hint=RESUME)

    def _locate(self, file: str) -> _Location:
        """Where the bytes of a file lie: the hub redirects to its storage, once for all ranges of a file."""
        with self._lock:
            location = self._locations.get(file)
        if location is None:
            location = self._ask(file)
            with self._lock:
                self._locations[file] = location
        return location

    def _ask(self, file: str) -> _Location:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import FileMetadataError, HfHubHTTPError

        name, revision = self.repository.name, self.repository.revision
        url = hf_hub_url(name, file, revision=revision)
        try:
            found = get_hf_file_metadata(url, token=None)
        except HfHubHTTPError as error:
            if error.response.status_code in _TRANSIENT:
                raise _BrokenError(
                    f"the hub answers {error.response.status_code}", wait=_told_wait(error.response)
                ) from None
            with explained(name, revision=revision):
                raise
            raise AssertionError("unreachable") from None
        except FileMetadataError as error:
            raise HubError(f"the hub says too little about {file}: {_plain(error)}") from None
        except _network_errors() as error:
            raise _BrokenError(f"the hub cannot be reached ({type(error).__name__})") from None
        if found.commit_hash is None:
            raise HubError(
                f"what answers for {file} does not name a commit, so it is no hub: a proxy, or a page to log in",
                hint="set HTTPS_PROXY or HF_ENDPOINT; then " + RESUME,
            )
        listed = self.repository.files[file]
        if found.commit_hash != revision or found.size not in (None, listed.size):
            raise HubError(
                f"{file} has moved: the hub gives it at {found.commit_hash[:12]} with {found.size or 0:,} bytes, and "
                f"{revision[:12]} with {listed.size:,} was asked for",
                hint=NO_COMMITS,
            )
        return _Location(found.location, urlsplit(found.location)[:2] == urlsplit(url)[:2])


@dataclass(frozen=True)
class _Location:
    """An address, and whether the hub itself serves it: the token goes there and nowhere else."""

    url: str
    is_hub: bool


class _BrokenError(Exception):
    """An attempt that another one may cure; `wait` is how long the server said to wait."""

    def __init__(self, reason: str, *, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


def _told_wait(response: Any) -> float | None:
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    told = response.headers.get("Retry-After", "").strip()
    return float(told) if told.isdigit() else None


def _network_errors() -> tuple[type[BaseException], ...]:
    """What a request may fail with: the base that huggingface_hub's own errors have from its HTTP library, whatever its name."""
    from huggingface_hub.errors import HfHubHTTPError

    # A session that another thread closed after an error of its own answers with a RuntimeError.
    return HfHubHTTPError.__bases__[0], OSError, RuntimeError


@contextmanager
def explained(name: str, *, revision: str | None = None) -> Iterator[None]:
    """Turn whatever huggingface_hub raises about a repository into one sentence and a way out.

    Raises:
        HubError: an `UnreachableError` where no hub answered at all.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with _without_signatures():
            yield
    except HFValidationError:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a name that the hub knows",
            hint="give a checkpoint's folder or a hub id like ORG/NAME",
        ) from None
    except GatedRepoError:
        if get_token() is None:
            raise HubError(
                f"{name} is gated, and there is no token",
                hint="accept its terms on the hub's page, then `hf auth login` (or set HF_TOKEN)",
            ) from None
        raise HubError(
            f"{name} is gated, and the account of the token has no access to it",
            hint="accept its terms on the hub's page with that account, or log in with another: `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        known = get_token() is not None
        raise HubError(
            f"the hub has no repository {name}, or it is private and "
            + ("the token does not open it" if known else "there is no token"),
            hint="check the name; "
            + ("log in with an account that may read it" if known else "log in")
            + ": `hf auth login` (or set HF_TOKEN)",
        ) from None
    except RevisionNotFoundError:
        raise HubError(
            f"{name} has no revision {revision}, or has it no more",
            hint="give a branch, tag or commit that the hub's page shows under History",
        ) from None
    except DisabledRepoError:
        raise HubError(f"the hub has disabled {name}") from None
    except OfflineModeIsEnabled:
        raise UnreachableError(
            f"{name} is not in the hub's cache as a whole, and HF_HUB_OFFLINE forbids asking the hub",
            hint="unset HF_HUB_OFFLINE, or download the model where there is a network",
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429:
            wait = _told_wait(error.response)
            told = "" if wait is None else f" for the next {wait:,.0f} s"
            raise HubError(f"the hub limits how much is asked of it{told}", hint=f"wait, then {RESUME}") from None
        if status in (401, 403):
            raise HubError(
                f"the hub answers {status} about {name}: the token is wrong, expired or lacks this permission",
                hint="`hf auth login` with a token that may read it (or set HF_TOKEN)",
            ) from None
        if isinstance(error, EntryNotFoundError):
            raise HubError(f"{name} has no such file at {revision}") from None
        raise HubError(f"the hub answers {status} about {name}", hint=RESUME) from None
    except json.JSONDecodeError:
        raise HubError(
            f"what answers for {name} is no hub: a proxy, or a page to log in, stands in front of it",
            hint="open the hub in a browser from this machine, or set HTTPS_PROXY or HF_ENDPOINT",
        ) from None
    except LocalEntryNotFoundError as error:
        raise UnreachableError(
            f"files of {name} cannot be had: {_plain(error)}",
            hint="check the network, HF_ENDPOINT and proxies; then " + RESUME,
        ) from None
    except _transport_errors() as error:
        raise UnreachableError(
            f"the hub cannot be reached ({type(error).__name__})",
            hint="check the network, HF_ENDPOINT and proxies; then " + RESUME,
        ) from None
    except OSError as error:
        raise HubError(
            f"{name} cannot be had from the hub: {error.strerror or _plain(error)}",
            hint="is there space in the hub's cache (HF_HOME), and may it be written to? then " + RESUME,
        ) from None


class UnreachableError(HubError):
    """No hub answered: what the cache has may still serve."""


def _transport_errors() -> type[BaseException]:
    from huggingface_hub.errors import HfHubHTTPError

    base: type[BaseException] = HfHubHTTPError.__bases__[0]
    return base


@contextmanager
def _without_signatures() -> Iterator[None]:
    """While huggingface_hub works, cut from what it logs whatever signs an address: for its time it is as good as a token."""

    def cut(record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"(\w+://[^\s?]+)\?\S+", r"\1", record.getMessage()), ()
        return True

    handlers = {*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers}
    for handler in handlers:
        handler.addFilter(cut)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(cut)


def _plain(error: BaseException) -> str:
    """The first line of a foreign error without addresses, which may be signed."""
    lines = str(error).strip().splitlines()
    return re.sub(r"\w+://\S+", "an address", lines[0]) if lines else type(error).__name__
