"""Data sets and tokenizers of the Hugging Face hub."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from ddc.data.config import DataError

log = logging.getLogger(__name__)
#: Seconds in which the hub must answer; its own client would try again for half a minute.
PATIENCE = 5.0


def load_splits(path: str, name: str | None, splits: Sequence[str], otherwise: str) -> list[Any]:
    """The splits of a data set of the hub, from the cache where they are in it.

    Args:
        path: of the data set, OWNER/NAME.
        name: of one of its configurations; null for the only one.
        splits: their names.
        otherwise: what the message says of those who have no connection.

    Raises:
        DataError: they cannot be had.
    """
    try:
        give_up_where_unreachable()
        import datasets

        return [datasets.load_dataset(path, name, split=split) for split in splits]
    except Exception as error:  # the client fails in many ways: network, name, licence, version
        raise DataError(
            f"data.hub_path={path}: could not be loaded from the Hugging Face hub"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}). {otherwise}"
        ) from error


@functools.cache
def give_up_where_unreachable() -> None:
    """Tell the hub's client to work offline where the hub does not answer: what is not in its cache
    is then refused at once.
    """
    if os.environ.get("HF_HUB_OFFLINE") or "https" in urllib.request.getproxies():
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), PATIENCE).close()
    except OSError as error:
        log.warning("%s cannot be reached (%s): only what is cached", address.geturl(), error)
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module, key in (
            ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
            ("datasets.config", "HF_HUB_OFFLINE"),
        ):
            if module in sys.modules:  # has read the variable
                setattr(sys.modules[module], key, True)
