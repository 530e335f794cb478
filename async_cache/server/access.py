"""Who may connect, which salts it may use, and which request ids are its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from typing import NamedTuple, TypeVar

import msgspec

from async_cache.config import TenantConfig
from async_cache.errors import AccessDeniedError
from async_cache.values import LoadResult, LookupHits, SegmentHits, SegmentResult

Told = TypeVar("Told", LookupHits, LoadResult)


@dataclass(frozen=True)
class Tenant:
    """Those who share a token's rights. With `salts` None it may use all, and is trusted with digests and the arena."""

    name: str = ""
    salts: frozenset[str] | None = None
    role: str = "all"

    @property
    def trusted(self) -> bool:
        """Whether it may see and name all that is cached."""
        return self.salts is None

    @property
    def may_read(self) -> bool:
        """Whether its role is to read, among others or only."""
        return self.role in ("all", "read")

    @property
    def watches(self) -> bool:
        """Whether it is told what concerns all: how much is cached, and how the server is."""
        return self.trusted or self.role == "watch"

    def may_use(self, salt: str) -> bool:
        """Whether a salt is its own."""
        return self.salts is None or salt in self.salts

    def check_salt(self, salt: str) -> None:
        """Check that a salt is its own. Raises AccessDeniedError."""
        if not self.may_use(salt):
            raise AccessDeniedError(f"the token is not for the salt {salt!r}")

    def check_role(self, needed: str) -> None:
        """Check that it may "read", or "store", or "all". Raises AccessDeniedError."""
        if self.role not in ("all", needed):
            raise AccessDeniedError(f"the token is for a tenant that may only {self.role}")

    def check_trusted(self, what: str) -> None:
        """Check that it may do what touches all tenants. Raises AccessDeniedError."""
        if not self.trusted:
            raise AccessDeniedError(f"the token is bound to salts: it is not for {what}")


def tenant_of(request_id: str) -> str:
    """The name of the tenant whose request the cache knows by this id."""
    return request_id.partition("\0")[0]


def before_own_ids(tenant: Tenant) -> str:
    """What stands before the ids of requests that a server makes for a tenant: clients' have more before them."""
    return f"{tenant.name}\0"


class Scope:
    """The request ids of a tenant and namespace: in the cache they are longer, and so never meet those of others."""

    def __init__(self, tenant: Tenant, namespace: str):
        self._prefix = f"{tenant.name}\0{namespace}\0"  # no name has a control character

    def inner(self, request_id: str) -> str:
        """What the cache calls a request of this client."""
        return self._prefix + request_id

    def outer(self, told: Told) -> Told:
        """Hits or a result, with the request id that the client knows."""
        request_id = told.request_id[len(self._prefix) :]
        if isinstance(told, SegmentHits | SegmentResult):
            parts = tuple(msgspec.structs.replace(part, request_id=request_id) for part in told.parts)
            return msgspec.structs.replace(told, request_id=request_id, parts=parts)
        return msgspec.structs.replace(told, request_id=request_id)

    def hide(self, text: str) -> str:
        """A text for this client, in which the cache has named a request."""
        return text.replace(repr(self._prefix)[1:-1], "")


class Pass(NamedTuple):
    """By what a client was let in: the digest of its token, if it gave one, and its way."""

    digest: bytes | None
    over_unix: bool


class Access:
    """The tenants, by their tokens. Only digests of tokens are kept, and all of them are compared, in constant time."""

    def __init__(self, tenants: Mapping[str, TenantConfig]):
        self._tenants = _by_token(tenants)

    def replace(self, tenants: Mapping[str, TenantConfig]) -> None:
        """Let in by other tokens from now on."""
        self._tenants = _by_token(tenants)

    def admit(self, by: Pass) -> Tenant:
        """The tenant whose token this is. Raises AccessDeniedError.

        Without a token, a client is let in by its way: over the Unix socket, or anyhow if there are no tenants.
        """
        if by.digest is not None:
            found = [tenant for digest, tenant in self._tenants if compare_digest(digest, by.digest)]
            if not found:
                raise AccessDeniedError("the server does not know this token")
            return found[0]
        if self._tenants and not by.over_unix:
            raise AccessDeniedError("the server wants a token")
        return Tenant()


def pass_of(token: str | None, *, over_unix: bool) -> Pass:
    """By what a client asks to be let in."""
    return Pass(_digest(token) if token is not None else None, over_unix)


def _by_token(tenants: Mapping[str, TenantConfig]) -> list[tuple[bytes, Tenant]]:
    return [
        (_digest(token), Tenant(name, frozenset(config.salts) if config.salts is not None else None, config.role))
        for name, config in tenants.items()
        for token in config.tokens
    ]


def _digest(token: str) -> bytes:
    return sha256(token.encode(errors="surrogatepass")).digest()
