"""A program under a tracer: it is stopped at each system call that changes the files below a directory.

There it may be killed, or the call cut short, or made to fail, and what it writes is seen. `ptrace` does that where it
is permitted (containers permit it for one's own children), without a file system or a library put in between.
"""

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

# <sys/ptrace.h>, <sys/user.h>, <sys/wait.h>
_TRACEME, _POKEUSER, _CONT, _GETREGS, _SYSCALL, _SETOPTIONS = 0, 6, 7, 12, 24, 0x4200
_TRACE_SYSGOOD, _TRACE_CLONE, _EXIT_KILL = 0x01, 0x08, 0x100000
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ALL_THREADS = 0x40000000
_RAX, _ORIG_RAX = 8 * 10, 8 * 15
_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")

_CALLS = {
    "write": 1, "open": 2, "mmap": 9, "pwrite64": 18, "writev": 20, "sendfile": 40, "fcntl": 72, "flock": 73,
    "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
    "link": 86, "unlink": 87, "symlink": 88, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "sync_file_range": 277, "utimensat": 280, "fallocate": 285, "pwritev": 296,
    "renameat2": 316, "copy_file_range": 326, "pwritev2": 328, "io_uring_setup": 425,
}  # fmt: skip
_NAMES = {number: name for name, number in _CALLS.items()}
_NO_DIRECTORY = None
_PATHS = {  # the arguments that say where: of a rename, the old name first
    "open": [(_NO_DIRECTORY, 0)],
    "openat": [(0, 1)],
    "mkdir": [(_NO_DIRECTORY, 0)],
    "mkdirat": [(0, 1)],
    "rmdir": [(_NO_DIRECTORY, 0)],
    "unlink": [(_NO_DIRECTORY, 0)],
    "unlinkat": [(0, 1)],
    "rename": [(_NO_DIRECTORY, 0), (_NO_DIRECTORY, 1)],
    "renameat": [(0, 1), (2, 3)],
    "renameat2": [(0, 1), (2, 3)],
    "truncate": [(_NO_DIRECTORY, 0)],
    "utimensat": [(0, 1)],
}
_FLAGS = {"open": 1, "openat": 2}  # the argument that they are in
_UNSEEN = ["creat", "link", "linkat", "symlink", "symlinkat", "copy_file_range", "sendfile", "io_uring_setup"]
_LOCKS = (6, 7, 37, 38)  # F_SETLK, F_SETLKW and those of open file descriptions
_SHARED, _WRITABLE = 0x01, 0x02  # of mmap
_HERE = -100  # AT_FDCWD


class _UserRegisters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, thread: int, address: int = 0, data: object = None) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def is_supported() -> bool:
    """Whether this machine's system calls are known here, and it lets a program trace its children."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    with suppress(ChildProcessError):
        run_alone(lambda: _ptrace(_TRACEME, 0))
        return True
    return False


class Killed(Exception):
    """Raised by whoever watches, to end the program before the call that it was told of."""


@dataclass(frozen=True)
class Call:
    """A system call that a thread of the program is about to make, or, with a `result`, has made."""

    process: int
    name: str
    arguments: tuple[int, ...]

    @cached_property
    def paths(self) -> list[str]:
        """The files that the call is about; of a rename, the old name and the new one."""
        if self.name in _PATHS and (self.name != "utimensat" or self.arguments[1]):
            return [self._path_at(directory, name) for directory, name in _PATHS[self.name]]
        return [os.readlink(f"/proc/{self.process}/fd/{self.fd}")]

    @cached_property
    def inode(self) -> int:
        """The file that is open, whatever it is called."""
        return os.stat(f"/proc/{self.process}/fd/{self.fd}").st_ino

    @property
    def fd(self) -> int:
        return self.arguments[0]

    @cached_property
    def data(self) -> bytes:
        """What a call that writes is to write."""
        if self.name in ("write", "pwrite64"):
            return self._memory(self.arguments[1], self.arguments[2])
        table = memoryview(self._memory(self.arguments[1], 16 * self.arguments[2])).cast("Q")
        return b"".join(self._memory(table[i], table[i + 1]) for i in range(0, len(table), 2))

    @cached_property
    def offset(self) -> int:
        """Where a call that writes begins."""
        if self.name in ("pwrite64", "pwritev", "pwritev2"):
            return self.arguments[3]
        lines = Path(f"/proc/{self.process}/fdinfo/{self.fd}").read_text().splitlines()
        said = dict(line.split(":\t", 1) for line in lines[:2])
        if int(said["flags"], 8) & os.O_APPEND:
            return os.stat(f"/proc/{self.process}/fd/{self.fd}").st_size
        return int(said["pos"])

    @property
    def flags(self) -> int:
        """Of a call that opens."""
        return self.arguments[_FLAGS[self.name]]

    @property
    def writes(self) -> bool:
        return "write" in self.name

    def write_some(self, count: int) -> None:
        """Write what the call begins with in its place: so much was done when the program was killed."""
        fd = os.open(f"/proc/{self.process}/fd/{self.fd}", os.O_WRONLY)
        try:
            os.pwrite(fd, self.data[:count], self.offset)
        finally:
            os.close(fd)

    def _path_at(self, directory: int | None, name: int) -> str:
        at = _HERE if directory is None else ctypes.c_int(self.arguments[directory]).value
        base = os.readlink(f"/proc/{self.process}/" + ("cwd" if at == _HERE else f"fd/{at}"))
        return os.path.normpath(os.path.join(base, os.fsdecode(self._string(self.arguments[name]))))

    def _string(self, address: int) -> bytes:
        text = b""
        while b"\0" not in text:
            text += self._memory(address + len(text), 4096 - (address + len(text)) % 4096)
        return text[: text.index(b"\0")]

    def _memory(self, address: int, size: int) -> bytes:
        fd = os.open(f"/proc/{self.process}/mem", os.O_RDONLY)
        try:
            return os.pread(fd, size, address)
        finally:
            os.close(fd)


class Watcher:
    """Is told of each call that changes what is below `root`, or locks it."""

    def enters(self, call: Call) -> int | None:
        """The call is about to be made. Return an errno, and it is not made and fails; raise Killed, and all ends.

        Return minus what the call is to return, and it is not made, but returns that.
        """
        return None

    def leaves(self, call: Call, result: int) -> None:
        """The call was made: what it returned, or minus its errno."""


def run(program: Callable[[], object], root: Path, watcher: Watcher) -> int | None:
    """Run a program in a child of this process, which has one thread; its exit status, or None if it was killed."""
    child = os.fork()
    if not child:
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        _run_and_exit(program)
    try:
        return _follow(child, str(root), watcher)
    except Killed:
        return None
    finally:
        _end(child)


def run_alone(program: Callable[[], object]) -> None:
    """Run a program in a child, and wait for it. Raises ChildProcessError if it fails."""
    child = os.fork()
    if not child:
        _run_and_exit(program)
    _, status = os.waitpid(child, 0)
    if status:
        raise ChildProcessError(f"it ended with {os.waitstatus_to_exitcode(status)}")


def _run_and_exit(program: Callable[[], object]) -> NoReturn:
    try:
        program()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _follow(child: int, root: str, watcher: Watcher) -> int:
    os.waitpid(child, _ALL_THREADS)
    _ptrace(_SETOPTIONS, child, 0, _TRACE_SYSGOOD | _TRACE_CLONE | _EXIT_KILL)
    inside: dict[int, Call | None] = {}  # threads that are in a call; None: one that nobody asked for
    refused: dict[int, int] = {}
    thread, deliver = child, 0
    while True:
        with suppress(ProcessLookupError):
            _ptrace(_SYSCALL, thread, 0, deliver)
        thread, status = os.waitpid(-1, _ALL_THREADS)
        deliver = 0
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread == child:
                assert os.WIFEXITED(status), f"the program died of signal {os.WTERMSIG(status)}"
                return os.WEXITSTATUS(status)
        elif os.WSTOPSIG(status) != _SYSCALL_STOP:
            event = status >> 16
            deliver = 0 if event or os.WSTOPSIG(status) == signal.SIGSTOP else os.WSTOPSIG(status)
        elif thread in inside:
            call = inside.pop(thread)
            if thread in refused:
                _ptrace(_POKEUSER, thread, _RAX, -refused.pop(thread))
            elif call:
                watcher.leaves(call, ctypes.c_longlong(_registers(thread).rax).value)
        else:
            inside[thread] = call = _call_of(child, thread, root)
            error = watcher.enters(call) if call else None
            if error:
                refused[thread] = error
                _ptrace(_POKEUSER, thread, _ORIG_RAX, -1)


def _registers(thread: int) -> _UserRegisters:
    registers = _UserRegisters()
    _ptrace(_GETREGS, thread, 0, ctypes.addressof(registers))
    return registers


def _call_of(process: int, thread: int, root: str) -> Call | None:
    """The call that a thread enters, if it changes what is below `root`."""
    registers = _registers(thread)
    name = _NAMES.get(registers.orig_rax)
    if name is None:
        return None
    arguments = tuple(getattr(registers, each) for each in _ARGUMENTS)
    call = Call(process, name, arguments)
    assert name not in _UNSEEN, f"the tracer does not know what {name} does"
    if name in _FLAGS and not call.flags & (os.O_CREAT | os.O_TRUNC):
        return None
    if name == "fcntl" and arguments[1] not in _LOCKS:
        return None
    if name == "mmap":
        shared = arguments[3] & _SHARED and arguments[2] & _WRITABLE and ctypes.c_int(arguments[4]).value >= 0
        assert not shared or not os.readlink(f"/proc/{process}/fd/{arguments[4]}").startswith(root), "memory is a file"
        return None
    return call if any(f"{path}/".startswith(f"{root}/") for path in call.paths) else None


def _end(child: int) -> None:
    """Kill the program, and wait until all of its threads are gone, and its locks with them."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        while True:
            os.waitpid(-1, _ALL_THREADS)
