"""Who may connect, and which salts it may use."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from async_cache.config import TenantConfig
from async_cache.errors import AccessDeniedError


@dataclass(frozen=True)
class Tenant:
    """Those who share request ids. `salts` None: it may use all, and is trusted with digests and the arena."""

    name: str = ""
    salts: frozenset[str] | None = None

    @property
    def trusted(self) -> bool:
        """Whether it may see and name all that is cached."""
        return self.salts is None

    def check_salt(self, salt: str) -> None:
        """Raises AccessDeniedError for a salt of others."""
        if self.salts is not None and salt not in self.salts:
            raise AccessDeniedError(f"the token is not for the salt {salt!r}")

    def check_trusted(self, what: str) -> None:
        """Raises AccessDeniedError for what touches all tenants."""
        if not self.trusted:
            raise AccessDeniedError(f"the token is bound to salts: it is not for {what}")


class Access:
    """The tenants, by their tokens. Only digests of tokens are kept and compared."""

    def __init__(self, tenants: Mapping[str, TenantConfig]):
        self._wants_token = bool(tenants)
        self._by_digest = {
            _digest(token): Tenant(name, frozenset(config.salts) if config.salts is not None else None)
            for name, config in tenants.items()
            for token in config.tokens
        }

    def admit(self, token: str | None, *, over_unix: bool) -> Tenant:
        """Whose token it is. Without one: whoever may open the Unix socket, or anybody if there are no tenants.

        Raises AccessDeniedError.
        """
        if token is not None:
            tenant = self._by_digest.get(_digest(token))
            if tenant is None:
                raise AccessDeniedError("the server does not know this token")
            return tenant
        if self._wants_token and not over_unix:
            raise AccessDeniedError("the server wants a token")
        return Tenant()


def _digest(token: str) -> bytes:
    return sha256(token.encode(errors="surrogatepass")).digest()
