"""Who may connect, which salts it may use, and which request ids are its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import msgspec

from async_cache.config import TenantConfig
from async_cache.errors import AccessDeniedError
from async_cache.values import LoadResult, LookupHits

Told = TypeVar("Told", LookupHits, LoadResult)


@dataclass(frozen=True)
class Tenant:
    """Those who share a token's rights. With `salts` None it may use all, and is trusted with digests and the arena."""

    name: str = ""
    salts: frozenset[str] | None = None

    @property
    def trusted(self) -> bool:
        """Whether it may see and name all that is cached."""
        return self.salts is None

    def may_use(self, salt: str) -> bool:
        """Whether a salt is its own."""
        return self.salts is None or salt in self.salts

    def check_salt(self, salt: str) -> None:
        """Check that a salt is its own. Raises AccessDeniedError."""
        if not self.may_use(salt):
            raise AccessDeniedError(f"the token is not for the salt {salt!r}")

    def check_trusted(self, what: str) -> None:
        """Check that it may do what touches all tenants. Raises AccessDeniedError."""
        if not self.trusted:
            raise AccessDeniedError(f"the token is bound to salts: it is not for {what}")


def tenant_of(request_id: str) -> str:
    """The name of the tenant whose request the cache knows by this id."""
    return request_id.partition("\0")[0]


class Scope:
    """The request ids of a tenant and namespace: in the cache they are longer, and so never meet those of others."""

    def __init__(self, tenant: Tenant, namespace: str):
        self._prefix = f"{tenant.name}\0{namespace}\0"  # no name has a control character

    def inner(self, request_id: str) -> str:
        """What the cache calls a request of this client."""
        return self._prefix + request_id

    def outer(self, told: Told) -> Told:
        """Hits or a result, with the request id that the client knows."""
        return msgspec.structs.replace(told, request_id=told.request_id[len(self._prefix) :])

    def hide(self, text: str) -> str:
        """A text for this client, in which the cache has named a request."""
        return text.replace(repr(self._prefix)[1:-1], "")


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
        """The tenant whose token this is. Raises AccessDeniedError.

        Without a token, a client is let in by its way: over the Unix socket, or anyhow if there are no tenants.
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
