"""A page of HTML that needs nothing but itself, readable by day, by night, without scripts and aloud."""

from __future__ import annotations

import colorsys
import html
import io
import re
import warnings
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

# Of 64 rows more, a reader is asked whether to see them.
_LONG = 64

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#59636e;--line:#d8dee4;--band:#f6f8fa;
--good:#1a7f37;--bad:#b35900;%(light)s}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#14181d;--soft:#9aa4af;--line:#3a424b;--band:#1d232a;
--good:#56d364;--bad:#f0a35e;%(dark)s}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.8rem 0}
a{color:inherit}
.verdict{border-left:.35rem solid var(--soft);background:var(--band);padding:.7rem 1rem;margin:1rem 0;font-size:1.08rem}
.good{border-color:var(--good)}.bad{border-color:var(--bad)}
.note,figcaption,caption{color:var(--soft);font-size:.92rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;margin:.6rem 0}
caption{text-align:left;padding:.2rem 0}
th,td{padding:.25rem .8rem .25rem 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
th{font-weight:600}
figure{margin:1rem 0}
figure svg{max-width:100%%;height:auto;display:block}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{fill:var(--ink)}
pre{overflow-x:auto;background:var(--band);padding:.8rem;font-size:.85rem}
summary{cursor:pointer}
"""


class Page:
    """Collects parts and makes them HTML. Whatever it is given is text, and escaped.

    Args:
        title: of the page.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._lead: list[str] = []
        self._sections: list[tuple[str, list[str]]] = []
        self._colours: set[str] = set()
        self._figures = 0

    def section(self, title: str) -> None:
        """Begin a section; it is left out if nothing is added to it."""
        self._sections.append((title, []))

    def verdict(self, text: str, good: bool | None) -> None:
        """What it all came to."""
        kind = {True: " good", False: " bad", None: ""}[good]
        self._add(f'<p class="verdict{kind}">{escape(text)}</p>')

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add(f'<p class="note">{escape(text)}</p>')

    def table(self, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], fold: bool = False) -> None:
        """A table whose first column names its rows.

        Args:
            caption: what it shows.
            header: of the columns; empty for none.
            rows: of cells, as many as the header has.
            fold: whether it is shown only when asked for, as it also is if it is long.
        """
        if not rows:
            return
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
        body = "\n".join(
            f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
            for first, *rest in rows
        )
        table = (
            f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
            + (f"<thead><tr>{head}</tr></thead>" if head else "")
            + f"<tbody>\n{body}\n</tbody></table></div>"
        )
        if fold or len(rows) > _LONG:
            table = f"<details><summary>{escape(caption)} ({len(rows)} rows)</summary>{table}</details>"
        self._add(table)

    def figure(self, figure: Figure, caption: str, alt: str) -> None:
        """A figure, as SVG.

        Args:
            figure: of Matplotlib.
            caption: below it.
            alt: what it shows, for those who do not see it.
        """
        self._figures += 1
        drawn = _svg(figure, f"f{self._figures}-")
        self._colours |= set(re.findall(r"var\(--c-([0-9a-f]{6})\)", drawn))
        drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
        self._add(f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>")

    def code(self, summary: str, text: str) -> None:
        """A file, shown when asked for."""
        self._add(f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>")

    def html(self) -> str:
        """The page."""
        sections = [(title, parts) for title, parts in self._sections if parts]
        links = "".join(f'<li><a href="#s{i}">{escape(title)}</a></li>' for i, (title, _) in enumerate(sections))
        body = "\n".join(
            f'<section id="s{i}"><h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"
            for i, (title, parts) in enumerate(sections)
        )
        colours = sorted(self._colours)
        style = _STYLE % {
            "light": "".join(f"--c-{each}:#{each};" for each in colours),
            "dark": "".join(f"--c-{each}:#{at_night(each)};" for each in colours),
        }
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{style}</style></head>\n<body>\n<header>"
            f"<h1>{escape(self._title)}</h1></header>\n<main>\n" + "\n".join(self._lead) + "\n"
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n{body}\n</main></body></html>\n'
        )

    def _add(self, part: str) -> None:
        (self._sections[-1][1] if self._sections else self._lead).append(part)


def escape(text: object) -> str:
    """Text as HTML shows it: marks escaped, and without what no page may have.

    >>> escape('<b> & "quotes"')
    '&lt;b&gt; &amp; &quot;quotes&quot;'
    """
    whole = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", whole))


def at_night(colour: str) -> str:
    """The same hue with light and dark exchanged, `rrggbb`.

    >>> at_night("ffffff"), at_night("000000"), at_night("1f5a96")
    ('14181d', 'ebebeb', '62a0df')
    """
    if colour == "ffffff":
        return "14181d"  # the page's
    hue, lightness, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)))
    rgb = colorsys.hls_to_rgb(hue, 0.1 + 0.82 * (1.0 - lightness), saturation)
    return "".join(f"{round(255 * part):02x}" for part in rgb)


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an element of a page, where its names are its own and its colours are the page's."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the reader's browser has the letters of all scripts
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style [^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text.replace("xlink:href=", "href="))
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|\shref="#|url\(#)', rf"\g<1>{prefix}", text)
    text = re.sub(r'(<svg [^>]*?height=")([\d.]+)pt(" [^>]*?width=")([\d.]+)pt', _pixels, text, count=1)
    return re.sub(r"\b(fill|stroke): #([0-9a-f]{6})", r"\1: var(--c-\2)", text)


def _pixels(found: re.Match[str]) -> str:
    """Sizes in points as those in pixels, of which there are 4 to 3."""
    before, height, between, width = found.groups()
    return f"{before}{float(height) * 4 / 3:.0f}{between}{float(width) * 4 / 3:.0f}"
