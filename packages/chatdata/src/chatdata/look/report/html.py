"""What every HTML report is made with: charts, their pictures, and a page that loads nothing. Needs no polars.

Text from the data may be anything. It reaches a page in two ways: through jinja2 with escaping on, and as JSON with
`<`, `>`, `&` and `'` written as \\u003c …. As a second guard, a Content-Security-Policy lets only our scripts run, by
their SHA-256, and lets nothing be fetched, not even an image.

A room has its own page.html, charts.json and page.css, and what is here in base.html, base.json and base.css. Colours
of charts are the page's CSS variables, so a chart follows dark mode without being drawn again. Names are data in them,
never part of an expression.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from chatdata.disk import check_file, write_whole
from chatdata.errors import UsageError
from chatdata.tokenizer.bpe import Tokenizer

MISSING = "a report needs Altair, its JavaScript and Jinja: `uv sync --extra report` installs them"
HERE, START = "chatdata.look.report", b"<!doctype html>"
# control characters other than tab and newline, which a page would drop or obey, shown as their pictures
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if c not in b"\t\n"} | {127: "␡"}


def named(folder: Path) -> Path:
    """A folder by its full path: "." and ".." get a name, a link keeps its own."""
    return Path(os.path.abspath(folder))  # noqa: PTH100


def check_report(out: Path) -> None:
    """Raise UsageError if the extra `report` is not installed, or if no page can be written to `out`: it is a folder,
    in a folder that does not exist, or a file that is not a page."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError:
        raise UsageError(MISSING) from None
    check_file(out, START, "a report")


def chart(
    room: str, kind: str, rows: list[Any], height: int, description: str, coloured: Sequence[str] = ()
) -> dict[str, Any]:
    """A chart of `room`'s charts.json with its rows filled in.

    coloured: values that have the page's colours --c0 … in this order. The page has its own key, because Vega's does
    not fold on a phone.
    """
    spec = json.loads(_file(room, "charts.json"))[kind]
    if coloured:
        colours = [f"var(--c{i})" for i in range(len(coloured))]
        spec["encoding"]["color"]["scale"] = {"domain": list(coloured), "range": colours}
    filled = {"data": {"values": rows}, "height": height, "description": description}
    return json.loads(_file(HERE, "base.json")) | spec | filled


def write_page(out: Path, room: str, charts: Mapping[str, dict[str, Any]], **values: Any) -> int:
    """Write `room`'s page to `out`, complete or not at all; return its bytes.

    charts: Vega-Lite by the id of the element that holds it. Altair checks them, vl-convert draws the picture that the
    page shows until it has drawn the chart, and without JavaScript. values: of the template.
    """
    import altair as alt
    import jinja2
    import vl_convert

    from chatdata.look.console import share

    def load(name: str) -> str:
        return _file(room if name == "page.html" else HERE, name)

    version = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
    charts = {name: alt.Chart.from_dict(spec).to_dict() for name, spec in charts.items()}
    pictures = {name: vl_convert.vegalite_to_svg(c | {"width": 440}, vl_version=version) for name, c in charts.items()}
    settings: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FunctionLoader(load), undefined=jinja2.StrictUndefined, **settings)
    environment.filters |= {"count": lambda n: f"{n:,}", "share": share}
    # Vega, Vega-Lite and Vega-Embed as vl-convert ships them (0.9 MB), in the version that Altair writes for
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    scripts = [_inline(vega), _inline(_file(HERE, "base.js") + _file(room, "page.js"))]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment.globals |= {"charts": charts, "pictures": pictures, "scripts": scripts}
    page = environment.get_template("page.html").render(
        style=_file(HERE, "base.css") + _file(room, "page.css"),
        hashes=" ".join(f"'sha256-{digest}'" for digest in digests),
        **values,
    )
    write_whole(out, page.encode("utf-8"))
    return len(page.encode("utf-8"))


def spelled(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as people can read it: blanks and control characters as pictures, bytes that are not text as hex."""
    data = tokenizer.token_bytes.get(token_id)
    if data is None:
        return tokenizer.decode_token(token_id)
    text = data.decode(errors="backslashreplace")
    return text.translate(CONTROLS).translate({ord(" "): "␣", ord("\t"): "␉", ord("\n"): "␤"})


def _file(room: str, name: str) -> str:
    """A file of a room, "" if it has none of this name."""
    file = resources.files(room).joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _inline(script: str) -> str:
    """A script that is safe inside script tags: nothing in it closes them or opens a comment."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n")
