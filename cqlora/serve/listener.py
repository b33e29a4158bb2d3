"""Where the server stands: its address, and the key that any address but a loopback one demands."""

import ipaddress
import os
import socket

from cqlora.errors import ConfigError

KEY_VARIABLE = "CQLORA_API_KEY"
_SHORTEST_KEY = 16


def read_key(host: str) -> str:
    """The API key of the environment, or "" where none is set and none is needed.

    Raises:
        ConfigError: the address can be reached from elsewhere and there is no key, or one that can be guessed.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if not key and not is_loopback(host):
        raise ConfigError(
            f"host={host} can be reached from other machines and {KEY_VARIABLE} is not set in the environment; "
            "set it to a long random string, or leave host=127.0.0.1."
        )
    if key and (len(key) < _SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key):
        raise ConfigError(
            f"{KEY_VARIABLE} has {len(key)} characters; give {_SHORTEST_KEY} or more printable ASCII ones without "
            "spaces, such as `openssl rand -hex 32` prints."
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, an address or `localhost`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; it does not listen yet, so that nobody waits while the model loads.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host={host} is no address ({error.strerror}); give host=127.0.0.1.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"host={host} port={port} cannot be listened on ({error.strerror}); give another port=, or 0."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The address as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
