"""What our HTTP servers share.

requests     errors in OpenAI's shape, bodies with a limit, clients that leave
connections  how many there may be, their deadlines, and how much memory unfinished bodies may have
access       API keys, and what other web pages may ask for
process      socket, signals, start and end
"""

from kvferry.http.access import AccessRules
from kvferry.http.connections import ConnectionLimits
from kvferry.http.process import Server, bind_socket, run_until_signal, url_of
from kvferry.http.requests import (
    ERROR_HANDLERS,
    ApiError,
    EventStream,
    api_error,
    check_stops,
    load_object,
    read_body,
    unless_gone,
)

__all__ = [
    "ERROR_HANDLERS",
    "AccessRules",
    "ApiError",
    "ConnectionLimits",
    "EventStream",
    "Server",
    "api_error",
    "bind_socket",
    "check_stops",
    "load_object",
    "read_body",
    "run_until_signal",
    "unless_gone",
    "url_of",
]
