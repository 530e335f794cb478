"""The arena: a client can read it, and nothing else."""

import ctypes
import fcntl
import mmap
import os
import socket
import subprocess
from contextlib import contextmanager

import pytest
from contract.support import OBJECT_BYTES, PAGE, count_hits, fill, make_layout, make_prompt, pattern, read_back

from async_cache import ObjectGroup, WriterClosedError, connect
from async_cache.protocol import messages
from async_cache.protocol.prompts import pack

from .programs import server
from .support import BIG, MIB, Peer, given_back

PROMPT = make_prompt(4)
HUGE = make_layout(ObjectGroup((9 * MIB + 1,), "uint8"))  # more than is copied in a step
BYTES = b"not yours"
PUNCH_HOLE, KEEP_SIZE, ZERO_RANGE, COLLAPSE = 2, 1, 16, 8
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_WRITE = 1033, 2, 8
MADV_REMOVE = 9

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


def check(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(fd, offset):
    os.pwrite(fd, BYTES, offset)


def write_vector(fd, offset):
    os.pwritev(fd, [BYTES], offset)


def write_at_position(fd, offset):
    os.lseek(fd, offset, os.SEEK_SET)
    os.write(fd, BYTES)


def send_file(fd, offset):
    source = os.memfd_create("source")
    try:
        os.write(source, BYTES)
        os.lseek(fd, offset, os.SEEK_SET)
        os.sendfile(fd, source, 0, len(BYTES))
    finally:
        os.close(source)


def copy_range(fd, offset):
    source = os.memfd_create("source")
    try:
        os.write(source, BYTES)
        os.copy_file_range(source, fd, len(BYTES), 0, offset)
    finally:
        os.close(source)


def splice(fd, offset):
    out, into = os.pipe()
    try:
        os.write(into, BYTES)
        os.splice(out, fd, len(BYTES), None, offset)
    finally:
        os.close(out)
        os.close(into)


def shrink(fd, offset):
    os.ftruncate(fd, PAGE)


def grow(fd, offset):
    os.ftruncate(fd, 4 * os.fstat(fd).st_size)


def allocate_more(fd, offset):
    os.posix_fallocate(fd, 0, 4 * os.fstat(fd).st_size)


def punch_hole(fd, offset):
    check(libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, PAGE))


def zero(fd, offset):
    check(libc.fallocate(fd, ZERO_RANGE, 0, PAGE))


def collapse(fd, offset):
    check(libc.fallocate(fd, COLLAPSE, 0, PAGE))


def map_to_write(fd, offset):
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[offset : offset + len(BYTES)] = BYTES


def map_then_allow_writing(fd, offset):
    size = os.fstat(fd).st_size
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        check(libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE))
        ctypes.memmove(address + offset, BYTES, len(BYTES))
    finally:
        libc.munmap(address, size)


def remove_through_a_map(fd, offset):
    size = os.fstat(fd).st_size
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        check(libc.madvise(address, size, MADV_REMOVE))
    finally:
        libc.munmap(address, size)


def seal_against_its_owner(fd, offset):
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)


ATTACKS = [
    write,
    write_vector,
    write_at_position,
    send_file,
    copy_range,
    splice,
    shrink,
    grow,
    allocate_more,
    punch_hole,
    zero,
    collapse,
    map_to_write,
    map_then_allow_writing,
    remove_through_a_map,
    seal_against_its_owner,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with server(tmp_path_factory.mktemp("arena"), l1="32MiB") as served:
        yield served


@pytest.mark.parametrize("reopened", [False, True], ids=["as received", "opened anew to write"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_nobody_but_the_server_can_change_it(served, attack, reopened):
    async with connect(served.url) as cache:
        await fill(cache, PROMPT)
        prefetch = cache.prefetch(PROMPT)
        async with cache.read(prefetch.request_id) as lease:
            offset = lease[0].offset
            with Peer(served.url) as peer:
                fd = os.open(f"/proc/self/fd/{peer.arena_fd}", os.O_RDWR) if reopened else os.dup(peer.arena_fd)
                try:
                    size = os.fstat(fd).st_size
                    with pytest.raises(OSError, match=r"Errno (1|9|13|16|22|75|95)\b"):
                        attack(fd, offset)
                    assert os.fstat(fd).st_size == size == 32 * MIB
                    assert os.pread(fd, OBJECT_BYTES, offset) == pattern(PROMPT, 0)
                finally:
                    os.close(fd)
            assert [bytes(chunk.views[0]) for chunk in lease] == [pattern(PROMPT, n) for n in range(len(PROMPT))]
            assert all(chunk.views[0].readonly for chunk in lease)
        await fill(cache, make_prompt(4, 9))  # the server can still write
        assert await read_back(cache, make_prompt(4, 9)) == 4
        await cache.delete(make_prompt(4, 9))


async def test_writing_to_a_private_map_changes_only_that(served):
    async with connect(served.url) as cache:
        await fill(cache, PROMPT)
        async with cache.read(cache.prefetch(PROMPT).request_id) as lease:
            offset = lease[0].offset
            with Peer(served.url) as peer, mmap.mmap(peer.arena_fd, 0, mmap.MAP_PRIVATE) as mapped:
                mapped[offset : offset + len(BYTES)] = BYTES
                assert bytes(lease[0].views[0]) == pattern(PROMPT, 0)


def segment_of(kind, path):
    """The descriptors to close, of which the first is passed."""
    if kind == "file":
        return [os.open(path, os.O_RDWR | os.O_CREAT)]
    if kind == "huge pages":
        return [os.memfd_create("segment", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)]
    return list(os.pipe()) if kind == "pipe" else [socket.socket(socket.AF_UNIX).detach()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_segment_is_taken_whatever_size_its_file_system_likes_to_be_read_in(served, tmp_path):
    """As with kernels of other pages, or huge pages for all shared memory: `st_blksize` says 2 MiB here."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,huge=always", "none", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        descriptor = os.open(tmp_path / "segment", os.O_RDWR | os.O_CREAT)
        assert os.fstat(descriptor).st_blksize != mmap.PAGESIZE
        with Peer(served.url, segment=descriptor) as peer:
            assert isinstance(peer.welcome, messages.Welcome)
        os.close(descriptor)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "huge pages"])
def test_a_segment_that_is_no_ordinary_memory_is_refused(served, tmp_path, kind):
    descriptors = segment_of(kind, tmp_path / "segment")
    try:
        with Peer(served.url, segment=descriptors[0]) as peer:
            refused = peer.welcome
            assert (refused.number, refused.code) == (0, "protocol")
            assert peer.arena_fd is None
            with pytest.raises(EOFError):
                peer.answers(1)
    finally:
        for fd in descriptors:
            os.close(fd)


@contextmanager
def segment_of_bytes(size_bytes, seals):
    fd = os.memfd_create("segment", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def reserve(peer, prompt):
    peer.register(prompt.layout)
    store = peer.number()
    peer.send(messages.ReserveStore(store, pack(prompt, 0, trusted=True)))
    _, reserved = peer.answers(2)
    assert reserved.chunks == list(range(len(prompt)))
    return store


def answer_to_commit(peer, store, position, offset):
    peer.send(messages.CommitStore(peer.number(), store, position, offset))
    return peer.answers(1)[0]


SEGMENT_PROMPTS = [make_prompt(2, 50), make_prompt(2, 51, BIG), make_prompt(2, 52, HUGE)]


@pytest.mark.parametrize("prompt", SEGMENT_PROMPTS, ids=["a page", "at once", "in a worker"])
async def test_a_client_whose_segment_lacks_the_bytes_fails_alone(tmp_path, prompt):
    """It commits what lies beyond the end, or in a hole: an error, or zeros, but no signal, and no log that grows."""
    size_bytes = prompt.layout.objects.room_bytes[0]
    with server(tmp_path) as served, segment_of_bytes(2 * size_bytes, F_SEAL_SHRINK) as segment:
        async with connect(served.url) as cache:
            with Peer(served.url, segment=segment) as peer:
                store = reserve(peer, prompt)
                for offset in (2 * size_bytes, size_bytes + PAGE, 2**40, 2**63 - 1):
                    failed = answer_to_commit(peer, store, 0, offset)
                    assert isinstance(failed, messages.Failed) and failed.code == "value"
                os.pwrite(segment, b"x" * PAGE, size_bytes)
                assert isinstance(answer_to_commit(peer, store, 0, size_bytes), messages.Done)
                check(libc.fallocate(segment, PUNCH_HOLE | KEEP_SIZE, 0, 2 * size_bytes))
                os.ftruncate(segment, 8 * size_bytes)
                assert isinstance(answer_to_commit(peer, store, 1, 0), messages.Done)
            prefetch = cache.prefetch(prompt)
            async with cache.read(prefetch.request_id) as lease:
                first, second = lease
                length = prompt.layout.groups[0].size_bytes
                assert bytes(first.views[0]) == (b"x" * PAGE).ljust(length, b"\0")[:length]
                assert bytes(second.views[0]) == bytes(length)
            await cache.flush()
            await given_back(cache)


@pytest.mark.parametrize("when", ["before", "after the first commit"])
async def test_a_segment_that_could_be_cut_short_is_not_mapped(tmp_path, when):
    """Reading beyond the end of what is mapped would be a signal, and the end of the server."""
    prompt = make_prompt(2, 53)
    seals = F_SEAL_SHRINK if when == "after the first commit" else 0
    with (
        server(tmp_path) as served,
        segment_of_bytes(4 * PAGE, seals) as segment,
        Peer(served.url, segment=segment) as peer,
    ):
        store = reserve(peer, prompt)
        if seals:
            assert isinstance(answer_to_commit(peer, store, 0, 0), messages.Done)
            with pytest.raises(PermissionError):
                os.ftruncate(segment, 0)
            assert isinstance(answer_to_commit(peer, store, 1, 3 * PAGE), messages.Done)
        else:
            os.ftruncate(segment, 0)
            refused = answer_to_commit(peer, store, 0, 0)
            assert isinstance(refused, messages.Failed) and refused.code == "value"
        async with connect(served.url) as cache:
            assert await count_hits(cache, prompt) == (2 if seals else 0)


async def test_a_writer_can_not_change_what_it_has_committed(served):
    prompt = make_prompt(1, 60)
    async with connect(served.url) as cache:
        writer = await cache.store(prompt)
        (chunk,) = writer
        view = chunk.views[0]
        view[:] = pattern(prompt, 0)
        chunk.commit()
        assert await read_back(cache, prompt) == 1
        view[:] = bytes(OBJECT_BYTES)
        assert await read_back(cache, prompt) == 1
        del view
        writer.close()
        with pytest.raises(WriterClosedError):
            chunk.views  # noqa: B018
