"""Asks a connector's class, before there is an instance, so that an exception in it names the class and the hook."""

from __future__ import annotations

import logging
from typing import Any

from kvferry.errors import ContractError, KVFerryError

logger = logging.getLogger(__name__)


def ask_class(connector_class: type[Any], hook: str, *args: Any) -> Any:
    """The class's answer.

    An error of ours that the class raises on purpose is passed on. Any other exception is logged, and is the cause of
    a ContractError that names class, hook and exception.
    """
    try:
        return getattr(connector_class, hook)(*args)
    except KVFerryError:
        raise
    except Exception as err:
        where = f"{connector_class.__module__}.{connector_class.__qualname__}.{hook}"
        text = f"{where} raised {type(err).__name__}: {err}"
        logger.exception("%s", text)
        raise ContractError(f"{text}. Mend that class method, or configure another connector") from err
