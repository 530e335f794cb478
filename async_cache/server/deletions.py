"""To delete whole models: what that finds is of all, so each tenant has it done once at a time, for its own salts."""

import asyncio

import msgspec

from async_cache.core import Core
from async_cache.errors import LimitError
from async_cache.prompt.origin import Selection
from async_cache.server.access import Tenant
from async_cache.values import DeletedModel


class ModelDeletions:
    """Deletes models, revisions and adapters for those who ask, over connections and HTTP."""

    def __init__(self, core: Core):
        self._core = core
        self._running: dict[str, asyncio.Task[DeletedModel]] = {}  # by tenant

    def begin(
        self, tenant: Tenant, model: str, revision: str | None, adapter: str | None, salt: str | None
    ) -> "asyncio.Task[DeletedModel]":
        """Begin to delete what is of a model and of the tenant's salts. It goes on, whoever waits for it or not.

        Raises AccessDeniedError for another's salt, and LimitError where the tenant has one under way.
        """
        if salt is not None:
            tenant.check_salt(salt)
        if tenant.name in self._running:
            raise LimitError("deletions of models: 1 is under way, which is the limit")
        selection = Selection(model, revision, adapter, salt, tenant.may_use)
        task = self._running[tenant.name] = asyncio.create_task(self._core.remover.delete_model(selection))
        task.add_done_callback(lambda task: self._ended(tenant.name, task))
        return task

    def _ended(self, name: str, task: "asyncio.Task[DeletedModel]") -> None:
        del self._running[name]
        if not task.cancelled():
            task.exception()  # looked at, also where nobody waits any more


def told(tenant: Tenant, deleted: DeletedModel) -> DeletedModel:
    """What a tenant is told: of backends, whoever is bound to salts knows no more than that there are some."""
    return deleted if tenant.trusted else msgspec.structs.replace(deleted, unsure=("l2",) if deleted.unsure else ())
