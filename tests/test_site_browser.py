"""The site in a browser: on a phone no page is wider than the screen, and no script fails."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390  # px
MEASURE = """<body><pre id="widths"></pre><script>
(async () => {
  const found = {};
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = "width: PHONEpx; height: 800px; border: 0";
    frame.src = page;
    document.body.append(frame);
    await new Promise(done => frame.onload = done);
    await new Promise(done => setTimeout(done, 300));
    found[page] = frame.contentDocument.documentElement.scrollWidth;
    frame.remove();
  }
  document.getElementById("widths").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_no_page_is_wider_than_a_phone(site: Path, tmp_path: Path) -> None:
    site = shutil.copytree(site, tmp_path / "site")
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    pages = [page for page in pages if not page.startswith("assets/")]
    wide = "too-wide.html"
    (site / wide).write_text('<div style="width: 900px">wide</div>')
    measure = MEASURE.replace("PAGES", json.dumps([*pages, wide])).replace("PHONE", str(PHONE))
    (site / "measure.html").write_text(measure)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000"]
    address = f"http://127.0.0.1:{server.server_port}/measure.html"
    done = subprocess.run([str(CHROMIUM), *options, address], capture_output=True, text=True, timeout=300, check=True)
    server.shutdown()
    widths = json.loads(done.stdout.partition('<pre id="widths">')[2].partition("</pre>")[0])
    assert widths.pop(wide) > PHONE  # what is too wide would be seen
    assert len(widths) == len(pages) > 18
    assert {page: width for page, width in widths.items() if width > PHONE} == {}
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves without a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass
