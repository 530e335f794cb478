"""The files that TLS needs, and what the standard library makes of them."""

import ssl
from dataclasses import dataclass

from async_cache.errors import ConfigError


@dataclass(frozen=True)
class Certificates:
    """Paths of files in PEM: `cert` is one's own, with its `key` in the same file or its own; `ca` is the authority
    that the other end's has to be of.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""

    def server_context(self) -> ssl.SSLContext:
        """For a server, which asks clients for a certificate if there is a `ca`. Reads files. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options |= ssl.OP_NO_RENEGOTIATION
        try:
            self._load_own(context)
            if self.ca:
                context.load_verify_locations(self.ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        return context

    def client_context(self) -> ssl.SSLContext:
        """For a client, which trusts the system's authorities unless there is a `ca`. Reads files. Raises ConfigError.

        The certificate of the server has to be for the host of its address.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            if self.cert:
                self._load_own(context)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        return context

    def _load_own(self, context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.cert, self.key or None, _ask_nobody)

    def _unusable(self, error: Exception) -> ConfigError:
        files = ", ".join(filter(None, (self.cert, self.key, self.ca)))
        return ConfigError(f"the certificates {files or 'of the system'} cannot be used: {reason(error)}")


def reason(error: Exception) -> str:
    """Why TLS could not be spoken, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _ask_nobody() -> str:
    """There is nobody who could type it."""
    raise ValueError("the key is locked by a passphrase")
