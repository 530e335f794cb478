"""What is told of an error of obstore, and what kind of fault it is.

obstore raises FileNotFoundError for what is not there, a few classes of its own, and GenericError for all else, which
may be a listing that is denied. The whole story is in the text: the URL, which may have a signature in its query, and
the answer, which may name the access key. So an error is told in words of ours, and is not chained to what we raise.
"""

import re

from async_cache.errors import AsyncCacheError

_STATUS = re.compile(r"status code: (\d{3}[A-Za-z ]*)")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>|\(code: (\w{1,64})\)")
_METADATA = re.compile(r"169\.254\.|metadata\.google\.internal")
_WAY = {
    "TimedOut": "no answer in time",
    "kind: Timeout": "no answer in time",
    "kind: Connect": "no connection",
    "error sending request": "the connection broke",
    "request or response body error": "the connection broke",
}
"""What of the text of an error says that it is of the way to the service, the most specific first."""


def told(error: BaseException) -> str:
    """One line about an error, in which there is nothing secret."""
    text = str(error)
    if isinstance(error, AsyncCacheError):
        return text
    if _METADATA.search(text):
        return "there are no credentials in the environment, and the machine's metadata service gives none"
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None or code is not None:
        words = [status[1].strip()] if status is not None else []
        return " ".join(words + ([f"({code[1] or code[2]})"] if code is not None else []))
    return _broken_way(text) or type(error).__name__


def _broken_way(text: str) -> str | None:
    return next((words for mark, words in _WAY.items() if mark in text), None)


def is_of_the_way(error: BaseException) -> bool:
    """Whether the service was not reached, or did not answer."""
    text = str(error)
    return _STATUS.search(text) is None and _broken_way(text) is not None


def is_absent(error: BaseException) -> bool:
    """Whether the service says that there is no such object."""
    return isinstance(error, FileNotFoundError)


def is_denied(error: BaseException) -> bool:
    """Whether the service says that we may not do that."""
    return bool(re.search("status code: 40[13]", str(error)))


def is_of_settings(error: BaseException) -> bool:
    """Whether the service says that there is no such bucket, or none for us, or there is nothing to tell it who we are.

    To wait and try again would not help.
    """
    text = str(error)
    return is_denied(error) or bool(re.search("NoSuchBucket|ContainerNotFound", text) or _METADATA.search(text))


def is_beyond_end(error: BaseException) -> bool:
    """Whether an object ends before the range that was asked for begins."""
    return bool(re.search("status code: 416|InvalidRange|StartTooLarge", str(error)))
