"""`kvferry explain`: why a request's prefix was a hit or not, and what it waits for, asked of a running server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvferry.config import api_key_environment
from kvferry.errors import ConfigError, HostError

_TIMEOUT_S = 30.0


def explain(
    request_id: Annotated[
        str, typer.Argument(metavar="ID", help="`id` of a reply (cmpl-..., chatcmpl-...) or of one of its choices.")
    ],
    url: Annotated[
        str, typer.Option(help="URL of the `kvferry serve` that answered the request.")
    ] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's JSON instead of a table.")] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="API key of the server. By default the environment variable KVFERRY_API_KEY or VLLM_API_KEY.",
        ),
    ] = None,
) -> None:
    """Show why the prefix of a request was a hit or not.

    The answer goes tier by tier, and names what a waiting request waits for. The server knows the requests that run,
    and the last 256 that ended. The exit status is 2 when the server does not know the request.
    """
    answer = ask(url, request_id, api_key or api_key_environment())
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    console = Console()
    for request in answer["requests"]:
        print_request(request, console)


def ask(url: str, request_id: str, api_key: str | None = None) -> dict[str, Any]:
    """The server's answer. Raises HostError when it has none, ConfigError when there is no such server."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url={url!r} must begin with http:// or https://")
    address = f"{url.rstrip('/').removesuffix('/v1')}/debug/requests/{urllib.parse.quote(request_id, safe='')}"
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as err:
        raise HostError(_message(err, url)) from err
    except (OSError, ValueError, http.client.HTTPException) as err:
        raise ConfigError(f"no kvferry server answers at --url={url}: {err}") from err


def _message(err: urllib.error.HTTPError, url: str) -> str:
    try:
        error = json.load(err)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):
        message, code = f"the server answers {err.code} {err.reason}", None
    if err.code != 404 or code == "request_not_found":
        return message
    return f"{message}: give --url the `kvferry serve` that answered the request; what is at {url} cannot explain any"


def print_request(request: dict[str, Any], console: Console) -> None:
    """One request as a summary and a table of its ranges."""
    tokens, waits_for = request["tokens"], request["waits_for"]
    ended = f" ({request['finish_reason']})" if request["finish_reason"] else ""
    console.print(f"[bold]{request['request_id']}[/bold]: {request['state']}{ended}, {request['age_s']:.3f} s")
    if request["error"]:
        console.print(f"error: {request['error']}", markup=False)
    if waits_for:
        figures = ", ".join(f"{name} {value}" for name, value in waits_for.items() if name != "what")
        console.print(f"waits for: {waits_for['what']} ({figures})", markup=False)
    loaded = ", ".join(f"{num} from {source}" for source, num in tokens["from_connector"].items()) or "0"
    console.print(
        f"prompt {tokens['prompt']} tokens: {tokens['from_device']} in the engine's cache, loaded {loaded}, "
        f"{tokens['to_compute']} to compute"
    )
    table = Table("tokens", "KV is in", "loaded", "why", title=f"prefix, {request['asked']}", title_justify="left")
    for item in request["ranges"]:
        first, end = item["tokens"]
        group = f" (group {item['group']})" if "group" in item else ""
        connector = f"{item['connector']}: " if "connector" in item else ""
        is_loaded = "yes" if item["loaded"] else ""
        table.add_row(f"{first} to {end}", item["place"] + group, is_loaded, connector + item["reason"])
    console.print(table)
