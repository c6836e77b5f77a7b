"""The bars: quiet without a terminal, and with one the stage, the layer and how far."""

from __future__ import annotations

import io

from rich.console import Console

from moefold.progress import LOG, Bars
from moefold.run import Event

PLANNED = Event("planned", totals={"walk": (3, 3), "sum": (1, 1), "stored": (0, 4)})


def drawn(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with Bars(console) as bars:
        bars(PLANNED)
        bars(Event("started", "walk", 7))
        bars(Event("finished", "walk", 7, seconds=1.0))
        bars(Event("started", "sum"))
        LOG.info("layer %d of %d", 5, 9)
        bars.progress.refresh()
        middle = out.getvalue()
        bars(Event("finished", "sum"))
        LOG.info("something else")
    LOG.info("layer %d of %d", 6, 9)  # nobody listens any more
    assert (terminal and "5/9 layer 5" in middle) or middle == ""
    return out.getvalue()


def test_a_terminal_sees_stages_and_layers():
    text = drawn(True)
    assert "1/3 layer 7" in text
    assert "9/9" in text
    assert "stored" not in text


def test_no_terminal_no_bars():
    assert drawn(False) == ""
