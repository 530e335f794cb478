"""Who writes in a directory: our index files, those of the dead that became ours, and those that others grow.

It blocks: for threads. One lists and looks, while others only read what it has put in place.
"""

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock

from async_cache.l2.filesystem.files import has_status_at_hand, open_file
from async_cache.l2.filesystem.format import Record, is_of_version_1, is_unfinished, parse_index
from async_cache.l2.filesystem.journal import Journal, is_left

logger = logging.getLogger(__name__)

MOST_ADOPTED = 64  # index files that are ours at a time, before they are folded into one
MOST_FOLLOWED = 512
MOST_ASKED = 16  # in a step of the loop: some ten microseconds
_TICK_NS = 50_000_000  # in which several changes of a directory may have the same time
_TRIES = 4  # to list a directory that changes meanwhile
_LONG_SECONDS = 0.01  # of a listing that is not done again at once, but after some times as long
_LONG_FACTOR = 10
_UNSETTLED, _STALE = -1, -2  # instead of the time of the directory when it was listed


class Writers:
    """The index files of an open directory, of which `journal` is the one that we write. Raises OSError."""

    def __init__(self, directory: int, name: str, journal: Journal):
        self._directory, self._name = directory, name
        self._has_status_at_hand = has_status_at_hand(directory)
        self.journal = journal
        self._journals = {journal.name: journal}  # replaced, and never changed: several threads iterate over it
        self._changing = Lock()
        self._listing = Lock()  # a directory has one place to list from
        self._listed_at = _UNSETTLED
        self._listing_seconds = self._list_again_at = 0.0
        self.has_unread = False  # more index files than may be open at a time
        self.has_unopened = False  # some cannot be opened
        self.former_bytes = 0  # of files that a process of an older version stores here
        self._warned: set[tuple[str, str]] = set()
        self._vanished: list[str] = []  # names of which nobody was told
        self._find(adopt=True)

    def all(self) -> list[Journal]:
        """All index files."""
        return list(self._journals.values())

    def ours(self) -> list[Journal]:
        """The index files that we answer for, or are about to."""
        return [journal for journal in self._journals.values() if journal.owned]

    def settled(self) -> list[Journal]:
        """Those of ours that tell nothing that is not known, nor recorded or cleared away elsewhere."""
        return [journal for journal in self.ours() if journal.known and journal.swept]

    @property
    def has_others(self) -> bool:
        """Whether others use the directory, as far as is known."""
        return self.has_unread or self.has_unopened or any(not journal.owned for journal in self._journals.values())

    def has_news(self) -> bool:
        """Whether others may have recorded what was not told, or come or gone, since the last `look`.

        It does not block: where a status may have to come from a disk or a server, or is asked of many, they may.
        """
        followed = [journal for journal in self.all() if not (journal.owned and journal.known)]
        if not self._has_status_at_hand or self.has_unread or self.has_unopened or len(followed) > MOST_ASKED:
            return True
        try:
            if os.fstat(self._directory).st_mtime_ns != self._listed_at:
                return True
            return any(journal.has_news() for journal in followed)
        except OSError:
            return True

    @property
    def are_known(self) -> bool:
        """Whether all index files could be opened and read."""
        return not (self.has_unread or self.has_unopened) and all(journal.is_readable for journal in self.all())

    @property
    def beats(self) -> bool:
        """Whether our index files are to be touched again and again, by `beat`: the file system has no locks."""
        return self.journal.beats

    def beat(self) -> None:
        """Say that we live."""
        for journal in self.ours():
            journal.touch()

    def names(self) -> list[str]:
        """What is in the directory."""
        with self._listing:
            return os.listdir(self._directory)

    def look(self, *, adopt: bool, lists: bool) -> Iterator[tuple[Journal, list[Record]]]:
        """What others have recorded since it was looked for last, in steps; what dead ones left is ours on demand.

        Where a listing takes long, who is new is found out only after some times as long, unless it `lists`.
        When it has ended, `take_vanished` tells those that are there no more.
        """
        followed = [journal for journal in self.all() if not journal.owned]
        if adopt:
            self._adopt()
        if adopt or self._has_changed(lists=lists):
            self._find()
        for journal in followed:
            if journal.name not in self._journals:
                yield from self._news(journal)  # its last words
        for _ in range(_TRIES):
            for journal in self.all():
                if not (journal.owned and journal.known):
                    yield from self._news(journal)
            if self._listed_at != _STALE:
                break
            self._find()  # over NFS one has gone; if it is there still, it is opened again, and all of it is news
        self._vanished += [each.name for each in followed if not each.owned and each.name not in self._journals]

    def take_vanished(self) -> list[str]:
        """The index files of others that are there no more, and that were not told before.

        None while some are not known, one of which may have taken its place.
        """
        if not self.are_known:
            return []
        vanished, self._vanished = self._vanished, []
        return vanished

    def _news(self, journal: Journal) -> Iterator[tuple[Journal, list[Record]]]:
        try:
            for found in journal.news():
                yield journal, found
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ENOENT):
                self.drop(journal)
                self._listed_at = _STALE
            else:
                self.cannot(journal.name, "read", error)

    def _has_changed(self, *, lists: bool) -> bool:
        """Whether the directory may have other index files than at the last listing, which is not done again at once
        where it takes long, unless it `lists`."""
        if os.fstat(self._directory).st_mtime_ns == self._listed_at:
            return False
        return lists or self._listing_seconds < _LONG_SECONDS or time.monotonic() > self._list_again_at

    def adopt_more(self) -> None:
        """Have index files of dead writers be ours that were not opened before, as there were too many."""
        self._find(adopt=True)

    def _adopt(self) -> None:
        now_ns = self.journal.touch()
        for journal in self.all():
            if not journal.owned:
                try:
                    journal.adopt(self._directory, now_ns)
                except OSError as error:
                    self.cannot(journal.name, "taken over", error)
        with self._changing:
            self._journals = {journal.name: journal for journal in self._journals.values()}  # some have new names

    def _find(self, *, adopt: bool = False) -> None:
        """Open index files that are new here; those of dead writers are ours, if they are to be adopted.

        What is renamed or removed while it is listed may be missed: then it is listed again.
        """
        for _ in range(_TRIES):
            before = {journal.writer for journal in self.all()}
            is_whole = self._open_new(adopt=adopt)
            if is_whole and before <= {journal.writer for journal in self.all()}:
                break

    def _open_new(self, *, adopt: bool) -> bool:
        """List once, and open what is new; False if something that was listed was not there any more."""
        began = time.monotonic()
        changed_ns = os.fstat(self._directory).st_mtime_ns
        # By the clock that gives the times: that of a server may be behind ours.
        now_ns = self.journal.touch() if adopt or not self._has_status_at_hand else time.time_ns()
        is_settled = now_ns - changed_ns > _TICK_NS  # else the next change may have the same time
        self._listed_at = changed_ns if is_settled else _UNSETTLED
        listed = self.names()
        self._measure_former([name for name in listed if is_of_version_1(name)])
        names = self._latest(listed, remove=adopt, now_ns=now_ns)
        is_whole = True
        self.has_unread = self.has_unopened = False
        for name in sorted(names - self._journals.keys()):
            if [journal.owned for journal in self.all()].count(adopt) > (MOST_ADOPTED if adopt else MOST_FOLLOWED):
                self.has_unread = True
                break
            if (parsed := parse_index(name)) is None:
                continue
            try:
                journal = Journal.open(self._directory, name, *parsed)
                if journal is None or (adopt and not journal.adopt(self._directory, now_ns)):
                    is_whole = False
                    continue
            except OSError as error:
                self.cannot(name, "opened", error)
                continue
            if journal.owned:
                journal.measure()  # what was recorded before it was locked
            elif not adopt:
                journal.size_bytes = 0  # all of it is news
            with self._changing:  # several threads may have found it
                self._journals = {journal.name: journal, **self._journals}
        with self._changing:
            self._journals = {name: each for name, each in self._journals.items() if name in names or each.owned}
        self._listing_seconds = time.monotonic() - began
        self._list_again_at = began + _LONG_FACTOR * self._listing_seconds
        return is_whole

    def _measure_former(self, names: list[str]) -> None:
        former_bytes = 0
        for name in names:
            with suppress(OSError):
                former_bytes += os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_blocks * 512
        if former_bytes and not self.former_bytes:
            logger.warning("%s: a process of an older version stores in it, too: it takes room from us", self._name)
        self.former_bytes = former_bytes

    def _latest(self, names: list[str], *, remove: bool, now_ns: int) -> set[str]:
        """The index files that count: the youngest of each writer. Others, and unfinished ones, are rests."""
        youngest: dict[int, tuple[int, str]] = {}
        rests = [name for name in names if is_unfinished(name)]
        for name in names:
            if (parsed := parse_index(name)) is not None:
                writer, generation = parsed
                older = youngest.get(writer)
                if older is None or generation > older[0]:
                    youngest[writer] = generation, name
                    rests += [older[1]] if older is not None else []
                else:
                    rests.append(name)
        for name in rests if remove else ():
            with suppress(OSError):
                file = open_file(self._directory, name)
                if is_left(file.fd, now_ns):
                    os.unlink(name, dir_fd=self._directory)
        return {name for _, name in youngest.values()}

    def cannot(self, name: str, what: str, error: OSError) -> None:
        """Something of an index file is not known: one line, and nobody takes what is not known for not there."""
        self.has_unopened = True
        if (name, what) not in self._warned:
            self._warned.add((name, what))
            logger.warning("%s: the index %s cannot be %s: %s", self._name, name, what, error)

    def add(self, journal: Journal) -> None:
        """One more."""
        with self._changing:
            self._journals = {**self._journals, journal.name: journal}

    def drop(self, journal: Journal) -> None:
        """One less."""
        with self._changing:
            self._journals = {name: each for name, each in self._journals.items() if each is not journal}

    def release(self) -> None:
        """Let go of the files, and of the locks with them: others may answer for what is ours."""
        for journal in self.all():
            journal.close()
        self._journals = {}
        del self.journal
