"""Calls between tests and the code they test, in two processes that share nothing but two pipes.

The code under test answers calls of its functions; the tests run in a process that the code never
was in, and see it through functions that make these calls. What crosses is plain data, rebuilt from
JSON on arrival: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset and
range. So no object with an `__eq__` of its own, no frame and no replaced builtin reaches the tests,
and neither they nor the values they expect are anywhere in the memory of the code.

Two kinds cross in another form: an iterator or a dict's view as an iterator over its first items,
a function as a function that calls back. Lists, dicts and sets that a call changed in place are
changed on the caller's side too.
Standard library only: the sandbox server loads this file by its path.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import os
import struct
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any

MAX_MESSAGE_BYTES = 16 << 20
MAX_ITEMS = 100_000
"""Of an iterator, so many items cross."""

_SIMPLE = (str, bool, type(None))
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": iter,
}


class ChannelError(BaseException):
    """The other side is gone or sent what is no message; no test can catch this as an exception."""


class CallChannel:
    """One end: calls the other side's functions, and answers calls while it waits."""

    def __init__(self, reads: int, writes: int, functions: dict[str, Callable[..., Any]]) -> None:
        """Keep the two descriptors.

        Args:
            reads: Where the other side's messages come from.
            writes: Where messages to it go.
            functions: What it may call, by name; functions that cross are added.
        """
        self._reads = reads
        self._writes = writes
        self._functions = functions
        self._number = itertools.count()
        self.broken = False
        """Whether the other side ever broke the protocol."""

    def send(self, kind: str, *content: Any) -> None:
        """Send one message.

        Raises:
            ValueError: If it is too large.
        """
        body = json.dumps([kind, *content]).encode()
        if len(body) > MAX_MESSAGE_BYTES:
            raise ValueError(f"{len(body)} bytes are too many to pass to a test or from it")
        data = struct.pack("!I", len(body)) + body
        try:
            while data:
                data = data[os.write(self._writes, data) :]
        except OSError:
            raise self._broken() from None

    def receive(self) -> list[Any]:
        """The other side's next message.

        Raises:
            ChannelError: If there is none, or no valid one.
        """
        size = struct.unpack("!I", self._read(4))[0]
        if size > MAX_MESSAGE_BYTES:
            raise self._broken()
        try:
            message = json.loads(self._read(size))
            if isinstance(message, list) and message and isinstance(message[0], str):
                return message
        except (ValueError, RecursionError):
            pass
        raise self._broken()

    def _read(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            part = os.read(self._reads, left)
            if not part:
                raise self._broken()
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _broken(self) -> ChannelError:
        self.broken = True
        return ChannelError("the code under test ended")

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of the other side.

        Raises:
            Exception: What it raised, as the nearest builtin exception.
            TypeError: If an argument or the result is no plain data.
            ChannelError: If the other side is gone.
        """
        self.send("call", name, self.encode(args), self.encode(kwargs))
        while True:
            kind, *content = self.receive()
            try:
                if kind == "call":
                    callback, callback_args, callback_kwargs = self._wanted(content)
                elif kind == "value":
                    value, changed = (self.decode(part) for part in content)
                    _change(args, changed)
                    return value
                else:
                    error = _error(content[0], self.decode(content[1]))
            except Exception:
                raise self._broken() from None
            if kind != "call":
                raise error
            self._answer(callback, callback_args, callback_kwargs)

    def _wanted(self, content: list[Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        name, args, kwargs = content
        return name, self.decode(args), self.decode(kwargs)

    def serve(self) -> None:
        """Answer calls until the other side is gone."""
        while True:
            try:
                _, *content = self.receive()
            except ChannelError:
                return
            self._answer(*self._wanted(content))

    def _answer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            value = self._functions[name](*args, **kwargs)
            self.send("value", self.encode(value), self.encode(args))
        except Exception as error:
            names = [base.__name__ for base in type(error).__mro__]
            try:
                self.send("error", names, self.encode(error.args))
            except Exception:
                self.send("error", names, self.encode((str(error)[:1000],)))

    def encode(self, value: Any) -> Any:
        """A value as JSON can hold it.

        Raises:
            TypeError: If it is no plain data.
        """
        if isinstance(value, _SIMPLE):
            return value
        if isinstance(value, int):
            return ["int", f"{int(value):x}"]  # no limit of digits
        if isinstance(value, float):
            return ["float", float(value).hex()]
        if isinstance(value, complex):
            return ["complex", value.real.hex(), value.imag.hex()]
        if isinstance(value, bytes | bytearray):
            return ["bytes", value.hex()]
        if isinstance(value, dict):
            return ["dict", [[self.encode(key), self.encode(item)] for key, item in value.items()]]
        if isinstance(value, range):
            return ["range", value.start, value.stop, value.step]
        for name in ("list", "tuple", "set", "frozenset"):
            if isinstance(value, getattr(builtins, name)):
                return [name, [self.encode(item) for item in value]]
        if isinstance(value, Iterator | KeysView | ValuesView | ItemsView):
            return ["iterator", [self.encode(i) for i in itertools.islice(value, MAX_ITEMS)]]
        if callable(value):
            name = f" {next(self._number)}"  # no name that code can give
            self._functions[name] = value
            return ["function", name]
        raise TypeError(f"a {type(value).__name__} is no plain data, and a test cannot see it")

    def decode(self, coded: Any) -> Any:
        """The value that `encode` was given.

        Raises:
            Exception: If the other side did not make it with `encode`.
        """
        if type(coded) in _SIMPLE:
            return coded
        kind, *content = coded
        if kind == "int":
            return int(content[0], 16)
        if kind == "float":
            return float.fromhex(content[0])
        if kind == "complex":
            return complex(*map(float.fromhex, content))
        if kind == "bytes":
            return bytes.fromhex(content[0])
        if kind == "dict":
            return {self.decode(key): self.decode(value) for key, value in content[0]}
        if kind == "range":
            return range(*content)
        if kind == "function":
            return self.function(str(content[0]))
        return _PLAIN[kind]([self.decode(item) for item in content[0]])

    def function(self, name: str) -> Callable[..., Any]:
        """A function that calls the other side's of this name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.call(name, args, kwargs)

        return call


def _change(args: tuple[Any, ...], changed: tuple[Any, ...]) -> None:
    """Give arguments the content that they have on the other side after a call."""
    for mine, other in zip(args, changed, strict=True):
        if type(mine) is not type(other) or mine == other:
            continue
        if isinstance(mine, list):
            mine[:] = other
        elif isinstance(mine, dict | set):
            mine.clear()
            mine.update(other)


def _error(names: list[str], args: tuple[Any, ...]) -> Exception:
    """An exception of the first of these classes that is builtin."""
    for name in names:
        kind = getattr(builtins, name, None)
        # A StopIteration would end a test's loop before its other assertions.
        if isinstance(kind, type) and issubclass(kind, Exception) and "Stop" not in name:
            try:
                return kind(*args)
            except TypeError:
                break
    return RuntimeError(*args)


def serve(namespace: dict[str, Any], reads: int, writes: int) -> None:
    """The side of the code under test: say which functions it has, then answer calls.

    Args:
        namespace: Its global names.
        reads: Descriptor calls come from.
        writes: Descriptor results go to.
    """
    functions = {name: value for name, value in namespace.items() if callable(value)}
    names = list(functions)
    channel = CallChannel(reads, writes, functions)
    channel.send("ready", names)
    channel.serve()


def examine(tests: list[str], reads: int, writes: int) -> bool:
    """The side of the tests: run them on the functions of the other side.

    Args:
        tests: Python source.
        reads: Descriptor results come from.
        writes: Descriptor calls go to.

    Returns:
        Whether all of it ran to its end, with an other side that kept to the protocol.

    Raises:
        BaseException: What a test raised.
    """
    channel = CallChannel(reads, writes, {})
    kind, names = channel.receive()
    tree = ast.parse("\n".join(tests), "<tests>")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    namespace: dict[str, Any] = {"__name__": "__main__"}
    # The code under test may define `len`; the tests' `len` stays Python's.
    for name in used.intersection(names) - set(dir(builtins)):
        namespace[name] = channel.function(name)
    exec(compile(tree, "<tests>", "exec"), namespace)
    return kind == "ready" and not channel.broken
