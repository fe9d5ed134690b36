"""Renders sections as one HTML file that needs nothing else: Vega-Lite, styles, data and pictures are inside.

The template escapes all texts. The page's policy (Content-Security-Policy) lets no request out and runs only the two scripts
written here, by their checksums, so that nothing that a folder smuggles in would run.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

import vitoats
from vitoats.common.json_files import to_json
from vitoats.report.page.document import Chart, Section

TEMPLATES = Path(__file__).parent / "templates"


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML text: the same sections give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [_script(charting_library()), _script((TEMPLATES / "report.js").read_text(encoding="utf-8"))]
    return environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        spec=lambda chart: Markup(spec_json(chart)),
        scripts=[Markup(script) for script in scripts],
        hashes=[_sha256(script) for script in scripts],
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        version=vitoats.__version__,
    )


def spec_json(chart: Chart) -> str:
    """A chart's specification as JSON that cannot end the element it stands in."""
    text = to_json({"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "height": chart.height, **chart.spec})
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def charting_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from the package vl-convert-python."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _script(text: str) -> str:
    """A script as it may stand in HTML, whose parser would end it at these strings."""
    return text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _sha256(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
