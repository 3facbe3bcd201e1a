"""`chatdata report`: one HTML page on which a person decides whether this is the data they meant.

collect.py      the numbers, exact, from manifest, index, tokens and mask
documents.py    which documents are shown, and their tokens as lines of segments
charts.py       the numbers as Altair charts
page.py         all of it in one file, page.html with page.css and page.js, that asks for nothing when it is opened
"""

from chatdata.report.page import default_out, write_report

__all__ = ["default_out", "write_report"]
