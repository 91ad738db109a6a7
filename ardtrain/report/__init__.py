"""Looking at runs, from their folders' files alone: one HTML file, pictures and CSV, a heat map in the terminal.

Starts no engine, needs no display, and imports neither torch nor, before a picture is asked for, matplotlib.
`history.py` reads `ranks.jsonl`; `reading.py` all that a report shows of a run; `page.py` makes the HTML file of
`page.html`, `page.css` and the scripts beside it; `pictures.py` draws with matplotlib; `terminal.py` writes text.
"""
