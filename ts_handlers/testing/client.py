"""TorchServe's inference, management and metrics APIs over HTTP; standard library only."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class TorchServeError(RuntimeError):
    """TorchServe did not do what was asked; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Response:
    """An HTTP answer: status, body and headers (names in lower case)."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def text(self) -> str:
        """The body as UTF-8; undecodable bytes are replaced."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body parsed as JSON."""
        return json.loads(self.body)


class Client:
    """The APIs of one TorchServe.

    Parameters
    ----------
    token_auth:
        Send the tokens that `token` gives.
    """

    def __init__(self, token_auth: bool) -> None:
        self.token_auth = token_auth
        self._urls: dict[str, str] = {}
        # Loopback must not go through a proxy that the environment configures.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def url(self, api: str = "inference") -> str:
        """Base address of the `inference`, `management` or `metrics` API."""
        return self._urls[api]

    def token(self, api: str = "inference") -> str:
        """The current token of the `inference`, `management` or `API` (token renewal) key."""
        raise NotImplementedError

    def predict(
        self,
        model: str,
        body: object,
        content_type: str | None = None,
        version: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> Response:
        """Send one prediction request; every HTTP status is returned, none raises.

        Parameters
        ----------
        body:
            Bytes as they are, a string as UTF-8, anything else as JSON.
        content_type:
            Default: application/octet-stream, text/plain or application/json, by the type of `body`.
        headers:
            Further request headers; one named Authorization replaces the token sent otherwise.

        Returns
        -------
        Response
            Status 0 when nobody answered; the body then holds the reason.
        """
        if isinstance(body, bytes):
            data, kind = body, "application/octet-stream"
        elif isinstance(body, str):
            data, kind = body.encode(), "text/plain"
        else:
            data, kind = json.dumps(body).encode(), "application/json"
        path = model_path("/predictions", model, version)
        merged = {"Content-Type": content_type or kind, **(headers or {})}
        return self._request("inference", "POST", path, data, merged, timeout)

    def status(self, model: str, version: str | None = None) -> list[dict[str, Any]]:
        """The management API's description of a model, one entry per version ("all" for every one)."""
        return self._management("GET", model_path("/models", model, version))  # type: ignore[no-any-return]

    def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """What the handler of one worker says about itself, parsed; the worker is TorchServe's choice."""
        entries = self._management("GET", model_path("/models", model, version), {"customized": "true"})
        parsed: Any = entries[0].get("customizedMetadata")
        while isinstance(parsed, (str, list)):
            if isinstance(parsed, list):
                parsed = parsed[0] if parsed else None
            else:
                try:
                    parsed = json.loads(parsed)
                except ValueError:
                    break
        if not isinstance(parsed, dict):
            raise self._error(f"{model}: the handler gave no description, but {parsed!r}")
        return parsed

    def register(self, url: str, **parameters: object) -> None:
        """Register an archive: file name in the model store, and TorchServe's parameters (`model_name`, ...).

        Workers start afterwards; use `wait_ready`. Default: `initial_workers=1`.
        """
        self._management("POST", "/models", {"url": url, "initial_workers": 1, "synchronous": "false", **parameters})

    def unregister(self, model: str, version: str | None = None) -> None:
        """Unregister a model, or one version of it."""
        self._management("DELETE", model_path("/models", model, version))

    def worker_pids(self, model: str, version: str | None = None) -> list[int]:
        """Process ids of the workers of a model."""
        return [int(w["pid"]) for entry in self.status(model, version) for w in entry["workers"]]

    def metrics(self) -> str:
        """The Prometheus text of the metrics API."""
        answer = self._request("metrics", "GET", "/metrics")
        if answer.status != 200:
            raise self._error(f"the metrics API answered {answer.status}: {answer.text}")
        return answer.text

    def _management(self, method: str, path: str, query: Mapping[str, object] | None = None) -> Any:
        if query:
            path += "?" + urllib.parse.urlencode({name: str(value) for name, value in query.items()})
        answer = self._request("management", method, path)
        if answer.status not in (200, 202):
            raise self._error(f"{method} {path} answered {answer.status}: {answer.text}")
        return answer.json()

    def _request(
        self,
        api: str,
        method: str,
        path: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> Response:
        """One HTTP exchange. Status 0: nobody answered."""
        merged = dict(headers or {})
        if self.token_auth and api != "metrics" and "Authorization" not in merged:
            with contextlib.suppress(OSError, ValueError, KeyError):
                merged["Authorization"] = f"Bearer {self.token(api)}"
        request = urllib.request.Request(self._urls[api] + path, data=data, headers=merged, method=method)
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return Response(answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()})
        except urllib.error.HTTPError as error:
            with error:
                return Response(error.code, error.read(), {k.lower(): v for k, v in error.headers.items()})
        except OSError as error:
            return Response(0, str(error).encode(), {})

    def _error(self, message: str) -> TorchServeError:
        return TorchServeError(message)


def model_path(prefix: str, model: str, version: str | None) -> str:
    """The path of a model, or of one version of it, below an API's prefix."""
    parts = [prefix, urllib.parse.quote(model, safe="")]
    return "/".join(parts if version is None else [*parts, urllib.parse.quote(version, safe="")])
