"""The command `moefold tune`: measure how the kernels are best cut for a model's layers, on the GPU at hand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from moefold.errors import InputError, MoefoldError
from moefold.progress import one_bar

if TYPE_CHECKING:
    import torch

    from moefold_kernels.bench import Shape
    from moefold_kernels.triton.search import Found

EPILOG = """
    Examples:

        moefold tune out/packed

        moefold tune Qwen/Qwen3-30B-A3B --tokens 1,16,64 --seconds 120

        moefold tune --shape qwen3-30b-a3b --format pair4

        moefold tune --hidden 2048 --inner 768 --experts 128 --top-k 8
    """


def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A checkpoint's directory, or a hub id (config.json only).")
    ] = None,
    shape: Annotated[str | None, typer.Option(metavar="NAME", help="A shape that `moefold bench run` knows.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size.")] = None,
    inner: Annotated[int | None, typer.Option(min=1, help="Intermediate size of one expert.")] = None,
    experts: Annotated[int | None, typer.Option(min=2, help="Routed experts of a layer.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts per token.")] = None,
    tokens: Annotated[str, typer.Option(metavar="COUNTS", help="Tokens of a batch, comma between them.")] = "",
    dense: Annotated[bool, typer.Option("--dense", help="Experts that are not packed.")] = False,
    format: Annotated[
        str, typer.Option(metavar="NAME", help="The pairs' format: exponent, pair4, pair5, pair6 or pair8.")
    ] = "exponent",
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Stop compiling and timing after so long, and say what is left out.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that compile; as cores and memory allow if left out.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write here; the cache that is looked up if left out.")
    ] = None,
) -> None:
    """Measure the fastest plans of the kernels on this GPU and keep them; nothing is ever tried while serving."""
    from moefold.cli import err, out

    with _errors():
        own = {"hidden": hidden, "inner": inner, "experts": experts, "top_k": top_k}
        shapes, counts = _shapes(model, shape, own), _counts(tokens)
        _check_format(format, dense)
        device = _device()
        path = _path(to, device)
        began, wrote, rejected, missing = time.monotonic(), 0, 0, False
        for one in shapes:
            left = float("inf") if seconds is None else began + seconds - time.monotonic()
            found, bandwidth = _run(one, counts, device, dense, format, workers, left, path)
            if found:
                out.print(_table(one, "dense" if dense else format, found, bandwidth))
            wrote += len(found)
            for line in _left_out(one, counts, found):
                missing = True
                err.print(line, highlight=False, markup=False, soft_wrap=True)
            for name, why in {name: why for each in found for name, why in each.rejected.items()}.items():
                rejected += 1
                err.print(f"never chosen: {name}: {why}", highlight=False, markup=False, soft_wrap=True)
        told = f"{wrote} plans written to {path}" if wrote else "nothing was written"
        told += f"; {rejected} candidates cannot be run here, or are wrong" if rejected else ""
        out.print(told, highlight=False, markup=False, soft_wrap=True)
        if missing and not wrote:
            raise MoefoldError(f"{seconds:g} seconds are too few for any plan; give more, or fewer --tokens")


@contextmanager
def _errors() -> Iterator[None]:
    """The kernels' errors as ours, and ours as the command line shows them; what is written stays when interrupted."""
    from moefold.cli import err, errors
    from moefold_kernels.errors import KernelsError, WrongResultError

    with errors():
        try:
            yield
        except WrongResultError as error:
            raise MoefoldError(str(error)) from error
        except KernelsError as error:
            raise InputError(str(error)) from error
        except ImportError as error:
            if error.name != "triton":
                raise
            raise InputError("triton is not installed; `pip install triton` (Linux)") from error
        except KeyboardInterrupt:
            err.print("interrupted; the plans found by then are written")
            raise typer.Exit(130) from None


def _shapes(model: str | None, name: str | None, own: dict[str, int | None]) -> list[Shape]:
    """The layers that are asked for, in one of three ways."""
    from moefold_kernels.bench import SHAPES, Shape, find

    given = {_flag(key): value for key, value in own.items() if value is not None}
    if sum((model is not None, name is not None, bool(given) and model is None)) != 1:
        raise InputError("name one of MODEL, --shape NAME, or --hidden, --inner, --experts and --top-k together")
    if name is not None:
        return [find("shape", name, SHAPES)]
    if model is not None:
        if wrong := given.keys() - {"--top-k"}:
            raise InputError(f"{', '.join(sorted(wrong))}: MODEL says it already; give one of the two")
        return _of_model(model, own["top_k"])
    if missing := [_flag(key) for key, value in own.items() if value is None]:
        raise InputError(f"{', '.join(given)} given without {', '.join(missing)}; a layer needs all four")
    sizes = {key: value for key, value in own.items() if value is not None}
    return [Shape("x".join(map(str, sizes.values())), **sizes)]


def _check_format(format: str, dense: bool) -> None:
    from moefold_kernels.checkpoint import FORMATS

    if format not in FORMATS:
        raise InputError(f"--format {format}: write one of {', '.join(FORMATS)}")
    if dense and format != FORMATS[0]:
        raise InputError(
            f"--format {format} and --dense: experts that are not packed have no format; give one of the two"
        )


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _of_model(name: str, top_k: int | None) -> list[Shape]:
    from moefold.hooks import Registry
    from moefold.sizes import sizes
    from moefold_kernels.bench import Shape

    found = []
    for one in sizes(name, Registry.installed()):
        per_token = top_k or one.top_k
        if per_token is None:
            raise InputError(f"{name}: config.json does not say how many experts a token gets; add --top-k")
        found.append(Shape(name, one.experts, one.hidden, one.inner, per_token))
    return found


def _counts(tokens: str) -> list[int]:
    words = tokens.replace(",", " ").split()
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"--tokens {tokens}: write whole numbers from 1 with commas between them, as in 1,16,256")
    if words:
        return [int(word) for word in words]
    from moefold_kernels.triton.tune import TOKENS

    return list(TOKENS)


def _device() -> torch.device:
    import torch

    from moefold_kernels.bench.kernel import interpreted

    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            "torch finds no CUDA device, and plans are measured on the GPU that will serve; run this there "
            "(`moefold doctor` shows what torch sees)"
        )
    return torch.device("cuda")


def _path(to: Path | None, device: torch.device) -> Path:
    """Where to write; what is there already is read now, so that no broken file is found after an hour."""
    from moefold_kernels.triton import configs
    from moefold_kernels.triton.tune import table_name

    path = to or configs.cache() / table_name(device)
    if to and not to.absolute().parent.is_dir():
        raise InputError(f"--out {to}: there is no such directory; name a file in one that exists")
    if path.is_dir():
        raise InputError(f"--out {path} is a directory; name a file")
    if path.exists():
        configs.read_table(path)
    return path


def _run(
    shape: Shape,
    counts: Sequence[int],
    device: torch.device,
    dense: bool,
    format: str,
    workers: int | None,
    left: float,
    path: Path,
) -> tuple[list[Found], float]:
    """What was found, each written as soon as it is, and the read bandwidth."""
    from moefold.cli import err
    from moefold_kernels.triton import configs
    from moefold_kernels.triton.tune import Tuner, about, entry

    found = []
    tuner = Tuner(shape, device, dense, format, workers, left)
    with one_bar(err) as tuner.progress:
        for one in tuner.run(counts):
            found.append(one)
            try:
                configs.write_table(path, about(device), [entry(one)])
            except OSError as error:
                raise InputError(f"{path} cannot be written ({error.strerror}); name another place by --out") from error
    return found, tuner.read_bandwidth


def _table(shape: Shape, weights: str, found: Sequence[Found], bandwidth: float) -> Table:
    kind = "packed" if weights == "exponent" else weights
    title = f"{shape.name}, {kind}: {shape.experts} experts, {shape.hidden} to {shape.inner}"
    table = Table(title=escape(f"{title}, top {shape.top_k}"), title_justify="left")
    for column in ("tokens", "us", "before", "speed", "bandwidth"):
        table.add_column(column, justify="right")
    table.add_column("plan: gate and up / down", overflow="fold")
    for one in found:
        before = one.seconds_before
        table.add_row(
            str(one.shape.tokens),
            f"{one.seconds * 1e6:.1f}",
            f"{before * 1e6:.1f}" if before else "cannot run",
            f"{before / one.seconds:.2f}x" if before else "-",
            f"{one.read / one.seconds / bandwidth:.0%}",
            escape(str(one.plan)),
        )
    return table


def _left_out(shape: Shape, counts: Sequence[int], found: Sequence[Found]) -> Iterator[str]:
    """What time was too short for."""
    missing = [str(count) for count in dict.fromkeys(counts) if count not in {one.shape.tokens for one in found}]
    if missing:
        yield f"left out, for lack of time: {shape.name} at {', '.join(missing)} tokens"
    for one in found:
        if one.late:
            every = one.tried + one.late
            yield f"not tried, for lack of time: {one.late} of {every} tiles at {one.shape.tokens} tokens"
