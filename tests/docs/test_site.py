"""Does the site build, stand alone and look right, on a desk and on a phone, in light and in dark?

Pictures are taken by Chromium where it is installed, and lie in pytest's folder for this run.
"""

import dataclasses
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.image
import pytest

import optimisers as opt

ROOT = Path(__file__).parents[2]

NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(any(find_spec(n) is None for n in NEEDED), reason="MkDocs is not installed"),
]

HOST = "site.test"
"""The name of the site in the browser, whose every request goes through a proxy of the test's own."""

BROWSERS_OWN = re.compile(
    r"(?:http://)?(?:update|content-autofill|optimizationguide-pa)\.googleapis\.com|"
    r"(?:http://)?(?:clients2|accounts)\.google\.com"
)
"""What Chromium asks for by itself, without any page."""

DESK, PHONE = 1280, 390


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built anew; every warning is an error."""
    folder = tmp_path_factory.mktemp("built") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


# -- the files -----------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page loads, and where its anchors are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "link" and {"stylesheet", "icon", "preload", "modulepreload"} & set(given["rel"].split()):
            self.loads.append(given["href"])
        elif tag in {"script", "img", "iframe", "source", "video"} and "src" in given:
            self.loads.append(given["src"])


def pages(site: Path) -> dict[str, Page]:
    return {
        str(file.relative_to(site)): Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")
    }


def test_whatever_a_page_loads_lies_in_the_folder(site: Path) -> None:
    for name, page in pages(site).items():
        for link in page.loads:
            assert not re.match(r"(?:[a-z]+:)?//", link), (name, link)
            file = site / link.lstrip("/") if link.startswith("/") else (site / name).parent / link
            assert link.startswith("data:") or Path(unquote(str(file).partition("?")[0])).exists(), (
                name,
                link,
            )

    styles = "".join(f.read_text(encoding="utf-8") for f in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//", styles) == []


def test_every_formula_is_drawn(site: Path) -> None:
    written = {f: f.read_text(encoding="utf-8") for f in site.rglob("*.html")}
    assert [str(f) for f, text in written.items() if "arithmatex" in text or "\\begin{" in text] == []
    assert sum(text.count("<math") for text in written.values()) > 900


def test_every_public_name_has_an_anchor(site: Path) -> None:
    found = set[str]().union(*(page.anchors for page in pages(site).values()))
    rules = {n for n in opt.__all__ if isinstance(c := getattr(opt, n), type) and issubclass(c, opt.Rule)}
    moved = {n for n in dir(opt) if f"optimisers.{n}" not in found} - {n for n in rules if n.lower() in found}
    inside = {n for n in moved if {f"optimisers.ops.{n}", f"optimisers.schedules.{n}"} & found}

    assert moved - inside - {"ops"} == set()


def test_the_home_page_is_the_readme_with_its_links_and_the_changelog_has_every_fragment(site: Path) -> None:
    home, changes = (
        re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", (site / name).read_text(encoding="utf-8")))
        for name in ("index.html", "changelog.html")
    )
    heads = re.findall(r"^## (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [head for head in heads if head not in home] == []
    assert "None is not zero" in home
    firsts = [
        f.read_text(encoding="utf-8").split("`")[0].split(" ")[:4] for f in ROOT.glob("changelog.d/*.*.md")
    ]
    assert len(firsts) > 50
    assert [words for words in firsts if " ".join(words).split("\n")[0].strip() not in changes] == []


# -- what a browser shows ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Served:
    """The site behind a proxy that knows no other host, and what was asked of it."""

    proxy: str
    elsewhere: list[str]


PROBE = """<!doctype html><title>probe</title><body><script>
const pages = PAGES, found = {};
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function look() {
  const frame = document.createElement("iframe");
  frame.style = "border:0;height:900px;width:WIDTHpx";
  document.body.append(frame);
  for (const page of pages) {
    await new Promise((done) => { frame.onload = done; frame.src = page; });
    await wait(20);
    const root = frame.contentDocument.documentElement;
    found[page] = {
      wide: root.scrollWidth - root.clientWidth,
      text: frame.contentDocument.querySelector("article").innerText.length,
      broken: [...frame.contentDocument.images].filter((i) => i.complete && !i.naturalWidth)
        .map((i) => i.src),
    };
  }
  document.body.innerHTML = "";
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}
look();
</script></body>"""
"""Looks at every page in a frame as wide as a screen, and writes what it saw."""


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[Served]:
    """A server for the browser alone: as a proxy it sees every host that a page asks for."""
    names = sorted(str(f.relative_to(site)) for f in site.rglob("*.html") if f.name != "404.html")
    elsewhere: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if asked.netloc not in {"", HOST}:
                elsewhere.append(self.path)
                self.send_error(502)
                return
            self.path = asked.path
            if asked.path.startswith("/probe"):
                width = asked.path.removeprefix("/probe").partition(".")[0]
                body = PROBE.replace("PAGES", json.dumps(names)).replace("WIDTH", width).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(body)
                return
            super().do_GET()

        def do_CONNECT(self) -> None:
            elsewhere.append(self.path)
            self.send_error(502)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: Handler(*given, directory=str(site))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Served(f"127.0.0.1:{server.server_port}", elsewhere)
    server.shutdown()
    server.server_close()
    thread.join()


def browse(served: Served, page: str, profile: Path, *options: str) -> str:
    """What Chromium prints of a page."""
    assert CHROMIUM is not None
    quiet = ("background-networking", "component-update", "default-apps", "sync", "extensions", "gpu")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--no-first-run",
            "--hide-scrollbars",
            *(f"--disable-{name}" for name in quiet),
            "--disable-features=OptimizationHints,MediaRouter,Translate",
            f"--proxy-server=http://{served.proxy}",
            "--proxy-bypass-list=<-loopback>",
            f"--user-data-dir={profile}",
            *options,
            f"http://{HOST}/{page}",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return done.stdout


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_no_page_is_wider_than_the_screen_or_empty_and_none_asks_the_net(
    width: int, served: Served, tmp_path: Path
) -> None:
    said = browse(served, f"probe{width}.html", tmp_path, "--virtual-time-budget=120000", "--dump-dom")

    found = json.loads(said.partition("FOUND")[2].partition("END")[0])
    assert len(found) > 40
    assert {page: seen for page, seen in found.items() if seen["wide"] > 0} == {}
    assert {page: seen for page, seen in found.items() if seen["text"] < 300} == {}
    assert {page: seen for page, seen in found.items() if seen["broken"]} == {}
    assert [asked for asked in served.elsewhere if not BROWSERS_OWN.match(asked)] == []


@NEEDS_CHROMIUM
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("page", ["index", "quickstart", "reference", "rules/adam", "gallery", "benchmarks"])
def test_a_page_has_its_colours_and_is_not_blank(
    page: str, width: int, dark: bool, served: Served, tmp_path: Path
) -> None:
    file = tmp_path / f"{page.replace('/', '-')}.png"
    options = [f"--window-size={width},1000", "--virtual-time-budget=4000", f"--screenshot={file}"]
    browse(served, f"{page}.html", tmp_path / "profile", *options, *["--force-dark-mode"] * dark)

    seen = matplotlib.image.imread(file)[..., :3]
    light = seen.mean(-1)
    assert (float(sorted(light.ravel())[light.size // 2]) < 0.3) == dark
    assert light[150:].std() > 0.03
