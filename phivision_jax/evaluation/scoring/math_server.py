"""A process that compares expressions with math-verify, for ``math_worker``; it imports nothing of this package.

It warms up once and then forks a child that answers requests. The kernel ends a child that computes for too long, even
in the middle of one long operation; the parent then replies in its place and forks another, which is warm at once.

Requests on standard input are a length (4 bytes, little-endian) and JSON, [reference, answer]. Each has a reply on
standard output, one byte: EQUAL, DIFFERENT or LATE; the first byte is READY.
"""

import contextlib
import gc
import json
import logging
import mmap
import os
import signal
import struct
import sys
from typing import Any

READY, EQUAL, DIFFERENT, LATE = b"R", b"E", b"D", b"L"
DECIMALS = 2
"""Decimals up to which numbers are equal."""
_WARM_UP = r"""
\frac{1}{2}  3\sqrt{2}  2^{10}  5!  \pi  1.5  1/2  x+1  (1,2)  [1,2)  (1,2,3)  \{1,2\}  10^{-3}  7\times8  2\cdot3
\sqrt[3]{2}  \frac{\sqrt{3}}{2}  3\frac{1}{2}  x^2+2x+1  (x+1)^2  0.5\pi  |-3|  \log{10}  \sin{30}  2:3  50%  1,000
45^\circ  x=5  -\frac{a}{b}  \frac{x+y}{2}  \infty  (-\infty,3]  \pm2  1,2,3  x\le3  2\sqrt{3}+1  a^{2}b  n-1  12cm
(16)  (3\sqrt{2})  (2^{10})  (\frac{\pi}{2})  ((1,2))  ([1,2])  5!{cm}  \frac  \sqrt  1/2%  (100  2}
\begin{pmatrix}1\\2\end{pmatrix}  (1,\frac{4}{2})  [1,\frac{4}{2})  (\sqrt{2},-1)  \{\frac{1}{2},3\}  (x-1)(x+1)
\sin^2x+\cos^2x  \frac{1}{\sqrt{3}}  \frac{1+\sqrt{5}}{2}  x=\frac{1}{2}  (-\infty,-1)\cup(1,\infty)  y=2x+1
"""
"""Expressions that are compared before the first request, because parsers are slow on forms that are new to them."""


def equal(reference: str, answer: str) -> bool:
    """True for numbers that are equal up to two decimals, and for other expressions that math-verify finds equal."""
    one, other = _parsed(reference), _parsed(answer)
    if one is None or other is None:
        return False
    numbers = [_number(each) for each in (one, other)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    if any(each is not None for each in numbers):
        return False
    from math_verify import verify

    return bool(verify(one, other, float_rounding=DECIMALS, timeout_seconds=None))


def _parsed(text: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units stay: "3cm" is not the number 3, as for lmms-eval.
    cleaning = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    found = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig(normalization_config=cleaning)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _number(expression: Any) -> float | int | None:
    """The value of an expression without variables, rounded; None if it is no real number."""
    import sympy

    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    if expression.is_Integer:
        return int(expression)
    value = expression.evalf()
    return round(float(value), DECIMALS) if value.is_Float or value.is_Integer else None


def _exactly(length: int) -> bytes:
    """The next bytes of standard input, and no more, because the next request may be another child's."""
    data = b""
    while len(data) < length:
        chunk = os.read(0, length - len(data))
        if not chunk:
            os._exit(0)  # the client has ended
        data += chunk
    return data


def _serve(busy: mmap.mmap, seconds: float) -> None:
    while True:
        (length,) = struct.unpack("<I", _exactly(4))
        reference, answer = json.loads(_exactly(length))
        busy[0] = 1
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends a process that does not handle it
        try:
            verdict = EQUAL if equal(reference, answer) else DIFFERENT
        except Exception:  # of parsers on what is no mathematics: of any type
            verdict = DIFFERENT
        signal.setitimer(signal.ITIMER_PROF, 0)
        busy[0] = 0
        os.write(1, verdict)


def main(seconds: float) -> None:
    """Serve requests, each for at most ``seconds`` of computation, until standard input ends."""
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the client, and that ends this process
    for text in _WARM_UP.split():
        for other in (text, "x^{2}+1", "(1,2)"):
            with contextlib.suppress(Exception):
                equal(text, other)
    gc.freeze()  # else a collection in a child takes as long as several comparisons
    busy = mmap.mmap(-1, 1)  # shared with children
    os.write(1, READY)
    while True:
        child = os.fork()
        if not child:
            try:
                _serve(busy, seconds)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        if busy[0]:
            busy[0] = 0
            os.write(1, LATE)


if __name__ == "__main__":
    main(float(sys.argv[1]))
