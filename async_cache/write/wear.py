"""What is left of a backend's budget of writes is noted in that backend, so that a restart gives nothing back."""

import logging
import time

from async_cache.errors import BackendError
from async_cache.l2.guard import Guard

log = logging.getLogger(__name__)

_NAME = "budget"


async def recall_budget(guard: Guard) -> None:
    """Go on with what was left when the backend was used last, where it has kept that.

    It is to be called again and again: where the backend could not be asked, it is when it can.
    """
    budget = guard.budget
    if budget is not None and not budget.is_recalled and guard.allows():
        try:
            note = await guard.note(_NAME)
        except BackendError as error:
            log.warning("%s: what was left of its write_budget is not known: %s", guard.name, error)
        else:
            budget.recall(note, time.time())


async def note_budget(guard: Guard, *, idle: bool) -> None:
    """Have the backend keep what is left, if much was written since it did; or something, where nothing follows."""
    budget = guard.budget
    if budget is not None and budget.is_recalled and budget.is_to_be_noted(idle=idle):
        written = budget.written
        try:
            await guard.keep_note(_NAME, budget.note(time.time()))
        except BackendError as error:
            log.warning("%s: what is left of its write_budget is not kept: %s", guard.name, error)
        budget.noted = written  # not where this was cancelled: who closes notes it again
