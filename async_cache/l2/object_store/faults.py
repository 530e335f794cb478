"""What is told of an error of obstore, and what kind of fault it is.

obstore raises FileNotFoundError for what is not there, a few classes of its own, and GenericError for all else, with
the whole story in its text: the URL, which may have a signature in its query, and the answer, which may name the
access key. So an error is told in words of ours, and is not chained to what we raise.
"""

import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from async_cache.errors import AsyncCacheError

_STATUS = re.compile(r"status code: (\d{3}[A-Za-z ]*)")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_TOLD = {
    "TimedOut": "no answer in time",
    "kind: Timeout": "no answer in time",
    "kind: Connect": "no connection",
    "error sending request": "the connection broke",
    "request or response body error": "the connection broke",
    "Account must be specified": "no account is given",
}
"""What of the text of an error stands for what it was, the most specific first."""


def told(error: BaseException) -> str:
    """One line about an error, in which there is nothing secret."""
    text = str(error)
    if isinstance(error, AsyncCacheError):
        return text
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return status[1].strip() + (f" ({code[1]})" if code is not None else "")
    for mark, words in _TOLD.items():
        if mark in text:
            return words
    return type(error).__name__


def is_absent(error: BaseException) -> bool:
    """Whether the service says that there is no such object."""
    return isinstance(error, FileNotFoundError)


def is_denied(error: BaseException) -> bool:
    """Whether the service says that we may not do that: to wait and try again would not help."""
    return isinstance(error, PermissionDeniedError | UnauthenticatedError)


def is_no_bucket(error: BaseException) -> bool:
    """Whether the service says that there is no such bucket."""
    return bool(re.search("NoSuchBucket|ContainerNotFound", str(error)))


def is_beyond_end(error: BaseException) -> bool:
    """Whether an object ends before the range that was asked for begins."""
    return bool(re.search("status code: 416|InvalidRange|StartTooLarge", str(error)))
